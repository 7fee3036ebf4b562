"""JAX's kernel for TPUs: pages are copied to vector memory a block of them ahead.

It rounds keys and values to bfloat16 on their way, so it serves nothing else.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import jax
from jax import numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import paged_attention as library

from pallas_kernels.paged_attention.blocks import widen_tables
from pallas_kernels.tpu.compat import interpret_mode, tpu_refusal
from pallas_kernels.tpu.tiles import LANES

__all__ = ["device_refusal", "paged_attention", "pages_of_block", "refusal"]

POSITIONS = 512
"""Of a block: with a head of 128 columns 512 KiB of vector memory, keys and values, two blocks."""

SUBLANES = 16  # of a tile of bfloat16
MOST_IDS = 2**17  # of all tables, in scalar memory: half of its 1 MiB


def refusal(rows: int, group: int, head_dim: int, page_len: int, table: int) -> str | None:
    """Why the kernel cannot serve these sizes; None if it can. `group`: query heads of a key."""
    if head_dim % LANES:
        return f"head_dim={head_dim} is no multiple of {LANES}"
    if page_len % SUBLANES:
        return f"page_len={page_len} is no multiple of {SUBLANES}"
    if page_len > POSITIONS:
        return f"page_len={page_len} is more than the {POSITIONS} positions of a block"
    if rows * table > MOST_IDS:
        return f"{rows} tables of {table} pages are more than {MOST_IDS} ids"
    return None


def device_refusal(dtype: Any, *, forced: bool) -> str | None:
    """As `tpu_refusal`."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"operands are {jnp.dtype(dtype).name}, not bfloat16"
    return tpu_refusal(dtype, forced=forced)


def pages_of_block(page_len: int, table: int) -> int:
    """How many pages are loaded and multiplied together."""
    return min(max(1, POSITIONS // page_len), table)


def paged_attention(
    q_BNh: jax.Array,
    k_MPLh: jax.Array,
    v_MPLh: jax.Array,
    lengths_B: jax.Array,
    tables_BN: jax.Array,
) -> jax.Array:
    """As `api.paged_attention`; the queries are scaled, the ids valid, the lengths inside."""
    block = pages_of_block(k_MPLh.shape[2], tables_BN.shape[1])
    interpret = interpret_mode()
    mode = pltpu.force_tpu_interpret_mode(interpret) if interpret else nullcontext()
    with mode, jax.numpy_dtype_promotion("standard"):  # the kernel mixes dtypes
        return library.paged_attention(
            q_BNh,
            k_MPLh,
            v_MPLh,
            lengths_B,
            widen_tables(tables_BN, block),
            pages_per_compute_block=block,
        )
