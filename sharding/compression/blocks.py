"""float32 numbers to bytes and back: bfloat16, or int8 and int4 in blocks with a scale each.

Integers and scales of a row lie in one array of bytes, which no platform widens on the wire; see
`pallas_kernels.quantize.format`. With `rotate` a block is multiplied with a Hadamard matrix first
(QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt8, UInt32

from moejax.exchange.codec import rotated
from pallas_kernels.quantize import api
from pallas_kernels.quantize.format import Format
from pallas_kernels.quantize.reference import add_terms

__all__ = ["Blocks", "add_up", "add_up_and_encode", "decode", "encode", "rotate"]


@dataclass(frozen=True)
class Blocks:
    """What rows of numbers look like on the wire.

    bits: 4 or 8: integers with a scale for each block; 16: bfloat16, without scales.
    block: numbers of a block; rows are made of whole ones.
    rotate: whether blocks are rotated; they have 128 numbers then.
    backend: of `pallas_kernels.quantize`; None takes the first that serves.
    """

    bits: int
    block: int
    rotate: bool = False
    backend: str | None = None

    @property
    def format(self) -> Format:
        """Of the integers; there are none at 16 bits."""
        assert self.bits < 16
        return Format(self.bits, self.block)

    @property
    def unrotated(self) -> Blocks:
        """The same of numbers that are rotated already."""
        return replace(self, rotate=False)

    def padded(self, count: int) -> int:
        """The numbers of a row that has room for `count`."""
        return -(-count // self.block) * self.block

    def row_bytes(self, count: int) -> int:
        """Bytes of a row of `count` numbers, whole blocks."""
        return 2 * count if self.bits == 16 else self.format.row_bytes(count)


def rotate(x_RN: Float32[Array, "R N"]) -> Float32[Array, "R N"]:
    """Every block of 128 times the Hadamard matrix, which is its own inverse."""
    return rotated(x_RN.reshape(len(x_RN), -1, 128)).reshape(x_RN.shape)


def encode(
    x_RN: Float[Array, "R N"],
    blocks: Blocks,
    key: UInt32[Array, "2"] | None = None,
    *,
    residual: bool = False,
) -> tuple[UInt8[Array, "R bytes"], Float32[Array, "R N"] | None]:
    """The bytes of rows, and what is lost.

    Args:
        x_RN: float32 or bfloat16, whole blocks. A block with a NaN or an infinity arrives as NaN.
        blocks: the format.
        key: rounds up by chance, with the probability that makes the mean right; None rounds to the
            nearest. bfloat16 is rounded to the nearest always.
        residual: whether to return x minus what arrives; else there is None in its place.
    """
    if blocks.bits == 16:
        sent = _bytes(x_RN.astype(jnp.bfloat16))
        left = x_RN.astype(jnp.float32) - decode(sent, blocks, x_RN.shape[1]) if residual else None
        return sent, left
    x_RN = rotate(x_RN.astype(jnp.float32)) if blocks.rotate else x_RN
    sent, left = api.encode(x_RN, blocks.format, key, residual=residual, backend=blocks.backend)
    return sent, rotate(left) if blocks.rotate and left is not None else left


def _bytes(x_RN: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x_RN, jnp.uint8).reshape(x_RN.shape[0], -1)


def decode(bytes_RN: UInt8[Array, "R bytes"], blocks: Blocks, width: int) -> Float32[Array, "R N"]:
    """What `encode` made of rows of `width` numbers, as float32 [R, width]."""
    if blocks.bits == 16:
        pairs = bytes_RN.reshape(bytes_RN.shape[0], -1, 2)
        return lax.bitcast_convert_type(pairs, jnp.bfloat16).astype(jnp.float32)
    x_RN = api.decode(bytes_RN, blocks.format, width, backend=blocks.backend)
    return rotate(x_RN) if blocks.rotate else x_RN


def add_up(
    bytes_RN: UInt8[Array, "R bytes"],
    rows_RN: Float[Array, "R N"],
    me: Int32[Array, ""],
    blocks: Blocks,
) -> Float32[Array, " N"]:
    """The sum over ranks, in their order, of what they sent, and of this one's own row.

    Args:
        bytes_RN: by rank.
        rows_RN: row `me` is this rank's term.
        me: this rank.
        blocks: the format; not rotated.
    """
    assert not blocks.rotate
    if blocks.bits < 16:
        return api.add_up(bytes_RN, rows_RN, me, blocks.format, backend=blocks.backend)
    return add_terms(decode(bytes_RN, blocks, rows_RN.shape[1]), rows_RN, me)


def add_up_and_encode(
    bytes_RN: UInt8[Array, "R bytes"],
    rows_RN: Float[Array, "R N"],
    me: Int32[Array, ""],
    blocks: Blocks,
    key: UInt32[Array, "2"] | None = None,
    *,
    residual: bool = False,
) -> tuple[UInt8[Array, "1 bytes"], Float32[Array, "1 N"] | None]:
    """`encode` of `add_up`."""
    if blocks.bits < 16:
        return api.add_up_and_encode(
            *(bytes_RN, rows_RN, me, blocks.format, key), residual=residual, backend=blocks.backend
        )
    return encode(add_up(bytes_RN, rows_RN, me, blocks)[None], blocks, residual=residual)
