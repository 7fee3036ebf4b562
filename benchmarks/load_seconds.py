"""How long a checkpoint of 10 GB takes to load, and how much memory of the host beside it.

    JAX_PLATFORMS=cpu python benchmarks/load_seconds.py

Writes benchmarks/results/load_seconds.json. A folder of transformers with random weights in
bfloat16 (as many of Qwen3-30B's layers as make 10 GB) is written to a temporary folder and loaded
by a process of its own, onto one device and onto two along `expert`. Devices are the CPU's, so
their copies lie in the host's memory, too: `beside_bytes` is the most memory that the process held
for itself while it loaded, without the mapped files, less what it held before and less the copies.
`cold`: the files were dropped from the page cache before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import write_results

LAYERS = 7
MESHES = ("expert=1", "expert=2")


@dataclasses.dataclass(frozen=True)
class Drawn:
    """An array that is drawn when somebody wants its numbers."""

    shape: tuple[int, ...]
    dtype: Any
    seed: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        # 16 random bits of a bfloat16 would be anything: a table of normal numbers is enough.
        table = rng.normal(0, 0.02, 4099).astype(np.float32)
        values = np.resize(table, math.prod(self.shape)).reshape(self.shape)
        return values.astype(self.dtype if dtype is None else dtype)


def model(layers: int) -> Any:
    from moejax.presets import PRESETS

    config = PRESETS["qwen3_30b_a3b"]().model
    return dataclasses.replace(config, num_layers=layers, scan_layers=False, remat="none")


def write(folder: Path, layers: int) -> int:
    """The checkpoint; returns its bytes."""
    import jax.numpy as jnp

    from moejax.families.export import save_hf_folder
    from moejax.training.state import Blueprint, weight_targets
    from sharding.mesh import MeshShape, abstract_mesh

    config = model(layers)
    targets = weight_targets(Blueprint(config, abstract_mesh(MeshShape())), jnp.bfloat16)
    flat = {n: Drawn(t.shape, t.dtype, i) for i, (n, t) in enumerate(targets.items())}
    save_hf_folder(folder, flat, config, family="qwen3_moe")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def own_bytes() -> int:
    """Memory that this process holds and that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def load(folder: str, mesh_text: str) -> None:
    """Loads, and prints a row; in a process of its own."""
    import jax

    from moejax.inference.source import open_model
    from moejax.serving.start import load_model
    from sharding.mesh import MeshShape

    shape = MeshShape.parse(mesh_text)
    jax.config.update("jax_num_cpu_devices", shape.size)
    source = open_model(folder)
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    before, most, done = own_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    _, params, biases = load_model(source, shape, "bfloat16")
    jax.block_until_ready((params, biases))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    leaves = jax.tree.leaves((params, biases))
    copies = sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards)
    row = {
        "mesh": mesh_text,
        "seconds": round(seconds, 1),
        "gb_per_s": round(sum(leaf.nbytes for leaf in leaves) / seconds / 1e9, 2),
        "peak_bytes": most[0],
        "device_bytes": copies,
        "largest_tensor_bytes": max(leaf.nbytes for leaf in leaves),
        "beside_bytes": most[0] - before - copies,
    }
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--folder", help="for the checkpoint; default: the system's temporary one")
    parser.add_argument("--name", default="load_seconds")
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "MESH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(*args.load)
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as parent:
        folder = Path(parent) / "model"
        start = time.perf_counter()
        size = write(folder, args.layers)
        print(f"{size / 1e9:.2f} GB written in {time.perf_counter() - start:.0f} s", flush=True)
        for cold in (True, False):
            for mesh in MESHES:
                if cold:
                    for file in folder.glob("*.safetensors"):
                        with open(file, "rb") as opened:
                            os.fsync(opened.fileno())
                            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                command = [sys.executable, __file__, "--load", str(folder), mesh]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                row = json.loads(done.stdout.splitlines()[-1])
                rows.append({"checkpoint_bytes": size, "cold": cold, **row})
                print(rows[-1], flush=True)
                write_results(args.name, rows)


if __name__ == "__main__":
    main()
