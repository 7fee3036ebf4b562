"""Serving that follows its traffic: experts move under texts, which are the same for it."""

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest
from draws import draws
from engine_support import END
from inference_support import CONFIG, random_weights
from jax import numpy as jnp
from serve_placement_support import Blocked

from moejax.errors import UserError
from moejax.inference.engine import Engine, EngineSettings
from moejax.inference.expert_weights import quantized_blueprint, quantizing
from moejax.inference.params import SamplingParams
from moejax.inference.placement_choice import PlacementChoice, choose_placement
from moejax.inference.placing import ServingPlacement
from moejax.placement import controller
from moejax.placement.arrays import slots_at_home
from moejax.placement.counting import begin_reading
from moejax.placement.plan_file import write_slots
from moejax.placement.record import record
from moejax.training.state import Blueprint, load_weights
from sharding.mesh import MeshShape, make_mesh

EXPERTS, LAYERS = 8, 2
MESH = (1, 4, 1)
# Few programs: each takes seconds to compile.
SMALL = {"page_len": 4, "prefill_chunk": 16, "max_rows": 4, "prefix_reuse": False}
LARGER = {**SMALL, "max_rows": 8, "prefix_reuse": True}
PARAMS = SamplingParams(temperature=0, max_tokens=12, logprobs=20, ignore_eos=True)


@pytest.fixture(scope="module")
def flat():
    return random_weights(CONFIG, draws(__name__))


@pytest.fixture(autouse=True)
def few_tokens_are_enough(monkeypatch):
    monkeypatch.setattr(controller, "LEAST_TOKENS", 40.0)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [t for t in threading.enumerate() if t.name == "moejax-planner"]


def model_of(flat, config=CONFIG, sizes=MESH, weights=None):
    """Blueprint, params and biases."""
    blueprint = Blueprint(config, make_mesh(MeshShape(*sizes)))
    values = {name: jnp.asarray(value) for name, value in flat.items()}
    if weights is not None:
        blueprint = quantized_blueprint(blueprint, weights)
        keep = quantizing(blueprint, weights)
        values = {n: v for name, array in values.items() for n, v in keep(name, array).items()}
    return blueprint, *load_weights(values, blueprint, np.float32)


def engine_of(model, choice=None, settings=SMALL, **options):
    """An engine, and what places its experts; `choice` None is home."""
    blueprint, params, biases = model
    placing = None
    if choice is not None:
        placing = ServingPlacement(blueprint, params, choice, **options)
        blueprint, params = placing.blueprint, placing.params
    settings = EngineSettings(**settings)
    engine = Engine(blueprint, params, biases, end_ids=[END], settings=settings, placing=placing)
    engine.expect(8, 48)  # one shape for decoding
    return engine, placing


def auto(blueprint, *, replicas=0, every=4, folder=""):
    shape = blueprint.shape
    return choose_placement(
        "auto", blueprint.config, shape, replicas=replicas, every=every, folder=folder
    )


def arrivals(rng, count=10, longest=16):
    """(step, prompt): texts join while others are under way."""
    steps = [0, *np.sort(rng.integers(0, 25, count - 1)).tolist()]
    return [(step, rng.integers(1, 257, rng.integers(4, longest + 1)).tolist()) for step in steps]


def texts_of(engine, requests, each=None):
    """Tokens and top log-probabilities of each request, which joins at its step."""
    waiting, ids, made, logprobs, step = list(requests), [], {}, {}, 0
    while waiting or engine.has_work:
        while waiting and waiting[0][0] <= step:
            ids.append(engine.add(waiting.pop(0)[1], PARAMS))
        for event in engine.step():
            made.setdefault(event.id, []).extend(event.tokens)
            logprobs.setdefault(event.id, []).extend(one.top_logprobs for one in event.logprobs)
        step += 1
        if each is not None:
            each()
    return [made[id] for id in ids], [np.array(logprobs[id]) for id in ids]


class Pair:
    """Two engines of a model: at home, and following; their programs are compiled once."""

    def __init__(self, flat, config=CONFIG, sizes=MESH, weights=None, replicas=0, settings=SMALL):
        self.home, _ = engine_of(model_of(flat, config, sizes, weights), settings=settings)
        self._model, self._replicas = model_of(flat, config, sizes, weights), replicas
        choice = auto(self._model[0], replicas=replicas)
        self.engine, self.placing = engine_of(self._model, choice, settings, layers_per_step=1)
        self.lines = []

    def begin(self, every):
        """Nothing counted, a planner that has never looked, and the next look after some steps."""
        placing = self.placing
        placing._planner = auto(self._model[0], replicas=self._replicas).planner
        placing._every, placing._looked = every, placing._steps
        placing._failed = placing._looking = False
        placing._looks = placing._moved = 0
        placing.reset()
        self.lines = []
        placing._tell = self.lines.append
        return placing._planner


