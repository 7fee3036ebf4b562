"""What the links between the devices of one host carry, by collective and size.

    python benchmarks/links.py --minutes 5
    python benchmarks/links.py --collectives --ragged --sizes 67108864 --add
    JAX_PLATFORMS=cpu python benchmarks/links.py --tiny    # a rehearsal on fake devices

Writes benchmarks/results/links_h200x4.json after every size.

- `bytes` is what one device holds of the larger of operand and result. `all_to_all` and
  `all_to_all_uint8` (a packed payload) swap equal buckets; `all_gather` is the ring's way out;
  `sum_scatter` is its way home as the exchange does it, an all-to-all of bf16 pieces and a float32
  sum, `psum_scatter` XLA's own reduce-scatter; `permute` passes everything to the next device.
- `sent` is what a device sends to others, n devices: (n − 1)/n · bytes, for a permutation bytes
  (`sharding.traffic.sent_bytes`). It receives as much. `gbs` is sent / ms, in GB/s one way.
- `ms` is one of CHAIN collectives in one program, each on what the one before gave; for gathers and
  sums, which change the shape, that includes a copy of one piece. `ms_call` is a program of one.
  Both are medians of groups, in rounds with all collectives of that size; `spread` is (largest −
  smallest) / median. Data are normal or random bytes.
- Before it is timed each result up to 4 MiB is compared with NumPy's. What fails has `error`.
- `latency_ms` of the file: the shortest `ms` of each collective at any size.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from common import expert_mesh, write_results

KIB, MIB = 1 << 10, 1 << 20
SIZES = [64 * KIB << (2 * i) for i in range(8)]  # 64 KiB … 1 GiB
CHAIN = 8
CHECKED = 4 * MIB
WIDTH = 256  # columns of a row
RAGGED = "ragged_all_to_all"
COLLECTIVES = (
    "all_to_all",
    "all_to_all_uint8",
    "all_gather",
    "sum_scatter",
    "psum_scatter",
    "permute",
)
KINDS = {"all_gather": "all-gather", "permute": "permute"}  # others send an all-to-all's bytes


def operand_bytes(name: str, size: int, devices: int) -> int:
    """Bytes a device puts in."""
    return size // devices if name == "all_gather" else size


def make(name: str, devices: int) -> Callable:
    """The collective of a device's rows [M, WIDTH], inside the shard_map."""
    import jax
    from jax import lax
    from jax import numpy as jnp

    from moejax.config import EXACT_WIRE
    from moejax.exchange.wire import return_rows
    from sharding import collectives
    from sharding.mesh import EXPERT

    def all_to_all(x: jax.Array) -> jax.Array:
        return collectives.all_to_all(x.reshape(devices, -1, WIDTH), EXPERT).reshape(x.shape)

    def sum_scatter(x: jax.Array) -> jax.Array:
        back = return_rows(x, EXPERT, EXACT_WIRE).reshape(devices, -1, WIDTH)
        return jnp.sum(back.astype(jnp.float32), axis=0).astype(x.dtype)

    def ragged(x: jax.Array) -> jax.Array:
        rows, me = x.shape[0] // devices, lax.axis_index(EXPERT)
        starts = jnp.arange(devices, dtype=jnp.int32) * rows
        sizes = jnp.full(devices, rows, jnp.int32)
        lands = jnp.full(devices, me * rows, jnp.int32)
        return lax.ragged_all_to_all(
            x, jnp.zeros_like(x), starts, sizes, lands, sizes, axis_name=EXPERT
        )

    return {
        "all_to_all": all_to_all,
        "all_to_all_uint8": all_to_all,
        "all_gather": lambda x: collectives.all_gather(x, EXPERT),
        "sum_scatter": sum_scatter,
        "psum_scatter": lambda x: lax.psum_scatter(x, EXPERT, tiled=True),
        "permute": lambda x: lax.ppermute(
            x, EXPERT, [(i, (i + 1) % devices) for i in range(devices)]
        ),
        RAGGED: ragged,
    }[name]


def chained(name: str, devices: int) -> Callable:
    """CHAIN of them, each on what the one before gave."""
    from jax import lax

    from sharding.mesh import EXPERT

    one = make(name, devices)

    def chain(x: Any) -> Any:
        for _ in range(CHAIN):
            y = one(x)
            if name == "all_gather":
                # The next device's piece, so that pieces stay distinct.
                place = (lax.axis_index(EXPERT) + 1) % devices
                y = lax.dynamic_slice_in_dim(y, place * x.shape[0], x.shape[0])
            elif y.shape != x.shape:
                y = lax.dynamic_update_slice_in_dim(x, y * 0.5, 0, 0)  # variance of 4 terms
            x = y
        return x

    return chain


def expected(name: str, x_GMW: np.ndarray) -> np.ndarray:
    """What each device should get, [G, …, WIDTH]; float32 for sums."""
    devices = len(x_GMW)
    pieces = x_GMW.reshape(devices, devices, -1, WIDTH)
    match name:
        case "all_gather":
            return np.stack([x_GMW.reshape(-1, WIDTH)] * devices)
        case "sum_scatter" | "psum_scatter":
            return pieces.astype(np.float32).sum(axis=0)
        case "permute":
            return np.roll(x_GMW, 1, axis=0)
        case _:
            return pieces.swapaxes(0, 1).reshape(x_GMW.shape)


