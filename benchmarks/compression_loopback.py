"""Gradients summed by two processes over a loopback whose rate is limited.

    python benchmarks/grad_compression.py loopback --rates 100mbit 1gbit 4gbit none

Writes benchmarks/results/grad_compression_loopback.json. For each rate two processes with one CPU
device each run in a network namespace of their own (`unshare -n`, which takes root, or a container
that may) and talk by gloo; `tc` limits what crosses `lo`, both directions together. A size counts
bfloat16 numbers, as in benchmarks/grad_compression.py.

- `ms`: median of `--rounds` calls, until both processes have ended, in rounds with all ways;
  `spread`: (largest − smallest) over it.
- `mib`: what crossed `lo` in a call, counted by the kernel of the system, headers included. XLA on
  a CPU sums bfloat16 as float32, so `psum_bfloat16` moves as much as `psum_float32`; the way of two
  bytes a number is `bf16`.
- `codec_ms`: encode, add up and encode, and decode alone, in both processes at once.
- `predicted_ms`: `mib` over the rate, but for what the limit lets through at once, and `codec_ms`.
- `of_bf16`: ms over those of `bf16` at that rate and size; `of_float32` likewise.

The codec here is plain JAX on a CPU whose cores the processes share, far slower than a GPU's
kernels: what is measured is at which ratio of computing to sending fewer bytes win, no GPU's time.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import write_results

NAME = "grad_compression_loopback"
WAYS = ("psum_float32", "psum_bfloat16", "bf16", "int8", "int4", "int4_rotated", "low_rank")
BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
MIB = 2**20
PATIENCE = 900.0  # seconds for one rate


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit", "4gbit", "none"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[4, 16], help="MiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default=NAME, help="result file")
    # Of the processes that it starts itself.
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)


def bytes_a_second(rate: str) -> float | None:
    """Of what `tc` calls a rate; None where there is no limit."""
    if rate == "none":
        return None
    return float(rate[:-4]) * BITS[rate[-4:]] / 8


def burst(limit: float) -> int:
    """Bytes that a limit of so many bytes a second lets through at once."""
    return max(128 * 1024, round(limit * 1e-3))


def loopback(args: argparse.Namespace) -> None:
    """Starts itself again: in a namespace for each rate, and there as two processes."""
    if args.process is not None:
        work(args)
        return
    if args.inside is not None:
        supervise(args)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for rate in args.rates:
            out = Path(folder) / rate
            flags = [*command(args, [rate]), "--inside", str(out)]
            subprocess.run(["unshare", "-n", *flags], check=True, timeout=PATIENCE + 30)
            both = [json.loads(Path(f"{out}.{i}").read_text()) for i in range(2)]
            rows += rows_of(rate, args.sizes, both)
            for row in rows:
                compare(row, rows)
            write_results(args.name, rows)
    for row in rows:
        print(" ".join(f"{key} {value}" for key, value in row.items()))


def command(args: argparse.Namespace, rates: list[str]) -> list[str]:
    """This program again."""
    words = [sys.executable, str(Path(__file__).with_name("grad_compression.py")), "loopback"]
    words += ["--rates", *rates, "--sizes", *map(str, args.sizes)]
    return [*words, "--rounds", str(args.rounds)]


def compare(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Adds the ratios."""
    for name, key in (("bf16", "of_bf16"), ("psum_float32", "of_float32")):
        for other in rows:
            same = all(other[k] == row[k] for k in ("rate", "mib_of_bfloat16"))
            if same and other["method"] == name:
                row[key] = round(row["ms"] / other["ms"], 3)