@pytest.fixture(scope="module")
def pair(flat):
    return Pair(flat)


def check_same(found, wanted, rounding):
    assert found[0] == wanted[0]
    scale = max(np.abs(logprobs).max() for logprobs in wanted[1])
    for got, want in zip(found[1], wanted[1]):
        assert np.abs(got - want).max() < rounding * scale


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


SCANNED = {"scan_layers": True, "num_layers": 3, "first_dense_layers": 1, "dense_hidden": 32}


@pytest.mark.parametrize(
    "case",
    [
        None,
        slow(({}, (2, 2, 2), None, 0)),
        slow((SCANNED, MESH, None, 1)),
        slow(({}, MESH, "int8", 1)),
        slow((SCANNED, (1, 8, 1), "fp8", 2)),
    ],
    ids=str,
)
def test_experts_move_under_texts(rng, flat, pair, case, caplog):
    longest = 16
    if case is not None:
        longest = 30
        changes, *rest = case
        config = dataclasses.replace(CONFIG, **changes)
        pair = Pair(random_weights(config, rng), config, *rest, LARGER)
    home, engine, placing = pair.home, pair.engine, pair.placing
    requests = arrivals(rng, longest=longest)
    wanted = [texts_of(home, requests) for _ in range(2)]  # the second time pages are there
    pair.begin(10**9)
    check_same(texts_of(engine, requests), wanted[0], 2e-6)
    programs, planner = engine.stats().programs, pair.begin(6)
    carried, carry = [], placing._carry

    def watched():
        carry()
        # Texts that have begun and have not ended.
        carried.append(engine.stats().running)

    def settle():
        while planner.busy:  # so that plans come in the middle of texts, on any machine
            time.sleep(1e-3)

    placing._carry = watched
    with jax.log_compiles():
        found = texts_of(engine, requests, settle)
    placing._carry = carry
    assert not [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert engine.stats().programs == programs == home.stats().programs
    check_same(found, wanted[1], 2e-6)
    assert any(running > 0 for running in carried)
    stats = engine.stats().placement
    assert stats.experts_moved > 0 and stats.looks >= 1 and stats.planner_seconds > 0
    assert stats.copies == pair._replicas * placing._devices * LAYERS or stats.layers_waiting
    assert np.array_equal(placing.arrays.slot_expert_P, placing._present_LP)
    assert any("experts moved" in line for line in pair.lines)
    assert any("as planned" in line for line in pair.lines)
    engine.close()


def test_counters_are_those_of_the_tokens_that_ran(rng, flat, pair):
    """Prompts and decoding, in rows beside empty ones; whatever is padded counts nowhere."""
    engine, placing = pair.engine, pair.placing
    pair.begin(10**9)
    ran, run_plan = [], engine._programs.run

    def noted(plan):
        works = [work for works in plan.rows for work in works]
        ran.extend((work.text, work.start, work.count) for work in works)
        return run_plan(plan)

    engine._programs.run = noted
    texts_of(engine, arrivals(rng, 7))
    engine._programs.run = run_plan
    total, each = jax.device_get(begin_reading(placing.counters, placing._mesh))

    texts = list({id(text): text for text, *_ in ran}.values())
    documents = [np.asarray(text.tokens) for text in texts]
    assert all(len(d) == t.limit for d, t in zip(documents, texts))
    routes = record(*model_of(flat, sizes=(1, 1, 1)), documents, tokens=True).experts_NLK
    firsts = np.cumsum([0, *map(len, documents)])
    first = {id(text): n for text, n in zip(texts, firsts)}
    pairs, load = np.zeros((LAYERS, EXPERTS, EXPERTS)), np.zeros((LAYERS, EXPERTS))
    tokens = 0
    for text, start, count in ran:
        for row in routes[first[id(text)] + start :][:count]:
            tokens += 1
            for layer, (a, b) in enumerate(row):
                load[layer, [a, b]] += 1
                pairs[layer, [a, b], [b, a]] += 1
    assert tokens >= sum(map(len, documents)) - len(documents)  # nothing comes after the last
    np.testing.assert_array_equal(total.tokens_L, [tokens] * LAYERS)
    np.testing.assert_array_equal(total.load_LE, load)
    np.testing.assert_array_equal(total.pairs_LEE, pairs)
    np.testing.assert_array_equal(each.load_LE.sum(0), load)
    engine.reset()
    assert not np.asarray(placing.counters.load_LE).any()


def swapped(slots_LP):
    """Another placement: all slots of a layer in reverse order."""
    return np.ascontiguousarray(slots_LP[:, ::-1])


def test_nothing_is_counted_or_passed_unless_asked(flat, pair):
    at_home = np.tile(slots_at_home(EXPERTS, 4), (LAYERS, 1))
    planned, _ = engine_of(model_of(flat), PlacementChoice(swapped(at_home)))
    sizes = []
    for engine in pair.home, planned, pair.engine:
        programs, shape = engine._programs, engine._shapes.decode(1, 1)
        lowered = programs._lower(programs._forward(shape))
        text = lowered.as_text()
        assert (f"<1x{LAYERS}x{EXPERTS}x{EXPERTS}xf32>" in text) == (engine is pair.engine)
        pages = len(jax.tree.leaves(programs._layers))
        given = len(jax.tree.leaves(programs._weights)) + pages + 3
        taken = len(jax.tree.leaves(lowered.in_avals))
        sizes.append((taken - given, lowered.out_tree.num_leaves - pages - 1))
    assert sizes == [(0, 0), (3, 0), (6, 3)]


@pytest.mark.parametrize("weights", [None, slow("int8")])
def test_a_plan_from_a_file(rng, flat, pair, weights, tmp_path):
    slots_LP = np.full((LAYERS, 4, 3), -1, np.int32)
    for layer in range(LAYERS):
        slots_LP[layer, :, :2] = rng.permutation(EXPERTS).reshape(4, 2)
        others = np.setdiff1d(np.arange(EXPERTS), slots_LP[layer, 3])
        slots_LP[layer, 3, 2] = rng.choice(others)  # a copy
    path = tmp_path / "plan.npz"
    write_slots(path, slots_LP.reshape(LAYERS, -1), 4)
    model = model_of(flat, weights=weights)
    choice = choose_placement(str(path), CONFIG, model[0].shape)
    engine, placing = engine_of(model, choice)
    requests = arrivals(rng, 5)
    found = texts_of(engine, requests)
    stats = engine.stats().placement
    assert not stats.following and stats.copies == LAYERS and stats.experts_moved == 0
    assert np.array_equal(placing.arrays.slot_expert_P, slots_LP.reshape(LAYERS, -1))
    home = pair.home if weights is None else engine_of(model_of(flat, weights=weights))[0]
    check_same(found, texts_of(home, requests), 2e-6)

    with pytest.raises(UserError, match="with --deterministic: which copy of an expert serves"):
        choose_placement(str(path), CONFIG, model[0].shape, deterministic=True)
    write_slots(path, slots_LP[..., :2].reshape(LAYERS, -1), 4)
    assert choose_placement(str(path), CONFIG, model[0].shape, deterministic=True) is not None


@pytest.mark.slow
def test_decoding_exchanges_are_measured_with_slots(rng, flat):
    """With the room that copies need, and weights that are read where they lie."""
    model = model_of(flat)
    engine, placing = engine_of(model, auto(model[0], replicas=1))
    timed = []

    def timer(name, rows, call):
        call()
        timed.append(name)
        return 1.0

    picked = engine.pick_exchange("auto", timer)
    assert set(timed) >= {"ring", "all_to_all"} and set(picked.left_out) <= {"remote"}
    # Whatever is chosen gives the same texts.
    requests, home = arrivals(rng, 4), engine_of(model_of(flat))[0]
    check_same(texts_of(engine, requests), texts_of(home, requests), 2e-6)
    moe = placing.blueprint.merge(placing.params, model[2]).layers
    layer = next(block.moe for block in moe.values() if block.moe is not None)
    assert layer.budget(4, placing.arrays).innermost.slots == 3
    engine.close()


def test_serving_goes_on_while_a_plan_is_made(rng, pair, monkeypatch):
    blocked, engine = Blocked(monkeypatch), pair.engine
    pair.begin(2)
    texts_of(engine, arrivals(rng, 4))  # the first plan never comes, and all texts end
    assert blocked.asked.is_set() and not pair.lines and engine.stats().placement.looks == 0
    threading.Timer(0.2, blocked.go.set).start()
    engine.close()  # waits for the thread


def test_a_planner_that_fails_ends_the_following_and_no_text(rng, pair, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no plan today")

    monkeypatch.setattr(controller.Controller, "look", fail)
    engine = pair.engine
    pair.begin(2)
    made, _ = texts_of(engine, arrivals(rng, 4), lambda: time.sleep(2e-3))
    assert all(len(tokens) == 12 for tokens in made)
    stats = engine.stats().placement
    assert not stats.following and stats.experts_moved == stats.looks == 0
    (line,) = pair.lines
    assert "no plan today" in line and "followed no more" in line
    assert "no plan today" in capsys.readouterr().err
    engine.close()
