"""Steps with NaN and spikes: which are applied, what stays as it was, what a checkpoint keeps."""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from train_support import batches, blueprint_of, initial, make_config

from moejax.errors import UserError
from moejax.training.anomaly import NONE, NONFINITE, SPIKE, history_to_json, judge, make_history
from moejax.training.anomaly_config import AnomalyConfig
from moejax.training.residuals import with_residuals
from moejax.training.state import from_logical
from moejax.training.step import BATCH_SPEC, make_train_step
from sharding import zero
from sharding.compression.config import GradCompression
from sharding.compression.methods import make_method
from sharding.mesh import DATA, MeshShape, make_mesh


class Oracle:
    """What a run does, with lists and float64."""

    def __init__(self, config):
        self.config, self.seen, self.in_a_row, self.halted = config, [], 0, False
        self.skipped = 0

    def judge(self, loss, norm):
        """(kind, applied); whether a value lies close to its limit besides."""
        config, window = self.config, self.config.window
        last = np.array(self.seen[-window:], np.float64).reshape(-1, 2)
        finite, close = np.isfinite([loss, norm]).all(), False
        kind, action = NONE, "apply"
        if not finite and config.nonfinite != "ignore":
            kind, action = NONFINITE, config.nonfinite
        elif finite and len(last) >= window // 2 and config.spike != "ignore":
            limit = last.mean(0) + config.sigma * last.std(0)
            close = np.isclose([loss, norm], limit, rtol=1e-3).any()
            if (np.array([loss, norm]) > limit).any():
                kind, action = SPIKE, {"report": "apply"}.get(config.spike, config.spike)
        if self.halted:
            return kind, False, close
        if action == "skip":
            self.in_a_row += 1
            if self.in_a_row > config.most_in_a_row:
                self.in_a_row, self.halted = self.in_a_row - 1, True
            else:
                self.skipped += 1
            return kind, False, close
        if action == "stop":
            self.halted = True
            return kind, False, close
        self.in_a_row = 0
        if finite:
            self.seen.append((loss, norm))
        return kind, True, close


ACTIONS = [*itertools.product(("skip", "stop", "ignore"), ("report", "skip", "stop", "ignore"))]


@pytest.mark.parametrize(("nonfinite", "spike"), ACTIONS)
def test_judged_as_by_hand(rng, nonfinite, spike):
    config = AnomalyConfig(nonfinite, spike, sigma=3.0, window=16, most_in_a_row=2)
    mesh = make_mesh(MeshShape(1, 1, 1))
    step = jax.jit(lambda history, loss, norm: judge(config, history, loss, norm))
    kinds = []
    for trial in range(3):
        history, oracle = make_history(config, mesh), Oracle(config)
        for i in range(40):
            loss, norm = np.float32(rng.normal(3, 0.1)), np.float32(rng.gamma(4.0, 0.2))
            # Later, as the first of them may end the run.
            if i > 8 * trial and rng.random() < 0.2:
                loss = rng.choice(np.array([np.nan, np.inf, 9.0], np.float32))
            if i > 8 * trial and rng.random() < 0.2:
                norm = rng.choice(np.array([np.nan, -np.inf, 40.0], np.float32))
            before = oracle.halted, oracle.in_a_row
            kind, applied, close = oracle.judge(float(loss), float(norm))
            verdict, history = step(history, jnp.float32(loss), jnp.float32(norm))
            if close:
                break  # either is right
            assert (int(verdict.kind), bool(verdict.apply)) == (kind, applied), (i, before)
            assert bool(verdict.halted) == oracle.halted
            assert int(history.in_a_row) == oracle.in_a_row
            assert int(history.skipped) == oracle.skipped
            assert int(history.applied) == len(oracle.seen)
            kinds.append(kind)
        kept = history_to_json(history)
        wanted = np.array(oracle.seen[-16:], np.float32).reshape(-1, 2)
        if not close:
            np.testing.assert_array_equal(np.array(kept["losses"], np.float32), wanted[:, 0])
            np.testing.assert_array_equal(np.array(kept["norms"], np.float32), wanted[:, 1])
    assert NONFINITE in kinds or nonfinite == "ignore"
    assert SPIKE in kinds or spike == "ignore" or nonfinite == "stop"


