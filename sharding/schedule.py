"""What a compiled program computes while something travels, and telling XLA what that costs.

An asynchronous collective is a pair of instructions, `…-start` and `…-done`; what stands between
the two in the schedule runs while the bytes are on their way. XLA's latency-hiding scheduler lays
them around the work that it believes takes longest, and it takes a kernel of ours, a custom call,
for something short. A profile corrects that: the costs of instructions by name, in a file as its
profile-guided latency estimator reads it (`xla.ProfiledInstructionsProto` as text).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["OVERLAP", "Transfer", "compile_overlapped", "kernels_of", "profile", "transfers"]

OVERLAP: dict[str, Any] = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # A chunk on its way out beside another on its way home; one is the default.
    "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
}
"""Compiler options under which XLA:GPU computes one chunk while others travel."""

COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")

_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.*?) (?P<op>[a-z][a-z0-9-]*)\((?P<rest>.*)$"
)
_SHAPE = re.compile(r"(?P<dtype>pred|[a-z]+\d+\w*)\[(?P<dims>[\d,]*)\]")
_BITS = re.compile(r"\d+")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_STARTED = re.compile(r"\s*(?:\([^%]*)?%?([\w.-]+)")


@dataclass(frozen=True)
class Transfer:
    """One collective and what runs beside it.

    name: of the instruction that starts it.
    kind: one of `COLLECTIVES`.
    bytes: of its result on one device, all parts together.
    kernels: the kernels between its start and its end, by the names that profiles show; empty for
        one that is waited for where it stands.
    """

    name: str
    kind: str
    bytes: int
    kernels: tuple[str, ...]


def _bytes(text: str) -> int:
    total = 0
    for shape in _SHAPE.finditer(text):
        bits = _BITS.search(shape["dtype"])
        size = max(1, int(bits[0]) // 8) if bits else 1
        for dim in filter(None, shape["dims"].split(",")):
            size *= int(dim)
        total += size
    return total


def _instructions(text: str) -> Iterator[re.Match[str]]:
    return filter(None, map(_INSTRUCTION.match, text.splitlines()))


def _kernel(instruction: re.Match[str]) -> str:
    """The name given to a Pallas kernel, or the instruction's own."""
    path = _OP_NAME.search(instruction["rest"])
    parts = path[1].split("/") if path else []
    return parts[-2] if len(parts) > 1 else instruction["name"]


def transfers(text: str) -> list[Transfer]:
    """The collectives of a compiled program, in the order in which they end.

    Args:
        text: `compiled.as_text()`; computations that the program calls are read, too.

    Raises:
        ValueError: the order of the program's instructions is not decided.
    """
    if "is_scheduled=true" not in text:
        raise ValueError("a program without a schedule; give a compiled one")
    started: dict[str, list[str]] = {}
    found = []
    for instruction in _instructions(text):
        op = instruction["op"]
        if op == "custom-call":
            for kernels in started.values():
                kernels.append(_kernel(instruction))
        kind = next((kind for kind in COLLECTIVES if op.startswith(kind)), None)
        if kind is None:
            continue
        if op == f"{kind}-start":
            started[instruction["name"]] = []
            continue
        name, kernels = instruction["name"], []
        if op == f"{kind}-done":
            start = _STARTED.match(instruction["rest"])
            assert start is not None
            name = start[1]
            kernels = started.pop(name)
        found.append(Transfer(name, kind, _bytes(instruction["type"]), tuple(kernels)))
    return found


def kernels_of(text: str) -> dict[str, str]:
    """Custom calls of a compiled program: their instructions' names, and the kernels'."""
    calls = (i for i in _instructions(text) if i["op"] == "custom-call")
    return {call["name"]: _kernel(call) for call in calls}


def profile(text: str, microseconds: Callable[[str], float], link_bytes: float) -> str:
    """Costs of a program's kernels and collectives, as XLA reads them.

    Args:
        text: `compiled.as_text()`.
        microseconds: of a kernel, by its name.
        link_bytes: bytes a second that a collective brings to a device.
    """
    costs = {name: microseconds(kernel) for name, kernel in kernels_of(text).items()}
    for transfer in transfers(text):
        costs[transfer.name] = transfer.bytes / link_bytes * 1e6
    return "".join(f'costs {{ name: "{n}" cost_us: {us:.3f} }}\n' for n, us in costs.items())


def compile_overlapped(
    lowered: Any, microseconds: Callable[[str], float], link_bytes: float
) -> Any:
    """Compiles a program for GPUs so that it computes while something travels.

    Compiled once to see its kernels, and once more with their costs.

    Args:
        lowered: `jax.jit(f).lower(…)`.
        microseconds: about how long a kernel takes, by its name.
        link_bytes: bytes a second that a collective brings to a device.
    """
    text = lowered.compile(compiler_options=OVERLAP).as_text()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "costs.pbtxt"
        path.write_text(profile(text, microseconds, link_bytes), encoding="utf-8")
        costs = {"xla_gpu_pgle_profile_file_or_directory_path": str(path)}
        return lowered.compile(compiler_options=OVERLAP | costs)
