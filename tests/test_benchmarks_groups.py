"""The prediction for experts in groups against counting, and the benchmark's inputs and tables."""

import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from draws import draws

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
sys.path.append(str(Path(__file__).parents[1] / "docs"))

import expert_groups
import figures_groups
from group_pairs import groups_of_a_token
from group_prediction import TILE, pairs_of_a_token, ratio, work
from layer_shapes import Shape, make_inputs

SHAPE = Shape(300, 64, 32, 8, 4)


@pytest.mark.parametrize("members", [1, 2, 4, 8])
def test_groups_of_random_experts(members):
    chosen = list(combinations(range(8), 4))
    counted = np.mean([len({e // members for e in one}) for one in chosen])
    assert pairs_of_a_token(SHAPE, members) == pytest.approx(counted)
    least = min(len({e // members for e in one}) for one in chosen)
    assert pairs_of_a_token(SHAPE, members, 0.0) == least
    order = draws(__name__).permutation(8).reshape(-1, members)
    assert groups_of_a_token(np.array(chosen), order) == pytest.approx(counted)


def test_work_is_what_drawing_rows_gives(rng):
    """Tiles and touched weights in the mean of many draws, each group's rows independent."""
    shape, members = replace(SHAPE, tokens=200), 2
    pairs = pairs_of_a_token(shape, members)
    count_NQ = rng.binomial(shape.tokens, pairs / 4, (4000, 4))
    tiles = (-(-count_NQ // TILE)).sum(1).mean()
    found = work(shape, members)
    assert found.flops == pytest.approx(6 * tiles * TILE * 64 * 32 * members, rel=0.02)
    assert found.rows == pytest.approx(200 * pairs)
    assert found.weight_bytes == pytest.approx(8 * 3 * 64 * 32 * 2)
    one = work(replace(shape, tokens=1), members)
    assert one.weight_bytes == pytest.approx(pairs * members * 3 * 64 * 32 * 2)


def test_groups_of_one_are_single_experts():
    assert ratio(SHAPE, 1) == 1
    assert ratio(SHAPE, 2, fused=True) < ratio(SHAPE, 2)
    # The fewer groups a token uses, the less there is to do.
    times = [ratio(SHAPE, 2, pairs_of_a_token(SHAPE, 2, away)) for away in (0, 0.5, 1)]
    assert times == sorted(times)


def test_likeness_is_of_routing():
    inputs = make_inputs(SHAPE, "uniform")
    found = []
    for likeness in 0.0, 0.9, 1.0:
        made = expert_groups.alike(SHAPE, 2, likeness, inputs)
        assert made.router_DE.std() == pytest.approx(64**-0.5, rel=0.25)
        found.append(expert_groups.pairs_on(made, SHAPE, 2))
    assert found[0] > found[1] > found[2] == 2
    assert found[0] == pytest.approx(pairs_of_a_token(SHAPE, 2), abs=0.3)


def test_tables():
    pairs = {"rows": [{"size": size, "away": 0.5} for size in (2, 4, 8)]}
    headings, body = figures_groups.predicted(pairs)
    assert len(body) == 3 * 7 and all(len(line) == len(headings) for line in body)
    row = {"shape": "s", "tokens": 1, "pass": "fwd", "size": 2, "pairs": 1.5}
    times = {"single_ms": 1.0, "ms": 2.0, "ratio": 2.0, "predicted_ratio": 1.5}
    headings, body = figures_groups.measured({"rows": [row | times, row | {"error": "why"}]})
    assert all(len(line) == len(headings) for line in body)
    assert body[0][-2:] == ["2.00", "1.50"] and "why" in body[1]