def test_a_history_that_was_saved_goes_on(rng):
    """In the same bits with the same window; with another one, as by hand."""
    mesh = make_mesh(MeshShape(2, 2, 1))
    # Never so many in a row that the run is halted, which is not saved: one that is continued runs.
    config = AnomalyConfig(spike="skip", sigma=2.0, window=8, most_in_a_row=60)
    step = jax.jit(lambda history, loss, norm: judge(config, history, loss, norm))
    values = rng.gamma(3.0, 1.0, (60, 2)).astype(np.float32)
    history, others = make_history(config, mesh), {}
    for i, (loss, norm) in enumerate(values):
        if i in (3, 8, 21, 40):
            kept = json.loads(json.dumps(history_to_json(history)))
            others[i] = make_history(config, mesh, kept)
        verdict, history = step(history, loss, norm)
        for name, other in others.items():
            again, others[name] = step(other, loss, norm)
            for one, two in zip(jax.tree.leaves(verdict), jax.tree.leaves(again), strict=True):
                np.testing.assert_array_equal(one, two)
    assert int(history.skipped) > 0 and len(others) == 4
    kept = history_to_json(history)
    for window in (4, 32):
        other = dataclasses.replace(config, window=window)
        found = history_to_json(make_history(other, mesh, kept))
        assert found["losses"] == kept["losses"][-window:]
        assert found["norms"] == kept["norms"][-window:]
        oracle = Oracle(other)
        oracle.seen = [*zip(kept["losses"], kept["norms"])][-window:]
        verdict, _ = judge(other, make_history(other, mesh, kept), jnp.float32(2), jnp.float32(99))
        assert int(verdict.kind) == oracle.judge(2.0, 99.0)[0] == (SPIKE if window == 4 else NONE)
    assert make_history(config, mesh, None).applied == 0


def test_configurations_that_are_refused():
    for wrong, words in (
        ({"sigma": 0.0}, "sigma=0.0: must be greater than 0"),
        ({"sigma": float("nan")}, "sigma=nan: must be greater than 0"),
        ({"window": 3}, "window=3: must be at least 4"),
        ({"most_in_a_row": 0}, "most_in_a_row=0: must be at least 1"),
        ({"dumps": -1}, "dumps=-1: must be 0 or more"),
    ):
        with pytest.raises(UserError, match=words):
            AnomalyConfig(**wrong)
    assert AnomalyConfig().active
    assert not AnomalyConfig(nonfinite="ignore", spike="ignore").active


# ── whole steps ──────────────────────────────────────────────────────────────

POISON = 7  # a token whose embedding is not finite
METHODS = {
    "exact": GradCompression(),
    "int8": GradCompression("int8", rounding="error_feedback"),
    "top_k": GradCompression("top_k", density=0.05),
    "low_rank": GradCompression("low_rank", rank=2),
}


def configured(method="exact", **anomaly):
    return make_config(
        experts=6,
        model={"num_layers": 2, "top_k_by_layer": (1, 2), "tie_embeddings": False},
        # One learning rate, so that a run that leaves a step out is one that never saw it.
        optimizer={"warmup_steps": 0, "schedule": "wsd", "decay_fraction": 0.0},
        grad_compression=METHODS[method],
        anomaly=AnomalyConfig(**anomaly),
    )


@pytest.fixture(autouse=True, scope="module")
def everything_is_large():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "SMALLEST", 64)
        yield


@pytest.fixture(scope="module")
def start():
    flat = initial(configured())
    (name,) = [name for name in flat if name.startswith("params/embedding")]
    flat[name] = flat[name].copy()
    flat[name][POISON] = np.nan
    return flat


@functools.cache
def program(config):
    blueprint = blueprint_of(config, (4, 2, 1))
    return blueprint, make_train_step(blueprint, config)


def run_steps(config, start, tokens, judged=True):
    """The states after each step, on the host, and the metrics."""
    blueprint, step = program(config)
    state = jax.block_until_ready(from_logical(start, blueprint))
    state = with_residuals(state, blueprint, config)
    if judged:
        state = dataclasses.replace(state, history=make_history(config.anomaly, blueprint.mesh))
    states, found = [], []
    where = NamedSharding(blueprint.mesh, BATCH_SPEC)
    for batch in tokens:
        state, metrics = jax.block_until_ready(
            step(state, jax.device_put(batch[None], where), None)
        )
        states.append(jax.tree.map(lambda x: np.array(x), dataclasses.replace(state, history=None)))
        found.append(jax.device_get(metrics))
    return states, found


def assert_equal_states(one, other, same_step=True):
    if not same_step:
        one, other = (dataclasses.replace(state, step=0) for state in (one, other))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def tokens():
    """Six batches; the third has the poisoned token once, on one device."""
    tokens = batches(np.random.default_rng(3), 6)
    tokens = np.where(tokens == POISON, POISON + 1, tokens)
    tokens[2, 5, 3] = POISON
    return tokens