def check(name: str, got: np.ndarray, x_GMW: np.ndarray) -> None:
    """Compares a result with NumPy's.

    Raises:
        ArithmeticError: they differ, sums by more than bf16 may.
    """
    want = expected(name, x_GMW)
    got = got.reshape(want.shape)
    if "scatter" in name:
        error = np.linalg.norm(got.astype(np.float32) - want) / np.linalg.norm(want)
        if not error < 1e-2:
            raise ArithmeticError(f"wrong by {error:.3g} of its norm")
    elif not np.array_equal(got, want):
        raise ArithmeticError(f"{np.mean(got != want):.1%} of the elements are wrong")


def prepare(name: str, size: int, mesh: Any) -> tuple[Any, Any, Any]:
    """An operand [G·M, WIDTH], and two programs: one collective, and the chain."""
    import jax
    from jax import numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from sharding.mesh import EXPERT

    devices = mesh.size
    dtype = jnp.uint8 if name.endswith("uint8") else jnp.bfloat16
    rows = operand_bytes(name, size, devices) // (WIDTH * jnp.dtype(dtype).itemsize)

    def draw(key: jax.Array) -> jax.Array:
        if dtype == jnp.uint8:
            return jax.random.bits(key[0], (rows, WIDTH), dtype)
        return jax.random.normal(key[0], (rows, WIDTH), dtype)

    def sharded(body: Callable) -> Callable:
        spec = P(EXPERT)
        return jax.jit(
            jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        )

    keys = jax.device_put(
        jax.random.split(jax.random.key(0), devices), NamedSharding(mesh, P(EXPERT))
    )
    x = sharded(draw)(keys)
    options = {}
    if name == RAGGED and jax.default_backend() == "gpu":
        options = {"xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback": True}
    one, chain = (
        sharded(body).lower(x).compile(compiler_options=options)
        for body in (make(name, devices), chained(name, devices))
    )
    return x, one, chain


def measure(args: argparse.Namespace, mesh: Any) -> list[dict[str, Any]]:
    """The rows, size by size."""
    import jax
    from ep_timing import Rounds, one_line
    from expert_layer import earlier_rows

    from sharding.traffic import sent_bytes

    names = [*args.collectives, *([RAGGED] if args.ragged else [])]
    kept = earlier_rows(args.name, jax.__version__) if args.add and args.name else []
    found: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60 * args.minutes
    for size in args.sizes:
        calls: dict[tuple[str, str], Callable] = {}
        errors: dict[str, str] = {}
        with ThreadPoolExecutor(len(names)) as pool:
            late = time.monotonic() > deadline
            jobs = {} if late else {n: pool.submit(prepare, n, size, mesh) for n in names}
        for name in names:
            try:
                if late:
                    raise TimeoutError(f"the {args.minutes:g} minutes were over")
                x, one, chain = jobs[name].result()
                if size <= CHECKED:
                    check(name, np.asarray(one(x)), np.asarray(x).reshape(mesh.size, -1, WIDTH))
                calls[name, "chain"], calls[name, "call"] = partial(chain, x), partial(one, x)
            except Exception as why:  # a result as well
                errors[name] = one_line(why)
        rounds = Rounds(calls)
        rounds.warm_up()
        for _ in range(args.rounds if calls else 0):
            rounds.run()
        for name in names:
            operand = operand_bytes(name, size, mesh.size)
            sent = sent_bytes(KINDS.get(name, "all-to-all"), mesh.size, operand)  # type: ignore[arg-type]
            row = {"collective": name, "bytes": size, "sent": round(sent)}
            keys = [(name, which) for which in ("chain", "call")]
            failed = [errors.get(name), *map(rounds.errors.get, keys)]
            if error := next(filter(None, failed), None):
                row |= {"error": error}
            else:
                ms = rounds.ms(keys[0]) / CHAIN
                row |= {"ms": round(ms, 5), "gbs": round(sent / ms / 1e6, 2)}
                row |= {"spread": round(rounds.spread(keys[0]), 4)}
                row |= {"ms_call": round(rounds.ms(keys[1]), 5)}
            print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            found.append(row)
        del calls, rounds, jobs
        if args.name is not None:
            write(args.name, kept, found, mesh.size)
    return found


def write(name: str, kept: list[dict[str, Any]], found: list[dict[str, Any]], devices: int) -> None:
    """The file; a row of before makes way for a measured one only."""

    def key(row: dict[str, Any]) -> tuple[str, int]:
        return row["collective"], row["bytes"]

    done = {key(row) for row in found if "ms" in row}
    kept = [row for row in kept if key(row) not in done]
    before = set(map(key, kept))
    rows = [*kept, *(row for row in found if key(row) not in before)]
    latency: dict[str, float] = {}
    for row in rows:
        if "ms" in row:
            known = latency.get(row["collective"], row["ms"])
            latency[row["collective"]] = min(known, row["ms"])
    write_results(name, rows, devices=devices, chain=CHAIN, latency_ms=latency)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = list(COLLECTIVES)
    parser.add_argument("--collectives", nargs="*", choices=COLLECTIVES, default=default)
    parser.add_argument("--ragged", action="store_true", help=f"{RAGGED}, too: very slow")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="bytes")
    parser.add_argument("--devices", type=int, help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=9.0, help="ends cleanly after these")
    parser.add_argument("--name", help="result file; default links_h200x4, nothing for --tiny")
    parser.add_argument("--add", action="store_true", help="keep the file's other rows")
    parser.add_argument("--tiny", action="store_true", help="two sizes, to rehearse anywhere")
    args = parser.parse_args(words)
    if args.tiny:
        args.sizes = SIZES[:2]
    elif args.name is None:
        args.name = "links_h200x4"
    return args


def main() -> None:
    args = parse()
    measure(args, expert_mesh(args.devices, args.tiny))


if __name__ == "__main__":
    main()
