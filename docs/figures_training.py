"""Tables of training steps and of unequal experts, for `docs/figures.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Table = tuple[Sequence[str], list[list[str]]]


def steps(result: dict[str, Any]) -> Table:
    """How long whole steps take, and what the planner says of them."""
    body = []
    for row in result["rows"]:
        predicted, changes = row["predicted_ms"], row["case"].partition(":")[2]
        body.append(
            [
                f"`{row['model']}`" + (f", {changes.replace(',', ', ')}" if changes else ""),
                f"{row['params_b']:.2f} B, {row['active_b']:.2f} B",
                row["mesh"],
                f"{row['tokens'] // row['seq']} × {row['seq']}",
                f"{row['step_ms']:.1f}",
                "–" if predicted is None else f"{predicted:.1f}",
                f"{row['tokens_per_s'] / 1e3:.0f} k",
                "–" if row["mfu"] is None else f"{row['mfu']:.1%}",
                f"{row['memory_bytes'] / 1e9:.1f} GB",
                f"{row['compile_seconds']:.0f} s",
            ]
        )
    headings = ["model", "parameters, active", "mesh", "examples × tokens", "step, ms"]
    more = ["predicted, ms", "tokens/s", "utilisation", "memory", "compiling"]
    return [*headings, *more], body


def stream_kernels(result: dict[str, Any]) -> Table:
    """Norms and heads: kernels beside XLA's programs and what must move."""
    body = [
        [
            row["shape"],
            f"`{row['program']}`",
            f"{row['megabytes']:.0f}",
            f"{row['floor_ms']:.3f}",
            f"{row['ms']:.3f}",
            f"{row['xla_ms']:.3f}",
            f"{row['xla_over_ours']:.2f}",
        ]
        for row in result["rows"]
    ]
    return ["shape", "program", "MB", "floor, ms", "ms", "XLA, ms", "XLA / ours"], body


def unequal_groups(result: dict[str, Any]) -> Table:
    """Weight gradients of experts with unequal numbers of tokens."""
    body = [
        [
            row["shape"],
            f"`{row['kernel']}`",
            f"{row['skew']:g}",
            f"{row['largest']:.2f}",
            f"{row['even_ms']:.3f}",
            f"{row['ms']:.3f} ({row['over_even']:.2f})",
            f"{row['ms_in_order']:.3f} ({row['in_order_over_even']:.2f})",
        ]
        for row in result["rows"]
    ]
    headings = ["shape", "kernel", "skew", "largest / mean", "equal experts, ms"]
    return [*headings, "largest first, ms", "in order, ms"], body
