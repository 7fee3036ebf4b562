"""Problems for every backend of the kernels' operations, with float64 results and plain bf16 ones.

A routing is data: all routings of one size run by one compiled function.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import jax
import numpy as np
from float8_flips import cut_hidden, other_roundings, without_flips
from jax import numpy as jnp
from kernel_support import BFLOAT16, ON_GPU, draw, padded_layout, wide
from oracle import activate, mlp

from pallas_kernels.fused_experts.api import fused_experts
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.hopper import compat as hopper
from pallas_kernels.quantized_experts.api import quantized_experts
from pallas_kernels.quantized_experts.format import (
    BLOCK,
    quantize,
    rows_through_float8,
)
from pallas_kernels.tpu import compat as tpu

INTERPRETERS = {"mosaic_gpu": hopper.interpreted, "mosaic_tpu": tpu.interpreted}
PADDED = 128


def context(backend):
    """Kernels are interpreted, with nan in memory that was not written, unless they can run."""
    return nullcontext() if ON_GPU else INTERPRETERS.get(backend, nullcontext)()


def poison():
    """Fills a GPU's free memory, of which the next outputs are made, with nan."""
    if ON_GPU:
        jax.block_until_ready([jnp.full((2**24,), jnp.nan) for _ in range(4)])


def _grouped(arrays, maps, **options):
    return grouped_matmul(arrays["lhs"], arrays["rhs"], maps["sizes"], **options)


def _fused(arrays, maps, **options):
    names = ("x", "w_in", "w_out", "scores")
    layout = (maps["place"], maps["copy"], maps["sizes"])
    biases = {"b_in_SNH": arrays.get("b_in"), "b_out_SD": arrays.get("b_out")}
    return fused_experts(*(arrays[n] for n in names), *layout, **biases, **options)


def _quantized(arrays, maps, **options):
    names = ("x", "w_in", "w_out", "scores")
    layout = (maps["place"], maps["copy"], maps["sizes"])
    return quantized_experts(*(arrays[n] for n in names), *layout, **options)


# XLA on a GPU would keep float32 between the operations of the plain bfloat16 reference.
ROUNDING = {"compiler_options": {"xla_allow_excess_precision": False}} if ON_GPU else {}


@partial(jax.jit, static_argnames=("function", "options"), **ROUNDING)
def _run(arrays, maps, ct, *, function, options):
    forward = partial(function, maps=maps, **dict(options))
    if ct is None:
        return {"out": forward(arrays)}
    out, pull = jax.vjp(forward, arrays)
    return {"out": out, **pull(ct)[0]}


