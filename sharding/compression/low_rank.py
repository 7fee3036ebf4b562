"""Gradients summed over ranks as products of thin matrices: PowerSGD (arXiv 1905.13727).

A parameter's gradient is a batch of matrices M [n, m], of layers and experts. One turn of the power
method for the sum of all ranks' M: P = orthonormal columns of ΣMQ [n, r], Q = ΣMᵀP [m, r], and
PQᵀ = PPᵀΣM is applied. Q starts where the last step left it. What PPᵀ leaves of a rank's own M is
its residual, and part of its M next step: so what was applied and all ranks' residuals add up to
the sum of all gradients. Only P and Q travel, r(n + m) numbers instead of nm, in float32. Early
gradients are poorly told by few directions, so a warm-up may send all of them.

The result goes into the optimizer as any other gradient: every entry of a matrix takes part in
every step, so that moments are those of a dense gradient (unlike for a sparse one, see `top_k`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from moejax.errors import UserError
from sharding.collectives import axis_size
from sharding.compression.interface import (
    RESIDUAL,
    Crossing,
    State,
    bytes_sent,
    exact_crossings,
)
from sharding.mesh import DATA
from sharding.zero import sum_to_piece

__all__ = ["LowRank", "Matrices", "orthonormal", "reciprocal"]

DEPENDENT = 1e-5
"""A column of which no more than this part is left beside the columns before it is dropped."""

_EXACT = lax.Precision.HIGHEST  # a GPU would round the factors to 10 bits otherwise


@dataclass(frozen=True)
class Matrices:
    """How a parameter is read as matrices: leading dimensions number them, then rows, then columns.

    batch, rows, columns: sizes of the dimensions, in order; together they are the shape.
    """

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @staticmethod
    def of(shape: tuple[int, ...], stacked: int | None = None) -> Matrices:
        """Reads a shape.

        Args:
            shape: at least two dimensions.
            stacked: leading dimensions that number layers and experts. None: as many as make the
                matrices most square: [L, D, 2, H] is L of [D, 2H], [N, h, D] one of [Nh, D].

        Raises:
            UserError: it leaves fewer than two dimensions.
        """
        counts = range(len(shape) - 1) if stacked is None else (stacked,)
        found = [
            Matrices(shape[:b], shape[b:c], shape[c:])
            for b in counts
            for c in range(b + 1, len(shape))
        ]
        if not found:
            raise UserError(
                f"shape={shape} with stacked={stacked}: low-rank reduction needs two dimensions or "
                "more for a matrix; reduce this parameter exactly"
            )
        return max(found, key=lambda f: min(f.n, f.m) / max(f.n, f.m))

    @property
    def n(self) -> int:
        """Rows of a matrix."""
        return math.prod(self.rows)

    @property
    def m(self) -> int:
        """Columns of a matrix."""
        return math.prod(self.columns)

    @property
    def count(self) -> int:
        """B, number of matrices."""
        return math.prod(self.batch)

    def product(
        self,
        p_Bnr: Float[Array, "B n r"],
        q_Bmr: Float[Array, "B m r"],
        dim: int | None = None,
        pieces: int = 1,
        index: jax.Array | int = 0,
    ) -> jax.Array:
        """PQᵀ in the parameter's shape, or one of `pieces` along `dim` of it, made alone.

        Args:
            p_Bnr, q_Bmr: float32.
            dim: a dimension of the shape; None: all of it.
            pieces: equal pieces of that dimension.
            index: which one; int32 [].
        """
        p = p_Bnr.reshape(*self.batch, *self.rows, -1)
        q = q_Bmr.reshape(*self.batch, *self.columns, -1)
        shape = [*self.batch, *self.rows, *self.columns]
        if dim is not None:
            each = shape[dim] // pieces
            shape[dim] = each
            begin, rows_end = len(self.batch), len(self.batch) + len(self.rows)
            if dim < rows_end:
                p = lax.dynamic_slice_in_dim(p, index * each, each, dim)
            if dim < begin:
                q = lax.dynamic_slice_in_dim(q, index * each, each, dim)
            elif dim >= rows_end:
                q = lax.dynamic_slice_in_dim(q, index * each, each, dim - len(self.rows))
        count = math.prod(shape[: len(self.batch)])
        rank = p.shape[-1]
        p, q = p.reshape(count, -1, rank), q.reshape(count, -1, rank)
        return jnp.einsum("bnr,bmr->bnm", p, q, precision=_EXACT).reshape(shape)


def orthonormal(x_Bnr: Float[Array, "B n r"]) -> Float[Array, "B n r"]:
    """Orthonormal columns that span the same space: Gram–Schmidt, each column done twice.

    A column that depends on those before it, or is zero, becomes zero. Twice is enough for
    orthogonality to rounding (Giraud et al. 2005, doi 10.1007/s00211-005-0615-4).

    Args:
        x_Bnr: float32; only few columns.
    """
    done: list[jax.Array] = []
    for j in range(x_Bnr.shape[-1]):
        # A scale of 1 first: squares of small gradients would vanish.
        largest = jnp.max(jnp.abs(x_Bnr[..., j]), axis=-1, keepdims=True)
        start = x_Bnr[..., j] * reciprocal(largest)
        left = start
        for _ in range(2):
            for other in done:
                left = left - other * jnp.sum(left * other, axis=-1, keepdims=True)
        length, before = (jnp.sqrt(jnp.sum(v * v, axis=-1, keepdims=True)) for v in (left, start))
        done.append(left * jnp.where(length <= DEPENDENT * before, 0.0, 1 / length))
    return jnp.stack(done, axis=-1)


@dataclass(frozen=True)
class LowRank:
    """PowerSGD for one parameter, a `sharding.compression.methods.Method`.

    The state is `residual`, float32 shaped like the local gradient, and `q` [B, m, r], equal on the
    ranks that are summed over. On another mesh the residuals' sum is handed out anew, and q starts
    from the key again.

    rank: r; less where a matrix is smaller.
    stacked: leading dimensions that number matrices, see `Matrices.of`.
    warmup_steps: steps in which everything is sent, in float32, and nothing is left over.
    """

    rank: int = 4
    stacked: int | None = None
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank={self.rank}: must be at least 1")
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps={self.warmup_steps}: must be 0 or more")

    def init(self, shape: tuple[int, ...], key: jax.Array) -> State:
        """No residual, and a random Q.

        Args:
            shape: of the local gradient, two dimensions or more.
            key: typed PRNG key, the same on all ranks that are summed over.

        Raises:
            UserError: the shape holds no matrix.
        """
        form, r = self._form(shape)
        q_Bmr = jax.random.normal(key, (form.count, form.m, r), jnp.float32)
        return {RESIDUAL: jnp.zeros(shape, jnp.float32), "q": q_Bmr}

    def _form(self, shape: tuple[int, ...]) -> tuple[Matrices, int]:
        form = Matrices.of(shape, self.stacked)
        return form, min(self.rank, form.n, form.m)

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
        """The part of rank r of the sum over `axes`, inside the shard_map.

        Args:
            grad: this rank's.
            state: of `init` or the last step.
            axes: mesh axes to sum over.
            dim: the dimension that storage splits over `data`: the piece stored here is made alone.
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
        if not self.warmup_steps:
            return self._thin(grad, state, axes, dim)
        sent = {RESIDUAL: jnp.zeros_like(grad), "q": state["q"]}
        return lax.cond(
            step < self.warmup_steps,
            lambda: (sum_to_piece(grad + state[RESIDUAL], axes, dim), sent),
            lambda: self._thin(grad, state, axes, dim),
        )

    def _thin(
        self, grad: jax.Array, state: State, axes: tuple[str, ...], dim: int | None
    ) -> tuple[jax.Array, State]:
        form, _ = self._form(grad.shape)
        whole = (grad + state[RESIDUAL]).reshape(form.count, form.n, form.m)
        p_Bnr = jnp.einsum("bnm,bmr->bnr", whole, state["q"], precision=_EXACT)
        p_Bnr = orthonormal(lax.psum(p_Bnr, axes))
        own_Bmr = jnp.einsum("bnm,bnr->bmr", whole, p_Bnr, precision=_EXACT)
        q_Bmr = lax.psum(own_Bmr, axes)
        own = form.product(p_Bnr, own_Bmr).reshape(grad.shape)
        # A column that nothing is left of would stay zero for ever: it starts where it was.
        alive_B1r = jnp.any(q_Bmr != 0, axis=1, keepdims=True)
        new = {
            RESIDUAL: grad + state[RESIDUAL] - own,
            "q": jnp.where(alive_B1r, _unit(q_Bmr), state["q"]),
        }
        if dim is None:
            return form.product(p_Bnr, q_Bmr), new
        piece = form.product(p_Bnr, q_Bmr, dim, axis_size(DATA), lax.axis_index(DATA))
        return piece, new

    def crossings(
        self, shape: tuple[int, ...], sizes: Mapping[str, int], dim: int | None
    ) -> list[Crossing]:
        """The collectives of `reduce`: kind, axes, and bytes of what a rank puts in.

        With a warm-up those of the warm-up, if they are more.

        Args:
            shape: of the local gradient.
            sizes: devices along each axis that is summed over.
            dim: as for `reduce`; it matters to the warm-up alone.
        """
        form, r = self._form(shape)
        thin: list[Crossing] = [
            ("all-reduce", tuple(sizes), 4 * form.count * side * r) for side in (form.n, form.m)
        ]
        if not self.warmup_steps:
            return thin
        return max(thin, exact_crossings(shape, sizes, dim), key=lambda c: bytes_sent(c, sizes))


def _unit(q_Bmr: jax.Array) -> jax.Array:
    """Columns of largest entry 1: only directions count, and no square over- or underflows."""
    largest = jnp.max(jnp.abs(q_Bmr), axis=1, keepdims=True)
    return q_Bmr * reciprocal(largest)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x; 0 below the least normal number, of which it would be infinite."""
    return jnp.where(x > jnp.finfo(jnp.float32).tiny, 1 / x, 0.0)
