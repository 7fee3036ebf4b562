"""A placement of all layers as a file: .npz with `slots` [L, P] and `devices`."""

from __future__ import annotations

import os

import numpy as np

from moejax.errors import UserError
from moejax.placement.archive import read_arrays, read_number, write_arrays

__all__ = ["read_slots", "write_slots"]


def read_slots(path: str | os.PathLike[str]) -> tuple[np.ndarray, int]:
    """Reads what `write_slots` wrote.

    Returns:
        int32 [L, P], the expert in each slot, −1 for an empty one; the number of devices G.

    Raises:
        UserError: the file is none, or does not hold together.
    """
    arrays = read_arrays(path, {"slots": ("iu", 2), "devices": ("iu", 0)}, optional=frozenset())
    slots_LP, devices = arrays["slots"], read_number(arrays["devices"])
    if not slots_LP.size or not 1 <= devices <= slots_LP.shape[1] or slots_LP.shape[1] % devices:
        raise UserError(
            f"{os.fspath(path)}: slots of shape {slots_LP.shape} for {devices} devices: must be "
            "[layers, devices · slots of a device]"
        )
    low, high = int(slots_LP.min()), int(slots_LP.max())
    if low < -1 or high >= 1 << 15:
        raise UserError(
            f"{os.fspath(path)}: slots: holds {low if low < -1 else high}: must be an expert, or "
            "-1 for an empty slot"
        )
    return slots_LP.astype(np.int32), devices


def write_slots(path: str | os.PathLike[str], slots_LP: np.ndarray, devices: int) -> None:
    """Writes a placement.

    Raises:
        UserError: the place cannot be written.
    """
    write_arrays(path, slots=slots_LP.astype(np.int32), devices=np.array(devices))
