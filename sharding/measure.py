"""`python -m sharding.measure`: measures this machine and stores its figures.

Each figure comes from a program that repeats one operation on its own result, so that the time of a
call is left out, and that grows until it takes long enough to be timed.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["main", "measure"]

REPEATS = 8  # of an operation in one program
GROUPS = 5  # timed calls, of which the median counts
LONG = 0.2  # seconds that a program takes at least, unless it would grow beyond `LARGEST`
LARGEST = 2**30  # bytes of an operand


def _seconds(run: Callable[..., Any], *operands: Any) -> float:
    """Median seconds of one of the operations in the program."""
    import jax

    jax.block_until_ready(run(*operands))
    found = []
    for _ in range(GROUPS):
        start = time.perf_counter()
        jax.block_until_ready(run(*operands))
        found.append(time.perf_counter() - start)
    return statistics.median(found) / REPEATS


def _grown(at: Callable[[int], tuple[float, int]], size: int, long: float) -> tuple[float, int]:
    """The first size that takes long enough, after its seconds; `at` gives seconds and bytes."""
    while True:
        seconds, operand = at(size)
        if seconds * REPEATS >= long or 2 * operand > LARGEST:
            return seconds, size
        size *= 2


def _repeated(operation: Callable[..., Any]) -> Callable[..., Any]:
    """A program of an operand that the operation gives anew, and of others that stay."""
    from jax import lax

    return lambda x, *others: lax.fori_loop(0, REPEATS, lambda _, x: operation(x, *others), x)


def _product(long: float) -> float:
    """FLOP/s of a grouped product of two experts, each with a square of rows and of weights."""
    import jax
    from jax import numpy as jnp

    from pallas_kernels.grouped_matmul.api import grouped_matmul

    def at(size: int) -> tuple[float, int]:
        keys = jax.random.split(jax.random.key(0))
        x = jax.random.normal(keys[0], (2 * size, size), jnp.bfloat16)
        w = jax.random.normal(keys[1], (2, size, size), jnp.bfloat16) / size**0.5
        sizes = jnp.full((2,), size, jnp.int32)
        return _seconds(jax.jit(_repeated(grouped_matmul)), x, w, sizes), x.nbytes

    seconds, size = _grown(at, 256, long)
    return 2 * 2 * size**3 / seconds


def _memory(long: float) -> float:
    """Bytes a second: an array is read and written."""
    import jax
    from jax import numpy as jnp

    def at(size: int) -> tuple[float, int]:
        x = jnp.arange(size, dtype=jnp.float32)
        return _seconds(jax.jit(_repeated(lambda x: x + 1)), x), x.nbytes

    seconds, size = _grown(at, 2**20, long)
    return 2 * 4 * size / seconds


def _links(long: float) -> tuple[float, float]:
    """Bytes a second that leave a device in a large all-to-all, and seconds of a tiny one."""
    import jax
    from jax import numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from sharding import collectives
    from sharding.mesh import EXPERT, MeshShape, make_mesh

    devices = jax.device_count()
    mesh = make_mesh(MeshShape(expert=devices))

    def at(size: int) -> tuple[float, int]:
        def draw() -> jax.Array:
            return jax.random.bits(jax.random.key(0), (devices * devices, size), jnp.uint8)

        # Where the program takes it, so that a call moves nothing but what is measured.
        x = jax.jit(draw, out_shardings=NamedSharding(mesh, P(EXPERT)))()
        body = _repeated(lambda x: collectives.all_to_all(x, EXPERT))
        mapped = jax.shard_map(
            body, mesh=mesh, in_specs=P(EXPERT), out_specs=P(EXPERT), check_vma=False
        )
        return _seconds(jax.jit(mapped), x), devices * size

    tiny, _ = at(16)
    large, size = _grown(at, 2**16, long)
    return (devices - 1) * size / max(large - tiny, 1e-9), tiny


def measure(long: float = LONG) -> Any:
    """The figures of this machine's devices, a `sharding.machine.Machine`.

    Args:
        long: seconds that a timed program takes at least.
    """
    import jax

    from sharding.machine import Machine

    link_bytes, link_seconds = _links(long) if jax.device_count() > 1 else (0.0, 0.0)
    return Machine(
        device=jax.devices()[0].device_kind,
        devices=jax.device_count(),
        product_flops=_product(long),
        memory_bytes=_memory(long),
        link_bytes=link_bytes,
        link_seconds=link_seconds,
        jax=jax.__version__,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = ArgumentParser(prog="python -m sharding.measure")
    parser.description = (
        "Measures this machine's devices and links, for python -m moejax.exchange.suggest."
    )
    parser.add_argument("--output", type=Path, help="a file instead of the library's own")
    arguments = parser.parse_args(argv)

    from moejax.errors import UserError
    from sharding.machine import machine_file, write_machine

    machine = measure()
    print(f"{machine.device}: {machine.product_flops / 1e12:.3g} TFLOP/s in products,")
    print(f"{machine.memory_bytes / 1e9:.4g} GB/s from memory,")
    if machine.devices > 1:
        links, tiny = machine.link_bytes / 1e9, machine.link_seconds * 1e6
        print(f"{links:.4g} GB/s to {machine.devices - 1} others, {tiny:.3g} µs at least;")
    path = arguments.output or machine_file(machine.device)
    try:
        write_machine(machine, path)
    except UserError as error:
        sys.exit(f"measure: {error} with --output")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
