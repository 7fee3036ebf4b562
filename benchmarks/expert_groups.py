"""Experts computed in groups, exactly, against single experts: one layer in bf16 on one GPU.

    python benchmarks/expert_groups.py
    JAX_PLATFORMS=cpu python benchmarks/expert_groups.py --tiny    # a rehearsal

Writes benchmarks/results/expert_groups_h100.json after every row. All of a shape is measured in one
process on the same tokens, router and expert weights; those of a group are stored side by side
(`moejax.wide_bank`), and its output is compared with that of single experts before it is timed.

- `likeness` says how far routing goes by groups: 0 chooses experts independently of each other; the
  columns of a group's members have that much of their variance in common, so that at 1 they are one
  and tokens choose whole groups. Groups differ by size, so inputs do, and single experts are timed
  on each.
- `pairs` are the groups of a token on these inputs. `ratio` is the median time over that of single
  experts, `predicted_ratio` what `group_prediction` expects of it for these pairs,
  `predicted_fused_ratio` of kernels that would gather, activate and weigh in the first product as
  those of single experts do.
- `ms` is the median of groups of back-to-back calls of one layer, router included, `ms_spread`
  (largest − smallest) / median. Calls of few tokens may be shorter than the host takes to issue
  them; ratios of these tell little.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from common import write_results
from group_prediction import ratio, work
from layer_shapes import LIMIT, SHAPES, Inputs, Shape, find_shape, make_inputs

SIZES = {"mixtral_8x7b": (2,), "qwen3_30b_a3b": (2, 4, 8)}
TOKENS = (1, 16, 256, 4096, 32768)
LEAST_BACKWARD = 4096  # tokens from which gradients are timed, too


def alike(shape: Shape, members: int, likeness: float, inputs: Inputs) -> Inputs:
    """The inputs with a router whose columns within a group have some variance in common."""
    rng = np.random.default_rng(2)
    groups = shape.experts // members
    common_DG = rng.standard_normal((shape.d_model, groups), np.float32)
    common_DE = np.repeat(common_DG, members, axis=1) / np.float32(np.sqrt(shape.d_model))
    own_DE = inputs.router_DE
    router_DE = np.sqrt(likeness) * common_DE + np.sqrt(1 - likeness) * own_DE
    return replace(inputs, router_DE=router_DE.astype(np.float32))


def pairs_on(inputs: Inputs, shape: Shape, members: int) -> float:
    """Groups of a token, in the mean; equal columns are taken in order."""
    logits_TE = inputs.x_TD @ inputs.router_DE
    chosen_TK = np.argsort(-logits_TE, axis=1, kind="stable")[:, : shape.top_k] // members
    return float(1 + (np.diff(np.sort(chosen_TK, axis=1), axis=1) > 0).sum(1).mean())


class Bench:
    """One shape, its arrays and the layer that is timed."""

    def __init__(self, shape: Shape, inputs: Inputs, repeats: int) -> None:
        import jax
        from jax import numpy as jnp
        from layer_jax import expert_weights

        self.shape, self.repeats = shape, repeats
        self.weights = expert_weights(shape, inputs)
        self.x_TD = jnp.asarray(inputs.x_TD.astype(jnp.bfloat16))
        self.ct_TD = jnp.asarray(inputs.ct_TD.astype(jnp.bfloat16))
        self._wait = jax.block_until_ready

    def laid(self, members: int) -> dict[str, Any]:
        """The weights as they are stored for groups."""
        import jax

        from moejax.wide_bank import laid_wide

        if members == 1:
            return self.weights
        lay = jax.jit(lambda w_in, w_out: laid_wide(w_in, w_out, members))
        w_in, w_out = lay(self.weights["w_in"], self.weights["w_out"])
        return self.weights | {"w_in": w_in, "w_out": w_out}

    def compiled(self, weights: dict[str, Any], members: int, backward: bool) -> Any:
        """The layer, or its gradients, for some stored weights."""
        import jax
        from layer_moejax import build, layer_config

        shape = self.shape
        config = layer_config(shape.hidden, shape.experts, shape.top_k)
        experts = replace(config.experts, together=members)
        forward, gradients = build(shape.d_model, replace(config, experts=experts), biased=False)
        arrays = (self.x_TD, self.ct_TD) if backward else (self.x_TD,)
        call = jax.jit(gradients if backward else forward)
        return call.lower(weights, None, *arrays).compile(), (weights, None, *arrays)

    def time(self, call: Any, arguments: tuple) -> Any:
        """The median time of a call."""
        from layer_timing import measure

        return measure(lambda: call(*arguments), self._wait, self.repeats)


def error_of(found: Any, right: Any) -> float:
    """Norm-relative."""
    found, right = (np.asarray(array, np.float32) for array in (found, right))
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows: of each shape, number of tokens, size and likeness."""
    for name in args.shapes:
        for tokens in args.tokens:
            shape = replace(find_shape(name, args.tiny), tokens=tokens)
            sizes = [s for s in SIZES[name] if not (shape.experts % s or shape.top_k % s)]
            inputs = make_inputs(shape, "uniform")
            bench = Bench(shape, inputs, args.repeats)
            for size, likeness in ((s, like) for s in sizes for like in args.likeness):
                made = alike(shape, size, likeness, inputs)
                bench.weights["router"] = made.router_DE
                yield from compared(bench, name, size, likeness, pairs_on(made, shape, size))
            del bench
            gc.collect()


