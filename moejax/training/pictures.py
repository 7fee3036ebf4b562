"""The two pictures of a run: its loss beside general compressors, and its experts' load."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moejax.training.files import disk_errors, write_atomically

__all__ = ["draw_expert_load", "draw_loss"]

_CURVE, _HELD_OUT, _LINE = "#1f5fa8", "#c8501e", "#555555"
_TICKS = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20)
_COLOUR_TICKS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
_ANNOTATED = 16  # up to this many experts each cell tells its number


def draw_loss(
    rows: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    zlib_bpb: float | None = None,
    xz_bpb: float | None = None,
) -> None:
    """Draws the loss over the steps, with what zlib and xz reach on the held-out text.

    Args:
        rows: of `metrics.jsonl`. Each has `step`; `bits_per_byte` is the training loss (without
            it in any row, `loss` in nats a token is drawn, and no compressor);
            `heldout_bits_per_byte` is in the rows of steps that were followed by an evaluation.
            None and missing values are left out.
        path: the PNG; replaced in one piece.
        zlib_bpb: bits a byte of zlib.
        xz_bpb: bits a byte of xz.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    in_bits = any(row.get("bits_per_byte") is not None for row in rows)
    step, value = _series(rows, "bits_per_byte" if in_bits else "loss")
    held_step, held = _series(rows, "heldout_bits_per_byte" if in_bits else "heldout_loss")
    lines = {"zlib": zlib_bpb, "xz": xz_bpb} if in_bits else {}
    shown_lines = {name: bits for name, bits in lines.items() if bits is not None}

    figure, axes = _figure(8.0, 4.8)
    smooth = _smooth(value)
    axes.plot(step, value, color=_CURVE, alpha=0.25, linewidth=0.8, label="training, each step")
    axes.plot(step, smooth, color=_CURVE, linewidth=1.8, label="training, smoothed")
    if len(held):
        label = "held-out files" if in_bits else "held-out"
        axes.plot(
            held_step, held, color=_HELD_OUT, marker="o", markersize=4, linewidth=1.2, label=label
        )
    height = _scale(axes, *_limits(value, np.array([*held, *shown_lines.values()])))
    for (name, bits), label_height in zip(
        shown_lines.items(), _apart([height(bits) for bits in shown_lines.values()])
    ):
        axes.axhline(bits, color=_LINE, linestyle="--", linewidth=1.0)
        axes.annotate(
            f"{name} {bits:.2f}",
            xy=(1.0, label_height),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            color=_LINE,
            va="center",
            annotation_clip=False,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (bits per byte)" if in_bits else "loss (nats per token)")
    last = f": {held[-1]:.3f} bits per byte on held-out files" if in_bits and len(held) else ""
    axes.set_title(f"Training loss{last}", loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(value) or len(held):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, loc="best")
    _save(figure, path)


def draw_expert_load(
    history: np.ndarray,
    path: str | os.PathLike[str],
    steps: Sequence[int] | None = None,
    experts_by_layer: Sequence[int] | None = None,
) -> None:
    """Draws layer × expert heat maps at the start, after a quarter, half, and at the end.

    The colour is an expert's tokens over the layer's mean: 1 is balanced. Each map is the mean of
    a few neighbouring entries (a fiftieth of the run), since one step's counts are noisy.

    Args:
        history: [times, layers, experts] tokens of each expert, any real dtype, times ≥ 1.
        path: the PNG; replaced in one piece.
        steps: [times] step of each entry; None counts from 1.
        experts_by_layer: [layers], where some have fewer than others; None: all have as many.

    Raises:
        ValueError: `history` has another rank or is empty.
        UserError: the disk is full or the place cannot be written.
    """
    from matplotlib.colors import TwoSlopeNorm

    history = np.asarray(history, np.float64)
    if history.ndim != 3 or 0 in history.shape:
        raise ValueError(f"history must be [times, layers, experts], got {history.shape}")
    times, layers, experts = history.shape
    labels = np.arange(1, times + 1) if steps is None else np.asarray(steps)
    numbers = np.full(layers, experts) if experts_by_layer is None else np.array(experts_by_layer)
    load = history * numbers[:, None] / np.maximum(history.sum(axis=2, keepdims=True), 1e-12)
    load[:, np.arange(experts) >= numbers[:, None]] = np.nan  # not there, and left blank
    chosen = sorted({0, (times - 1) // 4, (times - 1) // 2, times - 1})
    half = times // 100
    maps = [load[max(t - half, 0) : t + half + 1].mean(axis=0) for t in chosen]

    # Few experts: the maps beside each other; many: two by two, so that a cell stays visible.
    columns = len(maps) if experts <= 32 else min(len(maps), 2)
    grid_rows = -(-len(maps) // columns)
    width = min(max(experts * 0.32, 2.6), 7.0)
    height = min(max(layers * 0.3, 1.6), 6.0)
    figure, grid = _figure(
        columns * width + 1.6, grid_rows * (height + 0.9) + 0.4, grid_rows, columns
    )
    # One scale for all maps; beyond 4 the colour says no more, or late maps would be all white.
    top = float(np.clip(np.nanquantile(np.stack(maps), 0.995), 2.0, 4.0))
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=top)
    image = None
    for index, (axes, t, values) in enumerate(zip(grid.flat, chosen, maps)):
        image = axes.imshow(
            values, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest"
        )
        worst = np.nanmax(values, axis=1).mean()
        axes.set_title(f"step {labels[t]:,} · busiest {worst:.2f}×", loc="left", fontsize=10)
        _ticks(axes.xaxis, experts)
        _ticks(axes.yaxis, layers)
        if index % columns == 0:
            axes.set_ylabel("MoE layer")
        if index >= len(maps) - columns:
            axes.set_xlabel("expert")
        if experts <= _ANNOTATED and layers <= _ANNOTATED:
            _write_numbers(axes, values, top)
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    bar = figure.colorbar(
        image,
        ax=grid,
        extend="max" if np.nanmax(maps) > top else "neither",
        fraction=0.03,
        pad=0.02,
        aspect=10 * max(height * grid_rows / 2, 1),
    )
    bar.set_ticks([tick for tick in _COLOUR_TICKS if tick <= top])
    figure.suptitle(
        "Tokens of each expert ÷ mean of its layer (1 = balanced). "
        "Busiest: the layer's largest, mean over layers.",
        x=0.01,
        ha="left",
        fontsize=10,
        wrap=True,
    )
    _save(figure, path)


def _figure(width: float, height: float, rows: int = 0, columns: int = 0) -> Any:
    """A figure in inches without pyplot, whose global state a training process should not have."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    if rows:
        return figure, figure.subplots(rows, columns, squeeze=False)
    return figure, figure.subplots()


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with disk_errors(path):
        write_atomically(path, buffer.getvalue())


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    array = np.array(pairs, np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _smooth(value: np.ndarray) -> np.ndarray:
    """Mean over a twenty-fifth of the run around each step, over less near both ends."""
    sums = np.concatenate([[0.0], np.cumsum(value)])
    i = np.arange(len(value))
    before = np.minimum(len(value) // 50, i)
    after = np.minimum(before, len(value) - 1 - i)  # symmetric at the start, where it is steep
    return (sums[i + after + 1] - sums[i - before]) / (before + after + 1)


def _limits(value: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """The y range: everything but the spikes of single steps."""
    shown = [*others, *value[:1], *(np.quantile(value, [0.0, 0.99]) if len(value) else [])]
    if not shown:
        return 0.0, 1.0
    low, high = float(min(shown)), float(max(shown))
    return max(low * 0.93, 0.0), max(high * 1.05, 1e-6)


def _scale(axes: Any, low: float, high: float) -> Callable[[float], float]:
    """Sets the y axis: logarithmic for a wide range, so that late progress shows.

    Returns:
        Height of a value as a fraction of the axis.
    """
    ticks = [t for t in _TICKS if low <= t <= high]
    if low > 0 and len(ticks) >= 4:
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.set_ylim(low, high)
        return lambda v: math.log(v / low) / math.log(high / low)
    axes.set_ylim(low, high)
    return lambda v: (v - low) / (high - low)


def _apart(heights: list[float], gap: float = 0.05) -> list[float]:
    """Moves two labels apart until they are `gap` of the axis from each other."""
    if len(heights) == 2 and abs(heights[0] - heights[1]) < gap:
        middle = sum(heights) / 2
        sign = 1.0 if heights[0] >= heights[1] else -1.0
        return [middle + sign * gap / 2, middle - sign * gap / 2]
    return heights


def _ticks(axis: Any, count: int) -> None:
    stride = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256) if count <= 12 * s or s == 256)
    axis.set_ticks(range(0, count, stride))


def _write_numbers(axes: Any, values: np.ndarray, top: float) -> None:
    for (layer, expert), v in np.ndenumerate(values):
        if np.isnan(v):
            continue
        dark = v < 0.3 or v > 1 + 0.65 * (top - 1)
        axes.text(
            expert,
            layer,
            f"{v:.1f}",
            ha="center",
            va="center",
            fontsize=6,
            color="white" if dark else "black",
        )
