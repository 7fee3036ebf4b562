"""The operations that are tuned: on which inputs, and what their reference is.

Tokens, weights and cotangents are normally distributed and routing is uniform at random. What is
compared with the reference is a sample: all of it would take the reference minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from pallas_kernels.fused_experts import api as fused
from pallas_kernels.fused_experts import reference
from pallas_kernels.fused_experts.activations import ACTIVATIONS
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.hopper.tiles import ROWS
from pallas_kernels.route.api import sorted_places
from pallas_kernels.tuning.search import relative_distance

__all__ = ["Layer", "Products"]

SAMPLE = 32  # tokens
SEED = 0


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
    return (scale * jax.random.normal(key, shape)).astype(jnp.bfloat16)


def _draw(count: int, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    return _normal(jax.random.fold_in(jax.random.key(SEED), count), shape, scale)


@dataclass(frozen=True)
class Layer:
    """Fused experts on T tokens of width D, E experts of width H, K of them a token."""

    tokens: int
    d_model: int
    hidden: int
    experts: int
    top_k: int
    backward: bool
    activation: str = "swiglu"

    @property
    def name(self) -> str:
        """For messages."""
        sizes = (self.tokens, self.d_model, self.hidden, self.experts, self.top_k)
        return f"{','.join(map(str, sizes))} {'fwdbwd' if self.backward else 'fwd'}"

    @property
    def _places(self) -> int:
        """Room for all assignments with their padding."""
        assignments, unit = self.tokens * self.top_k, fused.ROW_ALIGNMENT
        most = assignments + min(self.experts, assignments) * (unit - 1)
        return -(-most // unit) * unit

    @cached_property
    def _ids_TK(self) -> np.ndarray:
        """int32, the experts of each token."""
        scores = np.random.default_rng(SEED).random((self.tokens, self.experts), np.float32)
        return np.argsort(scores, axis=1)[:, : self.top_k].astype(np.int32)

    def shapes(self) -> tuple[Any, ...]:
        """Of the inputs."""
        tokens, copies = self.tokens, (self.tokens, self.top_k)
        parts = ACTIVATIONS[self.activation].parts
        return (
            *(jax.ShapeDtypeStruct((tokens, self.d_model), jnp.bfloat16) for _ in range(2)),
            jax.ShapeDtypeStruct((self.experts, self.d_model, parts, self.hidden), jnp.bfloat16),
            jax.ShapeDtypeStruct((self.experts, self.hidden, self.d_model), jnp.bfloat16),
            jax.ShapeDtypeStruct(copies, jnp.float32),
            jax.ShapeDtypeStruct(copies, jnp.int32),
            jax.ShapeDtypeStruct((self._places,), jnp.int32),
            jax.ShapeDtypeStruct((self.experts,), jnp.int32),
        )

    def inputs(self) -> tuple[Any, ...]:
        """Arrays: tokens, cotangents, projections, scores, the map from and to places, sizes."""
        x, ct, w_in, w_out, scores, *_ = self.shapes()
        layout = jax.jit(
            partial(
                sorted_places,
                groups=self.experts,
                alignment=fused.ROW_ALIGNMENT,
                places=self._places,
            )
        )
        place_TK, sizes_E, copy_A = layout(self._ids_TK)
        weights = np.random.default_rng(SEED + 1).random(scores.shape, np.float32) + 0.5
        return (
            _draw(0, x.shape),
            _draw(1, ct.shape),
            _draw(2, w_in.shape, self.d_model**-0.5),
            _draw(3, w_out.shape, self.hidden**-0.5),
            jnp.asarray(weights / weights.sum(axis=1, keepdims=True)),
            place_TK,
            copy_A,
            sizes_E,
        )

    def function(self, x, ct, w_in, w_out, scores, place, copy, sizes):
        """y, and with the backward the gradients of x, both projections and the scores."""

        def forward(x, w_in, w_out, scores):
            maps = (place, copy, sizes)
            return fused.fused_experts(
                x, w_in, w_out, scores, *maps, activation=self.activation, backend="mosaic_gpu"
            )

        if not self.backward:
            return (forward(x, w_in, w_out, scores),)
        y, pull = jax.vjp(forward, x, w_in, w_out, scores)
        return y, *pull(ct)

    def _reference(self, x, ct, w_in, w_out, weights, ids: np.ndarray):
        """The sum and the gradients of x, both projections and the weights, for `ids` [N, J]."""
        place, sizes, copy = sorted_places(
            jnp.asarray(ids),
            groups=w_in.shape[0],
            alignment=1,
            places=ids.size,
            backend="reference",
        )

        def forward(x, w_in, w_out, weights):
            maps = (place, copy // ids.shape[1], sizes)
            return reference.fused_experts(
                x, w_in, w_out, weights, *maps, activation=self.activation
            )

        y, pull = jax.vjp(forward, x, w_in, w_out, weights)
        return y, *pull(ct)

    def errors(self, inputs: tuple[Any, ...], outputs: Any) -> dict[str, float]:
        """Of a sample of tokens; of the weights' gradients, of the expert with the fewest."""
        x, ct, w_in, w_out, scores, *_ = inputs
        tokens = np.unique(np.linspace(0, self.tokens - 1, SAMPLE).astype(np.int32))

        @jax.jit
        def of_tokens(x, ct, w_in, w_out, weights):
            y, x_ct, _, _, weights_ct = self._reference(
                x, ct, w_in, w_out, weights, self._ids_TK[tokens]
            )
            return (y, x_ct, weights_ct) if self.backward else (y,)

        want = of_tokens(x[tokens], ct[tokens], w_in, w_out, scores[tokens])
        places = zip(("y", "x", "scores"), (0, 1, 4), want)
        found = {name: relative_distance(outputs[at][tokens], w) for name, at, w in places}
        if not self.backward:
            return found
        rows_E = np.bincount(self._ids_TK.ravel(), minlength=self.experts)
        expert = int(np.argmin(np.where(rows_E > 0, rows_E, rows_E.max() + 1)))
        rows, copies = np.nonzero(self._ids_TK == expert)
        alone, weights = slice(expert, expert + 1), np.asarray(scores)[rows, copies][:, None]

        @jax.jit
        def of_expert(x, ct, w_in, w_out, weights):
            ids = np.zeros((rows.size, 1), np.int32)
            return self._reference(x, ct, w_in, w_out, weights, ids)[2:4]

        want = of_expert(x[rows], ct[rows], w_in[alone], w_out[alone], jnp.asarray(weights))
        places = zip(("w_in", "w_out"), (2, 3), want)
        return found | {name: relative_distance(outputs[at][alone], w) for name, at, w in places}


