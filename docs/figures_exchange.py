"""The figures of the exchange over several GPUs, for `figures.py`."""

from __future__ import annotations

from typing import Any

__all__ = ["layer", "links", "parts", "trained_with_wires"]

Table = tuple[list[str], list[list[str]]]
"""Headings and rows."""
SHAPES = ("qwen3_30b_a3b", "mixtral_8x7b", "dsv3")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["impl"], row["mode"], row["chunks"], row["options"], row["pass"], row["routing"]


def layer(result: dict[str, Any]) -> Table:
    """One layer over 4 GPUs: ms and TFLOP/s of a GPU in each mode."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault(_key(row), {})[row["shape"]] = row
    body = []
    for (impl, mode, chunks, options, which, routing), of in sorted(found.items(), key=_order):
        cells = [
            f"{of[s]['ms']:.2f} ({of[s]['tflops_per_gpu']:.0f})" if s in of else "–" for s in SHAPES
        ]
        # `auto` took a ring; the peer's mode is in its name.
        way = f"`{impl}`" if impl != "moejax" else f"`{'ring' if mode == 'auto' else mode}`"
        told = ", costs told" if options == "overlap_costs" else ""
        body.append([which, routing, way, f"{chunks}{told}", *cells])
    return ["pass", "routing", "mode", "chunks", *SHAPES], body


def _order(item: tuple[tuple[Any, ...], Any]) -> tuple[Any, ...]:
    impl, mode, chunks, options, which, routing = item[0]
    return which, routing, chunks, impl == "moejax", mode != "auto", mode == "remote", options


def parts(result: dict[str, Any]) -> Table:
    """The forward with parts left out, and what of the exchange is hidden."""
    body = []
    for row in result["rows"]:
        if row["impl"] != "moejax" or row["chunks"] > 1 or row["hidden_fraction"] is None:
            continue
        exchange = row["ms_no_compute"] - row["ms_neither"]
        body.append(
            [
                f"`{row['shape']}`",
                row["routing"],
                f"`{row['mode']}`",
                f"{row['ms']:.2f}",
                f"{row['ms_no_comm']:.2f}",
                f"{exchange:.2f}",
                f"{100 * row['hidden_fraction']:.0f} %",
                f"{row['bytes_sent'] / 1e6:.0f}",
                f"{row['max_over_mean_load']:.2f}",
            ]
        )
    headings = ["shape", "routing", "mode", "ms", "computation", "exchange", "hidden"]
    return [*headings, "MB sent", "max/mean load"], body


def links(result: dict[str, Any]) -> Table:
    """GB/s that a GPU sends, by collective and size."""
    sizes = sorted({row["bytes"] for row in result["rows"]})
    found = {(row["collective"], row["bytes"]): row.get("gbs") for row in result["rows"]}
    body = []
    for collective in dict.fromkeys(row["collective"] for row in result["rows"]):
        rates = [found.get((collective, size)) for size in sizes]
        body.append([f"`{collective}`", *("–" if r is None else f"{r:.0f}" for r in rates)])
        body[-1].append(f"{1e3 * result['latency_ms'][collective]:.0f}")
    headings = [f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB" for size in sizes]
    return ["collective", *headings, "least µs"], body


def trained_with_wires(result: dict[str, Any]) -> Table:
    """Models trained from scratch with a lossy wire."""
    body = [
        [
            "as it is" if row["wire"] == "compute" else f"`{row['wire']}`",
            "yes" if row["rotate"] else "",
            f"{row['seed']}",
            f"{row['bits_per_byte']:.4f}",
            "" if row is result["rows"][0] else f"{row['change']:+.2%}",
            f"{row['fewer_bytes']:.2f}",
        ]
        for row in result["rows"]
    ]
    headings = ["on the wire, all four ways", "rotated", "seed", "bits/byte", "change"]
    return [*headings, "fewer bytes than bfloat16"], body
