"""Builds the text on which the packaged model is trained, free of copies of its held-out files.

    python benchmarks/reference_corpus.py split  --held-out held_out.jsonl
    python benchmarks/reference_corpus.py build  --held-out held_out.jsonl --out corpus.jsonl

`split` writes the held-out documents of the running interpreter's standard library. `build`
gathers Python source at hand (the standard library, installed packages, further folders), leaves
out every near-duplicate of a held-out document and every exact copy of another file, and writes
JSONL. What was kept and left out is told and written beside the corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path

from moejax.cli import run_main
from moejax.data.corpus import Document, corpus_hash, is_held_out, split_held_out
from moejax.data.dedup import NearDuplicates
from moejax.data.sources import load_corpus, load_standard_library

FRACTION = 0.05


def write_jsonl(path: str, documents: Iterable[Document]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document.text}) + "\n")


def split(args: argparse.Namespace) -> None:
    _, held_out = split_held_out(load_standard_library().documents, FRACTION)
    write_jsonl(args.held_out, held_out)
    size = sum(d.num_bytes for d in held_out)
    print(f"{len(held_out)} held-out files, {size} bytes, sha256 {corpus_hash(held_out)}")


def build(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    held_out = load_corpus([args.held_out]).documents
    duplicates = NearDuplicates(held_out)
    packages = [sysconfig.get_path("purelib"), *args.folders]
    # What another interpreter's library holds out by path is left out as well, so that the model
    # can be measured there.
    library = load_standard_library().documents
    documents = [d for d in library if not is_held_out(d.path, FRACTION)]
    for folder in packages:
        documents.extend(load_corpus([f"{folder}/**/*.py"]).documents)
    seen: set[bytes] = set()
    unique = []
    for document in documents:
        digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if digest not in seen and len(document.text) <= args.longest:
            seen.add(digest)
            unique.append(document)
    kept, excluded = duplicates.filter(unique)
    write_jsonl(args.out, kept)
    record = {
        "held_out_sha256": corpus_hash(held_out),
        "corpus_sha256": corpus_hash(kept),
        "files_read": len(documents),
        "files_kept": len(kept),
        "bytes_kept": sum(d.num_bytes for d in kept),
        "near_duplicates_left_out": len(excluded),
        "python": sys.version.split()[0],
        "examples_left_out": sorted(e.path for e in excluded)[:50],
    }
    Path(args.out).with_suffix(".record.json").write_text(json.dumps(record, indent=2) + "\n")
    seconds = time.perf_counter() - start
    print(json.dumps({k: v for k, v in record.items() if k != "examples_left_out"}))
    print(f"built in {seconds:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("split", "build"))
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--out", default="corpus.jsonl")
    parser.add_argument("--folders", nargs="*", default=[])
    parser.add_argument("--longest", type=int, default=400_000, help="characters of a file")
    args = parser.parse_args()
    {"split": split, "build": build}[args.action](args)


if __name__ == "__main__":
    sys.exit(run_main(main))
