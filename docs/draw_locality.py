"""Draws traffic against loss of routing that knows where experts are: docs/img/locality.svg.

python docs/draw_locality.py     after benchmarks/locality.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from moejax.placement.frontier_picture import draw_frontier

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "locality.json"
PICTURE = ROOT / "docs" / "img" / "locality.svg"
AIMS = ((0.5, 0.02), (0.4, 0.05))
"""Ratio of remote sends and increase of the loss to be beaten."""
MOST = 0.15  # of the loss increase, to show

Rows = list[dict[str, Any]]


def series(rows: Rows) -> list[tuple[str, Rows]]:
    """The lines: penalties, and limits of devices, by placement and training."""
    lines = []
    kind = [r for r in rows if r["weights"] == "plain" and r["local_threshold"] is None]
    plain = [r for r in kind if r["training"] == "none"]
    for name in dict.fromkeys(row["placement"] for row in rows):
        mine = [r for r in plain if r["placement"] == name]
        lines.append((f"{name}, penalties", [r for r in mine if r["max_devices"] is None]))
        lines.append((f"{name}, at most M devices", [r for r in mine if not r["penalty"]]))
    for limit in dict.fromkeys(r["max_devices"] for r in plain if r["penalty"]):
        both = [r for r in plain if r["placement"] == "copies" and r["max_devices"] == limit]
        if limit is not None:
            lines.append((f"copies, at most {limit} and penalties", both))
    trained = [
        {
            **row,
            "loss_increase": row["loss_increase_tuned"],
            "loss_increase_error": row["loss_increase_tuned_error"],
        }
        for row in kind
        if row["training"] == "finetuned" and row["trained_max_devices"]
    ]
    lines.append(("copies trained so, against training without", trained))
    return [(title, found) for title, found in lines if found]


def main() -> int:
    """The script; returns the exit code."""
    if not RESULT.is_file():
        print(f"{RESULT}: not there; run benchmarks/locality.py")
        return 1
    draw_frontier(PICTURE, series(json.loads(RESULT.read_text())["rows"]), AIMS, "svg", MOST)
    return 0


if __name__ == "__main__":
    sys.exit(main())
