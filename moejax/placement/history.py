"""What looks at the traffic led to: in words, and as a picture at the end.

Shape letters: L layers with experts, E experts, P slots of all devices, G devices along `expert`, D
devices that count (`data` × `expert`).
"""

from __future__ import annotations

import os

import numpy as np

from moejax.placement.controller import LEAST_TOKENS, Rebalance
from moejax.placement.counting import Counts
from moejax.placement.pictures import draw_placement
from moejax.placement.plan_file import write_slots

__all__ = ["History", "in_words", "links"]

_MOST_LOOKS = 2000  # that are kept; then every other one is left out


class History:
    """Remembers of each look what a picture shows.

    Args:
        first_LP: int [L, P], the expert in each slot at the start, −1 for none.
        devices: G.
    """

    def __init__(self, first_LP: np.ndarray, devices: int):
        self._first_LP, self._devices = first_LP, devices
        self._looks: list[tuple[int, np.ndarray]] = []
        self._last: tuple[np.ndarray, Counts] | None = None

    def looked(
        self,
        step: int,
        slots_LP: np.ndarray,
        pairs_LEE: np.ndarray,
        load_LE: np.ndarray,
        counts: Counts,
    ) -> None:
        """Takes up a look.

        Args:
            step: of the program.
            slots_LP: int [L, P], until then.
            pairs_LEE: float32 [L, E, E], what was counted.
            load_LE: float32 [L, E].
            counts: of each device: load [D, L, E] and tokens [D, L]; in host memory.
        """
        if len(self._looks) >= _MOST_LOOKS:
            del self._looks[1::2]
        self._looks.append((step, _device_loads(load_LE, slots_LP, self._devices)))
        self._last = pairs_LEE, counts

    def finish(self, path: str | os.PathLike[str], slots_LP: np.ndarray) -> None:
        """Writes a placement, and draws what led to it; nothing without a look.

        Args:
            path: the picture, a PNG; the placement is beside it, with the ending .npz.
            slots_LP: int [L, P], at last.

        Raises:
            UserError: the disk is full or the place cannot be written.
        """
        if self._last is None:
            return
        (pairs_LEE, counts), devices = self._last, self._devices
        write_slots(os.path.splitext(path)[0] + ".npz", slots_LP, devices)
        layer = int(pairs_LEE.sum((1, 2)).argmax())
        orders = [
            (f"chosen together, layer {layer}: at home", self._first_LP[layer]),
            ("as placed", slots_LP[layer]),
        ]
        draw_placement(
            path,
            pairs_LEE[layer],
            [(title, slots_P.reshape(devices, -1)) for title, slots_P in orders],
            np.stack([loads_G for _, loads_G in self._looks]),
            [step for step, _ in self._looks],
            [
                (f"assignments a token, {name}", links(counts, some_LP, devices))
                for name, some_LP in (("at home", self._first_LP), ("placed", slots_LP))
            ],
        )


def in_words(told: Rebalance, more: str) -> str:
    """A line about a look.

    Args:
        told: what it led to.
        more: what a user can do where too few tokens are counted.
    """
    if told.kind == "waits":
        return f"{told.tokens:.0f} tokens counted, {LEAST_TOKENS:.0f} are needed; {more}"
    return (
        f"{told.moved} experts moved, {told.replicas} copies; not counting copies: pairs apart "
        f"{told.cut[0]:.3f} → {told.cut[1]:.3f}, load {told.load[0]:.2f} → "
        f"{told.load[1]:.2f} times the mean; {told.seconds:.2f} s"
    )


def _shares(slots_LP: np.ndarray, devices: int, experts: int) -> np.ndarray:
    """[L, E, G]: the part of an expert's assignments on each device, copies taken to be even."""
    has_LEG = np.zeros((len(slots_LP), experts, devices))
    for layer, slots_GS in enumerate(slots_LP.reshape(len(slots_LP), devices, -1)):
        for device, slots_S in enumerate(slots_GS):
            has_LEG[layer, slots_S[slots_S >= 0], device] = 1
    return has_LEG / has_LEG.sum(2, keepdims=True)


def _device_loads(load_LE: np.ndarray, slots_LP: np.ndarray, devices: int) -> np.ndarray:
    """[G], mean over layers; 1 is the mean device."""
    shares_LEG = _shares(slots_LP, devices, load_LE.shape[1])
    load_LG = np.einsum("le,leg->lg", load_LE, shares_LEG)
    return (load_LG / np.maximum(load_LG.mean(1, keepdims=True), 1e-30)).mean(0)


def links(counts: Counts, slots_LP: np.ndarray, devices: int) -> np.ndarray:
    """[G, G] assignments from a device to another, a token of the source, mean over layers.

    The mesh's tokens lie over `data` × `expert`; sources with the same place along `expert` are
    added up. A copy on the source itself takes all of its assignments.

    Args:
        counts: of each device: load [D, L, E] and tokens [D, L].
        slots_LP: int [L, P], −1 for an empty slot.
        devices: G.
    """
    load_DLE, tokens_DL = np.asarray(counts.load_LE), np.asarray(counts.tokens_L)
    load_GLE = load_DLE.reshape(-1, devices, *load_DLE.shape[1:]).sum(0)
    tokens_G = tokens_DL.reshape(-1, devices, tokens_DL.shape[1]).sum((0, 2))
    shares_LEG = _shares(slots_LP, devices, load_DLE.shape[2])
    links_GG = np.zeros((devices, devices))
    for source, load_LE in enumerate(load_GLE):
        here_LE1 = shares_LEG[:, :, source, None] > 0
        itself_G = np.arange(devices) == source
        goes_LEG = np.where(here_LE1, itself_G, shares_LEG)
        per_token = load_LE / max(float(tokens_G[source]), 1e-30)
        links_GG[source] = np.einsum("le,leg->g", per_token, goes_LEG)
    return links_GG
