"""Tables of experts that are computed in groups, for `docs/figures.py`: predicted, and measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from group_prediction import pairs_of_a_token, ratio
from layer_shapes import SHAPES, Shape

Table = tuple[Sequence[str], list[list[str]]]

TOKENS = (1, 16, 256, 4096, 32768)
LAYERS = {
    "Mixtral-8x7B": (SHAPES["mixtral_8x7b"], (2,)),
    "Qwen3-30B-A3B": (SHAPES["qwen3_30b_a3b"], (2, 4, 8)),
    "the packaged model": (Shape(1, 256, 44, 64, 8), (2, 4, 8)),
}
"""Each layer and the sizes of its groups."""


def predicted(pairs: dict[str, Any]) -> Table:
    """Time in groups over that of single experts, as built and with every step in the kernels.

    Args:
        pairs: of `benchmarks/group_pairs.py`: how far experts of a real model are chosen together.
    """
    body = []
    for name, (shape, sizes) in LAYERS.items():
        for size in sizes:
            away = mean(row["away"] for row in pairs["rows"] if row["size"] == size)
            for way, share in ("random", 1.0), ("chosen together", away), ("whole groups", 0.0):
                used = pairs_of_a_token(shape, size, share)
                cells = []
                for tokens in TOKENS:
                    at = replace(shape, tokens=tokens)
                    built, fused = (ratio(at, size, used, fused=f) for f in (False, True))
                    cells.append(f"{built:.2f}, {fused:.2f}")
                body.append([name, str(size), f"{way}: {used:.2f}", *cells])
                name = ""
    return ["", "of", "groups of a token", *(f"T = {tokens}" for tokens in TOKENS)], body


def measured(result: dict[str, Any]) -> Table:
    """Ratios of the layer, beside the predicted ones."""
    body = []
    for row in result["rows"]:
        head = [row["shape"], str(row["tokens"]), row["pass"], str(row["size"])]
        head.append(f"{row['pairs']:.2f}")
        if "error" in row:
            body.append([*head, row["error"], "", "", ""])
            continue
        expected = row.get("predicted_ratio")
        body.append(
            [
                *head,
                f"{row['single_ms']:.3f}",
                f"{row['ms']:.3f}",
                f"{row['ratio']:.2f}",
                "" if expected is None else f"{expected:.2f}",
            ]
        )
    headings = ["shape", "tokens", "pass", "of", "groups of a token", "single, ms", "groups, ms"]
    return [*headings, "ratio", "predicted"], body
