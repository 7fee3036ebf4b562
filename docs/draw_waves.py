"""Draws how rows fill buckets, and a further wave: docs/img/waves.png.

python docs/draw_waves.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from drawing import save
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

PICTURE = Path(__file__).parent / "img" / "waves.png"

INK, GREY, EMPTY, EDGE = "#22303c", "#76838f", "#f1f4f6", "#c3ccd3"
COLOURS = ("#2a6fb0", "#d9822b", "#8a5aa8", "#3d9a6b")

TOKENS, EXPERTS, TOP_K, DEVICES, ROWS = 16, 16, 4, 4, 12
CELL = 0.46


def rows_of_devices() -> list[list[int]]:
    """The tokens that have a row for each device, in order: more of them like the second one."""
    rng = np.random.default_rng(7)
    taste = np.repeat((0.0, 1.1, 0.0, -0.6), EXPERTS // DEVICES)
    noise = rng.gumbel(size=(TOKENS, EXPERTS))
    chosen = np.argsort(-(taste + noise), axis=1)[:, :TOP_K]
    visits = [set(row // (EXPERTS // DEVICES)) for row in chosen]
    return [[t for t in range(TOKENS) if device in visits[t]] for device in range(DEVICES)]


def draw_bucket(ax: Axes, left: float, y: float, tokens: list[int], colour: str) -> None:
    """C places, the first ones filled."""
    for place in range(ROWS):
        x, filled = left + place * CELL, place < len(tokens)
        face = colour if filled else EMPTY
        ax.add_patch(Rectangle((x, y - 0.25), CELL, 0.5, fc=face, ec=EDGE, lw=0.8))
        if filled:
            name = str(tokens[place])
            ax.text(x + CELL / 2, y, name, ha="center", va="center", color="white", fontsize=8.5)


def main() -> None:
    """The script."""
    _, ax = plt.subplots(figsize=(13.2, 3.4), dpi=110)
    waves = (0.0, ROWS * CELL + 0.9)
    for device, tokens in enumerate(rows_of_devices()):
        y = (DEVICES - 1 - device) * 0.72
        ax.text(-0.2, y, f"to device {device}", ha="right", va="center", color=GREY, fontsize=10)
        for wave, left in enumerate(waves):
            there = tokens[wave * ROWS : (wave + 1) * ROWS]
            draw_bucket(ax, left, y, there, COLOURS[device])
    for left, name, text in zip(
        waves,
        ("first wave", "further wave"),
        (
            "always runs, straight-line code",
            "runs if any device needs it, recomputed in the backward",
        ),
    ):
        middle = left + ROWS * CELL / 2
        style = {"ha": "center", "va": "bottom"}
        ax.text(middle, 2.82, name, fontsize=12, weight="bold", color=INK, **style)
        ax.text(middle, 2.55, text, fontsize=8.8, color=GREY, **style)
    told = (
        f"The rows of {TOKENS} tokens of device 0, by number of the token; buckets of {ROWS} rows"
    )
    ax.text(waves[1] - 0.45, -0.62, told, ha="center", fontsize=9, color=GREY)
    ax.set(xlim=(-1.5, waves[1] + ROWS * CELL + 0.1), ylim=(-0.8, 3.15))
    save(ax, PICTURE)


if __name__ == "__main__":
    sys.exit(main())
