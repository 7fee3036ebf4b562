"""Two hundred clients at once, a fifth of which go away: what became of their requests.

    JAX_PLATFORMS=cpu python benchmarks/serve_stress.py
    JAX_PLATFORMS=cpu python benchmarks/serve_stress.py --seconds 10 --name try

Writes benchmarks/results/serve_stress.json, a row. It is `python -m moejax.serving.stress` with the
packaged model: every answer is compared with the text that its prompt has alone, up to the first
near tie. `wrong` says what did not hold; memory is the process's own.
"""

from __future__ import annotations

import argparse
import sys

from common import write_results

from moejax.serving.start import running_model
from moejax.serving.stress import StressConfig, stress


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--name", default="serve_stress")
    args = parser.parse_args()
    config = StressConfig(seconds=args.seconds, clients=args.clients)
    with running_model(config, warm_up=True) as (model, loop):
        findings = stress(config, model, loop)
    first, last = findings.memory
    row = {
        "clients": config.clients,
        "seconds": config.seconds,
        **findings.counts,
        "memory_mib": [round(first / 2**20), round(last / 2**20)],
        "wrong": findings.wrong,
    }
    print(row)
    write_results(args.name, [row])
    return 1 if findings.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