def compared(
    bench: Bench, name: str, size: int, likeness: float, pairs: float
) -> Iterator[dict[str, Any]]:
    """Rows of the forward and, of many tokens, with gradients."""
    shape = bench.shape
    predicted = {
        "predicted_ratio": round(ratio(shape, size, pairs), 3),
        "predicted_fused_ratio": round(ratio(shape, size, pairs, fused=True), 3),
        "predicted_ms": round(work(shape, size, pairs).seconds * 1e3, 4),
    }
    for backward in (False, True) if shape.tokens >= LEAST_BACKWARD else (False,):
        row: dict[str, Any] = {
            "shape": name,
            "tokens": shape.tokens,
            "pass": "fwdbwd" if backward else "fwd",
            "size": size,
            "likeness": likeness,
            "pairs": round(pairs, 3),
        }
        try:
            plain, plain_arguments = bench.compiled(bench.laid(1), 1, backward)
            wide, arguments = bench.compiled(bench.laid(size), size, backward)
            if not backward:
                error = error_of(wide(*arguments), plain(*plain_arguments))
                if not error <= LIMIT:
                    raise ArithmeticError(f"y is off by {error:.3g} of its norm, limit {LIMIT}")
                row["error_vs_single"] = float(f"{error:.3g}")
            single, found = bench.time(plain, plain_arguments), bench.time(wide, arguments)
        except Exception as error:  # out of memory, refused, wrong: a result as well
            text = " ".join(str(error).split())
            yield row | {"error": f"{type(error).__name__}: {text}"[:300]}
            continue
        yield row | {
            "ms": round(found.ms, 5),
            "ms_spread": round(found.spread, 4),
            "single_ms": round(single.ms, 5),
            "single_ms_spread": round(single.spread, 4),
            "ratio": round(found.ms / single.ms, 4),
            **({} if backward else predicted),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--tokens", nargs="+", type=int, default=None)
    parser.add_argument("--likeness", nargs="+", type=float, default=[0.0, 0.9, 1.0])
    parser.add_argument("--repeats", type=int, default=9, help="timed groups of calls")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to rehearse anywhere")
    parser.add_argument("--name", help="default expert_groups_h100, nothing for --tiny")
    args = parser.parse_args()
    args.tokens = args.tokens or ([16, 192] if args.tiny else list(TOKENS))
    name = args.name or (None if args.tiny else "expert_groups_h100")
    assert set(SIZES) <= set(SHAPES)
    import jax

    if jax.devices()[0].platform == "cpu" and not args.tiny:
        raise SystemExit("no accelerator here: --tiny rehearses on the CPU")
    rows = []
    for row in measured(args):
        print(row, flush=True)
        rows.append(row)
        if name is not None:
            write_results(name, rows)


if __name__ == "__main__":
    main()
