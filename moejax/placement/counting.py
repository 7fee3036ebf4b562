"""Which experts are chosen together, counted inside jit.

A token's choice is a row of zeros and ones of m_NE, so mᵀ·m holds at [e, f] the tokens that chose
both, and on its diagonal the load. In bfloat16 with float32 sums it is exact up to 2²⁴ tokens.

It costs 2·N·E² FLOPs a layer for N tokens. A training step's layer takes 6·T·A, with T tokens of
the device and A active weights, so the share is at most E²/(3·A), where all tokens are counted:

    Mixtral-8x7B    E = 8,   A = 394 M    5e-8
    Qwen3-30B-A3B   E = 128, A =  57 M    1e-4
    DeepSeek-V3     E = 256, A = 583 M    4e-5

That is times the size of `tensor`, whose devices all count the same. A training step counts
`STEP_TOKENS` at most, so long batches cost less; 2,000 to 8,000 tokens are enough for affinity and
32,000 for load. What it takes besides is memory traffic: m_NE, L·N·E·2 bytes (DeepSeek-V3: 61 MB
for a moment), and the counters, L·E²·4 bytes (58 layers: 15 MB), some 50 µs at 3 TB/s.

Each device counts its own tokens; devices are summed when somebody reads. So a step has no
collective more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int

from moejax.placement.statistics import Statistics
from sharding.collectives import all_gather, psum_statistics
from sharding.mesh import TOKEN_AXES

__all__ = [
    "COUNTERS_SPEC",
    "STEP_TOKENS",
    "Counts",
    "add_step",
    "begin_reading",
    "count",
    "fade",
    "make_counters",
    "read_counters",
    "read_each",
    "sample_stride",
]

STEP_TOKENS = 2048
"""At most so many tokens of a device are counted in a training step."""

COUNTERS_SPEC = P(TOKEN_AXES)
"""Of counters: a leading dimension of `data` × `expert` devices, each with its own."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counts:
    """How often experts were chosen, and chosen together.

    Counters on devices have a dimension of devices before these.

    pairs_LEE: float32 [L, E, E], tokens that chose both; symmetric, 0 on the diagonal.
    load_LE: float32 [L, E], tokens that chose an expert.
    tokens_L: float32 [L], tokens that chose any.
    """

    pairs_LEE: Float32[Array, "*D L E E"]
    load_LE: Float32[Array, "*D L E"]
    tokens_L: Float32[Array, "*D L"]


def count(experts_LNK: Int[Array, "L N K"], num_experts: int) -> Counts:
    """Counts the choices of some tokens, each layer for itself; no gradient.

    Args:
        experts_LNK: int [L, N, K], distinct for a token and layer, −1 for none; a token without
            any counts nowhere. N < 2²⁴.
        num_experts: E.
    """
    # Each of the K columns is compared on its own, so that no [L, N, K, E] is ever made.
    ids_E = jnp.arange(num_experts, dtype=experts_LNK.dtype)
    chosen_LNE = jnp.zeros((*experts_LNK.shape[:2], num_experts), bool)
    for column in range(experts_LNK.shape[-1]):
        chosen_LNE |= experts_LNK[..., column, None] == ids_E
    m_LNE = chosen_LNE.astype(jnp.bfloat16)
    both_LEE = jnp.einsum("lne,lnf->lef", m_LNE, m_LNE, preferred_element_type=jnp.float32)
    itself_EE = jnp.eye(num_experts, dtype=bool)
    return Counts(
        pairs_LEE=jnp.where(itself_EE, 0.0, both_LEE),
        load_LE=jnp.diagonal(both_LEE, axis1=1, axis2=2),
        tokens_L=jnp.sum(jnp.any(experts_LNK >= 0, axis=-1), axis=-1, dtype=jnp.float32),
    )


