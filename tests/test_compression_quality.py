"""The benchmark of compressed gradients: its simulated ranks do what a mesh of devices does."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding
from train_support import BATCH, SEQ, batches, blueprint_of, make_config

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
sys.path.append(str(Path(__file__).parents[1] / "docs"))

import compression_methods as methods
import compression_quality as benchmark
import figures_compression as figures
from draw_compression import deltas, draw
from simulated_ranks import SimulatedRanks, plain_backends

from moejax.errors import UserError
from moejax.training.residuals import with_residuals
from moejax.training.state import init_state
from moejax.training.step import BATCH_SPEC, make_train_step
from pallas_kernels import backends
from sharding import zero
from sharding.compression.config import GradCompression
from sharding.compression.interface import RESIDUAL

RANKS, STEPS = 8, 3
PLAIN = make_config(
    experts=4,
    router={"selection_bias": False, "bias_update_rate": 0.0},
    model={"num_layers": 1, "first_dense_layers": 0, "dense_hidden": 0, "top_k_by_layer": ()},
)
METHODS = {
    "none": GradCompression(),
    "int8": GradCompression("int8"),
    "low_rank": GradCompression("low_rank", rank=2),
    "top_k": GradCompression("top_k", density=0.1, warmup_steps=1),
    "int4": GradCompression("int4", rounding="error_feedback", rotate=True),
    "bf16": GradCompression("bf16"),
}
CLIP = 0.05
FLIPPED = 2 * 256
"""Numbers that may differ."""
ROUNDED = 0.5
"""The part of them that may where blocks are rounded. The last bit of a gradient may move a block's
scale, rounded up to bfloat16, to the next one, and with it the block's numbers, and those the steps
after it: up to 0.31 were seen in twelve runs. With other keys 0.77 of the weights differ."""
SLOW = ("none", "low_rank", "int8", "int4", "bf16")


@pytest.fixture(autouse=True, scope="module")
def experts_and_the_head_are_large():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "SMALLEST", 2000)
        yield


def compiled(step, *arguments):
    traced = step.trace(*arguments)
    with jax.numpy_dtype_promotion("standard"):
        return traced.lower().compile()


def on_a_mesh(config, seed, tokens_TBL):
    """Losses and norms of the real step on 8 devices, and its state at the end."""
    blueprint = blueprint_of(config, (RANKS, 1, 1))
    state = jax.block_until_ready(init_state(blueprint, seed))
    state = with_residuals(state, blueprint, config)
    where, step, seen = NamedSharding(blueprint.mesh, BATCH_SPEC), None, []
    for tokens in tokens_TBL:
        rows = jax.device_put(tokens[None], where)
        step = step or compiled(make_train_step(blueprint, config), state, rows, None)
        state, metrics = jax.block_until_ready(step(state, rows, None))
        seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return *np.array(seen).T, state


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.slow] * (m in SLOW)) for m in METHODS]
)
def test_simulated_ranks_are_those_of_a_mesh(rng, method):
    """The same losses, weights and residuals, of the second of two seeds."""
    config = dataclasses.replace(PLAIN, grad_compression=METHODS[method])
    if method == "top_k":
        optimizer = dataclasses.replace(PLAIN.optimizer, clip_norm=CLIP)
        config = dataclasses.replace(config, optimizer=optimizer)
    seeds = [int(s) for s in rng.choice(1000, 2, replace=False)]
    tokens = np.stack([batches(rng, STEPS) for _ in seeds], axis=1)
    want, norms, real = on_a_mesh(config, seeds[1], tokens[:, 1])
    # What arrives in the first step, when all is sent, was clipped on each rank.
    assert (0 < norms[0] <= RANKS**0.5 * CLIP * 1.0001) == (method == "top_k")

    ranks = SimulatedRanks(config, RANKS)
    state = ranks.begin(seeds)
    rows = jnp.asarray(tokens.reshape(STEPS, 2, RANKS, BATCH // RANKS, SEQ + 1))
    steps = compiled(ranks.make_steps(), state, rows, jnp.int32(0))
    state, losses = jax.block_until_ready(steps(state, rows, jnp.int32(0)))

    np.testing.assert_allclose(np.asarray(losses)[:, 1], want, rtol=1e-5)
    other, got = (jax.tree.leaves(ranks.weights(state, seed=place)) for place in range(2))
    assert any(np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-2 for a, b in zip(other, got))
    off = [
        np.abs(np.asarray(found) - np.asarray(value)).ravel()
        for found, value in zip(got, jax.tree.leaves(real.masters), strict=True)
    ]
    share = ROUNDED if method in ("int8", "int4") else 0.0
    off = np.concatenate(off)
    assert np.sum(off > 1e-5) <= max(FLIPPED, share * off.size)
    assert (state.residuals is None) == (real.residuals is None)
    left = [np.zeros(1)]
    for name, kept in (real.residuals or {}).items():
        found = np.asarray(state.residuals[name][RESIDUAL])[1]
        value = np.asarray(kept[RESIDUAL]).reshape(found.shape)
        assert np.abs(value).max() > 0, name
        left.append(np.abs(found - value).ravel() / np.abs(value).max())
    left = np.concatenate(left)
    assert np.sum(left > 1e-4) <= max(FLIPPED, share * left.size)


def test_what_is_not_simulated_is_refused():
    with pytest.raises(UserError, match="batch_size=24 on 7 ranks"):
        SimulatedRanks(PLAIN, 7)
    with pytest.raises(UserError, match="accumulate=2"):
        SimulatedRanks(dataclasses.replace(PLAIN, accumulate=2), RANKS)


def test_no_kernel_of_a_device_inside():
    """What an H100 would take is refused, whatever is asked; outside nothing changes."""
    names, serves = ("mosaic_gpu", "reference"), lambda name, forced: None
    before = backends.choose
    with plain_backends():
        assert backends.choose("x", names, None, serves) == "reference"
        with pytest.raises(NotImplementedError, match="vmap"):
            backends.choose("x", names, "mosaic_gpu", serves)
    assert backends.choose is before and before("x", names, None, serves) == "mosaic_gpu"


def test_bytes_of_the_methods():
    """By hand, for the model of the benchmark: every matrix is stored in pieces, so summed once."""
    config = benchmark.run_config(methods.Sizes(), 100, 1e-3)

    def ratios(name):
        method = methods.METHODS[name]
        return methods.bytes_ratios(dataclasses.replace(config, grad_compression=method), RANKS)

    int8, low_rank, top_k = ratios("int8"), ratios("low_rank"), ratios("top_k")
    assert int8["bytes_ratio"] == round(2 / (1 + 2 / 256), 3)
    assert ratios("int4")["bytes_ratio"] == round(2 / (0.5 + 2 / 32), 3)
    assert ratios("int4_rotated")["bytes_ratio"] == round(2 / (0.5 + 2 / 128), 3)
    # (count, n, m) of head; queries and outputs; keys and values; both of the experts.
    head, square, narrow = (1, 256, 320), (4, 256, 256), (4, 256, 128)
    matrices = [head, square, square, narrow, narrow, (32, 256, 256), (32, 128, 256)]
    share = (RANKS - 1) / RANKS
    plain = sum(2 * c * n * m * share for c, n, m in matrices)
    thin = sum(2 * 4 * 4 * c * (n + m) * share for c, n, m in matrices)
    assert low_rank["bytes_ratio"] == round(plain / thin, 3)
    squares = sum(2 * 4 * c * (n + m) * share for c, n, m in matrices)
    sent = sum(4 * c * n * m * 0.01 * share for c, n, m in matrices)
    assert top_k["bytes_ratio"] == pytest.approx(plain / (sent + squares), rel=2e-3)
    exact = 320 * 256 + 4 * 256 * 8 + 9 * 256  # embedding, routers, norms
    numbers = sum(c * n * m for c, n, m in matrices)
    assert int8["compressed_part"] == round(numbers / (numbers + exact), 4)


def rows_of(rng, names, seeds):
    exact = rng.uniform(1, 2, seeds)
    change = {name: rng.normal(0, 0.01, seeds) for name in names} | {"exact": np.zeros(seeds)}
    rows = [
        {
            "method": name,
            "bytes_ratio": 2.0,
            "final_loss": list(exact * (1 + change[name])),
            "steps": [10, 20],
            "curve": [list(exact + 1), list(exact * (1 + change[name]))],
        }
        for name in names
    ]
    return rows, change


def test_changes_are_against_the_same_seed(rng, tmp_path):
    names = list(methods.METHODS)
    rows, change = rows_of(rng, names, 3)
    result = json.loads(json.dumps({"rows": benchmark.compared(rows)}))
    for row in result["rows"]:
        want = 100 * change[row["method"]]
        np.testing.assert_allclose(row["final_loss_delta_pct_by_seed"], want, atol=1e-4)
        assert row["final_loss_delta_pct"] == pytest.approx(want.mean(), abs=1e-4)
        assert row["standard_error"] == pytest.approx(want.std(ddof=1) / 3**0.5, abs=1e-4)
    headings, body = figures.quality(result)
    assert len(body) == len(names) and {len(line) for line in body} == {len(headings)}
    aims = ["", "", ""] + ["0.1 %"] * 2 + ["0.5 %"] * 4 + ["1 %"] * 2 + ["3 %"] * 2
    assert [line[-1] for line in body] == aims
    for name, (steps, percent) in deltas(result["rows"]).items():
        np.testing.assert_allclose(percent, [0, 100 * change[name].mean()], atol=1e-9)
        np.testing.assert_array_equal(steps, [10, 20])
    draw(result["rows"], tmp_path / "img" / "picture.svg")
    assert (tmp_path / "img" / "picture.svg").stat().st_size > 1000
    alone = benchmark.compared(rows[2:])  # nothing to compare with
    assert "final_loss_delta_pct" not in alone[0]
    one = benchmark.compared(rows_of(rng, names, 1)[0])
    assert all(row["standard_error"] is None for row in one)
    assert len(figures.quality({"rows": one})[1]) == len(names)


def test_a_rehearsal_spares_the_results(capsys, tmp_path, monkeypatch):
    for words in (["--tiny"], ["--steps", "10", "--every", "3"], ["--seeds", "1", "1"]):
        with pytest.raises(SystemExit):
            benchmark.parse(words)
    assert "--seeds must differ" in capsys.readouterr().err
    args = benchmark.parse(["--methods", "top_k", "exact", "--add", "--name", "try"])
    assert args.methods == ["exact", "top_k"]
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    assert benchmark.kept(args, {"a": 1}) == []
    rows = [{"method": name} for name in ("exact", "int8")]
    (tmp_path / "try.json").write_text(json.dumps({"settings": {"a": 1}, "rows": rows}))
    assert benchmark.kept(args, {"a": 1}) == rows[1:]
    with pytest.raises(SystemExit, match="other settings"):
        benchmark.kept(args, {"a": 2})
