"""Tables of one MoE layer, whole and kernel by kernel, for `docs/figures.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Table = tuple[Sequence[str], list[list[str]]]

PREFILL = {
    "mixtral_8x7b": "650 / 650",
    "qwen3_30b_a3b": "550 / 470",
    "sonic_fine": "590 / 580",
}
"""Shapes of the layer benchmark and the aims: TFLOP/s, fwd / fwd+bwd."""
DECODE = {
    "mixtral_b1": "0.26",
    "mixtral_b16": "1.02",
    "mixtral_b64": "1.02",
    "qwen3_b16": "0.28",
    "qwen3_b256": "0.44",
}
"""Likewise of decoding, ms."""
ROUTING = ("router product", "top_k", "sorted_places", "rest of routing")
PICTURE = "img/expert_kernels.svg"


def implementations(result: dict[str, Any], routing: str) -> Table | None:
    """A row for each implementation: TFLOP/s of prefill, ms of decode; None without rows."""
    rows = [row for row in result["rows"] if row["routing"] == routing]
    if not rows:
        return None
    found = {(row["impl"], row["shape"], row["pass"]): row for row in rows}

    def cell(impl: str, shape: str, which: str, key: str, form: str) -> str:
        value = found.get((impl, shape, which), {}).get(key)
        return "–" if value is None else format(value, form)

    body = []
    for impl in dict.fromkeys(row["impl"] for row in rows):
        body.append([f"`{impl}`"])
        for shape in PREFILL:
            rates = [cell(impl, shape, which, "tflops", ".0f") for which in ("fwd", "fwdbwd")]
            body[-1].append(" / ".join(rates))
        body[-1] += [cell(impl, shape, "fwd", "ms", ".3f") for shape in DECODE]
    if routing == "uniform":
        body.append(["*aim*", *PREFILL.values(), *DECODE.values()])
    headings = [*PREFILL, *(f"{shape}, ms" for shape in DECODE)]
    return ["implementation", *headings], body


def kernels(result: dict[str, Any]) -> dict[str, Table]:
    """Tables by their titles."""
    made = {}
    for title, which, shapes, digits, scale in (
        ("Forward, ms", "fwd", PREFILL, 2, 1.0),
        ("Forward and backward, ms", "fwdbwd", PREFILL, 2, 1.0),
        ("Decode (forward), µs", "fwd", DECODE, 1, 1e3),
    ):
        rows = [r for r in result["rows"] if r["pass"] == which and r["shape"] in shapes]
        if rows:
            made[title] = _kernel_table(rows, digits, scale)
    return made


def _kernel_table(rows: list[dict[str, Any]], digits: int, scale: float) -> Table:
    """A row for each kernel, for each shape predicted / measured (TFLOP/s)."""
    found = {(row["kernel"], row["shape"]): row for row in rows}
    # The classes that are not predicted come last, whatever shape has them.
    order = sorted(rows, key=lambda row: (row["predicted_ms"] is None, row["kernel"] == "other"))
    kernels = dict.fromkeys(row["kernel"] for row in order)
    shapes = dict.fromkeys(row["shape"] for row in rows)

    def number(value: float | None) -> str:
        if value is None:
            return "–"
        least = 10.0**-digits
        return f"<{least:g}" if value * scale < least / 2 else f"{value * scale:.{digits}f}"

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        rate = "" if row["tflops"] is None or scale != 1.0 else f" ({row['tflops']:.0f})"
        return f"{number(row['predicted_ms'])} / {number(row['ms'])}{rate}"

    body = []
    for kernel in kernels:
        of_kernel = [found.get((kernel, shape)) for shape in shapes]
        bounds = dict.fromkeys(row["bound"] for row in of_kernel if row and row["bound"])
        title = kernel if " " in kernel or kernel == "other" else f"`{kernel}`"
        body.append([title, ", ".join(bounds), *map(cell, of_kernel)])
    totals, shares = [], []
    for shape in shapes:
        of_shape = [row for row in rows if row["shape"] == shape]
        predicted = sum(row["predicted_ms"] or 0.0 for row in of_shape)
        all_there = any(row["ms"] is not None for row in of_shape)
        ms = sum(row["ms"] or 0.0 for row in of_shape) if all_there else None
        totals.append(f"{number(predicted)} / {number(ms)}")
        routing = sum(row["ms"] or 0.0 for row in of_shape if row["kernel"] in ROUTING)
        shares.append(f"{routing / ms:.1%}" if ms else "–")
    body += [["**sum**", "", *totals], ["routing in it", "", *shares]]
    return ["kernel", "bound by", *shapes], body
