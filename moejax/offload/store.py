"""Experts in host memory: filled while a model's weights are read, a layer's matrix at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.errors import UserError
from moejax.inference.stored import Keep, keep_all
from moejax.offload.low import LowExpert, lowered
from moejax.offload.parts import BankLayout
from moejax.shared_bank import expanded

__all__ = ["BANK_NAME", "Expert", "HostStore", "Store", "host_memory"]

Expert = tuple[jax.Array, ...]
"""One expert's arrays, in the order of `BankLayout.names`."""

BANK_NAME = re.compile(r"params/layers\.(\d+)\.moe\.bank\.(\w+)")
"""A weight of experts: the layer's index, and the name in its bank."""

_KINDS = ("pinned_host", "unpinned_host")


def host_memory(device: jax.Device) -> str:
    """The kind of host memory that a device copies from: pinned, if there is any.

    Raises:
        UserError: there is none.
    """
    kinds = {memory.kind for memory in device.addressable_memories()}
    for kind in _KINDS:
        if kind in kinds:
            return kind
    raise UserError(
        f"--offload on {device.device_kind}: it has no host memory, only "
        f"{', '.join(sorted(kinds))}; leave --offload out"
    )


class Store(Protocol):
    """Where the experts of a model are while they are not on the device.

    banks: what is stored, by layer.
    threaded: whether `expert` takes a while, so that threads call it.
    """

    banks: dict[int, BankLayout]
    threaded: bool

    @property
    def read_bytes(self) -> int:
        """Of files, so far."""

    def expert(self, layer: int, expert: int) -> Expert:
        """One expert's arrays, in host memory."""

    def low(self, layer: int, expert: int) -> LowExpert:
        """Its copy in fewer bits, in host memory; KeyError where there are none."""


class HostStore:
    """Each expert of each layer by itself.

    Beside what is stored there is one matrix of one layer's experts on the device while weights
    are read, and of layers whose experts share parameters, one layer's.

    Args:
        banks: what is to be stored, by layer.
        mesh: of the one device.
        before: of the weights as they are read, such as quantizing them.
        shared: parts of layers whose experts share parameters: names of each expert's own parts,
            and of common ones; None: experts are independent.
        low: keep a copy of each in 8 bits, too.
    """

    threaded = False
    read_bytes = 0

    def __init__(
        self,
        banks: Mapping[int, BankLayout],
        mesh: Mesh,
        before: Keep = keep_all,
        shared: tuple[tuple[str, ...], tuple[str, ...]] | None = None,
        low: bool = False,
    ) -> None:
        self.banks = dict(banks)
        self._before, self._shared, self._with_low = before, shared, low
        kind = host_memory(mesh.devices.flat[0])
        self._host = NamedSharding(mesh, P(), memory_kind=kind)
        self._found: dict[tuple[int, str], list[tuple[jax.Array, Any]]] = {}
        self._parts: dict[int, dict[str, jax.Array]] = {}
        self._experts: dict[tuple[int, int], Expert] = {}
        self._low: dict[tuple[int, int], LowExpert] = {}
        self._pick = jax.jit(_pick, static_argnums=2)
        self._expand = jax.jit(expanded)

    def keep(self, name: str, array: Any) -> Mapping[str, Any]:
        """Takes experts' weights, passes others on; for `ModelSource.weights`."""
        rest = {}
        for part, value in self._before(name, array).items():
            match = BANK_NAME.fullmatch(part)
            if match is None:
                rest[part] = value
            else:
                self._take(int(match[1]), match[2], value)
        return rest

    def expert(self, layer: int, expert: int) -> Expert:
        """One expert's arrays, in host memory."""
        return self._experts[layer, expert]

    def low(self, layer: int, expert: int) -> LowExpert:
        """Its copy in 8 bits, in host memory; KeyError where there are none."""
        return self._low[layer, expert]

    def _take(self, layer: int, name: str, value: jax.Array) -> None:
        if self._shared is None:
            self._split(layer, name, value)
            return
        own, common = self._shared
        parts = self._parts.setdefault(layer, {})
        parts[name] = value
        if parts.keys() != {*own, *common}:
            return
        dtype = self.banks[layer].shapes[0].dtype
        cast = {name: part.astype(dtype) for name, part in self._parts.pop(layer).items()}
        made = self._expand({n: cast[n] for n in own}, {n: cast[n] for n in common})
        whole = {
            "w_in": made.w_in_SDNH,
            "w_out": made.w_out_SHD,
            "b_in": made.b_in_SNH,
            "b_out": made.b_out_SD,
        }
        for name, array in whole.items():
            if array is not None:
                self._split(layer, name, array)

    def _split(self, layer: int, name: str, value: jax.Array) -> None:
        """Puts one array of all experts of a layer on the host, an expert at a time."""
        bank = self.banks[layer]
        dtype = bank.shapes[bank.names.index(name)].dtype
        self._found[layer, name] = found = []
        for expert in np.arange(bank.experts, dtype=np.int32):
            whole = self._pick(value, expert, dtype)
            low = lowered(name, whole) if self._with_low else None
            found.append(jax.block_until_ready(jax.device_put((whole, low), self._host)))
        if all((layer, other) in self._found for other in bank.names):
            arrays = [self._found.pop((layer, other)) for other in bank.names]
            for number, parts in enumerate(zip(*arrays, strict=True)):
                self._experts[layer, number] = tuple(whole for whole, _ in parts)
                if self._with_low:
                    self._low[layer, number] = tuple(low for _, low in parts)


def _pick(bank: jax.Array, expert: jax.Array, dtype: Any) -> jax.Array:
    return lax.dynamic_index_in_dim(bank, expert, 0, keepdims=False).astype(dtype)
