"""Named arrays on disk through orbax: the only module that knows it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

__all__ = ["ArrayStore", "any_process"]


class ArrayStore:
    """Writes dictionaries of arrays in the background and reads them onto any mesh.

    On several hosts the path is shared and every process makes the same calls.
    """

    def __init__(self) -> None:
        import orbax.checkpoint as ocp

        # Orbax logs a failed save with its traceback; the error is raised by `wait` anyway.
        logging.getLogger("absl").addFilter(_not_from_orbax)
        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())

    def save(self, path: Path, arrays: Mapping[str, jax.Array | np.ndarray]) -> None:
        """Copies the arrays to the host and returns; `path` is there when all is written.

        Args:
            path: a directory that does not exist; its parent does.
            arrays: any sharding. NumPy arrays must stay as they are until `wait` returns.
        """
        import orbax.checkpoint as ocp

        self._checkpointer.save(path, args=ocp.args.PyTreeSave(dict(arrays)))

    def wait(self) -> None:
        """Returns when the save under way is on disk; raises what went wrong in it."""
        self._checkpointer.wait_until_finished()

    def restore(
        self, path: Path, targets: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """Reads the arrays that the targets name; each device reads only its part."""
        import orbax.checkpoint as ocp

        # Every leaf needs its sharding, or orbax takes the one it was saved with.
        wanted = dict(targets)
        arguments: Any = ocp.args.PyTreeRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        return dict(self._checkpointer.restore(path, args=arguments))

    def close(self) -> None:
        """Releases orbax's threads."""
        self._checkpointer.close()


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def any_process(flag: bool) -> bool:
    """Whether the flag is set on some process, so that all of them take the same way."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))
