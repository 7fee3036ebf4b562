"""How decoding steps exchange rows: what is measured decides, and no choice changes a text."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from draws import draws
from engine_support import Oracle, make_engine, run
from inference_support import CONFIG, random_weights
from jax.sharding import PartitionSpec as P

from moejax import exchange
from moejax.config import ExchangeConfig
from moejax.errors import UserError
from moejax.inference import exchange_choice
from moejax.inference.exchange_choice import Picked, median_seconds, pick
from moejax.inference.params import SamplingParams
from moejax.model.cache import page_specs
from moejax.serving import start
from moejax.serving.flags import EngineFlags
from moejax.training.state import Blueprint, load_weights
from sharding.mesh import TOKEN_AXES, MeshShape, make_mesh
from sharding.specs import specs_of

# Buckets so small that a step needs several waves: what the candidates need not.
WAVES = ExchangeConfig(mode="all_to_all", bucket_rows=1)
MODEL = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, exchange=WAVES))
SMALL = {"page_len": 4, "prefill_chunk": 16, "max_rows": 32}  # four rows a device
MESH = (1, 8, 1)
GREEDY = {"temperature": 0, "logprobs": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def flat():
    return random_weights(MODEL, draws(__name__))


@pytest.fixture(scope="module")
def engine(flat):
    engine = make_engine(MODEL, flat, MESH, **SMALL)
    engine.expect(1, 48)  # one number of pages
    return engine


def made_by(config, flat, sizes=MESH):
    blueprint = Blueprint(config, make_mesh(MeshShape(*sizes)))
    return blueprint, load_weights(flat, blueprint, np.float32)


@pytest.fixture
def all_modes(monkeypatch):
    """As if the devices were Hopper GPUs: mode `remote` is no other one under another name."""
    monkeypatch.setattr(exchange_choice, "push", SimpleNamespace(refusal=lambda backend: None))


@pytest.fixture
def no_programs(monkeypatch):
    """Nothing is compiled to be measured: for timers that run nothing."""
    nothing = SimpleNamespace(compile=lambda: None)
    monkeypatch.setattr(exchange_choice._Measurement, "_lower", lambda self, name, rows: nothing)


class Table:
    """A timer that takes the times from a table, and runs nothing: ms of (exchange, rows)."""

    def __init__(self, **ms):
        self.ms, self.asked = ms, []

    def __call__(self, name, rows, call):
        self.asked.append((name, rows))
        ms = self.ms[name]
        return 1e-3 * (ms[rows] if isinstance(ms, dict) else ms)


def test_the_fastest_is_chosen_for_each_number_of_rows(engine, all_modes, no_programs, rng, caplog):
    timer = Table(
        ring={1: 1.0, 2: 3.0, 4: 16}, all_to_all={1: 2.0, 2: 2.0, 4: 3.0}, remote=8, config=7
    )
    picked = engine.pick_exchange("auto", timer)
    assert picked.exchanges == {1: "ring", 2: "all_to_all", 4: "all_to_all"}
    # The least, the largest, and then between; `config` is no other one where a bucket holds all.
    asked = [rows for rows, _ in itertools.groupby(timer.asked, lambda asked: asked[1])]
    assert asked == [1, 4, 1, 4, 2]
    assert "config" not in picked.seconds[1] and set(picked.seconds[4]) == set(timer.ms)
    told = str(picked)
    assert "by ring from 1 rows a device on, all_to_all from 2 rows" in told
    assert "4 rows: ring 1.000, all_to_all 0.188, remote 0.500, config 0.438" in told

    # Steps are compiled with what was chosen, and only those.
    engine.warm_up()
    found = {
        (key.shape.rows, key.exchange)
        for key in engine._programs._compiled
        if getattr(key, "shape", None) and not key.shape.tokens
    }
    assert found == {(1, "ring"), (2, "all_to_all"), (4, "all_to_all")}
    with jax.log_compiles():
        for _ in range(20):
            engine.add(rng.integers(1, 257, 9), SamplingParams(max_tokens=int(rng.integers(2, 9))))
        run(engine)
    assert not [r for r in caplog.records if "Compiling" in r.message]


def test_every_exchange_gives_the_same_texts(engine, flat, rng):
    oracle = Oracle(CONFIG, flat, CONFIG.max_context)
    prompts = [rng.integers(1, 257, n) for n in rng.integers(1, 17, 13)]
    params = SamplingParams(max_tokens=9, **GREEDY)
    found = {}
    for how in "config", "ring", "all_to_all", "remote":
        assert set(engine.pick_exchange(how).exchanges.values()) == {how}
        ids = [engine.add(prompt, params) for prompt in prompts]
        logprobs = {}

        def keep(_, events, logprobs=logprobs):
            for event in events:
                logprobs.setdefault(event.id, []).extend(event.logprobs)

        results, _ = run(engine, each=keep)
        found[how] = [(results[id, 0][0], logprobs[id]) for id in ids]
        compared = [oracle.check(p, made, params) for p, (made, _) in zip(prompts, found[how])]
        assert sum(compared) > 0.5 * 9 * len(prompts)
    compared = 0
    for how in "ring", "all_to_all", "remote":
        for (a, first), (b, second) in zip(found["config"], found[how]):
            same = next((i for i in range(9) if a[i] != b[i]), 9)  # a near tie ends what is alike
            want, have = (
                [one.top_logprobs for one in logprobs[:same]] for logprobs in (first, second)
            )
            np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)
            compared += same
    assert compared > 0.5 * 3 * 9 * len(prompts)


@pytest.mark.parametrize(
    "how",
    [
        "config",
        "ring",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("all_to_all", "remote")),
    ],
)
def test_rows_without_a_text_route_nowhere(flat, how, rng, monkeypatch):
    """Texts that end leave devices unevenly full: a step has the rows of the fullest, no more."""
    engine = make_engine(MODEL, flat, MESH, **SMALL)
    engine.expect(4, 48)
    engine.pick_exchange(how)
    programs, seen, steps = engine._programs, [], []
    merge, start_step = Blueprint.merge, programs._start

    class Watched:
        def __init__(self, model):
            self.model, self.logits = model, model.logits

        def __call__(self, *args, **options):
            out = self.model(*args, **options)
            seen.append(out.aux)
            return out

    @functools.cache
    def counting(key):
        """The counters of a step, as a program of its own."""

        def count(*state):
            programs._step(key, *state)
            return seen.pop().over_devices().counters

        blueprint, rows = programs._blueprint, P(TOKEN_AXES, None)
        weights = specs_of(blueprint.params), blueprint.bias_specs
        specs = (weights, page_specs(blueprint.config), rows, rows, rows)
        options = {"mesh": blueprint.mesh, "in_specs": specs, "out_specs": P()}
        return jax.jit(jax.shard_map(count, check_vma=False, **options))

    def noted(rows_BF, where_BW, shape, level):
        if not shape.tokens:
            state = programs._weights, programs._layers, programs._history_RM
            state = *state, *jax.device_put((rows_BF, where_BW), programs._rows)
            with monkeypatch.context() as patch:
                patch.setattr(Blueprint, "merge", lambda self, *w: Watched(merge(self, *w)))
                counters = jax.device_get(counting(programs._forward(shape))(*state))
            steps.append((int(rows_BF[:, 0].sum()), counters, shape.rows))
        return start_step(rows_BF, where_BW, shape, level)

    monkeypatch.setattr(programs, "_start", noted)
    for length in [20] * 3 + [3] * 13:
        engine.add(rng.integers(1, 257, 5), SamplingParams(max_tokens=length, ignore_eos=True))
    run(engine)
    few = most_waves = 0
    for texts, counters, rows_each in steps:
        few += texts < 8
        moe, layers = MODEL.moe, MODEL.num_layers
        np.testing.assert_array_equal(counters.assignments, [texts * moe.router.top_k] * layers)
        rows = counters.rows_self + counters.rows_host
        assert (rows <= counters.assignments).all() and (rows >= texts).all()
        most_waves = max(most_waves, int(counters.waves.max()))
        if how != "config":
            one = dataclasses.replace(WAVES, mode=how, bucket_rows=None, bucket_slack=np.inf)
            config = dataclasses.replace(moe, exchange=one)
            budget = exchange.choose_for(config, tokens=rows_each, devices=8)
            moved = 8 * budget.moved_rows if how != "remote" else counters.rows_host
            np.testing.assert_array_equal(counters.rows_host + counters.rows_padding, moved)
    assert few > 5 and (most_waves > 1 if how == "config" else most_waves == 1)


def test_what_cannot_run_is_left_out(flat, monkeypatch):
    blueprint, weights = made_by(MODEL, flat)

    def lower(self, name, rows):
        if name == "ring":
            raise NotImplementedError("no ring\nhere")
        return SimpleNamespace(compile=lambda: None)

    monkeypatch.setattr(exchange_choice._Measurement, "_lower", lower)
    timer = Table(all_to_all=2, config=1)
    picked = pick(blueprint, weights, [2, 4], timer=timer)
    assert picked.exchanges == {2: "config", 4: "config"}
    assert picked.left_out["ring"] == "no ring here"
    assert "XLA's all-to-all" in picked.left_out["remote"]  # on a CPU there is no kernel for it
    assert {name for name, _ in timer.asked} == {"all_to_all", "config"}
    assert "decoding exchanges rows by config (ms a layer, 2 rows: all_to_all 0.125" in str(picked)
    assert "; without ring: no ring here" in str(picked)


def test_a_near_tie_does_not_change_from_start_to_start(flat, all_modes, no_programs):
    blueprint, weights = made_by(MODEL, flat)
    picked = pick(blueprint, weights, [4], timer=Table(ring=1.02, all_to_all=1, remote=9, config=1))
    assert picked.exchanges == {4: "ring"}


def test_without_time_the_nearest_measured_number_of_rows_decides(flat, no_programs):
    blueprint, weights = made_by(MODEL, flat)
    timer = Table(ring={1: 1, 16: 5}, all_to_all={1: 2, 16: 1}, config=9)
    picked = pick(blueprint, weights, [1, 2, 4, 8, 16], timer=timer, seconds=0)
    assert set(picked.seconds) == {1, 16}
    assert [picked.exchanges[n] for n in (1, 2, 8, 16)] == ["ring"] * 2 + ["all_to_all"] * 2


@pytest.mark.parametrize(
    "changes, sizes",
    [
        pytest.param({}, (2, 2, 2), marks=pytest.mark.slow),
        ({"scan_layers": True, "num_layers": 3, "first_dense_layers": 1, "dense_hidden": 32}, MESH),
    ],
    ids=["tensor", "scanned"],
)
def test_layers_are_timed_on_the_devices(changes, sizes, rng, all_modes):
    config = dataclasses.replace(MODEL, **changes)
    blueprint, weights = made_by(config, random_weights(config, rng), sizes)
    calls = []

    def timer(name, rows, call):
        calls.append((name, rows))
        return median_seconds(name, rows, call)

    picked = pick(blueprint, weights, [1, 4], timer=timer)
    assert not picked.left_out and set(picked.seconds) == {1, 4}
    assert len(calls) == 2 * len(set(calls)) >= 14
    assert all(0 < s < 1 for found in picked.seconds.values() for s in found.values())


def test_where_there_is_nothing_to_choose(flat):
    assert pick(*made_by(MODEL, flat, (8, 1, 1)), [1]) is None
    dense = dataclasses.replace(CONFIG, first_dense_layers=2, dense_hidden=32)
    assert pick(Blueprint(dense, make_mesh(MeshShape(1, 8, 1))), (None, None), [1]) is None


def test_what_is_refused(flat, no_programs, monkeypatch):
    hosts = dataclasses.replace(WAVES, host_devices=2)
    config = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, exchange=hosts))
    blueprint, weights = made_by(config, flat)
    with pytest.raises(UserError, match="'remote' with host_devices=2"):
        pick(blueprint, weights, [1, 2], "remote")
    picked = pick(blueprint, weights, [2], timer=Table(ring=1, all_to_all=2, config=3))
    assert picked.exchanges == {2: "ring"} and "remote" in picked.left_out
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="auto with 2 processes: each would choose for itself; "):
        pick(blueprint, weights, [2])
    assert pick(blueprint, weights, [2], "ring").exchanges == {2: "ring"}


def test_the_median_of_a_few_calls(monkeypatch):
    now, took = [0.0], iter([9.0, 0.01, 0.05, 0.02, 0.03, 0.01, 7.0])

    def call():
        now[0] += next(took)

    monkeypatch.setattr(exchange_choice, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert median_seconds("ring", 1, call) == pytest.approx(0.02)  # the first is a warm-up
    took = iter([9.0, 5.0, 1.0])
    assert median_seconds("ring", 1, call) == pytest.approx(5.0)  # and long ones are not repeated


@pytest.mark.parametrize(
    "flags, measure, fake, asked",
    [
        ({}, True, False, "auto"),
        ({}, True, True, "ring"),
        ({}, False, False, "ring"),
        ({"deterministic": True}, True, False, "ring"),
        ({"deterministic": True, "decode_exchange": "config"}, True, False, "config"),
        ({"decode_exchange": "remote"}, False, False, "remote"),
    ],
)
def test_flags(flags, measure, fake, asked, flat, monkeypatch, capsys):
    if not fake:
        monkeypatch.setattr(start, "_have_speeds", lambda mesh: True)
    monkeypatch.setattr(start, "keep_compiled_programs", lambda: None)
    source = SimpleNamespace(config=MODEL, tokenizer=None, end_ids=())
    monkeypatch.setattr(start, "load_model", lambda *_: made_by_flat(flat))
    monkeypatch.setattr("moejax.serving.text_model.end_ids", lambda source: ())
    found = []

    def choose(engine, how):
        found.append(how)
        return Picked({4: "ring"}, {4: {"ring": 1e-3}} if how == "auto" else {}, {})

    monkeypatch.setattr("moejax.inference.engine.Engine.pick_exchange", choose)
    start.make_engine(source, EngineFlags(mesh="1x8x1", **flags), measure=measure)
    assert found == [asked]
    told = "decoding exchanges rows by ring (ms a layer, 4 rows: ring 1.000)\n"
    assert capsys.readouterr().err == (told if asked == "auto" else "")


def made_by_flat(flat):
    blueprint, weights = made_by(MODEL, flat)
    return blueprint, *weights
