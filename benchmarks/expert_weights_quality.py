"""What experts of 8 bits cost: the packaged model's held-out bits per byte, by format.

    JAX_PLATFORMS=cpu python benchmarks/expert_weights_quality.py

Writes benchmarks/results/expert_weights_quality.json. One device, float32 but for the experts, so
that their weights are all that differs; `change` is relative to weights as they are, over the same
windows, spread evenly over the held-out files. `expert_bytes` are of all routed experts on disk and
device, scales included, beside bfloat16's. The packaged model's experts are 44 wide: blocks of
128 × 128 numbers with one scale hold 128 × 44 there.
"""

from __future__ import annotations

import argparse
import time

from common import write_results

FORMATS = ("none", "int8", "fp8")


def main() -> None:
    import jax

    from moejax.data.corpus import split_held_out
    from moejax.data.pipeline import held_out_windows
    from moejax.data.sources import load_standard_library
    from moejax.inference.source import open_model
    from moejax.serving.start import load_model
    from moejax.training.evaluate import Evaluator
    from sharding.mesh import MeshShape

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=64, help="of held-out text")
    parser.add_argument("--rows", type=int, default=8, help="windows at once")
    parser.add_argument("--name", default="expert_weights_quality")
    args = parser.parse_args()
    source = open_model(None)
    length = source.config.max_context
    _, held_out = split_held_out(load_standard_library().documents, 0.05)
    windows = held_out_windows(held_out, source.need_tokenizer(), length, length // 2)
    rows: list[dict] = []
    for form in FORMATS:
        start = time.perf_counter()
        blueprint, params, biases = load_model(source, MeshShape(), "float32", form)
        evaluator = Evaluator(blueprint, windows, batch_size=args.rows, loss_chunk=16_384)
        bits = float(evaluator.bits_per_byte(params, biases, args.windows))
        experts = [leaf for path, leaf in jax.tree.leaves_with_path(params) if "bank" in str(path)]
        size = sum(leaf.size * (2 if form == "none" else leaf.dtype.itemsize) for leaf in experts)
        rows.append(
            {
                "weights": form,
                "bits_per_byte": bits,
                "change": bits / rows[0]["bits_per_byte"] - 1 if rows else None,
                "expert_bytes": size,
                "fewer_bytes": rows[0]["expert_bytes"] / size if rows else 1.0,
                "windows": args.windows,
                "window": length,
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
        print(rows[-1], flush=True)
        write_results(args.name, rows)


if __name__ == "__main__":
    main()
