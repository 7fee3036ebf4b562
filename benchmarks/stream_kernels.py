"""RMSNorm of the residual stream and attention's heads: kernels against XLA's programs.

    python benchmarks/stream_kernels.py           # one Hopper GPU
    python benchmarks/stream_kernels.py --tiny    # a rehearsal; writes nothing

Writes benchmarks/results/stream_kernels.json. Rows are random. A row for a shape and a program:
`ms` by the kernel, `xla_ms` of plain JAX compiled by XLA, medians of rounds in one process;
`floor_ms`, what must move (see `pallas_kernels.norm.api` and `pallas_kernels.heads.api`) at 3.05
TB/s. XLA's programs stand alone here: within a step it joins them with what comes before and after.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
from common import write_results
from ep_timing import Rounds
from jax import numpy as jnp

from moejax.model.norm import rms_normalize
from moejax.model.rope import rotate, turns
from pallas_kernels.heads import api as heads
from pallas_kernels.interpreting import interpreted
from pallas_kernels.norm import api as norm

SHAPES = {  # tokens, width, query heads, key heads, head dim
    "small": (32768, 1024, 16, 4, 64),
    "qwen3-30b": (32768, 2048, 32, 4, 128),
    "mixtral": (16384, 4096, 32, 8, 128),
    "deepseek-v3": (8192, 7168, 0, 0, 0),
}
TINY = {"tiny": (64, 64, 4, 2, 16)}
EPS = 1e-6
BANDWIDTH = 3.05e12  # bytes a second, as measured on an H100
BYTES = 2

Program = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], float]


def random(key: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)


def of_norm(tokens: int, width: int) -> dict[str, Program]:
    """Forward with a sum, backward with the stream's cotangent: kernel, XLA, operands, bytes."""
    x, other, ct, passed = (random(i, tokens, width) for i in range(4))
    scale = jnp.linspace(0.5, 1.5, width, dtype=jnp.float32)
    inverse = norm.add_and_normalize(x, None, scale, EPS, backend="reference")[2]

    def forward(x: Any, other: Any, scale: Any, backend: str) -> Any:
        return norm.add_and_normalize(x, other, scale, EPS, backend=backend)

    def backward(x: Any, inverse: Any, scale: Any, ct: Any, passed: Any, backend: str) -> Any:
        return norm.normalize_backward(x, inverse, scale, [ct], passed, backend=backend)

    once = float(tokens * width * BYTES)
    return {
        name: (
            partial(function, backend="mosaic_gpu"),
            partial(function, backend="reference"),
            operands,
            4 * once,
        )
        for name, function, operands in (
            ("norm", forward, (x, other, scale)),
            ("norm_backward", backward, (x, inverse, scale, ct, passed)),
        )
    }


def of_heads(tokens: int, queries: int, keys: int, head_dim: int) -> dict[str, Program]:
    """Likewise, for the heads of q, k and v."""
    qkv = random(1, tokens, queries + 2 * keys, head_dim)
    cts = tuple(random(2 + i, tokens, n, head_dim) for i, n in enumerate((queries, keys, keys)))
    positions = jnp.arange(tokens, dtype=jnp.int32)[None] % 4096
    cos, sin = (turn[0] for turn in turns(positions, head_dim, 1e6))
    scales = tuple(jnp.linspace(0.5, 1.5, head_dim, dtype=jnp.float32) * i for i in (1, 2))

    def forward(qkv: Any, cos: Any, sin: Any, scales: Any) -> Any:
        return heads.heads_forward(qkv, cos, sin, scales, keys, EPS)

    def backward(qkv: Any, cos: Any, sin: Any, scales: Any, cts: Any) -> Any:
        return heads.heads_backward(qkv, cos, sin, scales, cts, EPS)

    def plain(qkv: Any, scales: Any) -> Any:
        parts = jnp.split(qkv[None], [queries, queries + keys], axis=2)
        turned = [
            rotate(rms_normalize(part, scale, EPS), positions, 1e6)[0]
            for part, scale in zip(parts, scales)
        ]
        return (*turned, parts[2][0])

    def plain_backward(qkv: Any, cos: Any, sin: Any, scales: Any, cts: Any) -> Any:
        return jax.vjp(plain, qkv, scales)[1](cts)

    once = float(qkv.size * BYTES)
    values = keys / (queries + 2 * keys)  # whose numbers the backward does not read
    return {
        "heads": (forward, lambda q, c, s, w: plain(q, w), (qkv, cos, sin, scales), 2 * once),
        "heads_backward": (
            backward,
            plain_backward,
            (qkv, cos, sin, scales, cts),
            (3 - values) * once,
        ),
    }


def measure(shape: str, sizes: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """The rows of one shape."""
    tokens, width, *of_attention = sizes
    programs = of_norm(tokens, width)
    if all(of_attention):
        programs |= of_heads(tokens, *of_attention)
    calls = {}
    for name, (kernel, plain, operands, _) in programs.items():
        for kind, function in (("kernel", kernel), ("xla", plain)):
            compiled = jax.jit(function).lower(*operands).compile()
            calls[name, kind] = partial(compiled, *operands)
    for name in programs:
        made, wanted = (jax.tree.leaves(calls[name, kind]()) for kind in ("kernel", "xla"))
        for a, b in zip(made, wanted, strict=True):
            a, b = a.astype(jnp.float32), b.astype(jnp.float32).reshape(a.shape)
            error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
            assert error < 5e-3, f"{shape}: {name}: {error}"
    timed = Rounds(calls)
    timed.warm_up()
    for _ in range(rounds):
        timed.run()
    assert not timed.errors, timed.errors
    found = []
    for name, (*_, moved) in programs.items():
        ms, plain_ms = (timed.ms((name, kind)) for kind in ("kernel", "xla"))
        row = {"shape": shape, "program": name, "tokens": tokens, "megabytes": moved / 1e6}
        row |= {"floor_ms": round(1e3 * moved / BANDWIDTH, 4), "ms": round(ms, 4)}
        row |= {"xla_ms": round(plain_ms, 4), "xla_over_ours": round(plain_ms / ms, 3)}
        print(row, flush=True)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true")
    flags = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        if flags.tiny:
            stack.enter_context(interpreted())
        for shape, sizes in TINY.items() if flags.tiny else SHAPES.items():
            if flags.tiny or shape in flags.shapes:
                rows += measure(shape, sizes, flags.rounds)
            if not flags.tiny:
                write_results("stream_kernels", rows)


if __name__ == "__main__":
    main()
