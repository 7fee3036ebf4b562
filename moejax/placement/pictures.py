"""What a placement did, drawn: who is chosen with whom, each device's load, what links carry."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np

from moejax.training.files import disk_errors, write_atomically

__all__ = ["draw_placement"]


def draw_placement(
    path: str | os.PathLike[str],
    pairs_EE: np.ndarray,
    orders: Sequence[tuple[str, np.ndarray]],
    load_NG: np.ndarray,
    steps: Sequence[int],
    links: Sequence[tuple[str, np.ndarray]],
) -> None:
    """Draws a layer's pairs in several orders, loads over time, and links before and after.

    Args:
        path: the PNG; replaced in one piece.
        pairs_EE: how often two experts of a layer were chosen together.
        orders: title, and the experts [G, S] of each device, −1 for an empty slot.
        load_NG: shares of the load of each device, times the number of devices.
        steps: at which they were counted, N.
        links: title, and assignments [G, G] from one device to another, a token.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    from matplotlib.figure import Figure

    columns = max(len(orders), len(links) + 1)
    figure = Figure((4.2 * columns, 8.0), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False)
    top = np.sqrt(pairs_EE / max(float(pairs_EE.max()), 1e-30))
    for axes, (title, order_GS) in zip(grid[0], orders):
        held = [row[row >= 0] for row in order_GS]
        order = np.concatenate(held)
        axes.imshow(top[np.ix_(order, order)], cmap="magma", vmin=0, interpolation="nearest")
        for end in np.cumsum([len(row) for row in held])[:-1]:
            axes.axhline(end - 0.5, color="white", linewidth=0.6)
            axes.axvline(end - 0.5, color="white", linewidth=0.6)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("experts, by device")
        axes.set_xticks([])
        axes.set_yticks([])
    loads, *rest = grid[1]
    for device, load_N in enumerate(load_NG.T):
        loads.plot(steps, load_N, marker="o", markersize=3, linewidth=1.2, label=str(device))
    loads.axhline(1.0, color="#555555", linestyle="--", linewidth=1.0)
    loads.set_ylim(0, None)
    loads.xaxis.get_major_locator().set_params(integer=True)
    loads.set_xlabel("step")
    loads.set_ylabel("load of a device, 1: the mean")
    loads.set_title("assignments, mean over layers", loc="left", fontsize=10)
    if load_NG.shape[1] <= 16:
        loads.legend(title="device", fontsize=7, ncols=2)
    most = max((float(_others(link).max()) for _, link in links), default=1.0)
    for axes, (title, link_GG) in zip(rest, links):
        image = axes.imshow(_others(link_GG), cmap="viridis", vmin=0, vmax=most)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("to device")
        axes.set_ylabel("from device")
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes, shrink=0.8)
    for axes in [*grid[0][len(orders) :], *rest[len(links) :]]:
        axes.set_visible(False)
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=110)
        with disk_errors(path):
            write_atomically(path, file.getvalue())


def _others(link_GG: np.ndarray) -> np.ndarray:
    """What stays on its device crosses no link."""
    return np.where(np.eye(len(link_GG), dtype=bool), 0.0, link_GG)
