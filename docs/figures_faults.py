"""The tables of processes that were killed, for `docs/figures.py`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Table = tuple[Sequence[str], list[list[str]]]


def kills(result: dict[str, Any]) -> Table:
    """How soon the others ended."""
    body = []
    rows = [row for row in result["rows"] if "kill" in row]
    for name, chosen in {
        "process 0 of 2": [r for r in rows if r["processes"] == 2 and r["killed"] == 0],
        "process 1 of 2": [r for r in rows if r["processes"] == 2 and r["killed"] == 1],
        "the only one": [r for r in rows if r["processes"] == 1],
    }.items():
        if not chosen:
            continue
        took = [row["others_ended_s"] for row in chosen if row["others_ended_s"] is not None]
        seconds = "–" if not took else f"{statistics.median(took):.2f}, {max(took):.2f}"
        codes = sorted({code for row in chosen for code in row["exit_codes"]})
        stepped = sum(row["steps"] > 0 for row in chosen)
        body.append(
            [name, str(len(chosen)), str(stepped), seconds, ", ".join(map(str, codes)) or "–"]
        )
    headings = ["killed", "times", "with steps written", "others ended after s: median, longest"]
    return [*headings, "with exit codes"], body


def runs(result: dict[str, Any]) -> Table:
    """What came of the runs."""
    body = []
    rows = [row for row in result["rows"] if "attempts" in row]
    for name, chosen in {
        "2 processes always": [row for row in rows if not row["smaller"]],
        "1 process on half of the devices in between": [row for row in rows if row["smaller"]],
    }.items():
        if not chosen:
            continue
        equal, steps = (
            sum(row[n] for row in chosen) for n in ("steps_equal_in_every_bit", "steps")
        )
        attempts = sum(row["attempts"] for row in chosen)
        largest = max(row["largest_difference"] for row in chosen)
        far = f"{largest:.1e}" if largest else "0"
        body.append([name, str(len(chosen)), str(attempts), f"{equal} of {steps}", far])
    headings = ["runs", "number", "attempts", "steps equal in every bit"]
    return [*headings, "largest relative difference of a loss"], body
