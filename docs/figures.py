"""Fills the figures of README.md and docs/ from benchmarks/results and from the code itself.

python docs/figures.py           rewrites the blocks
python docs/figures.py --check   exit code 1 when one is stale

A block is what lies between `<!-- figures:NAME -->` and `<!-- end -->`; `BLOCKS` says what each
NAME holds. Text outside the blocks is left alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import figures_compress
import figures_compression
import figures_exchange
import figures_faults
import figures_groups
import figures_inference
import figures_layers
import figures_layout
import figures_offload
import figures_placement
import figures_techniques
import figures_training

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- figures:([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
FORMATS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "bits_per_byte": ("bits/byte", lambda v: f"{v:.3f}"),
    "zlib": ("zlib", lambda v: f"{v:.3f}"),
    "xz": ("xz", lambda v: f"{v:.3f}"),
    "steps": ("steps", lambda v: f"{v}"),
    "steps_per_s": ("steps/s", lambda v: f"{v:.2f}"),
    "seconds": ("seconds", lambda v: f"{v:.0f}"),
    "parameters": ("parameters", lambda v: f"{v / 1e6:.1f} M"),
    "active_parameters": ("multiplied with a token", lambda v: f"{v / 1e6:.1f} M"),
    "held_out_bytes": ("held-out bytes", lambda v: f"{v:,}"),
    "window": ("window", lambda v: f"{v}"),
    "overlap": ("overlap", lambda v: f"{v:g}"),
    "dtype": ("computed in", str),
}
"""Heading and format of each measure, in the order of the columns; others are not shown."""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def load(name: str) -> dict[str, Any] | None:
    """benchmarks/results/NAME.json, if it is there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def source(result: dict[str, Any], name: str) -> str:
    """Where figures come from."""
    made = f"{result['device']}, jax {result['jax']}, commit {result['commit']}"
    earlier = {row["commit"]: None for row in result["rows"] if "commit" in row}
    made += "".join(f", some rows at {commit}" for commit in earlier)
    return f"`{result['command']}` on {made} (benchmarks/results/{name}.json).\n"


def missing(name: str, what: str = "") -> str:
    """In the place of figures that are not there."""
    return f"*Not measured yet: benchmarks/results/{name}.json {what or 'is not there'}.*\n"


def measured(name: str) -> str:
    """The rows of benchmarks/results/NAME.json, and where they come from."""
    result = load(name)
    if result is None:
        return missing(name)
    rows = result["rows"]
    columns = [key for key in FORMATS if any(key in row for row in rows)]
    cells = [
        ["" if row.get(key) is None else FORMATS[key][1](row[key]) for key in columns]
        for row in rows
    ]
    body = table([FORMATS[key][0] for key in columns], cells)
    return f"{body}\n{source(result, name)}"


def presets() -> str:
    """What each preset is, counted from its configuration."""
    from moejax.presets import PRESETS
    from sharding.costs import count_parameters

    def row(name: str) -> list[str]:
        config = PRESETS[name]()
        model, router = config.model, config.model.moe.router
        parameters = count_parameters(model)
        return [
            f"`{name.replace('_', '-')}`",
            _count(parameters.total),
            _count(parameters.active),
            f"{model.num_layers} × {model.d_model}",
            f"{router.num_experts}, {router.top_k} of a token",
            f"{model.moe.experts.hidden}",
            f"`{config.mesh}`",
            f"{config.data.batch_size} × {config.data.seq_len}",
            f"{config.steps}",
        ]

    headings = ("preset", "parameters", "active", "layers × width", "experts", "expert width")
    return table((*headings, "mesh", "examples × tokens", "steps"), map(row, PRESETS))


def exchange() -> str:
    """What `auto` picks for 4096 tokens a device, by `moejax.exchange.choose_for`."""
    from moejax.exchange import choose_for
    from moejax.exchange.budget import probability_of_device
    from moejax.presets import PRESETS

    rows = []
    for name in ("mixtral_8x7b", "deepseek_v2_lite", "qwen3_30b_a3b"):
        moe = PRESETS[name]().model.moe
        experts, top_k = moe.router.num_experts, moe.router.top_k
        for devices in (2, 4, 8):
            slots = experts // devices
            budget = choose_for(moe, tokens=4096, devices=devices)
            distinct = devices * probability_of_device(experts, slots, top_k)
            expected = 4096 * distinct / devices
            rows.append(
                (
                    f"`{name.replace('_', '-')}`",
                    f"{devices}",
                    f"{top_k}",
                    f"{distinct:.2f}",
                    f"{expected:.0f}",
                    f"{budget.rows}",
                    f"`{budget.mode}`",
                )
            )
    headings = ("shape", "G", "K", "devices of a token", "rows expected a pair", "sent a pair")
    return table((*headings, "`auto` picks"), rows)


