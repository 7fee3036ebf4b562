"""The table of placements, for `docs/figures.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Table = tuple[Sequence[str], list[list[str]]]


def placements(result: dict[str, Any]) -> Table:
    """What tokens cost, how even loads are, what planning took; single domains are left out."""
    body, before = [], None
    for row in result["rows"]:
        if row["trace"].startswith("packaged, ") or row["method"] == "round_robin":
            continue
        where = f"{row['trace']}: {row['experts']} experts, {row['devices']} devices"
        mean, largest = row["batch_load"]
        body.append(
            [
                where if where != before else "",
                row["method"],
                f"{row['fanout']:.2f}",
                f"{row['remote_sends']:.2f}",
                f"{row['load_max_mean']:.2f}",
                f"{mean:.2f}, {largest:.2f}",
                _or_dash(row.get("cut"), ".3f"),
                _or_dash(row.get("plan_ms_per_layer"), ".1f"),
                _or_dash(row["moved"], ".0f"),
            ]
        )
        before = where
    headings = ["trace", "method", "fan-out", "remote sends", "load", "batches' load"]
    return [*headings, "cut", "ms a layer", "moved"], body


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
