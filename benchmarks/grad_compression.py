"""How long one gradient takes to be summed over ranks: exact, and in fewer bytes.

    python benchmarks/grad_compression.py links --minutes 3    # 2 or 4 GPUs of a host
    python benchmarks/grad_compression.py loopback             # 2 processes on a CPU; as root
    JAX_PLATFORMS=cpu python benchmarks/grad_compression.py links --tiny    # a rehearsal

`links` writes benchmarks/results/grad_compression.json. A size counts bfloat16 numbers: 64 MiB are
32 Mi numbers, 1 GiB 512 Mi. Every rank has other random bfloat16 gradients [numbers / 4096, 4096]
and gets the whole sum, float32 but for `psum_bfloat16`. A row for each way to sum:

- `bytes_ratio`: what a ring all-reduce of bfloat16 sends over what this sends, at the largest size.
- `ms_64MiB`, `ms_1GiB`: at 64 MiB one of 4 sums in one program, each of a gradient that has one
  number of the sum before; `ms_call_…`: a program of one sum. Medians of groups, in rounds with all
  ways; `spread_…` is (largest − smallest) / median. `error_…`: ‖sum − exact‖ / ‖exact‖ of one sum.
- `… , plain JAX` is without kernels. `final_loss_delta_pct` stays as it was in the file.
- `codec`: what a rank computes, alone, on one device: ms, and the memory's bytes/s of the bytes
  that must move.
- `predicted`: for slower links, bytes a rank sends over the rate, and for int8 the codec's ms.

`loopback`: see benchmarks/compression_loopback.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from functools import partial
from typing import Any

from common import RESULTS, write_results

CHAIN = 4  # sums in a program, of up to CHAINED numbers: more would fill the memory
CHAINED = 2**27
NAME = "grad_compression"
MIB = 2**20
SIZES = {"64MiB": 64 * MIB, "1GiB": 1024 * MIB}
TINY = {"16KiB": 2**14, "64KiB": 2**16}
LINKS_GBS = (25.0, 12.5, 1.25)


def links(args: argparse.Namespace) -> None:
    """The rows of links, size by size."""
    import jax

    from pallas_kernels.interpreting import interpreted
    from sharding.mesh import MeshShape, make_mesh

    if args.tiny:
        args.devices = args.devices or 2
        # More than it takes: interpreted kernels need threads beside those that wait for others.
        jax.config.update("jax_num_cpu_devices", 4 * args.devices)
    elif jax.devices()[0].platform == "cpu":
        raise SystemExit("no accelerator here: --tiny rehearses on the CPU")
    mesh = make_mesh(MeshShape(args.devices or len(jax.devices())))
    rows: dict[str, dict[str, Any]] = {}
    codec_rows: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60 * args.minutes
    with ExitStack() as stack:
        if args.tiny:
            stack.enter_context(interpreted())
        for i, (size, count) in enumerate(args.sizes.items()):
            # What is left is shared by the sizes that are left; the last one is the slowest.
            end = time.monotonic() + (deadline - time.monotonic()) / (len(args.sizes) - i)
            codec_rows += measure_codec(size, count // 2, mesh.size, args.rounds)
            measure(rows, args.methods, size, count // 2, mesh, args.rounds, end)
            if not args.tiny:
                write(rows, codec_rows, mesh.size)


def cases(methods: Sequence[str]) -> list[Any]:
    """With kernels and without."""
    from compression_programs import Case, has_blocks

    found = [Case(name, "mosaic_gpu" if has_blocks(name) else None) for name in methods]
    return found + [Case(name, "reference") for name in methods if has_blocks(name)]


def measure(
    rows: dict[str, dict[str, Any]],
    methods: Sequence[str],
    size: str,
    numbers: int,
    mesh: Any,
    count: int,
    deadline: float,
) -> None:
    """Adds one size's figures to the rows."""
    import jax
    from compression_programs import Case, gradients, reductions
    from ep_timing import Rounds, one_line
    from jax import numpy as jnp

    grads = gradients(numbers, mesh)
    seed = jnp.int32(7)
    chained = CHAIN if numbers <= CHAINED else 1

    def prepare(case: Any) -> tuple[Any, Callable, Callable]:
        start, chain = reductions(case, mesh, chained)
        operands = grads, start(grads), seed
        compiled = chain.lower(*operands).compile()
        if chained == 1:
            return operands, compiled, compiled
        return operands, compiled, reductions(case, mesh, 1)[1].lower(*operands).compile()

    calls: dict[tuple[str, str], Callable] = {}
    errors: dict[str, str] = {}
    jobs = {}
    with ThreadPoolExecutor(8) as pool:
        for case in cases(methods):
            # A thread does not know by itself that kernels are interpreted.
            jobs[case.label] = case, pool.submit(copy_context().run, prepare, case)
    exact = reductions(Case("psum_float32"), mesh, 1)[1](grads, {}, seed)[0][0]
    off = jax.jit(lambda a, b: jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
    for label, (case, job) in jobs.items():
        row = rows.setdefault(label, {"method": label})
        row["bytes_ratio"] = round(case.bytes_ratio(numbers, mesh.size), 3)
        try:
            operands, chain, call = job.result()
            row[f"error_{size}"] = float(f"{float(off(call(*operands)[0][0], exact)):.3g}")
            calls[label, "chain"] = partial(chain, *operands)
            calls[label, "call"] = partial(call, *operands)
        except Exception as why:  # a result as well
            errors[label] = one_line(why)
    rounds = Rounds(calls)
    rounds.warm_up()
    for done in range(count):
        if done and time.monotonic() > deadline:
            break
        rounds.run()
    for label in jobs:
        row, keys = rows[label], [(label, which) for which in ("chain", "call")]
        failed = [errors.get(label), *map(rounds.errors.get, keys)]
        if error := next(filter(None, failed), None):
            row["error"] = f"{size}: {error}"
            continue
        row[f"ms_{size}"] = round(rounds.ms(keys[0]) / chained, 4)
        row[f"ms_call_{size}"] = round(rounds.ms(keys[1]), 4)
        row[f"spread_{size}"] = round(rounds.spread(keys[0]), 4)
    for label in jobs:
        print(" ".join(f"{key} {value}" for key, value in rows[label].items()), flush=True)


def measure_codec(size: str, numbers: int, ranks: int, count: int) -> list[dict[str, Any]]:
    """What a rank computes, alone."""
    import jax
    from compression_programs import codec, codec_operands
    from ep_timing import Rounds

    found, calls, given = [], {}, {}
    for name in ("int8", "int4"):
        for backend in ("mosaic_gpu", "reference"):
            for part, (function, moved) in codec(name, numbers, ranks, backend).items():
                row = {"size": size, "method": name, "backend": backend, "part": part}
                found.append(row | {"bytes": moved})
                kind = name, part.endswith("float32")
                if kind not in given:
                    given[kind] = codec_operands(*kind, numbers, ranks)
                calls[len(found) - 1] = partial(jax.jit(function), *given[kind])
    rounds = Rounds(calls)
    rounds.warm_up()
    for _ in range(count):
        rounds.run()
    for at, row in enumerate(found):
        if error := rounds.errors.get(at):
            row["error"] = error
        else:
            ms = rounds.ms(at)
            row |= {"ms": round(ms, 4), "gbs": round(row["bytes"] / ms / 1e6, 1)}
        print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return found


def predict(codec_rows: Sequence[dict[str, Any]], devices: int) -> list[dict[str, Any]]:
    """Milliseconds over slower links: bytes over the rate, and the measured codec."""
    from compression_programs import Case

    found = []
    for size, count in SIZES.items():
        parts = {
            row["part"]: row.get("ms")
            for row in codec_rows
            if (row["size"], row["method"], row["backend"]) == (size, "int8", "mosaic_gpu")
        }
        times = [parts.get(part) for part in ("encode", "add_up_and_encode", "decode")]
        if None in times:
            continue
        for rate in LINKS_GBS:
            exact, int8 = (
                Case(name).bytes_of(count // 2, devices) / rate / 1e6
                for name in ("psum_bfloat16", "int8")
            )
            int8 += sum(times)
            row = {"size": size, "link_gbs": rate, "psum_bfloat16_ms": round(exact, 3)}
            found.append(row | {"int8_ms": round(int8, 3), "ratio": round(int8 / exact, 3)})
    return found


def write(
    rows: dict[str, dict[str, Any]], codec_rows: Sequence[dict[str, Any]], devices: int
) -> None:
    """The file; what training lost is somebody else's figure and is kept."""
    path = RESULTS / f"{NAME}.json"
    before = json.loads(path.read_text())["rows"] if path.is_file() else []
    lost = {row["method"]: row.get("final_loss_delta_pct") for row in before}
    made = [row | {"final_loss_delta_pct": lost.get(label)} for label, row in rows.items()]
    made += [row for row in before if row["method"] not in rows]
    predicted = predict(codec_rows, devices)
    more = {"devices": devices, "chain": CHAIN, "codec": list(codec_rows), "predicted": predicted}
    write_results(NAME, made, **more)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    from compression_loopback import add_flags
    from compression_programs import COMPRESSED, EXACT

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_subparsers(dest="mode", required=True)
    mode, known = modes.add_parser("links"), [*EXACT, *COMPRESSED]
    mode.add_argument("--methods", nargs="+", choices=known, default=known)
    mode.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    mode.add_argument("--devices", type=int, help="default: all")
    mode.add_argument("--rounds", type=int, default=9)
    mode.add_argument("--minutes", type=float, default=3.0, help="of rounds; compiling comes first")
    mode.add_argument("--tiny", action="store_true", help="to rehearse anywhere; writes nothing")
    add_flags(modes.add_parser("loopback"))
    args = parser.parse_args(words)
    if args.mode == "links":
        args.sizes = TINY if args.tiny else {size: SIZES[size] for size in args.sizes}
    return args


def main() -> None:
    args = parse()
    if args.mode == "links":
        links(args)
    else:
        from compression_loopback import loopback

        loopback(args)


if __name__ == "__main__":
    main()
