"""Draws how one token travels through the layer: docs/img/token.png.

python docs/draw_token.py
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

PICTURE = Path(__file__).parent / "img" / "token.png"

INK, GREY, LANE, IDLE = "#22303c", "#76838f", "#f1f4f6", "#ffffff"
TOKEN, SECOND, THIRD = "#2a6fb0", "#d9822b", "#3d9a6b"

DEVICES, SLOTS = 4, 4
CHOSEN = {5: 0.4, 7: 0.3, 12: 0.2, 14: 0.1}  # expert: score
COLOUR = {1: SECOND, 3: THIRD}  # of the devices that the token visits

STAGES = (
    (0.75, "route", "scores of all experts,\nthe 4 best chosen"),
    (2.55, "place, plan", "expert → slot → device:\n2 rows, not 4"),
    (4.5, "wire", "a row: activations,\nslots, scores, in bytes"),
    (6.4, "exchange", "all_to_all in\nfixed buckets"),
    (8.6, "experts", "rows sorted by slot,\none grouped matmul"),
    (10.75, "reduce", "weighted and summed\nin float32: 1 row"),
    (12.35, "exchange", "home, the same\nrows back"),
    (14.0, "sum", "in float32\non the source"),
)


def lane(device: int) -> float:
    """Height of the middle of a device's lane."""
    return (DEVICES - 1 - device) * 1.3 + 0.65


def box(ax: Axes, x: float, y: float, wide: float, high: float, colour: str, **style) -> None:
    """A rounded box around (x, y)."""
    corner = (x - wide / 2, y - high / 2)
    shape = f"round,pad=0,rounding_size={min(wide, high) * 0.22}"
    ax.add_patch(FancyBboxPatch(corner, wide, high, boxstyle=shape, fc=colour, **style))


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """A straight arrow."""
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=13, lw=1.8, color=colour,
            shrinkA=2, shrinkB=2,
        )
    )  # fmt: skip


def draw_lanes(ax: Axes) -> None:
    """The devices, and the experts that live on them."""
    for device in range(DEVICES):
        y = lane(device)
        ax.add_patch(Rectangle((-0.5, y - 0.57), 15.35, 1.14, fc=LANE, ec="none", zorder=-2))
        ax.text(-0.62, y, f"device {device}", ha="right", va="center", color=GREY, fontsize=10)
        for slot in range(SLOTS):
            expert = device * SLOTS + slot
            used = expert in CHOSEN
            colour = COLOUR[device] if used else IDLE
            x = 7.85 + slot * 0.5
            box(ax, x, y, 0.42, 0.52, colour, ec=colour if used else "#c3ccd3", lw=1)
            ax.text(
                x, y, str(expert), ha="center", va="center", fontsize=9,
                color="white" if used else GREY, weight="bold" if used else "normal",
            )  # fmt: skip


def draw_token(ax: Axes) -> None:
    """The token's way, from left to right."""
    home = lane(0)
    box(ax, -0.08, home, 0.5, 0.62, TOKEN, ec="none")
    ax.text(-0.08, home, "x", ha="center", va="center", color="white", style="italic", fontsize=13)
    arrow(ax, (0.22, home), (0.55, home), TOKEN)
    for i, (expert, score) in enumerate(CHOSEN.items()):
        y, colour = home + 0.36 - 0.24 * i, COLOUR[expert // SLOTS]
        ax.add_patch(Rectangle((0.92, y - 0.07), score * 1.6, 0.14, fc=colour, ec="none"))
        ax.text(0.87, y, str(expert), ha="right", va="center", fontsize=8.5, color=INK)
        # Two assignments become one row where they go to the same device.
        row = home + (0.24 if expert // SLOTS == 1 else -0.24)
        ax.plot([1.75, 2.45], [y, row], color=colour, lw=1.3)
    for device, row in ((1, home + 0.24), (3, home - 0.24)):
        colour, y = COLOUR[device], lane(device)
        box(ax, 2.85, row, 0.78, 0.3, colour, ec="none")
        ax.text(2.85, row, f"to {device}", ha="center", va="center", color="white", fontsize=9)
        arrow(ax, (3.28, row), (3.72, row), colour)
        packed(ax, 3.78, row, colour)
        arrow(ax, (5.3, row), (7.5, y), colour)
        arrow(ax, (9.62, y), (10.2, y), colour)
        ax.text(9.9, y + 0.2, "Σ", ha="center", va="center", color=colour, fontsize=11)
        box(ax, 10.65, y, 0.8, 0.3, colour, ec="none")
        ax.text(10.65, y, "1 row", ha="center", va="center", color="white", fontsize=9)
        arrow(ax, (11.1, y), (13.68, row + (-0.06 if device == 1 else 0.06)), colour)
    box(ax, 14.0, home, 0.5, 0.62, TOKEN, ec="none")
    ax.text(14.0, home, "y", ha="center", va="center", color="white", style="italic", fontsize=13)


def packed(ax: Axes, x: float, y: float, colour: str) -> None:
    """A row on the wire: activations, then slots and scores."""
    for wide, shade in ((0.95, 1.0), (0.27, 0.55), (0.27, 0.3)):
        patch = Rectangle((x, y - 0.15), wide, 0.3, fc=colour, alpha=shade, ec="none")
        ax.add_patch(patch)
        x += wide


def main() -> None:
    """The script."""
    _, ax = plt.subplots(figsize=(13.2, 5.4), dpi=110)
    draw_lanes(ax)
    draw_token(ax)
    for x, name, text in STAGES:
        ax.text(x, 5.95, name, ha="center", va="bottom", fontsize=12, weight="bold", color=INK)
        ax.text(x, 5.86, text, ha="center", va="top", fontsize=8.6, color=GREY, linespacing=1.35)
    ax.set(xlim=(-1.75, 15.0), ylim=(-0.1, 6.35))
    save(ax, PICTURE)


if __name__ == "__main__":
    sys.exit(main())
