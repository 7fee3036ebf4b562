"""From a stored model to one whose experts lie in host memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from jax import numpy as jnp

from moejax.errors import UserError
from moejax.inference.expert_weights import Quantizing
from moejax.inference.memory import free_bytes, page_bytes
from moejax.inference.stored import Keep, MappedWeights, keep_all
from moejax.offload.config import OffloadConfig
from moejax.offload.experts import OffloadedExperts
from moejax.offload.host_limit import check_host_memory
from moejax.offload.low import low_bytes
from moejax.offload.mapped_store import MappedStore, quantizing_on_host
from moejax.offload.parts import TakenApart, apart, dense_bytes
from moejax.offload.room import Room, divide, pages_that_fit
from moejax.offload.sending import THREADS
from moejax.offload.store import BANK_NAME, HostStore, Store
from moejax.training.state import Blueprint, load_weights, weight_targets

if TYPE_CHECKING:
    from moejax.inference.source import ModelSource

__all__ = ["OffloadedModel", "device_memory", "make_room"]

_SHARE_OF_FREE = 0.9


class OffloadedModel:
    """A model that is loaded with its experts on the host.

    Args:
        source: the model.
        blueprint: of it on one device, its layers not scanned.
        quantized: the same with experts of 8 bits, and what makes them; None: as they are.

    Attributes:
        parts: the model without its experts.
        top_k: K, the most that any layer chooses.

    Raises:
        UserError: the model has no experts.
    """

    def __init__(
        self,
        source: ModelSource,
        blueprint: Blueprint,
        quantized: tuple[Blueprint, Keep] | None = None,
    ) -> None:
        self._source, self._blueprint = source, blueprint
        used, self._before = (blueprint, keep_all) if quantized is None else quantized
        self.parts: TakenApart = apart(used)
        layers = blueprint.config.layers()
        self.top_k = max(layer.moe.router.top_k for layer in layers if layer.moe is not None)

    def check(self, config: OffloadConfig) -> None:
        """Refuses, before anything is read, what cannot be.

        Raises:
            UserError: fits are of another model; the model's experts cannot be read one by one.
        """
        if config.store == "mapped":
            self._files()
        banks = self.parts.banks.values()
        if config.low and any(bank.quantized for bank in banks):
            raise UserError(
                f"--offload-miss-dtype {config.miss_dtype} with --expert-weights: experts have 8 "
                "bits already; leave one of them out"
            )
        if config.fits is not None:
            most = max(bank.experts for bank in banks)
            config.fits.check(len(banks), most, self._blueprint.config.d_model)

    def load(self, config: OffloadConfig) -> tuple[Any, Any, Store]:
        """Reads the weights: those that stay on the device, selection biases, the experts.

        Args:
            config: where the experts are to be; of those `mapped` nothing is read.

        Raises:
            UserError: they are damaged or of another model, or the host has too little memory.
        """
        self.check(config)
        return self._pinned(config.low) if config.store == "pinned" else self._mapped()

    def _pinned(self, low: bool) -> tuple[Any, Any, HostStore]:
        blueprint, parts = self._blueprint, self.parts
        each = ((b, b.expert_bytes + (low_bytes(b) if low else 0)) for b in parts.banks.values())
        check_host_memory(sum(bank.experts * size for bank, size in each))
        store = HostStore(parts.banks, blueprint.mesh, self._before, self._shared(), low)
        flat = self._source.weights(blueprint, store.keep)
        dtype = jnp.dtype(blueprint.config.compute_dtype)
        return *load_weights(flat, parts.blueprint, dtype), store

    def _mapped(self) -> tuple[Any, Any, MappedStore]:
        blueprint, parts, files = self._blueprint, self.parts, self._files()
        # As it is sent and as it is read, by each thread; 8 bits are made of float32.
        largest = max(bank.expert_bytes for bank in parts.banks.values())
        read = 4 if isinstance(self._before, Quantizing) else 2
        check_host_memory((1 + read) * THREADS * largest)
        dtype = jnp.dtype(blueprint.config.compute_dtype)
        targets = weight_targets(blueprint, dtype)
        files.check(targets)
        before = self._before
        if isinstance(before, Quantizing):
            before = quantizing_on_host(before)
        store = MappedStore(parts.banks, files, targets, blueprint.mesh, before)
        others = [name for name in targets if not BANK_NAME.fullmatch(name)]
        flat = {name: files.read_weight(name, targets[name]) for name in others}
        return *load_weights(flat, parts.blueprint, dtype), store

    def _files(self) -> MappedWeights:
        """The model's files, of which an expert can be read by itself."""
        files, sharing = self._source.files, self._blueprint.config.moe.experts.sharing
        if files is None:
            raise UserError(
                f"--offload-store mapped: {self._source.path} is no folder of safetensors files, "
                "from which experts are read; write one first, as python -m moejax.families does "
                "of a run, or choose --offload-store pinned"
            )
        if sharing.active:
            raise UserError(
                "--offload-store mapped with experts that share parameters "
                f"(sharing kind={sharing.kind!r}): none lies in the files by itself; write them as "
                "independent ones first (python -m moejax.families MODEL OUT), or choose "
                "--offload-store pinned"
            )
        return files

    def _shared(self) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """The parts of experts that share parameters."""
        if not self._blueprint.config.moe.experts.sharing.active:
            return None
        blueprint = self._blueprint
        model: Any = blueprint.merge(blueprint.params, blueprint.biases)
        bank = model.layers[str(next(iter(self.parts.banks)))].moe.bank
        return bank.own, bank.common

    def experts(self, store: Store, room: Room, config: OffloadConfig) -> OffloadedExperts:
        """What runs them.

        Raises:
            UserError: fits are of another model.
        """
        self.check(config)
        return OffloadedExperts(store, self._blueprint.mesh, room, config, self.top_k)


def device_memory(blueprint: Blueprint) -> int:
    """Bytes that the device has free, most of which may be used; of a CPU, half its host's."""
    free = free_bytes(blueprint)
    return 2**62 if math.isinf(free) else int(free * _SHARE_OF_FREE)


def make_room(
    model: OffloadedModel,
    config: OffloadConfig,
    *,
    memory: int,
    page_len: int,
    pages: int | None,
    wanted_pages: int,
) -> tuple[Room, int]:
    """Divides a device's memory.

    Args:
        model: whose experts are offloaded.
        config: may say how much is streamed and guessed.
        memory: bytes.
        page_len: positions of a page.
        pages: of the key-value cache; None: as many as are wanted, or a part of the memory holds.
        wanted_pages: as many as all texts of full length need.

    Returns:
        what the experts get, and how many pages there are.

    Raises:
        UserError: it is too little; it says how much must be allowed.
    """
    dense = dense_bytes(model.parts)
    page = page_bytes(model.parts.blueprint, page_len)
    if pages is None:
        pages = pages_that_fit(memory, dense, page, wanted_pages)
    banks = list(model.parts.banks.values())
    taken = dense + pages * page
    return divide(banks, config, memory=memory, taken=taken, top_k=model.top_k), pages
