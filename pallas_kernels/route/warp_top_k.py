"""Top-k on NVIDIA GPUs: a warp for each token, its scores in the lanes' registers.

The best is taken k times over; a warp finds it with two reductions in hardware (`redux`, PTX ISA).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import numpy as jnp

from pallas_kernels.hopper.simt import LANES, Machine, launch
from pallas_kernels.hopper.simt_numbers import lane_sum

__all__ = ["MAX_EXPERTS", "program", "refusal", "top_k"]

WARPS = 4  # of a block, each with a token
MAX_EXPERTS = 1024  # 32 registers of a thread
INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def refusal(
    tokens: int, experts: int, k: int, dtype: Any, values_dtype: Any = jnp.float32
) -> str | None:
    """Why the kernel cannot serve this, or None."""
    for what, found in (("scores", dtype), ("values", values_dtype)):
        if found != jnp.float32:
            return f"{what} are {jnp.dtype(found).name}, the kernel takes float32"
    if tokens == 0:
        return "no tokens"
    if experts > MAX_EXPERTS:
        return f"{experts} experts; the kernel takes up to {MAX_EXPERTS}"
    if k > LANES:
        return f"the {k} best; the kernel takes up to {LANES}"
    if tokens * experts > INT_MAX:
        return f"{tokens} × {experts} scores; positions are int32"
    return None


def _ordered(m: Machine, bits: Any) -> Any:
    """A float32's bits -> int32 in the same order, where -0.0 equals 0.0 and none is INT_MIN."""
    key = m.select(bits < 0, bits ^ INT_MAX, bits)
    key = m.select(key == -1, 0, key)
    return m.select(key < INT_MIN + 1, INT_MIN + 1, key)


def _softmax(m: Machine, values: Any, where: Any, k: int) -> Any:
    """Of the first k lanes' float32 values, where they are valid."""
    largest = m.largest(m.select(where, _ordered(m, values), INT_MIN))
    largest = m.select(largest < 0, largest ^ INT_MAX, largest)  # its bits again
    exponential = m.select(where, m.float_exp(m.float_sub(values, largest)), 0)
    return m.float_div(exponential, lane_sum(m, exponential, k))


def program(
    m: Machine,
    scores: Any,
    values: Any,
    ids_out: Any,
    values_out: Any,
    block: Any,
    *,
    tokens: int,
    experts: int,
    k: int,
    softmax: bool,
) -> None:
    """One block: ids and values of the k best experts of its tokens.

    Args:
        m: the machine.
        scores: float32 words [tokens · experts].
        values: float32 words of the same shape, of which the chosen are taken.
        ids_out, values_out: [tokens · k].
        block: index.
        tokens, experts, k: sizes.
        softmax: of the chosen values, instead of themselves.
    """
    token = m.warp + block * WARPS
    mine = token < tokens
    columns = [m.lane + first for first in range(0, experts, LANES)]
    keys = []
    for column in columns:
        there = mine & (column < experts)
        bits = m.load(scores, token * experts + column, there)
        keys.append(m.select(there, _ordered(m, bits), INT_MIN))
    ids = m.lane * 0
    for j in range(k):
        most = keys[0]
        for key in keys[1:]:
            most = m.select(most < key, key, most)
        best = m.largest(most)
        own = m.lane * 0 + experts
        for key, column in zip(reversed(keys), reversed(columns), strict=True):
            own = m.select(key == best, column, own)
        id_ = m.smallest(own)
        keys = [m.select(column == id_, INT_MIN, key) for key, column in zip(keys, columns)]
        ids = m.select(m.lane == j, id_, ids)
    one_of_k = mine & (m.lane < k)
    m.store(ids_out, token * k + m.lane, ids, one_of_k)
    chosen = m.load(values, token * experts + ids, one_of_k)
    if softmax:
        chosen = _softmax(m, chosen, one_of_k, k)
    m.store(values_out, token * k + m.lane, chosen, one_of_k)


def top_k(
    scores_TE: jax.Array, values_TE: jax.Array, k: int, *, softmax: bool
) -> tuple[jax.Array, jax.Array]:
    """Ids of the k best experts, descending, the lower id first among equal scores; their values.

    Args:
        scores_TE: float32.
        values_TE: float32.
        k: at most E.
        softmax: of the chosen values, instead of themselves.

    Returns:
        int32 [T, k], float32 [T, k].
    """
    tokens, experts = scores_TE.shape
    dtypes = (jnp.int32, jnp.float32)
    ids, values = launch(
        partial(program, tokens=tokens, experts=experts, k=k, softmax=softmax),
        "top_k",
        blocks=-(-tokens // WARPS),
        threads=WARPS * LANES,
        inputs=[scores_TE.reshape(-1), values_TE.reshape(-1)],
        out_type=[jax.ShapeDtypeStruct((tokens * k,), dtype) for dtype in dtypes],
    )
    return ids.reshape(tokens, k), values.reshape(tokens, k)