def supervise(args: argparse.Namespace) -> None:
    """Limits this namespace's loopback and runs two processes in it."""
    (rate,) = args.rates
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    limit = bytes_a_second(rate)
    if limit is not None:
        words = f"tc qdisc add dev lo root tbf rate {rate} burst {burst(limit)} latency 200ms"
        subprocess.run(words.split(), check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "JOBSET"))}
    flags = [*command(args, [rate]), "--inside", args.inside, "--name", str(port), "--process"]
    running = [
        subprocess.Popen([*flags, str(i)], env=kept | {"JAX_PLATFORMS": "cpu"}) for i in range(2)
    ]
    try:
        end = time.monotonic() + PATIENCE
        codes = [process.wait(max(1.0, end - time.monotonic())) for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
    if any(codes):
        raise SystemExit(f"at {rate} the processes ended with {codes}")


def crossed() -> int:
    """Bytes that crossed `lo` so far."""
    fields = Path("/proc/net/dev").read_text().split("lo:")[1].split()
    return int(fields[8])


def work(args: argparse.Namespace) -> None:
    """One of the two processes; each writes what it measured."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"127.0.0.1:{args.name}", 2, args.process)
    from sharding.mesh import MeshShape, make_mesh

    mesh = make_mesh(MeshShape(2))
    found = [measure(size, args.rounds, mesh) for size in args.sizes]
    Path(f"{args.inside}.{args.process}").write_text(json.dumps(found))
    jax.distributed.shutdown()


def measure(size: int, rounds: int, mesh: Any) -> dict[str, dict[str, Any]]:
    """By way: `times` in ms and `bytes` of each call, and `codec_ms`."""
    import jax
    from compression_programs import Case, gradients, has_blocks, reductions
    from jax import numpy as jnp

    numbers, seed = size * MIB // 2, jnp.int32(7)
    grads, few = gradients(numbers, mesh), gradients(4096, mesh)
    nothing = reductions(Case("psum_float32"), mesh, 1)[1]

    def meet() -> None:
        jax.block_until_ready(nothing(few, {}, seed))
        time.sleep(0.02)  # for what the last messages leave in the queue

    calls, found = {}, {}
    for name in WAYS:
        case = Case(name, "reference" if has_blocks(name) else None)
        start, call = reductions(case, mesh, 1)
        calls[name], found[name] = (call, grads, start(grads), seed), {"times": [], "bytes": []}
        jax.block_until_ready(call(*calls[name][1:]))
    for _ in range(rounds):
        for name, (call, *operands) in calls.items():
            meet()
            before, begin = crossed(), time.perf_counter()
            jax.block_until_ready(call(*operands))
            found[name]["times"].append((time.perf_counter() - begin) * 1e3)
            meet()
            found[name]["bytes"].append(crossed() - before)
    for name in WAYS:
        if has_blocks(name) and not name.endswith("rotated"):
            found[name]["codec_ms"] = codec_ms(name, numbers, rounds, meet)
    return found


def rows_of(rate: str, sizes: list[int], both: list[Any]) -> list[dict[str, Any]]:
    """What two processes measured, as rows; a call has ended when it has in both."""
    limit, rows = bytes_a_second(rate), []
    for size, one, other in zip(sizes, *both, strict=True):
        for name in WAYS:
            times = list(map(max, one[name]["times"], other[name]["times"]))
            ms, moved = median(times), median(one[name]["bytes"])
            row = {"rate": rate, "mib_of_bfloat16": size, "method": name, "ms": round(ms, 2)}
            row |= {"spread": round((max(times) - min(times)) / ms, 3)}
            row |= {"mib": round(moved / MIB, 2)}
            if "codec_ms" in one[name]:
                codec = max(found[name]["codec_ms"] for found in (one, other))
                row |= {"codec_ms": round(codec, 2)}
            if limit is not None and ("codec_ms" in row or name.startswith("psum")):
                sending = max(0.0, moved - burst(limit)) / limit * 1e3
                row |= {"predicted_ms": round(sending + row.get("codec_ms", 0.0), 2)}
            rows.append(row)
    return rows


def codec_ms(name: str, numbers: int, rounds: int, meet: Any) -> float:
    """What a rank computes for one sum, alone, while the other one does so too."""
    import jax
    from compression_programs import codec, codec_operands

    total = 0.0
    for part, (function, _) in codec(name, numbers, 2, "reference").items():
        if part == "encode_float32":
            continue
        operands, program = codec_operands(name, False, numbers, 2), jax.jit(function)
        jax.block_until_ready(program(*operands))
        times = []
        for _ in range(rounds):
            meet()
            begin = time.perf_counter()
            jax.block_until_ready(program(*operands))
            times.append(time.perf_counter() - begin)
        total += median(times) * 1e3
    return total
