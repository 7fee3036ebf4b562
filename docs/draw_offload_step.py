"""Draws a layer's turn with experts in host memory: docs/img/offload_step.png.

python docs/draw_offload_step.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from drawing import save
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

PICTURE = Path(__file__).parent / "img" / "offload_step.png"

INK, GREY, LANE = "#22303c", "#76838f", "#f1f4f6"
DEVICE, HOST, LINK = "#2a6fb0", "#8a5aa8", "#d9822b"
LANES = {"device": 2.9, "host": 1.55, "link": 0.2}
HALF = 0.46  # of a box's height

BOXES = (
    # lane, left, right, text, colour
    ("device", 0.0, 2.3, "attend, route\nlayer n", DEVICE),
    ("host", 2.6, 4.6, "what is missing?", HOST),
    ("link", 4.9, 6.9, "what layer n lacks", LINK),
    ("link", 7.0, 10.4, "what is guessed for layer n + 1", LINK),
    ("device", 7.0, 9.1, "experts, finish\nlayer n", DEVICE),
    ("device", 9.2, 11.5, "attend, route\nlayer n + 1", DEVICE),
    ("host", 11.8, 13.8, "what is missing?", HOST),
)
ARROWS = (
    # from lane, x; to lane, x; text, and where it stands
    ("device", 2.3, "host", 2.75, "chosen experts, and a\nguess for the next layer", (2.95, 2.42)),
    ("host", 4.6, "link", 5.0, "", None),
    ("link", 6.9, "device", 7.1, "into slots", (7.12, 1.5)),
    ("device", 11.5, "host", 11.95, "", None),
    ("host", 12.2, "link", 10.45, "wrong guesses are let go", (11.75, 0.62)),
)


def draw(ax: Axes) -> None:
    """Lanes, boxes and arrows, from left to right in time."""
    for name, y in LANES.items():
        ax.add_patch(Rectangle((-0.15, y - 0.56), 14.1, 1.12, fc=LANE, ec="none", zorder=-2))
        ax.text(-0.3, y, name, ha="right", va="center", color=GREY, fontsize=11)
    for lane, left, right, text, colour in BOXES:
        corner = (left, LANES[lane] - HALF)
        shape = "round,pad=0,rounding_size=0.14"
        style = {"boxstyle": shape, "fc": colour, "ec": "none"}
        ax.add_patch(FancyBboxPatch(corner, right - left, 2 * HALF, **style))
        middle = (left + right) / 2
        ax.text(middle, LANES[lane], text, ha="center", va="center", color="white", fontsize=10)
    for start, x, end, to, text, at in ARROWS:
        down = LANES[start] > LANES[end]
        edges = (-HALF, HALF) if down else (HALF, -HALF)
        ends = ((x, LANES[start] + edges[0]), (to, LANES[end] + edges[1]))
        style = {"arrowstyle": "-|>", "mutation_scale": 13, "lw": 1.6, "color": INK}
        ax.add_patch(FancyArrowPatch(*ends, shrinkA=0, shrinkB=0, **style))
        if at is not None:
            ax.text(*at, text, va="center", color=INK, fontsize=9, linespacing=1.3)


def main() -> None:
    """The script."""
    _, ax = plt.subplots(figsize=(13.2, 3.6), dpi=110)
    draw(ax)
    ax.set(xlim=(-1.1, 14.1), ylim=(-0.5, 3.6))
    save(ax, PICTURE)


if __name__ == "__main__":
    sys.exit(main())
