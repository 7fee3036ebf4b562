"""The packaged model: exported from its run, and measured on its held-out files.

python benchmarks/reference_model.py export  --run runs/reference
python benchmarks/reference_model.py measure
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from common import write_results

from moejax.cli import run_main
from moejax.data.corpus import Document
from moejax.errors import UserError

OVERLAP = 0.5  # of a window that repeats the one before, as context


def texts_sha256(documents: Iterable[Document]) -> str:
    """Hash of a set of texts, whatever their names and order."""
    digests = sorted(hashlib.sha256(d.text.encode()).digest() for d in documents)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def export(args: argparse.Namespace) -> None:
    """Writes the newest checkpoint of a run as a model folder."""
    from moejax.inference.model_folder import save_model_folder
    from moejax.inference.source import open_model
    from moejax.training.state import Blueprint
    from sharding.mesh import MeshShape, make_mesh

    source = open_model(args.run)
    blueprint = Blueprint(source.config, make_mesh(MeshShape()))
    summary = Path(args.run) / "summary.json"
    record = json.loads(summary.read_text()) if summary.is_file() else {}
    if args.held_out:
        from moejax.data.sources import load_corpus

        record["held_out_texts_sha256"] = texts_sha256(load_corpus([args.held_out]).documents)
    if args.corpus_record:
        record["corpus"] = json.loads(Path(args.corpus_record).read_text())
    flat = source.weights(blueprint)
    save_model_folder(args.out, flat, source.config, source.tokenizer, record=record)
    size = sum(f.stat().st_size for f in Path(args.out).rglob("*") if f.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


def measure(args: argparse.Namespace) -> None:
    """Bits per byte of a model folder on the standard library's held-out files."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    from moejax.data.corpus import reference_compression, split_held_out
    from moejax.data.pipeline import held_out_windows
    from moejax.data.sources import load_corpus, load_standard_library
    from moejax.inference.source import open_model
    from moejax.training.state import Blueprint, load_weights
    from moejax.training.step import make_eval_step
    from sharding.flops import active_matrix_parameters
    from sharding.mesh import MeshShape, make_mesh

    start = time.perf_counter()
    source = open_model(args.model)
    config = dataclasses.replace(source.config, compute_dtype=args.dtype)
    if args.held_out:
        documents = list(load_corpus([args.held_out]).documents)
    else:
        _, documents = split_held_out(load_standard_library().documents, 0.05)
    record = json.loads((source.path / "config.json").read_text()).get("record", {})
    known = record.get("held_out_texts_sha256")
    if known not in (None, texts_sha256(documents)):
        raise UserError(
            f"{source.path}: the held-out files here are not those that were kept out of its "
            "training text (Python 3.11.7's); pass them with --held-out, or use that Python"
        )
    blueprint = Blueprint(config, make_mesh(MeshShape()))
    params, biases = load_weights(source.weights(blueprint), blueprint, jnp.dtype(args.dtype))
    step = make_eval_step(blueprint, loss_chunk=16_384)
    length = config.max_context
    windows = held_out_windows(documents, source.tokenizer, length, int(length * args.overlap))
    nll = 0.0
    for first in range(0, len(windows.tokens), args.rows):
        tokens = windows.tokens[first : first + args.rows]
        mask = windows.mask[first : first + args.rows]
        fill = args.rows - len(tokens)
        tokens, mask = np.pad(tokens, ((0, fill), (0, 0))), np.pad(mask, ((0, fill), (0, 0)))
        nll += float(step(params, biases, jnp.asarray(tokens), jnp.asarray(mask)))
        print(f"{first + args.rows - fill}/{len(windows.tokens)}", end="\r", flush=True)
    row = {
        "bits_per_byte": windows.bits_per_byte(nll),
        **reference_compression(documents),
        "seconds": record.get("training_seconds"),
        "measured_in_seconds": time.perf_counter() - start,
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
        "active_parameters": active_matrix_parameters(config),
        "held_out_bytes": windows.total_bytes,
        "window": length,
        "overlap": args.overlap,
        "dtype": args.dtype,
    }
    print(json.dumps(row, indent=2))
    if args.write:
        print(write_results("reference_model", [row]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("export", "measure"))
    parser.add_argument("--run", default="runs/reference")
    parser.add_argument("--out", default="moejax/assets/reference")
    parser.add_argument("--model", default=None)
    parser.add_argument("--held-out", default="")
    parser.add_argument("--corpus-record", default="")
    parser.add_argument("--overlap", type=float, default=OVERLAP)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    {"export": export, "measure": measure}[args.action](args)


if __name__ == "__main__":
    sys.exit(run_main(main))
