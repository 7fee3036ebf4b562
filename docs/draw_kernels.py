"""Draws where a layer's time goes, predicted beside measured: docs/img/expert_kernels.svg.

python docs/draw_kernels.py     after benchmarks/expert_kernels.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "expert_kernels_h100.json"
PICTURE = ROOT / "docs" / "img" / "expert_kernels.svg"

INK, GREY = "#22303c", "#76838f"
# In the order of the layer: routing grey, forward blue, sums green, backward orange.
COLOURS = {
    "router product": "#4b5763",
    "top_k": "#76838f",
    "sorted_places": "#9aa5ae",
    "rest of routing": "#c3ccd3",
    "experts_up": "#1f5a94",
    "experts_down": "#5b9bd5",
    "gather of rows": "#a8d5ba",
    "sum over a token's experts": "#3d9a6b",
    "experts_down_backward": "#a65312",
    "rows_gradient": "#d9822b",
    "w_in_gradient": "#eda95f",
    "w_out_gradient": "#f6cf9f",
    "other": "#7d4e9e",
}
PANELS = (
    (("mixtral_8x7b",), "Mixtral 8x7B"),
    (("qwen3_30b_a3b",), "Qwen3-30B-A3B"),
    (("sonic_fine",), "fine-grained"),
    (("mixtral_b1", "mixtral_b16", "mixtral_b64", "qwen3_b16", "qwen3_b256"), "decode"),
)
PASSES = {"fwd": "forward", "fwdbwd": "forward\n+ backward"}

Row = dict[str, Any]


def bars(ax: Axes, rows: list[Row], title: str) -> set[str]:
    """A pair of bars for each shape and pass; returns the kernels that have a part of one."""
    used: set[str] = set()
    jobs = list(dict.fromkeys((row["shape"], row["pass"]) for row in rows))
    ticks, several = [], len({shape for shape, _ in jobs}) > 1
    for i, job in enumerate(jobs):
        of_job = {r["kernel"]: r for r in rows if (r["shape"], r["pass"]) == job}
        for key, y, alpha in (("predicted_ms", i - 0.19, 0.6), ("ms", i + 0.19, 1.0)):
            left = 0.0
            for kernel, colour in COLOURS.items():
                ms = of_job.get(kernel, {}).get(key)
                if not ms:
                    continue
                ax.barh(y, ms, 0.34, left, color=colour, alpha=alpha, ec="white", lw=0.4)
                left += ms
                used.add(kernel)
            if left:
                word = "predicted" if key == "predicted_ms" else "measured"
                text = f" {left:.3g} {word}"
                ax.text(left, y, text, va="center", fontsize=8, color=INK if alpha == 1 else GREY)
        shape, which = job
        ticks.append(shape if several else PASSES[which])
    ax.set_yticks(range(len(jobs)), ticks, fontsize=9, color=INK)
    ax.invert_yaxis()
    ax.margins(x=0)
    ax.set_xlim(0, ax.get_xlim()[1] * 1.28)  # room for the numbers
    ax.set_xlabel("ms", fontsize=9, color=GREY)
    ax.set_title(title, fontsize=11, weight="bold", color=INK, loc="left")
    ax.tick_params(axis="x", labelsize=8, colors=GREY)
    ax.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    return used


def draw(rows: list[Row]) -> plt.Figure:
    """The picture: a panel for each prefill shape, one for decode."""
    shown = [(title, [r for r in rows if r["shape"] in shapes]) for shapes, title in PANELS]
    shown = [(title, of_panel) for title, of_panel in shown if of_panel]
    figure, axes = plt.subplots(-(-len(shown) // 2), 2, figsize=(12, 6.6), squeeze=False)
    used: set[str] = set()
    for ax, (title, of_panel) in zip(axes.flat, shown):
        used |= bars(ax, of_panel, title)
    for ax in axes.flat[len(shown) :]:
        ax.axis("off")
    legend = [Patch(color=colour, label=k) for k, colour in COLOURS.items() if k in used]
    figure.legend(
        handles=legend, loc="lower center", ncols=5, fontsize=8.5, frameon=False, labelcolor=INK
    )
    figure.tight_layout(rect=(0, 0.02 + 0.03 * -(-len(legend) // 5), 1, 1), h_pad=1.5, w_pad=2)
    return figure


def main() -> None:
    """The script."""
    if not RESULT.is_file():
        raise SystemExit(f"{RESULT} is not there: run benchmarks/expert_kernels.py")
    rows = json.loads(RESULT.read_text())["rows"]
    # Names of elements are hashed with a salt, which would be random.
    with plt.rc_context({"svg.hashsalt": "moejax"}):
        figure = draw(rows)
        PICTURE.parent.mkdir(exist_ok=True)
        figure.savefig(PICTURE, facecolor="white", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    print(PICTURE)


if __name__ == "__main__":
    sys.exit(main())
