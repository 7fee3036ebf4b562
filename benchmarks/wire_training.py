"""What a lossy wire costs a model that is trained with it from scratch.

    python benchmarks/wire_training.py
    python benchmarks/wire_training.py --steps 20 --name try

Writes benchmarks/results/wire_training.json after every run: `train.py`'s default model, the same
data in the same order, with the same wire all four ways (dispatch, combine, and both backward).
`change` of the held-out bits per byte is relative to the exact wire and the same seed; the exact
wire with another seed shows what of it is chance. `fewer_bytes` compares activations of all four
ways with the bytes of the exact wire in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import write_results
from wire_quality import fewer_bytes

ROOT = Path(__file__).parent.parent
WIRES = (
    ("compute", False, 0),
    ("int8", False, 0),
    ("float8", False, 0),
    ("int4", True, 0),
    ("compute", False, 1),
)
"""Format, rotated, seed."""
WAYS = ("dispatch", "combine", "dispatch-grad", "combine-grad")


def bits_per_byte(form: str, rotate: bool, seed: int, steps: int) -> dict[str, Any]:
    """The summary of a run of its own."""
    flags = [f"--model.moe.exchange.wire.{way}={form}" for way in WAYS]
    if rotate:
        flags.append("--model.moe.exchange.wire.rotate")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, ROOT / "train.py", "--run", run, f"--steps={steps}"]
        subprocess.run([*command, f"--seed={seed}", *flags], cwd=ROOT, check=True)
        return json.loads((run / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--name", default="wire_training")
    args = parser.parse_args()
    from moejax.config import WireConfig
    from moejax.presets import PRESETS

    d_model = PRESETS["tiny"]().model.d_model
    rows: list[dict[str, Any]] = []
    for form, rotate, seed in WIRES:
        summary = bits_per_byte(form, rotate, seed, args.steps)
        found = summary["bits_per_byte"]
        exact = rows[0]["bits_per_byte"] if rows else found
        rows.append(
            {
                "wire": form,
                "rotate": rotate,
                "seed": seed,
                "bits_per_byte": round(found, 5),
                "change": round(found / exact - 1, 5),
                "fewer_bytes": round(fewer_bytes(d_model, WireConfig(form, form)), 3),  # type: ignore[arg-type]
            }
        )
        print(rows[-1], flush=True)
        write_results(args.name, rows, steps=args.steps)


if __name__ == "__main__":
    main()
