"""The default training run, as `make train` makes it: how long, how good.

    python benchmarks/cpu_default.py

Writes benchmarks/results/cpu_default.json from the run's own summary.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import write_results

ROOT = Path(__file__).parent.parent


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        start = time.perf_counter()
        subprocess.run([sys.executable, ROOT / "train.py", "--run", run], cwd=ROOT, check=True)
        seconds = time.perf_counter() - start
        summary = json.loads((run / "summary.json").read_text())
    row = {
        "steps": summary["steps"],
        "steps_per_s": summary["steps"] / summary["training_seconds"],
        "seconds": seconds,
        "training_seconds": summary["training_seconds"],
        "bits_per_byte": summary["bits_per_byte"],
        "zlib": summary["zlib"],
        "xz": summary["xz"],
    }
    print(json.dumps(row, indent=2))
    print(write_results("cpu_default", [row], command="python train.py"))


if __name__ == "__main__":
    main()
