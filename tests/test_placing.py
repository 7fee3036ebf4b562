"""train.py --placement auto: experts move, nothing that is learned changes."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from run_support import TINY, kept_programs, refused, rows, run, stop_at, write_text

from moejax.placement import controller
from moejax.placement.counting import Counts
from moejax.placement.history import links as links_of
from moejax.placement.plan_file import read_slots
from moejax.training import session

AUTO = ("--placement", "auto", "--replicas", 1, "--rebalance-every", 2)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    text = write_text(tmp_path_factory.mktemp("data") / "text")
    with kept_programs(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "SAMPLE_TOKENS", 8)
        patch.setattr(controller, "LEAST_TOKENS", 200.0)
        float32 = ("--model.compute-dtype", "float32")
        yield [*TINY, "--data", text, "--steps", 6, *float32]


def looks(path):
    return [json.loads(line) for line in (path / "placement.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_placed_run_learns_what_a_run_at_home_does(flags, tmp_path, caplog):
    home, placed = tmp_path / "home", tmp_path / "placed"
    code, _, err = run(*flags, "--run", home)
    assert code == 0, err
    with jax.log_compiles():
        code, out, err = run(*flags, *AUTO, "--run", placed)
    assert code == 0, err
    told = [record.getMessage() for record in caplog.records]
    steps = [line for line in told if "Compiling jit(step)" in line and "int32[1,8,33]" in line]
    assert len(steps) == 1  # of training, whatever the placement

    found = looks(placed)
    assert [row["step"] for row in found] == [2, 4] and found[0]["kind"] == "plan"
    assert found[0]["replicas"] == 2 * 2  # a slot of each device, in each layer
    assert out.count("placement:") == 2
    at_home, after = rows(home), rows(placed)
    for name in ("loss", "aux_loss", "grad_norm"):
        want, got = ([row[name] for row in r] for r in (at_home, after))
        np.testing.assert_allclose(got, want, rtol=1e-5)
    fetched = [row["expert_fetch_bytes"] for row in after]
    assert fetched[:2] == [0, 0] and fetched[2] == found[0]["expert_fetch_bytes"] > 0

    slots_LP, devices = read_slots(placed / "placement.npz")
    assert devices == 2
    assert slots_LP.shape == (2, 2 * 5) and (slots_LP >= 0).all()
    assert (placed / "placement.png").read_bytes().startswith(b"\x89PNG")
    assert not any("placement" in p.name for p in home.iterdir())
    assert not any("slot" in p.name for p in (placed / "checkpoints").rglob("*"))


@pytest.mark.slow
def test_a_stopped_run_goes_on_from_home(flags, tmp_path):
    path = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3)
        code, _, err = run(*flags, *AUTO, "--run", path)
    assert code == 0, err
    assert [row["step"] for row in looks(path)] == [2]
    code, _, err = run("--run", path)
    assert code == 0, err
    assert [row["step"] for row in looks(path)] == [2, 4]
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4, 5, 6]


def test_what_is_refused(flags):
    assert "replicas=1: at home every expert is there once" in refused("--replicas", 1)
    assert "rebalance_every=0: must be at least 1" in refused("--rebalance-every", 0)
    dense = ("--model.first-dense-layers", 4, "--model.dense-hidden", 32)
    assert "placement=auto: the model has no layer" in refused("--placement", "auto", *dense)
    alone = ("--mesh", "data=2,expert=1", "--placement", "auto")
    assert "placement=auto on a mesh of expert=1" in refused(*flags, *alone)
    many = (*AUTO[:2], "--replicas", 5)
    assert "replicas=5: must lie between 0 and 4, with which each of 8" in refused(*flags, *many)


def test_links_carry_as_many_assignments_as_tokens_have(rng):
    """Two groups of four devices; every token chooses three of eight experts."""
    load = rng.integers(1, 50, (8, 2, 8)).astype(np.float32)
    counts = Counts(pairs_LEE=None, load_LE=load, tokens_L=load.sum(2) / 3)
    slots_LP = np.tile(np.arange(8), (2, 1))
    links = links_of(counts, slots_LP, 4)
    np.testing.assert_allclose(links.sum(1), np.full(4, 3.0), rtol=1e-6)
    source = load.reshape(2, 4, 2, 8).sum(0)[1]  # device 1 of both groups
    want = 3 * source.reshape(2, 4, 2).sum((0, 2)) / source.sum()
    np.testing.assert_allclose(links[1], want, rtol=1e-6)
