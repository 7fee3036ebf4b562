"""Which experts are chosen together, counted inside the training step."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from placement_support import assert_counts, brute_force
from run_support import (
    TINY,
    assert_rows_close,
    kept_programs,
    refused,
    rows,
    run,
    stop_at,
    write_text,
)
from train_support import BATCH, SEQ, batches, blueprint_of, host, initial, make_config

from moejax.model.decoder import Decoder
from moejax.placement import counting
from moejax.placement.record import trace_of
from moejax.placement.statistics import read_statistics
from moejax.training import session
from moejax.training.state import from_logical, to_logical
from moejax.training.step import BATCH_SPEC, make_gather, make_train_step

EXPERTS, LAYERS = 10, 2  # of `make_config`, with 2 and with 3 experts of a token
TOKENS = batches(np.random.default_rng(1), 3)  # fixed: no two router scores are almost equal

# ── a batch ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_count(rng, dtype):
    """More tokens than bfloat16 could count; some masked, some with fewer choices."""
    layers, tokens, experts, chosen = 3, 700, 5, 3
    order = rng.permuted(np.tile(np.arange(experts), (layers, tokens, 1)), axis=-1)
    experts_LNK = order[..., :chosen].astype(dtype)
    experts_LNK[0, :, 2] = -1
    experts_LNK[:, rng.random(tokens) < 0.2] = -1
    experts_LNK[2] = np.where(experts_LNK[2] >= 0, [0, 1, 2], -1)  # always the same
    found = jax.jit(counting.count, static_argnums=1)(experts_LNK, experts)
    assert found.pairs_LEE.dtype == found.load_LE.dtype == found.tokens_L.dtype == np.float32
    assert_counts(found, brute_force(np.moveaxis(experts_LNK, 0, 1), experts))
    assert found.pairs_LEE.max() > 256


def test_stride(rng):
    for _ in range(200):
        length = int(2 ** rng.integers(0, 8) * rng.integers(1, 4))
        tokens, most = int(length * rng.integers(1, 40)), int(rng.integers(1, 300))
        stride = counting.sample_stride(tokens, most)
        taken = np.arange(tokens)[::stride]
        assert len(taken) <= most and (tokens > most or stride == 1)
        # Positions in a text are taken equally often.
        times = np.bincount(taken % length, minlength=length)
        assert np.ptp(times) <= 1 + len(taken) // length
        if len(taken) <= length:
            assert times.max() == 1
    assert counting.sample_stride(4096, 2048) == 3
    assert counting.sample_stride(1 << 16, 2048) == 33


# ── steps ────────────────────────────────────────────────────────────────────


def config_of(accumulate=1, scan=False, **run):
    model = {"top_k_by_layer": (), "scan_layers": True, "remat": "layer"} if scan else {}
    return make_config(EXPERTS, model=model, accumulate=accumulate, **run)


@pytest.fixture(scope="module")
def starts():
    return {scan: initial(config_of(scan=scan)) for scan in (False, True)}


class Run:
    """Steps on a mesh, with counters or without."""

    def __init__(self, config, sizes, start, *, counted=True):
        self.config, self.blueprint = config, blueprint_of(config, sizes)
        self.state = jax.block_until_ready(from_logical(start, self.blueprint))
        if counted:
            counts = counting.make_counters(self.blueprint.mesh, LAYERS, EXPERTS)
            self.state = dataclasses.replace(self.state, counts=jax.block_until_ready(counts))
        self._step = make_train_step(self.blueprint, config)

    def lowered(self):
        return self._step.trace(self.state, self._batch(TOKENS[0]), None).lower()

    def _batch(self, tokens):
        parts = self.config.accumulate
        rows = tokens.reshape(parts, BATCH // parts, SEQ + 1)
        return jax.device_put(rows, NamedSharding(self.blueprint.mesh, BATCH_SPEC))

    def compile(self):
        with jax.numpy_dtype_promotion("standard"):  # JAX's attention mixes dtypes
            self._step = self.lowered().compile()
        return self

    def step(self, tokens):
        self.state, metrics = jax.block_until_ready(
            self._step(self.state, self._batch(tokens), None)
        )
        return jax.device_get(metrics)

    def trace(self, tokens):
        """What the weights of now choose for a batch: experts [BATCH, SEQ, L, K]."""
        params = jax.block_until_ready(make_gather(self.blueprint)(self.state.masters))
        trace = trace_of(self.blueprint, params, self.state.biases, list(tokens[:, :-1]))
        return trace.experts_NLK.reshape(BATCH, SEQ, LAYERS, -1)

    def counts(self):
        return counting.read_counters(self.state.counts, self.blueprint.mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, accumulate, scan, window",
    [((2, 2, 2), 2, False, 2), ((1, 4, 1), 1, True, 0)],
)
def test_steps_count_what_a_trace_holds(starts, sizes, accumulate, scan, window):
    """All tokens, over devices and microbatches; older steps fade."""
    config = config_of(accumulate, scan, placement_stats_window=window)
    steps = Run(config, sizes, starts[scan]).compile()
    want = [np.zeros(())] * 3
    assert_counts(steps.counts(), want)
    for tokens in TOKENS:
        new = brute_force(steps.trace(tokens).reshape(BATCH * SEQ, LAYERS, -1), EXPERTS)
        metrics = steps.step(tokens)
        assert metrics["moe"].experts_TK is None
        np.testing.assert_array_equal(metrics["moe"].counts_E, new[1])
        want = [old * (0.5 if window else 1.0) + n for old, n in zip(want, new)]
        assert_counts(steps.counts(), want)  # halves are exact
    assert steps.counts().pairs_LEE.any(axis=(1, 2)).all()


def test_a_sample_of_the_tokens(starts, monkeypatch):
    """Of each device and microbatch every third token, the least stride that fits."""
    monkeypatch.setattr(counting, "STEP_TOKENS", 16)
    data, accumulate = 4, 2
    steps = Run(config_of(accumulate), (data, 1, 1), starts[False]).compile()
    parts = steps.trace(TOKENS[0]).reshape(accumulate * data, -1, LAYERS, 3)
    assert parts.shape[1] == 24
    sample = parts[:, ::5].reshape(-1, LAYERS, 3)
    steps.step(TOKENS[0])
    assert_counts(steps.counts(), brute_force(sample, EXPERTS))


def test_nothing_is_counted_unless_asked_for(starts, monkeypatch):
    off = Run(config_of(), (2, 2, 1), starts[False], counted=False)
    on = Run(config_of(), (2, 2, 1), starts[False])
    matrix = re.compile(rf"x{EXPERTS}x{EXPERTS}x(f32|bf16)")
    assert matrix.search(on.lowered().as_text()) and not matrix.search(off.lowered().as_text())
    assert len(jax.tree.leaves(on.state)) == len(jax.tree.leaves(off.state)) + 3

    on.compile(), off.compile()
    for tokens in TOKENS:
        want, found = off.step(tokens), on.step(tokens)
        jax.tree.map(np.testing.assert_array_equal, found, want)
    jax.tree.map(
        np.testing.assert_array_equal, host(to_logical(on.state)), host(to_logical(off.state))
    )

    def never(*_):
        raise AssertionError("counted")

    monkeypatch.setattr(counting, "count", never)
    monkeypatch.setattr(Decoder, "report_experts", never)
    Run(config_of(), (2, 2, 1), starts[False], counted=False).lowered()
    with pytest.raises(AssertionError, match="counted"):
        Run(config_of(), (2, 2, 1), starts[False]).lowered()


def test_counting_adds_no_collective(starts):
    def collectives(counted):
        text = Run(config_of(), (2, 2, 1), starts[False], counted=counted).lowered().as_text()
        return re.findall(r"stablehlo\.(all_\w+|reduce_scatter|collective_\w+)", text)

    found = collectives(True)
    assert found and found == collectives(False)


# ── train.py ─────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    text = write_text(tmp_path_factory.mktemp("data") / "text")
    with kept_programs(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "SAMPLE_TOKENS", 8)
        counted = ("--placement-stats", "--placement-stats-window", 0, "--placement-stats-every", 2)
        yield [*TINY, "--data", text, "--steps", 5, *counted]


@pytest.mark.slow
def test_a_run_writes_statistics_and_goes_on(flags, tmp_path, monkeypatch):
    """Counted anew after a stop; what is learned is as without."""
    path, written = tmp_path / "run", []
    write = session.write_statistics

    def noted(*args):
        write(*args)
        written.append(read_statistics(args[0]).tokens_L.tolist())

    monkeypatch.setattr(session, "write_statistics", noted)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3)
        code, _, err = run(*flags, "--run", path)
    assert code == 0, err
    assert written == [[2 * 256.0] * 2, [3 * 256.0] * 2]  # after step 2, and at the end
    stored = {p.name for p in (path / "checkpoints").rglob("*") if "count" in p.name}
    assert not stored
    code, _, err = run("--run", path)
    assert code == 0, err
    assert written[2:] == [[256.0] * 2, [2 * 256.0] * 2]  # after step 4, and at the end
    statistics = read_statistics(path / "placement_stats.npz")
    np.testing.assert_array_equal(statistics.load_LE.sum(1), [2 * 2 * 256] * 2)
    steps = rows(path)[3:]
    with_all = [row["tokens_per_expert"] for row in steps]
    np.testing.assert_array_equal(statistics.load_LE, np.sum(with_all, axis=0))
    # Each token has two experts: a pair for each of them.
    np.testing.assert_array_equal(statistics.pairs_LEE.sum(2), statistics.load_LE)

    code, _, err = run("--run", path)  # it is over already: nothing is counted
    assert code == 0 and len(written) == 4, err

    plain = tmp_path / "plain"
    code, _, err = run(*flags, "--no-placement-stats", "--run", plain)
    assert code == 0 and not (plain / "placement_stats.npz").exists(), err
    assert_rows_close(rows(plain), rows(path))


def test_what_is_refused(flags):
    assert "placement_stats_window=-1" in refused("--placement-stats-window", -1)
    dense = ("--model.first-dense-layers", 4, "--model.dense-hidden", 32)
    assert "no layer with experts" in refused("--placement-stats", *dense)
