"""train.py with merged, unequal and shared experts: begun from weights, continued, planned."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from fewer_experts_support import draw, model_of, save
from run_support import kept_programs, run, stop_at, write_text
from train_support import batches, train

import infer
from moejax.families.expanded import expanded_config, expanded_weights
from moejax.inference.source import open_model
from moejax.routing.metrics import router_metrics
from moejax.serving import start
from moejax.training import session
from moejax.training.config import DataConfig, OptimizerConfig, TrainConfig
from moejax.training.init_from import initial_state
from moejax.training.pictures import draw_expert_load
from moejax.training.rundir import RunDir
from moejax.training.state import Blueprint, from_logical, logical_targets, to_logical
from sharding.mesh import MeshShape, make_mesh

RUN = [
    *("--data.seq-len", 16, "--data.batch-size", 8, "--devices", 8, "--eval-every", 0),
    *("--save-every", 2, "--model.compute-dtype", "float32", "--optimizer.warmup-steps", 1),
    *("--optimizer.learning-rate", 1e-3, "--steps", 4),
]


def same(found, wanted, part=""):
    """The weights of `wanted`, bit by bit, and in its dtypes."""
    for name, value in wanted.items():
        if name.startswith(part):
            assert found[name].dtype == value.dtype, name
            np.testing.assert_array_equal(np.asarray(found[name]), value, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "sizes", "scan"),
    [
        ("merged+unequal", (1, 2, 1), True),
        pytest.param("merged+unequal", (1, 4, 1), False, marks=pytest.mark.slow),
        pytest.param("merged", (2, 2, 2), True, marks=pytest.mark.slow),
        pytest.param("unequal", (2, 4, 1), True, marks=pytest.mark.slow),
        pytest.param("basis", (2, 2, 1), True, marks=pytest.mark.slow),
        pytest.param("merged+up", (2, 4, 1), False, marks=pytest.mark.slow),
    ],
)
def test_masters_are_the_weights(tmp_path, rng, kind, sizes, scan):
    """Tables stay whole numbers, stacked where layers are scanned; two of three layers are."""
    config = model_of(kind, num_layers=3)
    flat = save(tmp_path / "m", rng, config)
    blueprint = Blueprint(
        dataclasses.replace(config, scan_layers=scan), make_mesh(MeshShape(*sizes))
    )
    state = initial_state(blueprint, open_model(tmp_path / "m"), print)
    found = to_logical(jax.block_until_ready(state))
    same(found, flat)
    # What is stored is read again for another mesh.
    other = Blueprint(config, make_mesh(MeshShape(1, 3, 1)))
    host = {name: np.asarray(value) for name, value in found.items()}
    assert {n: (t.shape, t.dtype) for n, t in logical_targets(other).items()} == {
        n: (v.shape, v.dtype) for n, v in host.items()
    }
    again = to_logical(from_logical(host, other))
    same(again, host)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    with kept_programs(tmp_path_factory.mktemp("programs")), pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "SAMPLE_TOKENS", 8)
        yield


def losses(path):
    return [row["loss"] for row in RunDir(path).metrics()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scan"),
    [("merged", True), ("merged+unequal", False), ("unequal", True), ("basis", True)],
)
def test_a_run_begins_with_them_and_goes_on(tmp_path, rng, text, programs, monkeypatch, kind, scan):
    """Its first loss is that of the weights; a stop and another mesh only round otherwise."""
    config = model_of(kind, num_layers=3)
    flat = save(tmp_path / "m", rng, config)
    layers = "--model.scan-layers" if scan else "--model.no-scan-layers"
    flags = ["--init-from", tmp_path / "m", "--data", text, layers, *RUN]
    code, out, err = run(*flags, "--mesh", "data=2,expert=2", "--run", tmp_path / "whole")
    assert code == 0, err
    assert "begins with the weights of" in out and len(losses(tmp_path / "whole")) == 4
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run(*flags, "--mesh", "data=2,expert=2", "--run", path)[0] == 0
    code, out, err = run("--run", path, "--mesh", "data=1,expert=4")
    assert code == 0 and "resuming after step 2" in out, err
    np.testing.assert_allclose(losses(path), losses(tmp_path / "whole"), rtol=2e-5)
    end = open_model(path)
    found = end.weights(Blueprint(end.config, make_mesh(MeshShape(1, 2, 1))))
    same(found, flat, "bias/")
    moved = [n for n, v in flat.items() if (np.asarray(found[n]) != v).any()]
    assert set(moved) == {n for n in flat if n.startswith("params/")}
    numbers = np.array(end.config.expert_numbers)
    for row in RunDir(path).metrics():
        assert all(1 <= load <= n for load, n in zip(row["load_max_over_mean"], numbers))


@pytest.mark.slow
def test_the_first_loss_is_that_of_an_expert_for_each_output(rng):
    """Unrolled and scanned, on two devices."""
    config = model_of("merged+unequal", num_layers=3)
    flat, tokens = draw(rng, config), batches(rng, 1)
    whole = {n: np.asarray(a) for n, a in expanded_weights(flat, config).items()}
    found = []
    for model, weights, sizes in (
        (expanded_config(config), whole, (1, 1, 1)),
        (config, flat, (1, 2, 1)),
        (dataclasses.replace(config, scan_layers=True), flat, (1, 2, 1)),
    ):
        run_config = TrainConfig(
            model,
            DataConfig(seq_len=tokens.shape[2] - 1, batch_size=tokens.shape[1]),
            OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
            steps=10,
        )
        targets = logical_targets(Blueprint(model, make_mesh(MeshShape())))
        rest = {n: np.zeros(t.shape, t.dtype) for n, t in targets.items() if n not in weights}
        done = train(run_config, sizes, rest | weights, tokens)
        found.append([done.each(name)[0] for name in ("loss", "aux_loss")])
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("merged+unequal", "6 to 9 by layer, merged from 12, of width 16, 3 for a token"),
        pytest.param("merged", "  9, merged from 12, of width 16", marks=pytest.mark.slow),
        pytest.param("unequal", "  6 to 9 by layer of width 16", marks=pytest.mark.slow),
        pytest.param("basis", "9 of width 16, 3 for a token, sharing", marks=pytest.mark.slow),
        pytest.param("merged+unequal+up", "merged from 12, of", marks=pytest.mark.slow),
    ],
)
def test_dry_run(tmp_path, rng, kind, words):
    config = model_of(kind)
    flat = save(tmp_path / "m", rng, config)
    code, out, err = run(
        *("--dry-run", "--init-from", tmp_path / "m", "--mesh", "data=2,expert=3", *RUN[:-2]),
        *("--data.batch-size", 12),
    )
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.strip().startswith("experts "))
    assert words in line, line
    padding = (config.padded_vocab - config.vocab_size) * config.d_model * 2
    total = sum(math.prod(v.shape) for n, v in flat.items() if n.startswith("params/")) - padding
    assert f"({total}), " in out
    assert "the closed formulas give the same" in out


# ── what is told of loads ────────────────────────────────────────────────────


def test_loads_of_layers_with_fewer_experts(tmp_path):
    """Even loads are 1 in each layer, however many experts it has."""
    counts = np.array([[4, 4, 4, 0, 0, 0], [2, 2, 2, 2, 2, 2]], np.int32)
    zeros = np.zeros(2, np.float32), np.full(2, 6, np.int32)
    found = router_metrics(counts, *zeros, experts=np.array([3, 6]))
    np.testing.assert_allclose(found["max_over_mean"], [1, 1])
    assert found["max_over_mean"].dtype == np.float32
    history = np.stack([counts, counts])
    draw_expert_load(history, tmp_path / "load.png", experts_by_layer=(3, 6))
    draw_expert_load(history, tmp_path / "all.png")
    assert (tmp_path / "load.png").read_bytes() != (tmp_path / "all.png").read_bytes()


@pytest.mark.slow
def test_routes_count_the_experts_that_are_there(tmp_path, rng, capsys, monkeypatch):
    monkeypatch.setattr(start, "keep_compiled_programs", lambda: None)
    monkeypatch.chdir(tmp_path)
    config = model_of("unequal")
    save(tmp_path / "m", rng, config)
    argv = ["routes", "-p", "def main():", "--model", str(tmp_path / "m"), "--counts", "c.npz"]
    code = infer.main([*argv, "--mesh", "data=1,expert=2,tensor=1", "--picture", "p.png"])
    err = capsys.readouterr().err
    assert code == 0, err
    counts_LE = np.load(tmp_path / "c.npz")["counts"]
    assert counts_LE.shape == (2, 9) and not counts_LE[0, 6:].any()
    idle = int((counts_LE[0, :6] == 0).sum() + (counts_LE[1] == 0).sum())
    busiest = max(counts_LE[0].max() * 6, counts_LE[1].max() * 9) / counts_LE[0].sum()
    assert f"{idle} of 15 are idle" in err and f"has {busiest:.1f} times the mean" in err
    assert (tmp_path / "p.png").exists()
