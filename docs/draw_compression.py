"""Draws held-out loss with compressed gradients against exact ones:
docs/img/compression_quality.svg.

python docs/draw_compression.py     after benchmarks/compression_quality.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))
from figures_compression import PICTURE, TITLES

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "compression_quality.json"
GREY = "#76838f"
COLOURS = {
    "exact_again": "#9aa5ae",
    "bf16": "#4b5763",
    "int8": "#1f5a94",
    "int8_feedback": "#5b9bd5",
    "int4": "#3d9a6b",
    "int4_feedback": "#a8d5ba",
    "int4_rotated": "#7d4e9e",
    "int4_rotated_feedback": "#c3a6d6",
    "low_rank": "#a65312",
    "low_rank_at_once": "#d6a27e",
    "top_k": "#d9822b",
    "top_k_at_once": "#f6cf9f",
}


def deltas(rows: list[dict[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps, and percent of loss more than exact gradients with the same seed, their mean.

    Raises:
        SystemExit: exact gradients have no row.
    """
    exact = next((row for row in rows if row["method"] == "exact"), None)
    if exact is None:
        raise SystemExit(f"{RESULT}: has no row of exact gradients to compare with")
    found = {}
    for row in rows:
        if row is not exact:
            percent = 100 * (np.array(row["curve"]) / np.array(exact["curve"]) - 1)
            found[row["method"]] = np.array(row["steps"]), percent.mean(axis=1)
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The losses above, and below what each method adds to the exact one."""
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 7.5), sharex=True, layout="constrained", height_ratios=(1, 1.4)
    )
    for row in rows:
        mean = np.array(row["curve"]).mean(axis=1)
        exact = row["method"] == "exact"
        colour = "black" if exact else COLOURS[row["method"]]
        above.plot(row["steps"], mean, color=colour, lw=1.6 if exact else 1.0)
    for name, (steps, percent) in deltas(rows).items():
        dashed = "--" if name == "exact_again" else "-"
        title = TITLES[name].replace("`", "")
        below.plot(steps, percent, dashed, color=COLOURS[name], lw=1.4, label=title)
    below.axhline(0, color="black", lw=0.8)
    below.set_yscale("symlog", linthresh=1.0)
    below.set_ylabel("more than exact, %")
    below.set_xlabel("step")
    above.set_ylabel("held-out loss, nats a byte")
    figure.legend(loc="outside lower center", fontsize=7, frameon=False, ncols=3)
    for axes in above, below:
        axes.grid(color=GREY, alpha=0.25, lw=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    """The script; returns the exit code."""
    if not RESULT.is_file():
        print(f"{RESULT}: not there; run benchmarks/compression_quality.py")
        return 1
    draw(json.loads(RESULT.read_text())["rows"], ROOT / "docs" / PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
