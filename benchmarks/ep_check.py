"""A small layer over all devices against a plain one in float32 on one device.

The plain one shares no code with what is timed: every expert computes every token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from ep_programs import Arrays, lower
from ep_shapes import PASSES, PEER, ROUTINGS, Variant, make_inputs
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh
from layer_shapes import LIMIT, Shape

ROUNDED = 8e-2  # of int8 and float8: two roundings forward, two more backward


def small_shape(devices: int) -> Shape:
    """Wide enough for the kernels, and several tiles of rows for some experts."""
    return Shape(tokens=128, d_model=256, hidden=128, experts=4 * devices, top_k=4)


def _routed(logits_TE: jax.Array, top_k: int) -> jax.Array:
    """Scores [T, E] of a softmax over the K best."""
    kth_T = jnp.sort(logits_TE, axis=1)[:, -top_k]
    best_TE = jnp.where(logits_TE >= kth_T[:, None], logits_TE, -jnp.inf)
    return jax.nn.softmax(best_TE, axis=1)


def plain(weights: dict, scores_TE: jax.Array, x_TD: jax.Array) -> jax.Array:
    """Σ_e score·expert_e(x), float32 [T, D]."""

    def add(y_TD: jax.Array, expert: Any) -> tuple[jax.Array, None]:
        w_in_DNH, w_out_HD, score_T = expert
        h_TNH = jnp.einsum("td,dnh->tnh", x_TD, w_in_DNH, precision="highest")
        a_TH = jax.nn.silu(h_TNH[:, 0]) * h_TNH[:, 1]
        return y_TD + score_T[:, None] * jnp.dot(a_TH, w_out_HD, precision="highest"), None

    of_expert = (weights["w_in"], weights["w_out"], scores_TE.T)
    return lax.scan(add, jnp.zeros_like(x_TD), of_expert)[0]


@jax.jit
def _reference(weights: dict, scores: Any, x_TD: jax.Array, ct_TD: jax.Array) -> Any:
    """y, and the gradients of the weights and of x; `scores` are [T, E], or (bias, K)."""

    def y(weights: dict, x_TD: jax.Array) -> jax.Array:
        if isinstance(scores, dict):
            logits_TE = jnp.dot(x_TD, weights["router"], precision="highest") + scores["bias"]
            return plain(weights, _routed(logits_TE, scores["ones"].size), x_TD)
        return plain(weights, scores, x_TD)

    y_TD, pull = jax.vjp(y, weights, x_TD)
    return y_TD, *pull(ct_TD)


def relative(got: Any, want: Any) -> float:
    """‖got − want‖ / ‖want‖; NaN stays NaN."""
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


class SmallCase:
    """The small layer's arrays and references, for all variants on a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.shape = mesh, small_shape(mesh.size)
        self.inputs = make_inputs(self.shape, mesh.size, seed=1)
        self.arrays = Arrays(self.shape, self.inputs, mesh)
        self.wanted: dict[str, Any] = {}

    def reference(self, routing: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Y and gradients; `even` is the peer's routing."""
        if routing not in self.wanted:
            arrays = (self.arrays.weights, self.arrays.x_TD, self.arrays.ct_TD)
            weights, x_TD, ct_TD = jax.tree.map(
                lambda a: jnp.asarray(np.asarray(a).astype(np.float32)), arrays
            )
            top_k = self.shape.top_k
            if routing == "even":
                scores = np.zeros((x_TD.shape[0], self.shape.experts), np.float32)
                np.put_along_axis(scores, self.inputs.ids_TK, self.inputs.scores_TK, axis=1)
                given: Any = jnp.asarray(scores)
            else:
                bias = jnp.asarray(self.inputs.bias_E[routing])
                given = {"bias": bias, "ones": jnp.ones(top_k)}
            y, found, x_ct = _reference(weights, given, x_TD, ct_TD)
            self.wanted[routing] = jax.device_get((y, {**found, "x": x_ct}))
        return self.wanted[routing]

    def lower(self, variant: Variant) -> dict[str, Any]:
        """The variant's two programs at this size, to be compiled with any options."""
        found = {}
        for which in PASSES:
            small = replace(variant, which=which)
            arguments = self.arrays.arguments(small, "balanced")
            found[which] = lower(self.shape, small, "total", self.mesh, arguments).lowered
        return found

    def check(self, variant: Variant, compiled: dict[str, Any]) -> dict[str, float]:
        """Norm-relative errors of y and of each gradient, the larger of both routings.

        Args:
            variant: says what the programs are.
            compiled: what `lower` gave.

        Raises:
            ArithmeticError: one is above the limit.
        """
        found: dict[str, float] = {}
        for routing in ("even",) if variant.impl == PEER else ROUTINGS:
            for name, error in self._errors(variant, routing, compiled).items():
                limit = limit_of(variant)
                if not error <= limit:
                    text = f"{name} is off by {error:.3g} of its norm, limit {limit}"
                    raise ArithmeticError(f"small layer, {routing} routing: {text}")
                found[name] = max(float(f"{error:.3g}"), found.get(name, 0.0))
        return dict(sorted(found.items()))

    def _errors(self, variant: Variant, routing: str, compiled: dict[str, Any]) -> dict[str, float]:
        want_y, wants = self.reference(routing)
        arguments = self.arrays.arguments(replace(variant, which="fwdbwd"), routing)
        _, grads, x_ct = compiled["fwdbwd"](*arguments)
        gots = {name: np.asarray(g).astype(np.float32) for name, g in grads.items()}
        if "router" in gots:
            gots["router"] = gots["router"].sum(axis=0)
        gots["x"] = x_ct
        y_TD = compiled["fwd"](*arguments[:-1])
        return {"y": relative(y_TD, want_y), **{n: relative(g, wants[n]) for n, g in gots.items()}}


def limit_of(variant: Variant) -> float:
    """The largest norm-relative error."""
    return LIMIT if variant.wire == "exact" else ROUNDED


@jax.jit
def _norms(got: Any, want: Any) -> list[jax.Array]:
    def pair(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.stack([jnp.sum(jnp.square(a - b)), jnp.sum(jnp.square(b))])

    return jax.tree.leaves(jax.tree.map(pair, got, want))


def difference(got: Any, want: Any) -> float:
    """The largest norm-relative difference of two results, computed where they live."""
    pairs = [np.asarray(p, np.float64) for p in _norms(got, want)]
    return float(max(np.sqrt(p[0] / p[1]) if p[1] else np.sqrt(p[0]) for p in pairs))
