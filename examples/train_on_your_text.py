"""Trains a tiny MoE model on your text, then lets it continue a line.

python examples/train_on_your_text.py           on a text that it writes itself
python examples/train_on_your_text.py PATH …    on files and folders of UTF-8 text, or .jsonl
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

import infer
import train

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def write_days(path: Path) -> str:
    """Two thousand lines of neighbouring days."""
    starts_and_lengths = np.random.default_rng(0).integers((0, 3), (7, 8), (2000, 2))
    lines = [" ".join((DAYS * 2)[start:][:length]) for start, length in starts_and_lengths]
    path.write_text("".join(line + ".\n" for line in lines))
    return str(path)


folder = Path(tempfile.mkdtemp())
texts = sys.argv[1:] or [write_days(folder / "days.txt")]
run = folder / "run"
flags = [  # `moejax-train --help` lists them all; those left out have values for a small CPU
    *("--data.paths", *texts, "--data.seq-len", "64", "--data.batch-size", "16"),
    *("--model.d-model", "64", "--model.num-layers", "2", "--model.max-context", "64"),
    *("--steps", "100", "--optimizer.warmup-steps", "10", "--eval-every", "0"),
    *("--mesh", "expert=2", "--run", str(run)),  # 8 experts over two devices, here fake ones
]
# Prints its progress. What goes wrong is told in one line, and the exit code is not 0.
if code := train.main(flags):
    sys.exit(code)

# The run directory holds weights, tokenizer and figures; `infer` takes it as it is.
summary = json.loads((run / "summary.json").read_text())
prompt = "Friday" if not sys.argv[1:] else "The"
said = io.StringIO()
with contextlib.redirect_stdout(said):
    asked = ["--model", str(run), "--mesh", "expert=2", "-p", prompt, "--max-tokens", "17"]
    code = infer.main(asked)
print(f"it continues {prompt!r}: {said.getvalue().strip()}")
print(f"held-out text: {summary['bits_per_byte']:.2f} bits a byte, zlib {summary['zlib']:.2f}")
assert code == 0
if not sys.argv[1:]:
    assert said.getvalue().startswith("Friday Saturday Sunday ") and summary["bits_per_byte"] < 0.4
