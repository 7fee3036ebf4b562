"""Tables of generation and of experts with 8 bits, for `docs/figures.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Table = tuple[Sequence[str], list[list[str]]]

NAMES = {"none": "as they are (bfloat16)", "int8": "`int8`", "fp8": "`fp8` (e4m3)"}


def quality(result: dict[str, Any]) -> Table:
    """What experts of 8 bits cost."""
    body = [
        [
            NAMES[row["weights"]],
            f"{row['bits_per_byte']:.4f}",
            "" if row["change"] is None else f"{row['change']:+.3%}",
            f"{row['fewer_bytes']:.2f}",
        ]
        for row in result["rows"]
    ]
    return ["experts' weights", "bits/byte", "change", "fewer bytes"], body


def generation(result: dict[str, Any]) -> Table:
    """Prompts and decoding steps, by model and batch."""

    def cell(row: dict[str, Any] | None) -> str:
        if row is None or "error" in row:
            return "–"
        share = row["roofline_fraction"]
        bound = "" if share is None else f" ({share:.0%})"
        return f"{row['ms_per_step']:.2f}{bound}"

    found = {
        (r["impl"], r["model"], r["weights"], r["batch"], r["phase"]): r for r in result["rows"]
    }
    keys = list(dict.fromkeys(key[:4] for key in found))
    body = []
    for key in keys:
        prefill, decode = (found.get((*key, phase)) for phase in ("prefill", "decode"))
        speed = f"{decode['tokens_per_s']:.0f}" if decode and "error" not in decode else "–"
        body.append([f"`{key[0]}`", f"`{key[1]}`", *map(str, key[2:]), cell(prefill), cell(decode)])
        body[-1].append(speed)
    headings = ["", "model", "experts", "texts", "prompts, ms", "step, ms", "tokens/s"]
    return headings, body


def decode_exchange(result: dict[str, Any]) -> Table:
    """Decoding steps with each exchange, by batch; the one that was picked in bold."""
    found = {(r["batch"], r["mode"]): r for r in result["rows"]}
    batches, modes = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))

    def cell(row: dict[str, Any]) -> str:
        if row["ms_per_step"] is None:
            return "–"
        text = f"{row['ms_per_step']:.2f} ({row['ms_device']:.2f})"
        return f"**{text}**" if row["picked"] else text

    body = [[str(batch), *(cell(found[batch, mode]) for mode in modes)] for batch in batches]
    return ["texts", *(f"`{mode}`, ms (devices alone)" for mode in modes)], body


def loading(result: dict[str, Any]) -> Table:
    """How long a checkpoint takes to load, and how much memory beside it."""

    def gb(value: float) -> str:
        return f"{value / 1e9:.2f}"

    body = [
        [
            f"`{row['mesh']}`",
            "no" if row["cold"] else "yes",
            gb(row["checkpoint_bytes"]),
            f"{row['seconds']:.0f}",
            gb(row["device_bytes"]),
            gb(row["beside_bytes"]),
            gb(row["largest_tensor_bytes"]),
        ]
        for row in result["rows"]
    ]
    headings = ["mesh", "in page cache", "GB on disk", "s", "GB on devices", "GB beside"]
    return [*headings, "GB of the largest tensor"], body
