"""One of two processes that load a folder's weights together: `two_processes.py PORT RANK FOLDER`.

Prints, as JSON, the bytes that it reads of each weight, those of its devices' parts, and sums of
the parts' numbers.
"""

import json
import sys

import jax
import numpy as np


def main(port: str, rank: str, folder: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(rank))

    from moejax.families import folder as families_folder
    from moejax.inference.source import open_model
    from moejax.inference.stored import on_devices
    from moejax.training.state import Blueprint
    from sharding.mesh import MeshShape, make_mesh

    read: list[int] = []

    def counted(target, part):
        read.append(0)

        def reading(index):
            array = part(index)
            read[-1] += array.nbytes
            return array

        return on_devices(target, reading)

    families_folder.on_devices = counted
    source = open_model(folder)
    blueprint = Blueprint(source.config, make_mesh(MeshShape(expert=8)))
    arrays = source.weights(blueprint)
    found = {}
    for (name, array), size in zip(arrays.items(), read, strict=True):
        parts = {repr(s.index): np.asarray(s.data) for s in array.addressable_shards}
        held = sum(part.nbytes for part in parts.values())
        sums = {key: float(part.astype(np.float64).sum()) for key, part in parts.items()}
        found[name] = {"read": size, "held": held, "all": array.nbytes, "sums": sums}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
