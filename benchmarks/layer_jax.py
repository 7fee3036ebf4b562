"""Measures the JAX implementations; started by `expert_layer.py`, in a process of its own."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from layer_check import make_gradient_errors, make_output_error
from layer_peers import IMPLS, Candidate
from layer_shapes import Inputs, Shape
from layer_timing import (
    DECODE_LAYERS,
    LOOP_LAYERS,
    Reporter,
    Timing,
    check,
    measure,
    parse_worker,
    work,
)


def expert_weights(shape: Shape, inputs: Inputs) -> dict[str, jax.Array]:
    """Bf16 expert weights drawn on the device, normal / √fan-in, and the float32 router."""

    def normal(seed: int, size: tuple[int, ...], fan_in: int) -> jax.Array:
        def draw() -> jax.Array:
            value = jax.random.normal(jax.random.key(seed), size, jnp.float32)
            return (value * fan_in**-0.5).astype(jnp.bfloat16)

        return jax.jit(draw)()

    experts, d_model, hidden = shape.experts, shape.d_model, shape.hidden
    return {
        "router": jnp.asarray(inputs.router_DE),
        "w_in": normal(1, (experts, d_model, 2, hidden), d_model),
        "w_out": normal(2, (experts, hidden, d_model), hidden),
    }


class Bench:
    """One shape: its arrays, its references, and the measurements of one candidate."""

    def __init__(self, shape: Shape, inputs: Inputs, groups: int) -> None:
        self.shape, self.groups = shape, groups
        self.weights = expert_weights(shape, inputs)
        self.bias = None if inputs.bias_E is None else jnp.asarray(inputs.bias_E)
        self.x_TD = jnp.asarray(inputs.x_TD.astype(jnp.bfloat16))
        self.ct_TD = jnp.asarray(inputs.ct_TD.astype(jnp.bfloat16))
        self.sample_S = jnp.asarray(inputs.sample.astype(np.int32))
        sampled_T = jnp.zeros(shape.tokens, bool).at[self.sample_S].set(True)
        self.sparse_ct_TD = jnp.where(sampled_T[:, None], self.ct_TD, jnp.bfloat16(0))
        self.output_error = make_output_error(shape.top_k)
        self.gradient_errors = make_gradient_errors(shape.top_k)
        self.first = (self.weights, self.bias, self.x_TD)

    def time(self, compiled: Callable, *arguments: Any, layers: int = 1) -> Timing:
        """Times a compiled function."""
        return measure(lambda: compiled(*arguments), jax.block_until_ready, self.groups, layers)

    def forward(self, candidate: Candidate) -> tuple[Timing, dict[str, Any]]:
        """Checks, then times y."""
        first = (candidate.prepare(self.weights), self.bias, self.x_TD)
        compiled = jax.jit(candidate.forward).lower(*first).compile()
        y_TD = compiled(*first)
        error = self.output_error(self.weights, self.bias, self.x_TD, self.sample_S, y_TD)
        more = {"error_vs_float32": check(float(error), "y", candidate.limit)}
        del y_TD
        called = self.time(compiled, *first)
        if not self.shape.decode:
            return called, more
        row, loop = self.decode(candidate, first)
        others = {"ms_single_calls": round(called.ms, 5), "ms_in_a_loop": round(loop.ms, 5)}
        return row, more | others

    def decode(self, candidate: Candidate, first: tuple) -> tuple[Timing, Timing]:
        """Times programs of many layers in a row, as a decoding step is: one after another, as the
        model's layers are by default, and in a loop, as with `scan_layers`.

        A call of one layer is over before the next is issued, so calls would time the host. Each
        layer's input depends on the output before it and yet equals x in every bit, so that the
        layers cannot be merged and all touch the same experts: 1e-30·y is lost when it is added.
        """

        def layer(weights: dict, bias: Any, x_TD: jax.Array) -> jax.Array:
            y_TD = candidate.forward(weights, bias, x_TD)
            return x_TD + y_TD * jnp.bfloat16(1e-30)

        def in_a_row(weights: dict, bias: Any, x_TD: jax.Array) -> jax.Array:
            for _ in range(DECODE_LAYERS):
                x_TD = layer(weights, bias, x_TD)
            return x_TD

        def in_a_loop(weights: dict, bias: Any, x_TD: jax.Array) -> jax.Array:
            return lax.fori_loop(0, LOOP_LAYERS, lambda _, x: layer(weights, bias, x), x_TD)

        def timed(chain: Callable, layers: int) -> Timing:
            compiled = jax.jit(chain).lower(*first).compile()
            if not bool(jnp.array_equal(compiled(*first), self.x_TD)):
                raise ArithmeticError("the chain of layers changed its input")
            return self.time(compiled, *first, layers=layers)

        return timed(in_a_row, DECODE_LAYERS), timed(in_a_loop, LOOP_LAYERS)

    def backward(self, candidate: Candidate) -> tuple[Timing, dict[str, Any]]:
        """Checks all gradients, then times y and them."""
        arguments = (*self.first, self.ct_TD)
        compiled = jax.jit(candidate.gradients).lower(*arguments).compile()
        sparse = (*self.first, self.sparse_ct_TD)
        errors = self.gradient_errors(*sparse, self.sample_S, compiled(*sparse)[1])
        found = {name: check(float(e), f"gradient of {name}") for name, e in sorted(errors.items())}
        return self.time(compiled, *arguments), {"gradient_errors_vs_float32": found}

    def run(self, impl: str, backward: bool, report: Reporter) -> None:
        """Measures every candidate of an implementation and reports the fastest."""
        best: tuple[Timing, dict[str, Any]] | None = None
        why: BaseException | str = "forward only: it has no gradient"
        try:
            for candidate in IMPLS[impl](self.shape, self.bias is not None):
                if backward and candidate.gradients is None:
                    break
                try:
                    timing, more = (self.backward if backward else self.forward)(candidate)
                except Exception as error:  # out of memory, refused, wrong: a result as well
                    why = error
                    continue
                if best is None or timing.ms < best[0].ms:
                    config = {"config": candidate.config} if candidate.config else {}
                    best = timing, more | config
        except Exception as error:  # not installed, or not for this jax
            why = error
        if best is None:
            report.failed(backward, why)
        else:
            report.row(backward, best[0], **best[1])


def main() -> None:
    args = parse_worker()
    for todo, shape, inputs in work(args):
        bench = Bench(shape, inputs, args.repeats)
        for impl, name, which in todo:
            report = Reporter(impl, name, shape, inputs, args.routing)
            bench.run(impl, which == "fwdbwd", report)
            gc.collect()
            # A fault of a kernel stays with the process: this raises, and a new one goes on.
            jax.block_until_ready(bench.x_TD + bench.x_TD)
        del bench
        jax.clear_caches()
        gc.collect()


if __name__ == "__main__":
    main()
