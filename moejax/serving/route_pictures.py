"""Pictures of which experts texts use, and which they use together.

Shape letters: L layers with experts, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["draw_pairs", "draw_routes", "lift"]

_MAPS = 16  # layers that one picture of pairs shows


def draw_routes(
    counts_LE: np.ndarray, layers: Sequence[int], path: str, experts_by_layer: Sequence[int]
) -> None:
    """Draws the share of each expert in its layer, as a multiple of an equal share.

    The experts of a layer are numbered as they are; they are not related across layers.

    Args:
        counts_LE: [L, E], uses of each expert.
        layers: [L], the layers' numbers in the model.
        path: .png or .svg.
        experts_by_layer: [L]; what a layer has less than E is left blank.
    """
    from matplotlib.figure import Figure

    num_layers, experts = counts_LE.shape
    numbers_L1 = np.array(experts_by_layer)[:, None]
    shares_LE = counts_LE / np.maximum(counts_LE.sum(axis=1, keepdims=True), 1) * numbers_L1
    shares_LE[np.arange(experts) >= numbers_L1] = np.nan
    figure = Figure((min(4 + experts / 12, 16), min(2 + num_layers / 4, 16)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares_LE, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    shown = range(0, num_layers, max(1, num_layers // 24))
    axes.set_yticks(list(shown), [str(layers[i]) for i in shown])
    figure.colorbar(image, label="uses, 1: as many as the mean expert of the layer")
    figure.savefig(path, dpi=120)


def draw_pairs(
    pairs_LEE: np.ndarray,
    load_LE: np.ndarray,
    tokens: int,
    layers: Sequence[int],
    path: str,
) -> None:
    """Draws expert × expert maps of `lift`, in the order of the arrays; of 16 layers at most.

    Args:
        pairs_LEE: [L, E, E], tokens that chose both experts.
        load_LE: [L, E], tokens that chose an expert.
        tokens: all of them.
        layers: [L], the layers' numbers in the model.
        path: .png or .svg.
    """
    from matplotlib.figure import Figure

    count = min(_MAPS, len(layers))
    shown = np.linspace(0, len(layers) - 1, count).round().astype(int)
    columns = math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    figure = Figure((1 + 3 * columns, 0.6 + 3.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    image: Any = None
    for axes, index in zip(grid.flat, shown):
        values_EE = lift(pairs_LEE[index], load_LE[index], tokens)
        image = axes.imshow(
            np.log2(values_EE), cmap="RdBu_r", vmin=-3, vmax=3, interpolation="nearest"
        )
        axes.set_title(f"layer {layers[index]}", loc="left", fontsize=9)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=grid, extend="both", fraction=0.03)
    bar.set_ticks(range(-3, 4), labels=["⅛", "¼", "½", "1", "2", "4", "8"])
    bar.set_label("tokens that chose both experts, 1: as if chosen independently")
    figure.savefig(path, dpi=120)


def lift(pairs_EE: np.ndarray, load_E: np.ndarray, tokens: float) -> np.ndarray:
    """How often two experts are chosen together, as a multiple of what independence would give.

    Pairs · tokens / (load · load), the lift of Brin et al. 1997 (doi 10.1145/253260.253325), with
    one token added above and below, so that rare experts tell little: 1 says nothing. NaN on the
    diagonal.

    Args:
        pairs_EE: [E, E], tokens that chose both experts.
        load_E: [E], tokens that chose an expert.
        tokens: all of them.
    """
    alone_EE = np.outer(load_E, load_E) / max(tokens, 1)
    values_EE = (np.asarray(pairs_EE, np.float64) + 1) / (alone_EE + 1)
    np.fill_diagonal(values_EE, np.nan)
    return values_EE
