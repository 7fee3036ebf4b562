"""Tables of experts in host memory, for `docs/figures.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Table = tuple[Sequence[str], list[list[str]]]

PICTURE = "img/offload_traces.svg"
PLAIN = ("lru:none:0", "lfu:none:0", "predicted:history:0", "predicted:combined:0")
AHEAD = ("lfu:routers", "predicted:combined", "predicted:routers", "predicted:linear")


def hits(result: dict[str, Any]) -> Table:
    """Hit rates of policies with and without fetching ahead, by the share that has slots."""
    rows = result["rows"]
    fractions = sorted({row["cache_fraction"] for row in rows})
    found = {
        (f"{r['policy']}:{r['predictor']}:{r['prefetch_experts']}", r["cache_fraction"]): r
        for r in rows
    }
    ahead = max(row["prefetch_experts"] for row in rows)
    best = {row["cache_fraction"]: row["belady"] for row in rows}
    body = [["the most without fetching ahead (Belady)", *(f"{best[f]:.1%}" for f in fractions)]]
    for case in (*PLAIN, *(f"{case}:{ahead}" for case in AHEAD)):
        policy, predictor, count = case.split(":")
        name = f"`{policy}`" + (f" by `{predictor}`" if predictor != "none" else "")
        if count != "0":
            name += f", {count} a layer fetched ahead"
        cells = [found.get((case, fraction)) for fraction in fractions]
        if any(cells):
            body.append([name, *("–" if c is None else f"{c['hit_rate']:.1%}" for c in cells)])
    return ["uses whose expert is there", *(f"{f:.1%} have slots" for f in fractions)], body


def recalls(result: dict[str, Any]) -> Table:
    """Recall at k and 2k of each predictor by how many layers it looks ahead."""
    distances = sorted({row["distance"] for row in result["recall"]} - {None})
    found = {(row["predictor"], row["distance"]): row for row in result["recall"]}
    body = []
    for name in dict.fromkeys(row["predictor"] for row in result["recall"]):
        cells = [found.get((name, distance)) for distance in (*distances, None)]
        told = ["–" if c is None else f"{c['at_k']:.1%} / {c['at_2k']:.1%}" for c in cells]
        body.append([f"`{name}`", *told])
    headings = ["this layer" if d == 0 else f"{d} ahead" for d in distances]
    return ["recall at k / 2k", *headings, "next token, same layer"], body


def decoding(result: dict[str, Any]) -> Table:
    """Speed of decoding with each policy and predictor."""
    body = []
    for row in result["rows"]:
        belady, resident = row["belady"], row["resident_tokens_per_s"]
        how = [row.get("store", "pinned")]
        how += ["all guesses"] if row.get("guesses") == "all" else []
        body.append(
            [
                f"{row['cache_fraction']:.1%}",
                f"`{row['policy']}`",
                ", ".join([f"`{row['predictor']}`", *(h for h in how if h != "pinned")]),
                f"{row['hit_rate']:.1%} ({row['held_rate']:.1%})",
                "–" if belady is None else f"{belady:.1%}",
                f"{row['tokens_per_s']:.1f}",
                "–" if resident is None else f"{resident:.1f}",
                f"{row['stall_ms_per_token']:.2f}",
                f"{row['link_fraction']:.0%} of {row['link_gbs']:.1f} GB/s",
            ]
        )
    headings = ["have slots", "policy", "predictor", "hits (held)", "Belady", "tokens/s"]
    return [*headings, "all resident, tokens/s", "stall, ms a token", "transfers"], body