def hosts() -> str:
    """Rows of a token that cross between hosts, by formula, with experts chosen evenly."""
    from moejax.exchange.budget import probability_of_device
    from moejax.presets import PRESETS

    rows = []
    for name in ("mixtral_8x7b", "qwen3_30b_a3b"):
        router = PRESETS[name]().model.moe.router
        for count, local in ((2, 4), (2, 8), (4, 8), (8, 8)):
            devices, experts = count * local, router.num_experts
            if devices <= experts:
                one = probability_of_device(experts, experts // devices, router.top_k)
                host = probability_of_device(experts, experts // count, router.top_k)
                each, once = (devices - local) * one, (count - 1) * host
                shape = f"`{name.replace('_', '-')}`"
                rows.append((shape, f"{count} × {local}", f"{each:.2f}", f"{once:.2f}"))
    return table(("shape", "hosts × devices", "to every device", "once a host"), rows)


def reference_curve() -> str:
    """Held-out bits per byte of the packaged model on the way."""
    result = json.loads((RESULTS / "reference_training.json").read_text())
    pairs = [(str(r["step"]), f"{r['heldout_bits_per_byte']:.3f}") for r in result["rows"]]
    return table(("step", "bits/byte"), pairs)


def wire_quality(columns: bool) -> str:
    """What rounding on the wire, or sending fewer columns, costs the packaged model."""
    name = "wire_quality"
    result = load(name)
    if result is None:
        return missing(name)
    rows = [row for row in result["rows"] if columns == ("columns" in row or "trained" in row)]
    if not rows:
        return missing(name, "has no rows of fewer columns")
    body = []
    for row in rows:
        cells = [f"`{row['wire']}`" + (", rotated" if row["rotate"] else "")]
        if columns:
            cells += [*map(str, row.get("columns", ("all", "all"))), f"{row.get('trained', 0)}"]
        body.append(
            [
                *cells,
                f"{row['bits_per_byte']:.4f}",
                "" if row["change"] is None else f"{row['change']:+.2%}",
                "1" if row["fewer_bytes"] is None else f"{row['fewer_bytes']:.2f}",
            ]
        )
    ways = ["columns out", "home", "steps of training"] if columns else []
    headings = ("on the wire", *ways, "bits/byte", "change", "fewer bytes than bfloat16")
    # Rows of an earlier run say so themselves.
    own = {key: rows[0][key] for key in ("command", "commit") if key in rows[0]}
    return table(headings, body) + "\n" + source({**result, **own, "rows": []}, name)


def ep_schedule() -> str:
    """Bytes of the exchange beside expert kernels, in programs that XLA compiled for GPUs."""
    name = "ep_schedule"
    result = load(name)
    if result is None:
        return missing(name)
    found: dict[tuple, dict[str, float]] = {}
    for row in result["rows"]:
        key = tuple(str(row[k]) for k in ("shape", "mode", "chunks", "pass"))
        found.setdefault(key, {})[row["options"]] = row["bytes_behind"]
    ways = ("default", "overlap", "costs")
    body = [
        [f"`{shape}`", f"`{mode}`", *rest, *(f"{100 * of[way]:.0f} %" for way in ways)]
        for (shape, mode, *rest), of in found.items()
    ]
    headings = ("shape", "mode", "chunks", "pass", "XLA alone", "two at once", "with costs")
    return table(headings, body) + "\n" + source(result, name)


def expert_layer(routing: str) -> str:
    """One MoE layer in every implementation: TFLOP/s of prefill, ms of decode."""
    name = "expert_layer_h100"
    result = load(name)
    if result is None:
        return missing(name)
    made = figures_layers.implementations(result, routing)
    if made is None:
        return missing(name, f"has no rows of {routing} routing")
    return table(*made) + "\n" + source(result, name)


def expert_kernels() -> str:
    """The layer kernel by kernel, predicted and measured, and its picture."""
    name = "expert_kernels_h100"
    result = load(name)
    if result is None:
        return missing(name)
    made = figures_layers.kernels(result)
    parts = [f"{title}:\n\n{table(*each)}\n" for title, each in made.items()]
    picture = figures_layers.PICTURE
    if (ROOT / "docs" / picture).is_file():
        parts.append(f"![Predicted and measured time of each kernel]({picture})\n\n")
    return "".join(parts) + source(result, name)


def compression_quality() -> str:
    """What compressed gradients cost, and its picture."""
    text = made_from("compression_quality", figures_compression.quality)
    if not (ROOT / "docs" / figures_compression.PICTURE).is_file():
        return text
    return f"{text}\n![Held-out loss of each method]({figures_compression.PICTURE})\n"


def compress() -> str:
    """What fewer experts cost, and its picture."""
    text = made_from("compress", figures_compress.compress)
    if not (ROOT / "docs" / figures_compress.PICTURE).is_file():
        return text
    return f"{text}\n![Bits per byte by size]({figures_compress.PICTURE})\n"


def made_from(name: str, make: Callable[[dict[str, Any]], figures_exchange.Table]) -> str:
    """A table made from benchmarks/results/NAME.json."""
    result = load(name)
    return missing(name) if result is None else table(*make(result)) + "\n" + source(result, name)


BLOCKS: dict[str, Callable[[], str]] = {
    "cpu_default": lambda: measured("cpu_default"),
    "reference_model": lambda: measured("reference_model"),
    "wire_quality": lambda: wire_quality(columns=False),
    "ep_schedule": ep_schedule,
    "ep_layer": lambda: made_from("ep_layer_h200x4", figures_exchange.layer),
    "ep_parts": lambda: made_from("ep_layer_h200x4", figures_exchange.parts),
    "wire_training": lambda: made_from("wire_training", figures_exchange.trained_with_wires),
    "compression_quality": compression_quality,
    "compress": compress,
    "compress_200_steps": lambda: made_from("compress_200_steps", figures_compress.compress),
    "compress_1000_steps": lambda: made_from("compress_1000_steps", figures_compress.compress),
    "groups_predicted": lambda: made_from("group_pairs", figures_groups.predicted),
    "groups_measured": lambda: made_from("expert_groups_h100", figures_groups.measured),
    "expert_weights": lambda: made_from("expert_weights_quality", figures_inference.quality),
    "load_seconds": lambda: made_from("load_seconds", figures_inference.loading),
    "inference": lambda: made_from("inference_h100", figures_inference.generation),
    "decode_exchange": lambda: made_from("decode_exchange", figures_inference.decode_exchange),
    "placement": lambda: made_from("placement", figures_placement.placements),
    "placement_layers": lambda: made_from("placement_layers_h200x2", figures_placement.layers),
    "locality": lambda: made_from("locality", figures_placement.locality),
    "locality_trained": lambda: made_from("locality", figures_placement.locality_trained),
    "offload_hits": lambda: made_from("offload_traces", figures_offload.hits),
    "offload_recalls": lambda: made_from("offload_traces", figures_offload.recalls),
    "offload_decoding": lambda: made_from("offload_h200", figures_offload.decoding),
    "stream_kernels": lambda: made_from("stream_kernels", figures_training.stream_kernels),
    "train_step_batches": lambda: made_from("train_step_h100_batches", figures_training.steps),
    "train_step": lambda: made_from("train_step_h100", figures_training.steps),
    "unequal_groups": lambda: made_from("unequal_groups", figures_training.unequal_groups),
    "kills": lambda: made_from("faults", figures_faults.kills),
    "killed_runs": lambda: made_from("faults", figures_faults.runs),
    "links": lambda: made_from("links_h200x4", figures_exchange.links),
    "wire_columns": lambda: wire_quality(columns=True),
    "presets": presets,
    "techniques": lambda: table(*figures_techniques.techniques(load)),
    "layouts": lambda: table(*figures_layout.layouts()),
    "exchange": exchange,
    "hosts": hosts,
    "reference_curve": reference_curve,
    "expert_layer": lambda: expert_layer("uniform"),
    "expert_layer_zipf": lambda: expert_layer("zipf"),
    "expert_kernels": expert_kernels,
}


def documents() -> list[Path]:
    """README and everything under docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """The text with its blocks made anew."""
    return BLOCK.sub(lambda m: m[1] + BLOCKS[m[2]]() + m[4], text)


def _count(number: int) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


def main() -> int:
    """The script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path in documents():
        old = path.read_text()
        new = filled(old)
        if new != old:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(new)
    for path in stale:
        print(f"{path}: {'figures are stale; run python docs/figures.py' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
