"""The table of what fewer experts cost, for `docs/figures.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Table = tuple[Sequence[str], list[list[str]]]

PICTURE = "img/compress.svg"


def name_of(case: str) -> str:
    """A case as a sentence: `merge:48:merge.fit=each@9` is merged, `merge.fit=each`, 9 outputs."""
    case, _, outputs = case.partition("@")
    method, _, rest = case.partition(":")
    number, _, flags = rest.partition(":")
    names = {"none": "as it is", "merge": "merged", "prune": "pruned (REAP)", "share": "sharing"}
    names["group"] = f"side by side, {number} each"
    words = names[method]
    if "saliency" in flags:
        words = "pruned"
    return words + (f", `{flags}`" if flags else "") + (f", {outputs} outputs" if outputs else "")


def compress(result: dict[str, Any]) -> Table:
    """Size and quality of each case, before and after training."""
    body = []
    for row in result["rows"]:
        trained, own = row.get("finetuned_delta_pct"), row["method"] == "none"
        used = "" if own or row["used"] is None else f", {row['used']:.2f}"
        experts = "" if own else f"{row['experts']:g}{used}"
        error = "" if own else f"{sum(row['layer_error']) / len(row['layer_error']):.1%}"
        size = f"{row['parameters'] / 1e6:.1f} M ({row['size_fraction']:.0%})"
        continued = "" if own else f"{row['exact_match']:.0%}, {row['same_tokens']:.0%}"
        body.append(
            [
                name_of(row["method"]),
                experts,
                f"{size}, {row['active_parameters'] / 1e6:.1f} M",
                error,
                f"{row['bits_per_byte']:.4f}",
                "" if own else f"{row['delta_pct']:+.1f} %",
                continued,
                "" if trained is None else f"{row['finetuned_bits_per_byte']:.4f}",
                "" if trained is None or own else f"{trained:+.1f} %",
            ]
        )
    headings = ["", "experts a layer, used by a token", "parameters, of a token at most"]
    headings += ["layer error", "bits/byte", "change", "continuations: the same, tokens alike"]
    return [*headings, "trained: bits/byte", "change"], body
