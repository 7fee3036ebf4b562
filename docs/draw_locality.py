"""Draws traffic against loss of routing that knows where experts are: docs/img/locality.svg.

python docs/draw_locality.py     after benchmarks/locality.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from moejax.placement.frontier import recommend
from moejax.placement.frontier_picture import draw_frontier

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "locality.json"
PICTURE = ROOT / "docs" / "img" / "locality.svg"
AIMS = ((0.5, 0.02), (0.4, 0.05))
"""Ratio of remote sends and increase of the loss to be beaten."""
MOST = 0.15  # of the loss increase, to show

Rows = list[dict[str, Any]]


def series(rows: Rows) -> list[tuple[str, Rows]]:
    """The settings by placement, and those of training against the same without such routing."""
    plain = [row for row in rows if row["training"] == "none"]
    found = [
        (name, [row for row in plain if row["placement"] == name])
        for name in dict.fromkeys(row["placement"] for row in plain)
    ]
    trained = [
        {
            **row,
            "loss_increase": row["loss_increase_tuned"],
            "loss_increase_error": row["loss_increase_tuned_error"],
        }
        for row in rows
        if row["training"] == "finetuned" and row["trained_max_devices"]
    ]
    if trained:
        found.append(("copies, trained so, against training without", trained))
    return found


def recommended(rows: Rows) -> Rows:
    """Of the weights as they are, the setting with least traffic within the loss of each aim."""
    plain = [row for row in rows if row["training"] == "none"]
    points = [(row["remote_sends"], row["loss_increase"]) for row in plain]
    best = [recommend(points, loss) for _, loss in AIMS]
    return [plain[i] for i in best if i is not None]


def main() -> int:
    """The script; returns the exit code."""
    if not RESULT.is_file():
        print(f"{RESULT}: not there; run benchmarks/locality.py")
        return 1
    rows = json.loads(RESULT.read_text())["rows"]
    draw_frontier(PICTURE, series(rows), AIMS, recommended(rows), MOST)
    return 0


if __name__ == "__main__":
    sys.exit(main())
