"""The benchmark of layers with placements: its router, and a small run of all programs."""

import sys
from pathlib import Path

import numpy as np
import pytest

from sharding.mesh import MeshShape, make_mesh

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import placement_layers
import placement_programs


def test_the_router_chooses_what_the_trace_says(rng):
    shape = placement_layers.Shape(50, 64, 32, 16, 4)
    chosen = rng.permuted(np.tile(np.arange(16), (50, 1)), axis=1)[:, :4]
    logits = placement_programs.choosing(chosen, shape, rng) @ placement_programs.router(shape)
    assert np.array_equal(np.argsort(-logits, axis=1)[:, :4], chosen)


@pytest.mark.slow
def test_all_programs_agree(rng):
    """Outputs of all placements are those at home, loads and rows are counted, all is timed."""
    flags = ["--tiny", "--tokens", "32", "--rounds", "1", "--modes", "ring"]
    flags += ["--shapes", "olmoe", "--generated", "generated"]
    args, mesh = placement_layers.parse(flags), make_mesh(MeshShape(expert=4))
    ((*names, shape, trace),) = placement_layers.cases(args, mesh.size)
    found = {}

    def put(rows):
        found.update({tuple(row[k] for k in placement_layers.KEY): row for row in rows})

    placement_layers.Case(tuple(names), shape, trace, args, mesh).run(put)
    assert not [row for row in found.values() if "error" in row]
    assert all(row["ms"] > 0 for row in found.values())
    rows = {row["placement"]: row for row in found.values() if row["what"] == "forward"}
    sends = [rows[name]["remote_rows"] for name in ("home", "planned", "copies")]
    assert 4 > sends[0] > sends[1] > sends[2] > 0
    kinds = [row["what"] for row in found.values()]
    assert {k: kinds.count(k) for k in set(kinds)} == {
        "forward": 5,
        "forward_backward": 3,
        "migration": 3,
        "counting": 1,
    }
