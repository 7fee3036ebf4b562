"""Experts in a model's files: each is read when it is asked for, and the host keeps none of them.

What is read often stays in the system's cache of files, as far as the host's memory goes. What an
expert consists of is gathered, transposed and converted as it is read, quantized too.

Each reading makes arrays of its own, which nothing writes to afterwards. So nobody has to know when
a buffer may be written to again: JAX, which may take an array of numpy's as its own instead of
copying it, lets go of them when their transfer is done.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.errors import UserError
from moejax.inference.expert_weights import Quantizing
from moejax.inference.stored import Keep, MappedWeights, keep_all
from moejax.offload.low import LowExpert
from moejax.offload.parts import BankLayout
from moejax.offload.store import BANK_NAME, Expert, host_memory
from sharding.mesh import MeshShape, make_mesh

__all__ = ["MappedStore", "quantizing_on_host"]


class MappedStore:
    """Reads each expert of each layer by itself. Threads may call `expert` at the same time.

    Args:
        banks: what is read, by layer.
        files: the model's, checked.
        targets: anything with `shape` and `dtype` for each weight of the model as it is stored, by
            name.
        mesh: of the one device.
        before: of one expert's weights [1, …] on the host, such as quantizing them.
    """

    threaded = True

    def __init__(
        self,
        banks: Mapping[int, BankLayout],
        files: MappedWeights,
        targets: Mapping[str, Any],
        mesh: Mesh,
        before: Keep = keep_all,
    ) -> None:
        self.banks = dict(banks)
        self._files, self._before = files, before
        kind = host_memory(mesh.devices.flat[0])
        self._host = NamedSharding(mesh, P(), memory_kind=kind)
        self._targets: dict[int, dict[str, Any]] = {layer: {} for layer in self.banks}
        for name, target in targets.items():
            if match := BANK_NAME.fullmatch(name):
                self._targets[int(match[1])][name] = target
        self._stored = {
            layer: sum(files.stored_bytes(name, target) for name, target in own.items())
            // self.banks[layer].experts
            for layer, own in self._targets.items()
        }
        self._lock, self._read_bytes = threading.Lock(), 0

    @property
    def read_bytes(self) -> int:
        """Of files, so far; from the system's cache of them, too."""
        return self._read_bytes

    def expert(self, layer: int, expert: int) -> Expert:
        """One expert's arrays, read into host memory.

        Raises:
            UserError: a scale in the files is not finite.
        """
        parts: dict[str, Any] = {}
        for name, target in self._targets[layer].items():
            index = slice(expert, expert + 1), *(slice(None),) * (len(target.shape) - 1)
            read = self._before(name, self._files.read_part(name, target, index))
            parts |= {BANK_NAME.fullmatch(part)[2]: value for part, value in read.items()}  # type: ignore[index]
        with self._lock:
            self._read_bytes += self._stored[layer]
        bank = self.banks[layer]
        arrays = tuple(
            np.asarray(parts[name])[0].astype(like.dtype, copy=False)
            for name, like in zip(bank.names, bank.shapes, strict=True)
        )
        return jax.block_until_ready(jax.device_put(arrays, self._host))

    def low(self, layer: int, expert: int) -> LowExpert:
        """There are none."""
        raise KeyError(layer, expert)


def quantizing_on_host(keep: Quantizing) -> Quantizing:
    """The same on the host's processor, for one expert at a time.

    Raises:
        UserError: JAX was started without it.
    """
    try:
        devices = jax.local_devices(backend="cpu")
    except RuntimeError:
        raise UserError(
            "--offload-store mapped with --expert-weights: experts are quantized on the host's "
            "processor as they are read, and JAX_PLATFORMS leaves it out; add cpu to it, such as "
            "cuda,cpu, or choose --offload-store pinned"
        ) from None
    return keep.on(make_mesh(MeshShape(), devices[:1]))
