"""The table of what compressed gradients cost in quality, for `docs/figures.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Table = tuple[Sequence[str], list[list[str]]]

PICTURE = "img/compression_quality.svg"
TITLES = {
    "exact": "float32",
    "exact_again": "float32, other weights by 1e-6",
    "bf16": "`bf16`",
    "int8": "`int8`, stochastic",
    "int8_feedback": "`int8`, error feedback",
    "int4": "`int4`, stochastic",
    "int4_feedback": "`int4`, error feedback",
    "int4_rotated": "`int4`, rotated, stochastic",
    "int4_rotated_feedback": "`int4`, rotated, error feedback",
    "low_rank": "`low_rank` 4, sends all in the first 100 steps",
    "low_rank_at_once": "`low_rank` 4 from the first step",
    "top_k": "`top_k` 1 %, sends all in the first 100 steps",
    "top_k_at_once": "`top_k` 1 % from the first step",
}
"""Of the methods, in the order of rows."""
AIMS = {"int8": 0.1, "int4": 0.5, "low_rank": 1.0, "top_k": 3.0}
"""Largest increase of the loss aimed at, in percent, by what a method's name begins with."""


def aim(method: str) -> float | None:
    """What the increase of a method's loss should not exceed, in percent."""
    return next((most for name, most in AIMS.items() if method.startswith(name)), None)


def quality(result: dict[str, Any]) -> Table:
    """Held-out loss of each method against exact gradients."""
    body = []
    for row in result["rows"]:
        name, delta = row["method"], row.get("final_loss_delta_pct")
        compared = ["", "", ""]
        if delta is not None and name != "exact":
            error, most = row["standard_error"], aim(name)
            compared = [
                f"{delta:+.2f} %" + ("" if error is None else f" ± {error:.2f}"),
                ", ".join(f"{each:+.2f}" for each in row["final_loss_delta_pct_by_seed"]),
                "" if most is None else f"{most:g} %",
            ]
        loss = sum(row["final_loss"]) / len(row["final_loss"])
        body.append([TITLES[name], f"{row['bytes_ratio']:.2f}", f"{loss:.4f}", *compared])
    headings = ["gradients", "fewer bytes than bfloat16", "held-out loss, nats", "change"]
    return [*headings, "each seed, %", "aim"], body
