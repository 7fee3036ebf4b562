"""JAX's kernel for NVIDIA GPUs since Ampere, written for Triton: flash decoding over pages.

The positions of a row are split over several blocks of the grid, and their sums are put together
afterwards (Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
from jax import numpy as jnp

from pallas_kernels.hopper.compat import sm_count
from pallas_kernels.interpreting import is_interpreted
from pallas_kernels.paged_attention.blocks import widen_tables

__all__ = ["device_refusal", "paged_attention", "pages_of_block", "refusal", "splits"]

HEADS = 16  # of a block: the fewest rows of a product
FEWEST = 16  # columns and positions of a product
BLOCK = 2**13  # numbers of the keys that are multiplied together, if a page has no more
MOST = 2**14
POSITIONS = 256  # of a split, at least
WARPS, STAGES = 4, 2
# As measured on an H100: 32 rows of 4096 positions, 8 heads of 128 columns, are read at 2.24 TB/s,
# with 2**14 numbers at 1.66 (whether a page has 16 or 128 positions); the twin reads 0.89.


def refusal(rows: int, group: int, head_dim: int, page_len: int, table: int) -> str | None:
    """Why the kernel cannot serve these sizes; None if it can. `group`: query heads of a key."""
    for name, size in (("head_dim", head_dim), ("page_len", page_len)):
        if size & (size - 1):
            return f"{name}={size} is no power of 2"
    if head_dim < FEWEST:
        return f"head_dim={head_dim} is less than {FEWEST}"
    if head_dim * max(page_len, FEWEST) > MOST:
        return f"a page of {page_len} × {head_dim} numbers, the kernel takes up to {MOST}"
    if _library() is None:
        return "this version of JAX does not have the kernel"
    return None


def device_refusal(dtype: Any, *, forced: bool) -> str | None:
    """Why the kernel cannot serve operands of this dtype here; see `hopper_refusal`."""
    name = jnp.dtype(dtype).name
    if name not in ("bfloat16", "float16"):
        return f"operands are {name}, not bfloat16 or float16"
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    ampere = device.platform == "gpu" and capability[:1].isdigit() and float(capability) >= 8
    if not forced and not ampere:
        return f"the device is {device.device_kind!r}, no NVIDIA GPU of capability 8.0 or more"
    return None


def pages_of_block(head_dim: int, page_len: int) -> int:
    """How many pages are loaded and multiplied together, a power of 2."""
    return max(1, max(BLOCK // head_dim, FEWEST) // page_len)


def splits(blocks: int, positions: int) -> int:
    """Into how many parts a row's positions are split, a power of 2.

    Args:
        blocks: of the grid without splitting.
        positions: of a table.
    """
    count = 1
    while blocks * count < 2 * sm_count() and positions >= 2 * count * POSITIONS:
        count *= 2
    return count


def paged_attention(
    q_BNh: jax.Array,
    k_MPLh: jax.Array,
    v_MPLh: jax.Array,
    lengths_B: jax.Array,
    tables_BN: jax.Array,
) -> jax.Array:
    """As `api.paged_attention`; the queries are scaled, the ids valid, the lengths inside."""
    rows, heads, head_dim = q_BNh.shape
    kv_heads, _, page_len, _ = k_MPLh.shape
    block = pages_of_block(head_dim, page_len)
    groups = -(-heads // kv_heads // HEADS)
    count = splits(rows * kv_heads * groups, tables_BN.shape[1] * page_len)
    kernel = _library()
    assert kernel is not None
    with jax.numpy_dtype_promotion("standard"):  # the kernel mixes dtypes
        return kernel(
            q_BNh,
            k_MPLh,
            v_MPLh,
            widen_tables(tables_BN, block * count),
            lengths_B,
            block_h=HEADS,
            pages_per_compute_block=block,
            k_splits=count,
            num_warps=WARPS,
            num_stages=STAGES,
            interpret=is_interpreted(),
        )


@cache
def _library() -> Callable[..., jax.Array] | None:
    """JAX's function; importing it warns that it will be removed some day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention
        except ImportError:
            return None
    return paged_attention
