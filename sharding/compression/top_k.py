"""Gradients summed over ranks from each rank's largest numbers only, with error feedback.

A rank adds what it did not send before to its gradient (see `TopK` for momentum), and sends of each
group of at most 65536 numbers the part `density` that is largest: a value of 16 or 32 bits and an
offset of 16 bits each. Where storage splits the parameter over `data`, groups lie within pieces and
go to the piece's owner only, by one all-to-all; what came there is then gathered over the other
axes. Else everything is gathered everywhere. Sums are in float32, rank by rank in order, so that
they are equal in every bit wherever they are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
from jax import lax
from jax import numpy as jnp

from moejax.errors import UserError
from sharding.collectives import axis_size
from sharding.compression.chunks import Chunks
from sharding.compression.interface import (
    RESIDUAL,
    Crossing,
    State,
    bytes_sent,
    exact_crossings,
)
from sharding.compression.selection import largest
from sharding.mesh import DATA
from sharding.zero import sum_to_piece

__all__ = ["Groups", "TopK"]

LARGEST_GROUP = 1 << 16
"""Offsets of 16 bits reach no further."""


@dataclass(frozen=True)
class Groups:
    """Rows of one gradient, one for each owner, cut into groups out of which numbers are chosen.

    rows: R, one for each piece of storage, or the only one.
    row: numbers of a row.
    density: part of a group that is sent.
    value_words: words of 16 bits that a value takes: 1 bfloat16, 2 float32.
    """

    rows: int
    row: int
    density: float
    value_words: int

    @property
    def count(self) -> int:
        """G, groups of a row."""
        return -(-self.row // LARGEST_GROUP)

    @property
    def size(self) -> int:
        """B, numbers of a group; the last one of a row is padded with zeros."""
        return -(-self.row // self.count)

    @property
    def k(self) -> int:
        """Numbers that are sent of a group, at least 1."""
        return min(self.size, max(1, round(self.density * self.size)))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's payload."""
        return 2 * (1 + self.value_words) * self.count * self.k

    def encode(self, rows_RN: jax.Array) -> jax.Array:
        """The payload, uint16 [R, G, k, 1 + words]: offsets in the group, then values' bits."""
        padded = self.count * self.size - self.row
        x_GB = jnp.pad(rows_RN, ((0, 0), (0, padded))).reshape(-1, self.size)
        at_Gk = largest(x_GB, self.k)
        values_Gk = jnp.take_along_axis(x_GB, at_Gk, axis=-1)
        if self.value_words == 1:
            values_Gk = values_Gk.astype(jnp.bfloat16)
        words = lax.bitcast_convert_type(values_Gk, jnp.uint16).reshape(*at_Gk.shape, -1)
        payload = jnp.concatenate([at_Gk.astype(jnp.uint16)[..., None], words], axis=-1)
        return payload.reshape(self.rows, self.count, self.k, -1)

    def add_up(self, payloads_RGkW: jax.Array) -> jax.Array:
        """The sum of payloads of one row from several ranks, float32 [row]; in their order."""

        def add(total_N: jax.Array, payload_GkW: jax.Array) -> tuple[jax.Array, None]:
            at, values = self._decode(payload_GkW)
            # Padding lies behind the row's end and is dropped. No rank names a place twice, so the
            # order of additions is that of ranks.
            return total_N.at[at].add(values, mode="drop", unique_indices=True), None

        return lax.scan(add, jnp.zeros(self.row, jnp.float32), payloads_RGkW)[0]

    def _decode(self, payload_GkW: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Places in the row, int32 [G·k], and values, float32."""
        first_G1 = jnp.arange(self.count, dtype=jnp.int32)[:, None] * self.size
        at = first_G1 + payload_GkW[..., 0].astype(jnp.int32)
        words = payload_GkW[..., 1:]
        if self.value_words == 1:
            values = lax.bitcast_convert_type(words[..., 0], jnp.bfloat16).astype(jnp.float32)
        else:
            values = lax.bitcast_convert_type(words, jnp.float32)
        return at.reshape(-1), values.reshape(-1)

    def sent(self, payload_RGkW: jax.Array) -> jax.Array:
        """What a rank's own payload says: float32 [R, N], zero where nothing is sent."""
        return jax.vmap(lambda payload_GkW: self.add_up(payload_GkW[None]))(payload_RGkW)


@dataclass(frozen=True)
class TopK:
    """Top-k with error feedback for one parameter, a `sharding.compression.methods.Method`.

    With `momentum` b a rank keeps u ← b·u + (1 − b)·g, adds u to its residual instead of g, and
    forgets u where it sends (momentum correction and factor masking, Deep Gradient Compression,
    arXiv 1712.01887 §3). The optimizer then must have no mean of its own: b1 = 0. And of
    Adam, which divides by the root of a mean of squares, these squares should be those of the dense
    gradient, not of what arrives: `sharding.compression.squares` estimates them in few bytes.

    Without momentum, what was applied and all residuals add up to the sum of all gradients; with
    it, the part that is forgotten is lost.

    The state is `residual`, whose sum over ranks is conserved on another mesh, and with momentum
    `momentum`, which starts at zero there.

    density: part of the numbers that a rank sends, of each group; at least one number.
    momentum: decay of the ranks' own means of gradients, Adam's b1; 0: none, Adam keeps its own.
    warmup_steps: steps in which everything is sent, in float32. Momentum is not forgotten in them,
        so that what arrives is the mean of the summed gradients, as Adam's own would be but for
        the correction of its bias: (1 − b)·g in the first step.
    values: how they travel; what rounding loses stays in the residual.
    """

    density: float = 0.01
    momentum: float = 0.0
    warmup_steps: int = 0
    values: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise UserError(f"density={self.density}: must be greater than 0 and at most 1")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum={self.momentum}: must be at least 0 and less than 1")
        if self.values not in ("bfloat16", "float32"):
            raise UserError(f"values={self.values!r}: must be 'bfloat16' or 'float32'")
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps={self.warmup_steps}: must be 0 or more")

    def init(self, shape: tuple[int, ...], key: jax.Array) -> State:
        """Nothing left over, and no momentum; both shaped like the gradient.

        Args:
            shape: of the local gradient.
            key: not needed.
        """
        del key
        names = (RESIDUAL, "momentum") if self.momentum else (RESIDUAL,)
        return {name: jnp.zeros(shape, jnp.float32) for name in names}

    def reduce(
        self,
        grad: jax.Array,
        state: State,
        axes: tuple[str, ...],
        dim: int | None,
        *,
        key: jax.Array | None = None,
        step: jax.Array | int = 0,
    ) -> tuple[jax.Array, State]:
        """The sum over `axes` of what ranks send, inside the shard_map.

        Args:
            grad: this rank's.
            state: of `init` or the last step.
            axes: mesh axes to sum over, `data` first.
            dim: the dimension that storage splits over `data`: the piece stored here is returned.
                None: the whole, equal in every bit on all ranks of `axes`.
            key: not needed.
            step: steps taken, int32 []; for the warm-up.

        Returns:
            The sum or the piece of it, float32, and the new state.
        """
        del key
        grad = grad.astype(jnp.float32)
        if axis_size(axes) == 1:
            return grad, state
        mean = grad
        if self.momentum:
            mean = self.momentum * state["momentum"] + (1 - self.momentum) * grad
        whole = mean + state[RESIDUAL]
        if not self.warmup_steps:
            return self._sparse(mean, whole, axes, dim)
        sent = {RESIDUAL: jnp.zeros_like(grad)} | ({"momentum": mean} if self.momentum else {})
        return lax.cond(
            step < self.warmup_steps,
            lambda: (sum_to_piece(whole, axes, dim), sent),
            lambda: self._sparse(mean, whole, axes, dim),
        )

    def _sparse(
        self, mean: jax.Array, whole: jax.Array, axes: Sequence[str], dim: int | None
    ) -> tuple[jax.Array, State]:
        chunks, groups = self._form(whole.shape, {a: axis_size(a) for a in axes}, dim)
        rows_RN = chunks.cut(whole)
        payload = groups.encode(rows_RN)
        others, received = tuple(axes), payload
        if dim is not None:
            received = lax.all_to_all(payload, DATA, split_axis=0, concat_axis=0)
            others = tuple(a for a in axes if a != DATA)
        if axis_size(others) > 1:
            received = lax.all_gather(received, others).reshape(-1, *payload.shape[1:])
        total_1N = groups.add_up(received)[None]
        sent_RN = groups.sent(payload)
        new = {RESIDUAL: chunks.join(rows_RN - sent_RN)}
        if self.momentum:
            new["momentum"] = jnp.where(chunks.join(sent_RN) != 0, 0.0, mean)
        return chunks.join_piece(total_1N), new

    def _form(
        self, shape: tuple[int, ...], sizes: Mapping[str, int], dim: int | None
    ) -> tuple[Chunks, Groups]:
        """How a gradient is cut: into pieces of storage, or not at all."""
        owners = {} if dim is None else {DATA: sizes[DATA]}
        chunks = Chunks(tuple(shape), owners, dim, 1)
        words = 1 if self.values == "bfloat16" else 2
        return chunks, Groups(chunks.ranks, chunks.width, self.density, words)

    def crossings(
        self, shape: tuple[int, ...], sizes: Mapping[str, int], dim: int | None
    ) -> list[Crossing]:
        """The collectives of `reduce`: kind, axes, and bytes of what a rank puts in.

        With a warm-up they are those of the warm-up, unless these are fewer, which a program has
        besides; without, those of every step.

        Args:
            shape: of the local gradient.
            sizes: devices along each axis that is summed over, `data` first.
            dim: as for `reduce`.
        """
        _, groups = self._form(shape, sizes, dim)
        whole = groups.rows * groups.row_bytes
        others = tuple(a for a in sizes if dim is None or a != DATA)
        sparse: list[Crossing] = [("all-gather", others, whole)]
        if dim is not None:
            sparse.insert(0, ("all-to-all", (DATA,), whole))
        if not self.warmup_steps:
            return sparse
        dense = exact_crossings(shape, sizes, dim)
        return max(sparse, dense, key=lambda found: bytes_sent(found, sizes))
