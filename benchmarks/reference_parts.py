"""The packaged model on two parts of its held-out files: one large file of prose, and the rest.

    python benchmarks/reference_parts.py

Plain windows, no overlap. Writes benchmarks/results/reference_parts.json.
"""

from __future__ import annotations

import sys

from common import write_results

from moejax.cli import run_main

PROSE = "pydoc_data/topics.py"
ROWS = 8


def main() -> None:
    import dataclasses

    import jax.numpy as jnp

    from moejax.data.corpus import reference_compression, split_held_out
    from moejax.data.pipeline import held_out_windows
    from moejax.data.sources import load_standard_library
    from moejax.inference.source import open_model
    from moejax.training.evaluate import Evaluator
    from moejax.training.state import Blueprint, load_weights
    from sharding.mesh import MeshShape, make_mesh

    source = open_model(None)
    config = dataclasses.replace(source.config, compute_dtype="float32")
    blueprint = Blueprint(config, make_mesh(MeshShape()))
    params, biases = load_weights(source.weights(blueprint), blueprint, jnp.float32)
    _, documents = split_held_out(load_standard_library().documents, 0.05)
    rows = []
    for part, chosen in (
        (PROSE, [d for d in documents if d.path == PROSE]),
        ("the other files", [d for d in documents if d.path != PROSE]),
    ):
        windows = held_out_windows(chosen, source.tokenizer, config.max_context)
        evaluator = Evaluator(blueprint, windows, batch_size=ROWS, loss_chunk=16_384)
        row = {"part": part, "bytes": windows.total_bytes, "files": len(chosen)}
        row |= {"bits_per_byte": evaluator.bits_per_byte(params, biases)}
        row |= reference_compression(chosen)
        print(row, flush=True)
        rows.append(row)
    print(write_results("reference_parts", rows))


if __name__ == "__main__":
    sys.exit(run_main(main))
