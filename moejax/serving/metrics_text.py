"""The engine's counts in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from moejax.inference.request import EngineStats, PlacementStats
from moejax.offload.statistics import OffloadStats

__all__ = ["CONTENT_TYPE", "metrics_text"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_HELP = {
    "running": "texts on a device",
    "waiting": "texts without a place on a device",
    "rows": "most texts that run at once",
    "pages": "pages of the cache, of all devices",
    "pages_held": "pages used by texts",
    "pages_kept": "pages kept for texts that begin alike",
    "prompt_tokens": "tokens of prompts run, those of preempted texts again",
    "reused_tokens": "tokens of prompts that needed not be run",
    "generated_tokens": "tokens made",
    "preemptions": "times a text gave back its pages",
    "decode_steps": "decoding steps started",
    "prefill_steps": "steps with prompts started",
    "programs": "programs compiled",
    "placement_following": "1 while experts follow the traffic",
    "placement_looks": "looks at the traffic",
    "placement_experts_moved": "experts carried to a device that had them not, copies included",
    "placement_copies": "slots that hold an expert once more, of all layers",
    "placement_layers_waiting": "layers whose experts have yet to be carried",
    "placement_planner_seconds": "seconds that plans took, in a thread of their own",
    "offload_slots": "experts on the device, of all layers",
    "offload_experts": "experts in all, of all layers",
    "offload_decode_held": "uses of experts that were on the device, decoding",
    "offload_decode_early": "uses of experts that had been guessed, decoding",
    "offload_decode_missed": "uses of experts that had to be asked for, decoding",
    "offload_decode_low": "uses of experts that had come in fewer bits, decoding",
    "offload_decode_stall_seconds": "seconds that decoding waited for experts",
    "offload_prefill_stall_seconds": "seconds that prompts waited for experts",
    "offload_asked_bytes": "bytes of experts that a layer lacked",
    "offload_guessed_bytes": "bytes of experts that were guessed",
    "offload_vain_bytes": "bytes of experts that were guessed and not used",
    "offload_read_bytes": "bytes of experts read from files or the system's cache of them",
}
# What only grows until the program ends.
_COUNTERS = {
    *("prompt_tokens", "reused_tokens", "generated_tokens", "preemptions"),
    *("decode_steps", "prefill_steps", "programs"),
    *("placement_looks", "placement_experts_moved", "placement_planner_seconds"),
    *(name for name in _HELP if name.startswith(("offload_decode", "offload_prefill"))),
    *("offload_asked_bytes", "offload_guessed_bytes", "offload_vain_bytes", "offload_read_bytes"),
}


def metrics_text(stats: EngineStats) -> str:
    """Each count as `moejax_NAME`, with `_total` if it only grows; of parts that there are."""
    parts = ("placement", "offload")
    found = {f.name: getattr(stats, f.name) for f in fields(stats) if f.name not in parts}
    if stats.placement is not None:
        found |= _of_placement(stats.placement)
    if stats.offload is not None:
        found |= _of_offload(stats.offload)
    lines = []
    for name, value in found.items():
        counter = name in _COUNTERS
        full = f"moejax_{name}{'_total' if counter else ''}"
        kind = "counter" if counter else "gauge"
        lines += [f"# HELP {full} {_HELP[name]}", f"# TYPE {full} {kind}", f"{full} {value + 0}"]
    return "\n".join(lines) + "\n"


def _of_placement(stats: PlacementStats) -> dict[str, Any]:
    return {f"placement_{f.name}": getattr(stats, f.name) for f in fields(stats)}


def _of_offload(stats: OffloadStats) -> dict[str, Any]:
    uses = {f"offload_decode_{f.name}": getattr(stats.decode, f.name) for f in fields(stats.decode)}
    plain = {f"offload_{f.name}": getattr(stats, f.name) for f in fields(stats)}
    return uses | {name: value for name, value in plain.items() if name in _HELP}
