"""XLA's schedule of an expert-parallel layer for 4 H200, compiled without one: what travels behind
what.

    pip install --no-deps --target DIR jax-cuda13-plugin jax-cuda13-pjrt  # of jax's version
    export JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1
    PYTHONPATH=DIR python benchmarks/ep_schedule.py

Each row counts the collectives that carry rows and those of them with an expert kernel between
start and end: `default` as XLA schedules, `overlap` with `sharding.schedule.OVERLAP` alone, `costs`
as `sharding.schedule.compile_overlapped` makes it. Nothing is run: it shows the order, not a time.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import write_results
from ep_shapes import SHAPES
from flax import nnx
from jax import numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from layer_shapes import Shape

from moejax.config import ExchangeConfig, ExpertsConfig, MoEConfig, RouterConfig
from moejax.layer import MoELayer
from pallas_kernels import backends
from pallas_kernels.hopper.compat import hopper_refusal
from pallas_kernels.route import api as route
from sharding.mesh import AXES, TOKEN_AXES
from sharding.schedule import OVERLAP, compile_overlapped, transfers
from sharding.specs import specs_of

DEVICES = 4
TARGET = Path(__file__).parent / "h200.pbtxt"
LINK_BYTES = 300e9  # a second, measured for large all-to-alls on such a host
FLOPS = 600e12  # a second, of expert products on one
SHARES = {"experts_up": 2 / 3, "experts_down": 1 / 3, "experts_down_backward": 2 / 3}
SHARES |= {"w_in_gradient": 2 / 3, "w_out_gradient": 1 / 3, "rows_gradient": 2 / 3}
"""Of the forward's FLOPs, by kernel."""


def mesh_of_four() -> Mesh:
    """4 GPUs that are not there."""
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="h200x4",
        target_config=TARGET.read_text(),
        topology=f"1x1x{DEVICES}",
    )
    devices = np.array(topology.devices).reshape(1, DEVICES, 1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def lowered(shape: Shape, mode: str, chunks: int, backward: bool, mesh: Mesh) -> Any:
    """The layer in bfloat16, in buckets or chunks of a size that no routing overflows."""
    config = MoEConfig(
        RouterConfig(num_experts=shape.experts, top_k=shape.top_k),
        ExpertsConfig(hidden=shape.hidden),
        ExchangeConfig(mode=mode, chunks=chunks, bucket_slack=float("inf")),
    )
    layer = nnx.eval_shape(
        lambda: MoELayer(shape.d_model, config, expert_devices=DEVICES, rngs=nnx.Rngs(0))
    )
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    specs, rows = specs_of(params), P(TOKEN_AXES)

    def body(params, x, ct):
        def one(params, x):
            return nnx.merge(graph, params, rest)(x)[0]

        if not backward:
            return one(params, x)
        y, pull = jax.vjp(one, params, x)
        # As behind a loss: nothing of the backward begins before the forward has ended.
        ct, y = jax.lax.optimization_barrier((ct, y))
        return y, pull(ct)

    out = (rows, (specs, rows)) if backward else rows
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(specs, rows, rows), out_specs=out, check_vma=False
    )

    def abstract(array, spec):
        dtype = jnp.bfloat16 if len(array.shape) > 2 else array.dtype  # experts' weights
        return jax.ShapeDtypeStruct(array.shape, dtype, sharding=NamedSharding(mesh, spec))

    leaves, tree = jax.tree.flatten(params)
    split = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, P))
    params = jax.tree.unflatten(tree, [abstract(*pair) for pair in zip(leaves, split, strict=True)])
    wide = jax.ShapeDtypeStruct((DEVICES * shape.tokens, shape.d_model), jnp.bfloat16)
    x = jax.ShapeDtypeStruct(wide.shape, wide.dtype, sharding=NamedSharding(mesh, rows))
    return jax.jit(mapped).trace(params, x, x).lower(lowering_platforms=("cuda",))


def count(text: str, least: int) -> dict[str, Any]:
    """What a compiled program does while something travels.

    Args:
        text: `compiled.as_text()`.
        least: bytes of a collective that carries rows.

    Returns:
        its collectives of at least so many bytes; those with a kernel of the experts between start
        and end; the part of all their bytes that these carry.
    """
    moved = [t for t in transfers(text) if t.bytes >= least]
    behind = [t for t in moved if any(k in SHARES for k in t.kernels)]
    total, hidden = (sum(t.bytes for t in some) for some in (moved, behind))
    return {
        "transfers": len(moved),
        "behind_experts": len(behind),
        "bytes_behind": round(hidden / total, 3) if total else None,
    }


def kernel_microseconds(shape: Shape, chunks: int) -> Callable[[str], float]:
    """About how long a kernel takes for one chunk, by its name."""
    forward = shape.flops(False) / chunks / FLOPS * 1e6
    return lambda kernel: SHARES[kernel] * forward if kernel in SHARES else 10.0


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--modes", nargs="+", default=["ring", "all_to_all"])
    parser.add_argument("--chunks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--passes", nargs="+", choices=["fwd", "fwdbwd"], default=["fwd", "fwdbwd"])
    parser.add_argument("--name", default="ep_schedule")
    args = parser.parse_args()
    for module in (backends, route):  # as on a Hopper GPU
        module.hopper_refusal = lambda dtype, forced: hopper_refusal(dtype, forced=True)
    mesh, rows = mesh_of_four(), []
    for name, mode, chunks, which in itertools.product(
        args.shapes, args.modes, args.chunks, args.passes
    ):
        shape = SHAPES[name]
        microseconds = kernel_microseconds(shape, chunks)
        program = lowered(shape, mode, chunks, which == "fwdbwd", mesh)
        compiled = {
            "default": program.compile(),
            "overlap": program.compile(compiler_options=OVERLAP),
            "costs": compile_overlapped(program, microseconds, LINK_BYTES),
        }
        for options, one in compiled.items():
            found = count(one.as_text(), 2 * shape.d_model * (shape.tokens // chunks))
            keys = {"shape": name, "mode": mode, "chunks": chunks, "pass": which}
            rows.append(keys | {"options": options} | found)
            print(rows[-1], flush=True)
        write_results(args.name, rows, device=f"compiled for {DEVICES} NVIDIA H200, not run")


if __name__ == "__main__":
    main()