@dataclass(frozen=True)
class Products:
    """Grouped products of M rows with G matrices [K, N], and with the backward their gradients.

    alignment: of the groups' sizes; with 1 the kernels are those for groups of any size.
    """

    rows: int
    contraction: int
    columns: int
    groups: int
    backward: bool
    alignment: int = ROWS

    @property
    def name(self) -> str:
        """For messages."""
        sizes = (self.rows, self.contraction, self.columns, self.groups)
        return f"{','.join(map(str, sizes))} {'fwdbwd' if self.backward else 'fwd'}"

    @cached_property
    def _sizes_G(self) -> np.ndarray:
        even = np.full(self.groups, 1 / self.groups)
        blocks = np.random.default_rng(SEED).multinomial(self.rows // self.alignment, even)
        return (self.alignment * blocks).astype(np.int32)

    def shapes(self) -> tuple[Any, ...]:
        """Of the inputs."""
        shape = jax.ShapeDtypeStruct
        return (
            shape((self.rows, self.contraction), jnp.bfloat16),
            shape((self.groups, self.contraction, self.columns), jnp.bfloat16),
            shape((self.rows, self.columns), jnp.bfloat16),
            shape((self.groups,), jnp.int32),
        )

    def inputs(self) -> tuple[Any, ...]:
        """Rows, matrices, cotangents, sizes."""
        lhs, rhs, ct, _ = self.shapes()
        scale = self.contraction**-0.5
        drawn = (_draw(0, lhs.shape), _draw(1, rhs.shape, scale), _draw(2, ct.shape))
        return (*drawn, jnp.asarray(self._sizes_G))

    def function(self, lhs, rhs, ct, sizes):
        """The products, and with the backward the gradients of rows and matrices."""

        def product(lhs, rhs):
            return grouped_matmul(lhs, rhs, sizes, alignment=self.alignment, backend="mosaic_gpu")

        if not self.backward:
            return (product(lhs, rhs),)
        out, pull = jax.vjp(product, lhs, rhs)
        return out, *pull(ct)

    def errors(self, inputs: tuple[Any, ...], outputs: Any) -> dict[str, float]:
        """Of the smallest group that is not empty, and of the largest."""
        lhs, rhs, ct, _ = inputs
        ends = np.cumsum(self._sizes_G)
        found: dict[str, float] = {}
        smallest = np.where(self._sizes_G > 0, self._sizes_G, self.rows + 1).argmin()
        product = partial(jnp.matmul, precision="highest", preferred_element_type=jnp.float32)
        for g in {int(smallest), int(self._sizes_G.argmax())}:
            rows = slice(int(ends[g] - self._sizes_G[g]), int(ends[g]))
            pairs = {"out": (outputs[0][rows], product(lhs[rows], rhs[g]))}
            if self.backward:
                pairs["lhs"] = outputs[1][rows], product(ct[rows], rhs[g].T)
                pairs["rhs"] = outputs[2][g], product(lhs[rows].T, ct[rows])
            found |= {f"{name} of {g}": relative_distance(*p) for name, p in pairs.items()}
        return found
