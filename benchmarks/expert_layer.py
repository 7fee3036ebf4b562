"""One MoE layer, router included, in bf16 on one GPU: moejax and what it is compared with.

    python benchmarks/expert_layer.py
    python benchmarks/expert_layer.py --routing zipf --impls moejax torch_grouped_mm --add
    JAX_PLATFORMS=cpu python benchmarks/expert_layer.py --tiny    # a rehearsal

Writes benchmarks/results/expert_layer_h100.json after every row. All JAX implementations run in one
process and PyTorch in a second one after it, each with the GPU's memory to itself.

- Inputs are the same everywhere and normally distributed: tokens, cotangent and router weight;
  expert weights are drawn on the device. A random router routes uniformly at random. `--routing
  zipf` adds fixed biases to the logits, so that the experts' shares fall as 1/rank
  (`layer_shapes.zipf_bias`).
- `fwd` is y. `fwdbwd` is Σ y·ct for a fixed random ct and its gradients with respect to x, both
  expert weights and the router weight. No auxiliary losses.
- FLOPs are 6·T·D·H·K forward and three times that with backward, whatever an implementation
  really does. The roofline is 788 TFLOP/s, and for decode the bytes of the experts touched at
  3.05 TB/s.
- `ms` is the median of groups of back-to-back calls, `ms_spread` (largest − smallest) / median. For
  decode it is the time of one layer in a program of 16 layers one after another, as infer.py's
  step is (PyTorch: of a CUDA graph of one layer), `ms_in_a_loop` in a program that loops 64 times
  over one, and `ms_single_calls` that of a call of one layer. XLA makes CUDA graphs of the first
  and the last. The weights touched are larger than the L2 cache in every shape, so reading them
  again and again reads memory.
- Before it is timed, y of 64 tokens is compared with float32 (`error_vs_float32`, norm-relative),
  and so are all gradients for a cotangent on those tokens alone; above 1e-2 nothing is timed and
  the row has `error` in the place of figures, as it has when memory does not suffice.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import RESULTS, commit, device_name, write_results
from layer_timing import JAX_IMPLS, Job, add_flags, jobs

ROOT = Path(__file__).parent.parent
KEY = ("impl", "shape", "pass", "routing")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    parser.add_argument("--name", help="result file; default expert_layer_h100, nothing for --tiny")
    parser.add_argument(
        "--add", action="store_true", help="keep the file's other rows, with their commit"
    )
    args = parser.parse_args()
    if args.repeats < 5 and not args.tiny:
        parser.error(f"--repeats {args.repeats}: at least 5 groups are needed for a median")
    if args.name is None and not args.tiny:
        args.name = "expert_layer_h100"
    return args


def worker(
    script: str, args: argparse.Namespace, impls: list[str], done: set[Job]
) -> Iterator[dict[str, Any]]:
    """The rows of one worker process, as it makes them."""
    words = [sys.executable, str(ROOT / "benchmarks" / script)]
    for flag, values in (("shapes", args.shapes), ("impls", impls), ("passes", args.passes)):
        words += [f"--{flag}", *values]
    words += ["--routing", args.routing, "--repeats", str(args.repeats)]
    words += ["--tiny"] if args.tiny else []
    words += ["--skip", *("/".join(job) for job in sorted(done))] if done else []
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # This process needs the device's name only: the worker may take nearly all of the memory.
    env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    # Running out of memory is a result here; XLA would print all of its allocations.
    env.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ROW "):
                yield json.loads(line.removeprefix("ROW "))
            else:
                print(line, end="", flush=True)


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows. A process that dies is started again after what it died of."""
    jax_impls = [impl for impl in args.impls if impl in JAX_IMPLS]

    def named(job: Job) -> dict[str, Any]:
        return dict(zip(KEY, (*job, args.routing)))

    others = [impl for impl in args.impls if impl not in JAX_IMPLS]
    for script, impls in (("layer_jax.py", jax_impls), ("layer_torch.py", others)):
        todo = jobs(args.shapes, impls, args.passes)
        done: set[Job] = set()
        if script == "layer_torch.py" and importlib.util.find_spec("torch") is None:
            yield from ({**named(job), "error": "torch is not installed"} for job in todo)
            continue
        while left := [job for job in todo if job not in done]:
            for row in worker(script, args, impls, done):
                done.add((row["impl"], row["shape"], row["pass"]))
                yield row
            culprit = next((job for job in left if job not in done), None)
            if culprit is not None:
                done.add(culprit)
                yield {**named(culprit), "error": "its process died"}


def earlier_rows(name: str, jax_version: str) -> list[dict[str, Any]]:
    """The rows of an existing file, each with the commit it was measured at."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return []
    content = json.loads(path.read_text())
    for what, now in (("device", device_name()), ("jax", jax_version)):
        if content[what] != now:
            raise SystemExit(f"--add to {path}: its {what} is {content[what]}, here it is {now}")
    return [{"commit": content["commit"], **row} for row in content["rows"]]


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    head = "{impl:22} {shape:14} {pass:7} {routing:8}".format(**row)
    if "error" in row:
        print(f"{head} {row['error']}", flush=True)
        return
    text = "{ms:10.4f} ms ±{ms_spread:6.1%} {tflops:7.1f} TFLOP/s {share_of_roofline:6.1%}"
    errors = [row.get("error_vs_float32", 0), *row.get("gradient_errors_vs_float32", {}).values()]
    print(f"{head} {text.format(**row)} of roofline, error {max(errors):.1e}", flush=True)


def main() -> None:
    args = parse()
    # Before jax is imported: this process must leave the memory to its workers.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax

    if jax.devices()[0].platform == "cpu" and not args.tiny:
        raise SystemExit("no accelerator here: --tiny rehearses on the CPU")
    kept = earlier_rows(args.name, jax.__version__) if args.add and args.name else []
    here, rows = commit(), []
    for row in measured(args):
        show(row)
        rows.append(row)
        if args.name is None:
            continue
        new = {tuple(r[k] for k in KEY) for r in rows}
        others = [r for r in kept if tuple(r[k] for k in KEY) not in new]
        others = [{k: v for k, v in r.items() if (k, v) != ("commit", here)} for r in others]
        path = write_results(args.name, [*others, *rows])
    if args.name and rows:
        print(path)


if __name__ == "__main__":
    main()
