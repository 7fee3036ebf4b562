"""Sums of one gradient over ranks, exact and compressed, as benchmarks/grad_compression.py times
them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.quantize import api
from sharding.compression.config import GradCompression
from sharding.compression.interface import bytes_sent
from sharding.compression.methods import make_method
from sharding.mesh import DATA
from sharding.traffic import sent_bytes

COLUMNS = 4096
MOMENTUM = 0.9
EXACT = {"psum_bfloat16": jnp.bfloat16, "psum_float32": jnp.float32}
COMPRESSED = {
    "bf16": GradCompression("bf16"),
    "int8": GradCompression("int8"),
    "int8_error_feedback": GradCompression("int8", "error_feedback"),
    "int4": GradCompression("int4"),
    "int4_rotated": GradCompression("int4", rotate=True),
    "low_rank": GradCompression("low_rank"),
    "top_k": GradCompression("top_k"),
}


@dataclass(frozen=True)
class Case:
    """One way to sum.

    name: a key of `EXACT` or `COMPRESSED`.
    backend: of `pallas_kernels.quantize`; None where nothing is rounded in blocks.
    """

    name: str
    backend: str | None = None

    @property
    def label(self) -> str:
        """The name in rows."""
        return f"{self.name}, plain JAX" if self.backend == "reference" else self.name

    @property
    def method(self) -> Any:
        """What `sharding.compression` makes of it."""
        method = make_method(COMPRESSED[self.name], momentum=MOMENTUM)
        if self.backend is not None:
            method = replace(method, blocks=replace(method.blocks, backend=self.backend))
        return method

    def bytes_of(self, numbers: int, ranks: int) -> float:
        """That a rank sends."""
        if self.name in EXACT:
            width = jnp.dtype(EXACT[self.name]).itemsize
            return sent_bytes("all-reduce", ranks, width * numbers)
        shape = numbers // COLUMNS, COLUMNS
        sizes = {DATA: ranks}
        return bytes_sent(self.method.crossings(shape, sizes, None), sizes)

    def bytes_ratio(self, numbers: int, ranks: int) -> float:
        """What a ring of bfloat16 sends, over what this does."""
        return Case("psum_bfloat16").bytes_of(numbers, ranks) / self.bytes_of(numbers, ranks)


def has_blocks(name: str) -> bool:
    """Whether numbers are rounded in blocks."""
    return name in COMPRESSED and COMPRESSED[name].method in ("int8", "int4")


def gradients(numbers: int, mesh: Any, seed: int = 0) -> jax.Array:
    """Random bfloat16 [ranks, numbers / COLUMNS, COLUMNS], another one on each rank."""

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.normal(key[0], (1, numbers // COLUMNS, COLUMNS), jnp.bfloat16)

    split = lambda: jax.random.split(jax.random.key(seed), mesh.size)  # noqa: E731
    keys = jax.jit(split, out_shardings=NamedSharding(mesh, P(DATA)))()
    return jax.jit(
        jax.shard_map(draw, mesh=mesh, in_specs=P(DATA), out_specs=P(DATA), check_vma=False)
    )(keys)


def reductions(case: Case, mesh: Any, times: int) -> tuple[Callable, Callable]:
    """The start of the state, and `times` sums in a row: (gradients, state, seed) → (sums, state).

    Each one begins with a number of the sum before in its gradient, so that none overlaps another;
    all sums are results, so that none is left out.
    """
    exact = case.name in EXACT
    method = None if exact else case.method

    def one(grad: jax.Array, state: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        if method is None:
            return lax.psum(grad.astype(EXACT[case.name]), DATA), state
        return method.reduce(grad, state, (DATA,), None, key=key, step=jnp.int32(0))

    def run(grads: jax.Array, state: Any, seed: jax.Array) -> tuple[list[jax.Array], Any]:
        grad, state = grads[0], jax.tree.map(lambda a: a[0], state)
        key = jax.random.fold_in(jax.random.key(seed), lax.axis_index(DATA))
        totals: list[jax.Array] = []
        for i in range(times):
            if totals:
                # Without the barrier XLA computes parts of a state anew wherever they are used.
                grad, state, totals[-1] = lax.optimization_barrier((grad, state, totals[-1]))
                grad = grad.at[0, 0].set(totals[-1][0, 0].astype(grad.dtype))
            total, state = one(grad, state, jax.random.fold_in(key, i))
            totals.append(total)
        return totals, jax.tree.map(lambda a: a[None], state)

    def start(grads: jax.Array) -> Any:
        if method is None:
            return {}
        state = method.init(grads.shape[1:], jax.random.key(0))
        return jax.tree.map(lambda a: a[None], state)

    sharded = lambda body, ins, outs: jax.jit(  # noqa: E731
        jax.shard_map(body, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
    )
    return sharded(start, P(DATA), P(DATA)), sharded(run, (P(DATA), P(DATA), P()), (P(), P(DATA)))


def codec(
    name: str, numbers: int, ranks: int, backend: str | None
) -> dict[str, tuple[Callable, int]]:
    """What a rank computes for an all-reduce, alone: function and bytes of memory it must move.

    Returns:
        By part: `encode` of bfloat16, and of float32; `add_up_and_encode`; `decode`. A function
        takes what `codec_operands` gives; add_up_and_encode begins with bfloat16.
    """
    form = make_method(COMPRESSED[name]).blocks.format  # type: ignore[attr-defined]
    each = numbers // ranks
    sent, row = ranks * form.row_bytes(each), form.row_bytes(each)

    def encode(x: jax.Array, payload: jax.Array, key: jax.Array) -> jax.Array:
        return api.encode(x, form, key, backend=backend)[0]

    def add_up_and_encode(x: jax.Array, payload: jax.Array, key: jax.Array) -> jax.Array:
        return api.add_up_and_encode(payload, x, jnp.int32(0), form, key, backend=backend)[0]

    def decode(x: jax.Array, payload: jax.Array, key: jax.Array) -> jax.Array:
        return api.decode(payload, form, each, backend=backend)

    return {
        "encode": (encode, 2 * numbers + sent),
        "encode_float32": (encode, 4 * numbers + sent),
        "add_up_and_encode": (add_up_and_encode, 2 * each + (ranks - 1) * row + row),
        "decode": (decode, sent + 4 * numbers),
    }


def codec_operands(
    name: str, wide: bool, numbers: int, ranks: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random numbers [ranks, …], float32 if `wide`; the bytes of others, and a key."""
    form = make_method(COMPRESSED[name]).blocks.format  # type: ignore[attr-defined]
    shape, key = (ranks, numbers // ranks), jax.random.key_data(jax.random.key(1))
    dtype = jnp.float32 if wide else jnp.bfloat16
    x = jax.jit(lambda: jax.random.normal(jax.random.key(2), shape, dtype))()
    payload = jax.jit(lambda x: api.encode(x, form, backend="reference")[0])(x)
    return x, payload, key
