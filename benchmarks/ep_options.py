"""Named sets of compiler options that bear on running collectives beside kernels, and what a
compiled schedule did with them.

XLA:GPU runs a collective on a stream of its own only where its schedule has work between the
collective's start and its end. The order is the latency-hiding scheduler's, with jax 0.11.2 by
default (`lhs` gives the same program there), to which kernels of other compilers are custom calls
of little cost. Not here: pipelined collectives, which are for loops; symmetric memory and user
buffers, with which NCCL may use NVLink multicast; `xla_gpu_enable_analytical_latency_estimator`,
on which XLA 0.11.2 aborts.
"""

from __future__ import annotations

from typing import Any

from ep_schedule import count, kernel_microseconds
from layer_shapes import Shape

from sharding.schedule import OVERLAP, compile_overlapped

LARGE = 1 << 20  # bytes of a collective that carries rows

_HIDE = {"xla_gpu_enable_latency_hiding_scheduler": True}
_GRAPHS = "xla_gpu_enable_command_buffer"
_GATHER, _PERMUTE = (
    f"xla_gpu_{name}_combine_threshold_bytes" for name in ("all_gather", "collective_permute")
)
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    # Starts collectives early, ends them late.
    "lhs": _HIDE,
    # How many may be in flight at once; 1 by default.
    "lhs_two": _HIDE | {"xla_gpu_experimental_parallel_collective_overlap_limit": 2},
    "lhs_four": _HIDE | {"xla_gpu_experimental_parallel_collective_overlap_limit": 4},
    "lhs_early": _HIDE | {"xla_gpu_experimental_collective_start_as_early_as_possible": True},
    # Times of collectives from a model of the hardware, not constants.
    "lhs_sol": _HIDE | {"xla_gpu_enable_analytical_sol_latency_estimator": True},
    # No CUDA graphs, or collectives inside of them.
    "lhs_no_graphs": _HIDE | {_GRAPHS: ""},
    "lhs_all_graphs": _HIDE | {_GRAPHS: "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,COLLECTIVES"},
    "no_graphs": {_GRAPHS: ""},
    # Small gathers stay apart.
    "lhs_apart": _HIDE | {_GATHER: 0, _PERMUTE: 0},
    # Fewer multiprocessors for the transfers, more for the experts.
    "lhs_8_channels": _HIDE | {"xla_gpu_nccl_collective_max_nchannels": 8},
    "lhs_16_channels": _HIDE | {"xla_gpu_nccl_collective_max_nchannels": 16},
    "lhs_streams": _HIDE
    | {
        "xla_gpu_experimental_enable_collective_multi_streaming": True,
        "xla_gpu_executable_num_communication_streams": 2,
        "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
    },
    # Nothing beside anything.
    "no_async": {"xla_gpu_disable_async_collectives": "ALLCOLLECTIVES"},
    # What the library itself asks for; the second with the times of kernels and transfers.
    "overlap": OVERLAP,
    "overlap_costs": OVERLAP,
}


def compile_with(lowered: Any, options: str, shape: Shape, chunks: int, link_gbs: float) -> Any:
    """Compiles a program.

    Args:
        lowered: `jax.jit(f).lower(…)`.
        options: name of a set.
        shape: says how long the experts' kernels take.
        chunks: that a device's tokens are cut into.
        link_gbs: what a link carries.
    """
    if options != "overlap_costs":
        return lowered.compile(compiler_options=OPTIONS[options])
    return compile_overlapped(lowered, kernel_microseconds(shape, chunks), link_gbs * 1e9)


def scheduled(text: str) -> dict[str, Any]:
    """`ep_schedule.count` of a compiled program's text."""
    return count(text, LARGE)
