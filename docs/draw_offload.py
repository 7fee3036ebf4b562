"""Draws hit rates of a partial cache and recall of predictors: docs/img/offload_traces.svg.

python docs/draw_offload.py     after benchmarks/offload_traces.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "offload_traces.json"
PICTURE = ROOT / "docs" / "img" / "offload_traces.svg"
COLOURS = {
    "lru": "#7f7f7f",
    "lfu": "#d9822b",
    "combined": "#1f5a94",
    "linear": "#2a8a57",
    "routers": "#8a4fa3",
    "history": "#4f9bd9",
    "coactivation": "#b5532f",
    "previous": "#c9a227",
    "prompt": "#c46b9c",
    "frequent": "#7f7f7f",
}
_AHEAD = 4  # experts fetched ahead that the picture shows
CURVES = (
    ("LRU", ("lru", "none", 0), "lru", "--"),
    ("LFU with decay", ("lfu", "none", 0), "lfu", "--"),
    ("predicted by combined", ("predicted", "combined", 0), "combined", "--"),
    ("{n} fetched ahead by combined", ("predicted", "combined", _AHEAD), "combined", "-"),
    ("{n} fetched ahead by routers", ("predicted", "routers", _AHEAD), "routers", "-"),
    ("{n} fetched ahead by linear", ("predicted", "linear", _AHEAD), "linear", "-"),
)


def draw(result: dict[str, Any]) -> Any:
    """Hit rate over the share of experts that is held; recall over layers ahead."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.0, 4.6), layout="constrained")
    _hit_rates(left, result["rows"])
    _recalls(right, result["recall"])
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_ylim(0, 100)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _hit_rates(axes: Any, rows: list[dict[str, Any]]) -> None:
    sizes = {row["cache_fraction"]: row["belady"] for row in rows}
    axes.plot(
        [100 * size for size in sizes],
        [100 * best for best in sizes.values()],
        ":",
        color="black",
        marker="s",
        label="Belady: most without fetching ahead",
    )
    for words, case, colour, style in CURVES:
        chosen = [r for r in rows if (r["policy"], r["predictor"], r["prefetch_experts"]) == case]
        if chosen:
            axes.plot(
                [100 * row["cache_fraction"] for row in chosen],
                [100 * row["hit_rate"] for row in chosen],
                style,
                color=COLOURS[colour],
                marker="o",
                # Two lines lie nearly on each other: the wider one stays to be seen.
                linewidth=4.0 if case == CURVES[3][1] else 1.5,
                label=words.format(n=_AHEAD),
            )
    axes.set_xlabel("experts on the device, %")
    axes.set_ylabel("uses whose expert is there, %")


def _recalls(axes: Any, recalls: list[dict[str, Any]]) -> None:
    within = sorted({r["distance"] for r in recalls if r["distance"] is not None})
    places = {distance: index for index, distance in enumerate([*within, None])}
    for name in dict.fromkeys(recall["predictor"] for recall in recalls):
        found = [r for r in recalls if r["predictor"] == name]
        found.sort(key=lambda r: places[r["distance"]])
        for field, style, words in (("at_k", "-", name), ("at_2k", ":", None)):
            # The next token's point stands alone: it is no layer further.
            for alone in (False, True):
                part = [r for r in found if (r["distance"] is None) == alone]
                axes.plot(
                    [places[r["distance"]] for r in part],
                    [100 * r[field] for r in part],
                    style,
                    color=COLOURS[name],
                    marker="o",
                    markersize=4,
                    label=None if alone else words,
                )
    axes.set_xticks(list(places.values()), [*map(str, within), "next token,\nsame layer"])
    axes.set_xlabel("layers ahead")
    axes.set_ylabel("recall at k (dotted: at 2k), %")


def main() -> None:
    """Reads the result and writes the picture."""
    figure = draw(json.loads(RESULT.read_text()))
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
