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


def measured(name: str) -> str:
    """The rows of benchmarks/results/NAME.json, and where they come from."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return f"*Not measured yet: benchmarks/results/{name}.json is not there.*\n"
    result = json.loads(path.read_text())
    rows = result["rows"]
    columns = [key for key in FORMATS if any(key in row for row in rows)]
    cells = [
        ["" if row.get(key) is None else FORMATS[key][1](row[key]) for key in columns]
        for row in rows
    ]
    source = f"{result['device']}, jax {result['jax']}, commit {result['commit']}"
    body = table([FORMATS[key][0] for key in columns], cells)
    return f"{body}\n`{result['command']}` on {source} (benchmarks/results/{name}.json).\n"


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
    """What `auto` picks for 4096 tokens a device, by `moejax.exchange.choose`."""
    from moejax.exchange import choose
    from moejax.exchange.budget import probability_of_device
    from moejax.presets import PRESETS

    rows = []
    for name in ("mixtral_8x7b", "deepseek_v2_lite", "qwen3_30b_a3b"):
        moe = PRESETS[name]().model.moe
        experts, top_k = moe.router.num_experts, moe.router.top_k
        for devices in (2, 4, 8):
            slots = experts // devices
            budget = choose(
                moe.exchange,
                tokens=4096,
                top_k=top_k,
                num_experts=experts,
                slots=slots,
                devices=devices,
            )
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


def reference_curve() -> str:
    """Held-out bits per byte of the packaged model on the way."""
    result = json.loads((RESULTS / "reference_training.json").read_text())
    pairs = [(str(r["step"]), f"{r['heldout_bits_per_byte']:.3f}") for r in result["rows"]]
    return table(("step", "bits/byte"), pairs)


BLOCKS: dict[str, Callable[[], str]] = {
    "cpu_default": lambda: measured("cpu_default"),
    "reference_model": lambda: measured("reference_model"),
    "presets": presets,
    "exchange": exchange,
    "reference_curve": reference_curve,
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