@dataclass
class Problem:
    """Operands, the float64 results {"out", and a gradient for each array}, and bf16's error.

    function, arrays, maps, options: what `run` calls, differentiated by the arrays.
    ct: of the output; None where there is no gradient.
    exact: what a backend should give.
    scales: what errors are relative to where that is not the norm, by name.
    plain: results of the plain reference in bfloat16, and what they should be.
    hidden_values: whose rounding is in all results, the large ones' above all.
    without_flips: of an output, on a GPU: see `float8_flips`.
    """

    function: object
    arrays: dict
    maps: dict
    options: dict
    ct: np.ndarray | None
    exact: dict
    scales: dict = field(default_factory=dict)
    plain: tuple[dict, dict] = None
    hidden_values: int = 2**31
    without_flips: object = None

    def run(self, backend, *, gradient=True):
        """What a backend gives, on poisoned memory."""
        poison()
        options = tuple(sorted({**self.options, "backend": backend}.items()))
        ct = self.ct if gradient else None
        with context(backend):
            results = _run(self.arrays, self.maps, ct, function=self.function, options=options)
            return jax.tree.map(np.asarray, results)

    def check(self, results):
        """Each result, within 1e-2 and 1.1 times the plain reference's error; zeros are exact.

        Errors are samples: of n roundings, the ratio of two spreads by about 1 / √n; of few it says
        nothing. A row's hidden values are rounded once for all that comes of them.
        """
        plain, should = self.plain or (self.run("reference"), self.exact)
        for name, got in results.items():
            want = self.exact[name]
            got = np.asarray(got, np.float64)
            assert np.isfinite(got).all(), name
            zero = ~want.reshape(len(want), -1).any(axis=1)
            assert not got[zero].any(), f"{name}: rows or experts that nobody uses"
            if not want.any():
                continue
            if self.without_flips is not None:
                got = self.without_flips(got)
            scale = self.scales.get(name) or np.linalg.norm(want)
            error, of_plain = (
                np.linalg.norm(np.asarray(g, np.float64) - w) / scale
                for g, w in ((got, want), (plain[name], should[name]))
            )
            assert error <= 1e-2, (name, error)
            count = min(np.count_nonzero(want), self.hidden_values // 8)
            if count >= 64:
                allowed = 1.1 * (1 + 3 / np.sqrt(count)) * of_plain
                assert error <= allowed + 1e-7, (name, error, of_plain)


def grouped_problem(rng, sizes, *, rows, k, n):
    """Rows of no group hold no numbers: they must not be looked at."""
    lhs, rhs, ct = draw(rng, rows, k), draw(rng, len(sizes), k, n), draw(rng, rows, n)
    exact = {
        "out": np.zeros(ct.shape),
        "lhs": np.zeros(lhs.shape),
        "rhs": np.zeros(rhs.shape),
    }
    lhs64, rhs64, ct64 = wide(lhs, rhs, ct)
    for g, end in enumerate(np.cumsum(sizes)):
        mine = slice(end - sizes[g], end)
        exact["out"][mine] = lhs64[mine] @ rhs64[g]
        exact["lhs"][mine] = ct64[mine] @ rhs64[g].T
        exact["rhs"][g] = lhs64[mine].T @ ct64[mine]
    lhs[sum(sizes) :], ct[sum(sizes) :] = np.nan, np.inf
    maps = {"sizes": np.asarray(sizes, np.int32)}
    return Problem(_grouped, {"lhs": lhs, "rhs": rhs}, maps, {}, ct, exact)


def _maps(ids, slots):
    """Places, as many whatever the routing, with a tile that no slot has."""
    busy = min(slots, ids.size)
    room = -(-(ids.size + busy * (PADDED - 1)) // PADDED) * PADDED + PADDED
    used = padded_layout(ids, slots, PADDED, spare=0)[2].sum()
    place, copy, sizes = padded_layout(ids, slots, PADDED, spare=room - int(used))
    return {"place": place, "copy": copy, "sizes": sizes}


def layer_arrays(rng, ids, *, slots, d_model, hidden, parts, d_out=None, biases=False, rows=1.0):
    d_out = d_out or d_model
    arrays = {
        "x": draw(rng, len(ids), d_model, scale=rows),
        "w_in": draw(rng, slots, d_model, parts, hidden, scale=d_model**-0.5),
        "w_out": draw(rng, slots, hidden, d_out, scale=hidden**-0.5),
        "scores": (0.1 + rng.random(ids.shape)).astype(np.float32) * (ids < slots),
    }
    if biases:
        arrays |= {"b_in": draw(rng, slots, parts, hidden), "b_out": draw(rng, slots, d_out)}
    return arrays


def exact_layer(arrays, ids, ct, activation):
    """The layer and all its gradients in float64, one slot at a time; and scales.

    A score's gradient is a sum of D terms, of which little may be left. It is as well one over
    hidden units, and over projections; a rounding of any of these moves it by a part of its term.
    """
    a64 = {name: np.asarray(a, np.float64) for name, a in arrays.items()}
    ct = np.asarray(ct, np.float64)
    exact = {"out": np.zeros(ct.shape), **{name: np.zeros(a.shape) for name, a in a64.items()}}
    terms = 0.0
    for s in range(len(a64["w_in"])):
        rows, js = np.nonzero(ids == s)
        biases = [a64[b][s] if b in a64 else 0.0 for b in ("b_in", "b_out")]
        y, pull = mlp(a64["x"][rows], a64["w_in"][s], a64["w_out"][s], *biases, activation)
        weight = a64["scores"][rows, js][:, None]
        np.add.at(exact["out"], rows, weight * y)
        exact["scores"][rows, js] = np.sum(y * ct[rows], axis=1)
        h = np.einsum("td,dnh->tnh", a64["x"][rows], a64["w_in"][s]) + biases[0]
        hidden, pull_activation = activate(h, activation)
        hidden_ct = ct[rows] @ a64["w_out"][s].T
        parts = (y, ct[rows]), (hidden, hidden_ct), (h, pull_activation(hidden_ct))
        terms += sum(np.sum((value * its_ct) ** 2) for value, its_ct in parts)
        x_ct, *cts = pull(weight * ct[rows])
        np.add.at(exact["x"], rows, x_ct)
        for name, value in zip(("w_in", "w_out", "b_in", "b_out"), cts):
            if name in exact:
                exact[name][s] = value
    return exact, {"scores": np.sqrt(terms)}


def fused_problem(rng, ids, *, slots, activation="swiglu", **shapes):
    parts = 1 if activation in ("gelu", "relu2") else 2
    arrays = layer_arrays(rng, ids, slots=slots, parts=parts, **shapes)
    ct = draw(rng, len(ids), arrays["w_out"].shape[2])
    results = exact_layer(arrays, ids, ct, activation)
    return Problem(
        _fused,
        arrays,
        _maps(ids, slots),
        {"activation": activation},
        ct,
        *results,
        hidden_values=np.count_nonzero(ids < slots) * arrays["w_out"].shape[1],
    )


def expand(q):
    """w[..., k, n] = values[..., n, k] · scales[..., n // 128, k // 128], in float64."""
    values, scales = np.asarray(q.values).astype(np.float64), np.asarray(q.scales, np.float64)
    n, k = (np.arange(size) // BLOCK for size in values.shape[-2:])
    return np.swapaxes(values * scales[..., n[:, None], k[None, :]], -1, -2)


def _requantized(a):
    """[rows, H] through e4m3 by rows and blocks of 128, in float64."""
    return np.asarray(jax.jit(rows_through_float8)(a.astype(np.float32)), np.float64)


def quantized_problem(rng, ids, dtype, rows, *, slots, activation="swiglu", **widths):
    """Exact for the quantized weights, and for rows and hidden values rounded where rows are."""
    parts = 1 if activation in ("gelu", "relu2") else 2
    arrays = layer_arrays(rng, ids, slots=slots, parts=parts, **widths)
    q_in = quantize(jnp.swapaxes(jnp.asarray(arrays["w_in"]), 1, 2), dtype)
    q_out = quantize(jnp.asarray(arrays["w_out"]), dtype)
    problem_arrays = {**arrays, "w_in": q_in, "w_out": q_out}
    arrays |= {"w_in": np.swapaxes(expand(q_in), 1, 2), "w_out": expand(q_out)}
    if rows == "float8":
        arrays["x"] = _requantized(arrays["x"])
    zeros = np.zeros((len(ids), arrays["w_out"].shape[2]))
    should, _ = exact_layer(arrays, ids, zeros, activation)
    exact, without = should["out"], None
    if rows == "float8":
        exact, rounded = np.zeros_like(exact), []
        for s in range(slots):
            at, js = np.nonzero(ids == s)
            h = np.einsum("td,dnh->tnh", arrays["x"][at], arrays["w_in"][s])
            a, pull = activate(h, activation)
            scores = arrays["scores"][at, js][:, None]
            np.add.at(exact, at, scores * (_requantized(a) @ arrays["w_out"][s]))
            if ON_GPU:
                _, cut = cut_hidden(problem_arrays["x"][at], q_in, s)
                error = np.sqrt(((pull(np.ones_like(a)) * cut) ** 2).sum(1))
                rounded.append((at, np.full(len(at), s), scores * other_roundings(a, error)))
        if ON_GPU:
            flips = map(np.concatenate, zip(*rounded, strict=True))
            without = partial(without_flips, exact=exact, w_out=arrays["w_out"])
            without = partial(without, **dict(zip(("tokens", "slots", "changes"), flips)))
    maps, options = _maps(ids, slots), {"activation": activation}
    rounded = {name: np.asarray(a, BFLOAT16) for name, a in arrays.items()}
    rounded["scores"] = arrays["scores"]
    plain = Problem(_fused, rounded, maps, options, None, {}).run("reference")
    return Problem(
        _quantized,
        problem_arrays,
        maps,
        {**options, "rows": rows},
        None,
        {"out": exact},
        plain=(plain, should),
        hidden_values=np.count_nonzero(ids < slots) * arrays["w_out"].shape[1],
        without_flips=without,
    )