@pytest.mark.parametrize(
    "method",
    [m if m in ("exact", "top_k") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS],
)
def test_a_step_with_nan_leaves_no_trace(start, tokens, method):
    """Weights, moments, biases and residuals go on as if its batch had never been."""
    config = configured(method, nonfinite="skip")
    states, found = run_steps(config, start, tokens[[0, 1, 2, 3, 4]])
    without, _ = run_steps(config, start, tokens[[0, 1, 3, 4]])
    assert [int(m["anomaly"].kind) for m in found] == [0, 0, NONFINITE, 0, 0]
    assert [bool(m["anomaly"].apply) for m in found] == [True, True, False, True, True]
    assert [int(state.step) for state in states] == [1, 2, 3, 4, 5]
    assert_equal_states(states[2], states[1], same_step=False)
    for name in ("masters", "moments", "biases"):
        with_, never = (jax.tree.leaves(getattr(s[-1], name)) for s in (states, without))
        for a, b in zip(with_, never, strict=True):
            np.testing.assert_array_equal(a, b)
    assert (states[0].residuals is None) == (method == "exact")


def test_where_nobody_looks_nan_spreads(start, tokens):
    ignored, _ = run_steps(configured(nonfinite="ignore"), start, tokens[:3])
    whole = [np.isfinite(x).all() for x in jax.tree.leaves(ignored[-1].masters)]
    assert sum(whole) < len(whole) / 2


def test_a_run_that_stops_is_left_before_the_step(start, tokens):
    config = configured(nonfinite="stop")
    states, found = run_steps(config, start, tokens[:5])
    for state in states[2:]:
        assert_equal_states(state, states[1])
    assert [bool(m["anomaly"].halted) for m in found] == [False, False, True, True, True]


def test_too_many_in_a_row_stop_a_run(start, tokens):
    config = configured(nonfinite="skip", most_in_a_row=2)
    order = [0, 2, 2, 1, 2, 2, 2, 1]
    states, found = run_steps(config, start, tokens[order])
    assert [int(state.step) for state in states] == [1, 2, 3, 4, 5, 6, 6, 6]
    assert_equal_states(states[5], states[3], same_step=False)
    assert [bool(m["anomaly"].halted) for m in found] == [False] * 6 + [True] * 2


def test_a_spike_is_skipped_or_told(start, tokens):
    """Two batches that are all alike, which the model learns; then one of other tokens."""
    tokens = np.where(tokens == POISON, POISON + 1, tokens)
    order = [0] * 12 + [1, 0]
    config = configured(spike="skip", window=4, sigma=4.0)
    states, found = run_steps(config, start, tokens[order])
    kinds = [int(m["anomaly"].kind) for m in found]
    assert kinds[-2:] == [SPIKE, NONE] and kinds[:-2].count(SPIKE) == 0
    assert_equal_states(states[-2], states[-3], same_step=False)
    verdict = found[-2]["anomaly"]
    seen = np.array([[m["loss"], m["grad_norm"]] for m in found[-6:-2]], np.float64)
    np.testing.assert_allclose(verdict.mean_2, seen.mean(0), rtol=1e-5)
    limit = seen.mean(0) + 4 * seen.std(0)
    np.testing.assert_allclose(verdict.limit_2, limit, rtol=1e-3)
    reported, again = run_steps(
        dataclasses.replace(config, anomaly=AnomalyConfig(spike="report", window=4, sigma=4.0)),
        start,
        tokens[order],
    )
    assert int(again[-2]["anomaly"].kind) == SPIKE and bool(again[-2]["anomaly"].apply)
    # Reported or not looked at: the same, as far as two programs round alike.
    plain, nothing = run_steps(config, start, tokens[order], judged=False)
    assert nothing[0]["anomaly"] is None
    for step, tolerance in ((0, 1e-6), (-1, 1e-4)):
        one, other = ((s[step].masters, s[step].moments) for s in (reported, plain))
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
            atol = tolerance * np.nanmax(np.abs(b), initial=0)  # POISON's row is nan
            np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "exact"])
def test_no_method_hides_what_is_not_finite(rng, method):
    """One number of one rank is enough for the norm to tell."""
    way, mesh = make_method(METHODS[method], momentum=0.9), make_mesh(MeshShape(8, 1, 1))

    def reduced(grad):
        held = way.init(grad.shape[1:], jax.random.key(0))
        key, step = jax.random.key(1), jnp.int32(3)
        return way.reduce(grad[0], held, (DATA,), None, key=key, step=step)[0]

    mapped = jax.shard_map(reduced, mesh=mesh, in_specs=P(DATA), out_specs=P(), check_vma=False)
    run = jax.jit(mapped)
    grads = rng.normal(size=(8, 64, 64)).astype(np.float32)
    assert np.isfinite(run(grads)).all()
    for bad in (np.nan, np.inf, -np.inf):
        broken = grads.copy()
        broken[tuple(rng.integers(0, grads.shape))] = bad
        assert not np.isfinite(run(broken)).all()