def sample_stride(tokens: int, most: int) -> int:
    """The static stride with which about `most` of some tokens are taken, evenly spread.

    It shares no divisor with the number of tokens, hence none with the length of the texts that
    they are: otherwise the same few positions of every text would be taken.

    Args:
        tokens: T, at least 1.
        most: tokens to take, at least 1.

    Returns:
        The smallest such stride that takes at most `most`.
    """
    stride = -(-tokens // most)
    while math.gcd(stride, tokens) > 1:
        stride += 1
    return stride


def make_counters(mesh: Mesh, layers: int, experts: int) -> Counts:
    """Empty counters, each device's on itself.

    Args:
        mesh: with axes `data` and `expert`.
        layers: L, those with experts.
        experts: E.
    """
    devices = math.prod(mesh.shape[axis] for axis in TOKEN_AXES)
    shapes = ((devices, layers, experts, experts), (devices, layers, experts), (devices, layers))

    def zeros() -> Counts:
        return Counts(*(jnp.zeros(shape, jnp.float32) for shape in shapes))

    return jax.jit(zeros, out_shardings=NamedSharding(mesh, COUNTERS_SPEC))()


def add_step(counters: Counts, new: Counts, decay: float) -> Counts:
    """A device's counters after a step, inside the shard_map: decay · counters + new.

    Sums are exact below 2²⁴ without a decay; beyond, and with one, they are rounded to float32.

    Args:
        counters: the device's part, a leading dimension of 1.
        new: counts of its tokens of this step.
        decay: from 0 to 1; 1 forgets nothing, and then old sums are not touched.
    """
    if decay == 1.0:
        return jax.tree.map(lambda old, n: old + n[None], counters, new)
    return jax.tree.map(lambda old, n: jnp.float32(decay) * old + n[None], counters, new)


def read_counters(counters: Counts, mesh: Mesh) -> Statistics:
    """Counters summed over all devices. Every process has to call it.

    Args:
        counters: from `make_counters` or a step.
        mesh: the same.
    """
    # One program at a time, for fake devices' sake.
    total = jax.device_get(_summed(mesh)(jax.block_until_ready(counters)))
    return Statistics(total.pairs_LEE, total.load_LE, total.tokens_L)


def read_each(counters: Counts, mesh: Mesh) -> Counts:
    """The counts of each device in host memory, pairs left out. Every process has to call it.

    Args:
        counters, mesh: as for `read_counters`.
    """
    return jax.device_get(_each(mesh)(jax.block_until_ready(counters)))


def begin_reading(counters: Counts, mesh: Mesh) -> tuple[Counts, Counts]:
    """Starts what `read_counters` does, for one process that goes on meanwhile.

    Args:
        counters, mesh: as there.

    Returns:
        the counts of all devices together, and those of each with empty pairs, on their way to the
        host; `jax.device_get` waits for them. The counters may be given up at once.
    """
    found = _copied(mesh)(counters)
    for array in jax.tree.leaves(found):
        array.copy_to_host_async()
    return found


def fade(counters: Counts, mesh: Mesh, factor: float) -> Counts:
    """All counts times a factor, on their devices; the old ones are given up."""
    return _faded(mesh)(counters, jnp.float32(factor))


@cache
def _faded(mesh: Mesh) -> Any:
    def faded(counters: Counts, factor: jax.Array) -> Counts:
        return jax.tree.map(lambda count: count * factor, counters)

    shardings = NamedSharding(mesh, COUNTERS_SPEC)
    return jax.jit(faded, donate_argnums=0, out_shardings=shardings)


def _sum(counters: Counts) -> Counts:
    """This device's counters and those of the others, inside the shard_map."""
    total = psum_statistics(jax.tree.map(lambda a: a[0], counters), TOKEN_AXES)
    # A ring adds different parts of an array in different orders: equal up to rounding.
    pairs_LEE = (total.pairs_LEE + total.pairs_LEE.swapaxes(1, 2)) / 2
    return replace(total, pairs_LEE=pairs_LEE)


@cache
def _copied(mesh: Mesh) -> Any:
    def copied(counters: Counts) -> tuple[Counts, Counts]:
        return _sum(counters), replace(counters, pairs_LEE=counters.pairs_LEE[..., :0])

    specs: Any = P(), COUNTERS_SPEC
    mapped = jax.shard_map(
        copied, mesh=mesh, in_specs=COUNTERS_SPEC, out_specs=specs, check_vma=False
    )
    return jax.jit(mapped)


@cache
def _each(mesh: Mesh) -> Any:
    def each(counters: Counts) -> Counts:
        few = replace(counters, pairs_LEE=counters.pairs_LEE[..., :0])
        return jax.tree.map(lambda count: all_gather(count, TOKEN_AXES), few)

    mapped = jax.shard_map(each, mesh=mesh, in_specs=COUNTERS_SPEC, out_specs=P(), check_vma=False)
    return jax.jit(mapped)


@cache
def _summed(mesh: Mesh) -> Any:
    mapped = jax.shard_map(_sum, mesh=mesh, in_specs=COUNTERS_SPEC, out_specs=P(), check_vma=False)
    return jax.jit(mapped)
