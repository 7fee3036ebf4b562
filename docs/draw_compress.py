"""Draws bits per byte of models with fewer experts against their size: docs/img/compress.svg.

python docs/draw_compress.py     after benchmarks/compress.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))
from figures_compress import PICTURE

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "compress.json"
COLOURS = {"merge": "#1f5a94", "prune": "#d9822b"}
"""Of what has lines; what shares parameters is in the table alone."""
NAMES = {"merge": "merged", "prune": "pruned (REAP)"}
STAGES = {"bits_per_byte": ("--", ""), "finetuned_bits_per_byte": ("-", ", trained")}


def draw(rows: list[dict[str, Any]]) -> Any:
    """Lines by method and stage over the share of the parameters that is left."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    plain = {row["method"]: row for row in rows if row["method"].count(":") < 2}
    for method, colour in COLOURS.items():
        chosen = [r for name, r in plain.items() if name == "none" or name.startswith(method)]
        chosen.sort(key=lambda row: row["size_fraction"])
        for stage, (style, words) in STAGES.items():
            if all(stage in row for row in chosen):
                axes.plot(
                    [100 * row["size_fraction"] for row in chosen],
                    [row[stage] for row in chosen],
                    style,
                    color=colour,
                    marker="o",
                    label=NAMES[method] + words,
                )
    axes.invert_xaxis()
    axes.set_xlabel("parameters left, %")
    axes.set_ylabel("held-out bits per byte")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Reads the result and writes the picture."""
    figure = draw(json.loads(RESULT.read_text())["rows"])
    figure.savefig(ROOT / "docs" / PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
