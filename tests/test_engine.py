"""The engine on a real model: each text is its own, whatever runs beside it, on any mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from draws import draws
from engine_support import END, Oracle, check_books, make_engine, run
from inference_support import CONFIG, random_weights

from moejax.config import ExchangeConfig, LatentConfig
from moejax.inference.drawing import Level
from moejax.inference.params import SamplingParams
from moejax.inference.source import open_model
from moejax.training.state import Blueprint
from sharding.mesh import MeshShape, make_mesh

# Few shapes: each takes seconds to compile.
SMALL = {"page_len": 4, "prefill_chunk": 16}
MESHES = {
    (1, 1, 1): {"max_rows": 4, "pages": 18},  # too few for four texts of full length
    (1, 8, 1): {"max_rows": 8},
    (2, 2, 2): {"max_rows": 8},
}


@pytest.fixture(scope="module")
def flat():
    return random_weights(CONFIG, draws(__name__))


@pytest.fixture(scope="module")
def oracle(flat):
    return Oracle(CONFIG, flat, CONFIG.max_context)


@pytest.fixture(scope="module")
def warm(flat):
    """Mesh → its engine, made once."""

    @functools.cache
    def make(sizes):
        engine = make_engine(CONFIG, flat, sizes, **SMALL, **MESHES[sizes])
        engine.warm_up()
        return engine

    return make


@pytest.fixture(params=MESHES, ids=str)
def engine(request, warm):
    return warm(request.param)


@pytest.fixture
def single(warm):
    return warm((1, 1, 1))


def random_params(rng, **changes):
    """Greedy or drawn, now and then with all that a request may ask for."""
    ask = {"max_tokens": int(rng.integers(1, 30)), "temperature": 0}
    if rng.random() < 0.6:
        seed = int(rng.integers(2**32))
        ask |= {"temperature": float(rng.uniform(0.3, 1.5)), "seed": seed, "top_p": 0.95}
    if rng.random() < 0.4:
        ask |= {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.3}
    if rng.random() < 0.4:
        ask |= {"stop_token_ids": rng.integers(0, 257, 60).tolist()}
        ask |= {"min_tokens": int(rng.integers(0, ask["max_tokens"]))}
    if rng.random() < 0.4:
        ask["logprobs"] = int(rng.integers(0, 6))
    return SamplingParams(**{**ask, **changes})


def collect(engine, logprobs, each=None):
    def note(engine, events):
        check_books(engine)
        for event in events:
            logprobs.setdefault((event.id, event.index), []).extend(event.logprobs)
        if each is not None:
            each()

    return run(engine, each=note)[0]


def check_all(oracle, requests, results, logprobs):
    """Returns: how many tokens agree with the oracle."""
    compared = 0
    for id, (prompt, params) in requests.items():
        for index in range(params.n):
            made, finish = results[id, index]
            asked = logprobs[id, index] if params.logprobs is not None else ()
            compared += oracle.check(prompt, made, params, index, asked)
            assert len(asked) == (len(made) if params.logprobs is not None else 0)
            ended = finish == "stop"
            room = CONFIG.max_context - len(prompt)
            assert ended or len(made) == min(params.max_tokens or room, room)
            assert not ended or len(made) >= params.min_tokens
            assert not {END, *params.stop_token_ids} & set(made)
    return compared


def test_texts_are_those_of_a_forward_pass_whatever_joins_and_leaves(engine, oracle, rng, caplog):
    requests, logprobs, before = {}, {}, engine.stats()
    common = rng.integers(1, 257, 17).tolist()
    left = 14

    def add_some():
        nonlocal left
        while left and rng.random() < 0.5:
            left -= 1
            prompt = rng.integers(1, 257, rng.integers(1, 28)).tolist()
            if rng.random() < 0.4:
                prompt = [*common, *prompt[:9]]
            params = random_params(rng, n=int(rng.choice([1, 1, 2])))
            requests[engine.add(prompt, params)] = (prompt, params)

    results = {}
    with jax.log_compiles():
        while left:
            add_some()
            results |= collect(engine, logprobs, add_some)
    assert not [r for r in caplog.records if "Compiling" in r.message]
    made = sum(len(tokens) for tokens, _ in results.values())
    assert check_all(oracle, requests, results, logprobs) > 0.5 * made
    after = engine.stats()
    assert after.generated_tokens - before.generated_tokens == made
    shapes = engine._shapes.all()
    drawing = len({shape.rows for shape in shapes}) * len(Level)
    assert after.programs == before.programs == len(shapes) + drawing
    assert (after.running, after.waiting, after.pages_held) == (0, 0, 0)


def test_few_pages_preempt_and_change_no_text(single, oracle, rng):
    before, requests, logprobs = single.stats().preemptions, {}, {}
    for i in range(6):
        prompt = rng.integers(1, 257, 10).tolist()
        penalty = {"repetition_penalty": 1.3, "presence_penalty": 0.5} if i % 2 else {}
        params = random_params(rng, max_tokens=38, stop_token_ids=[], min_tokens=38, **penalty)
        requests[single.add(prompt, params)] = (prompt, params)
    results = collect(single, logprobs)
    assert single.stats().preemptions > before
    compared = check_all(oracle, requests, results, logprobs)
    assert compared > 6 * 38 * 0.5


def test_a_conversation_goes_on_from_its_pages(engine, oracle, rng):
    prompt = rng.integers(1, 257, 13).tolist()
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    first = engine.add(prompt, params)
    made = run(engine)[0][first, 0][0]
    before = engine.stats()
    longer = [*prompt, *made, *rng.integers(1, 257, 5).tolist()]
    second = engine.add(longer, params)
    again = run(engine)[0][second, 0][0]
    after = engine.stats()
    assert after.reused_tokens - before.reused_tokens == 24
    assert after.prompt_tokens - before.prompt_tokens == 30 - 24
    assert oracle.check(longer, again, params) > 0


def test_the_texts_of_a_request_and_of_no_seed_differ(single, rng):
    prompt = rng.integers(1, 257, 9)
    drawn = SamplingParams(temperature=2, max_tokens=8, ignore_eos=True, n=3)
    ids = [single.add(prompt, drawn) for _ in range(2)]
    seeded = dataclasses.replace(drawn, seed=int(rng.integers(2**63)))
    ids += [single.add(prompt, seeded) for _ in range(2)]
    results, _ = run(single)
    texts = [[results[id, i][0] for i in range(3)] for id in ids]
    assert texts[2] == texts[3]
    assert len({tuple(text) for group in texts[:3] for text in group}) == 9
    alone = single.add(prompt, dataclasses.replace(seeded, n=1), stream=2)
    assert run(single)[0][alone, 0][0] == texts[2][2]


def test_cancelled_texts_leave_nothing(engine, rng):
    ids = [
        engine.add(rng.integers(1, 257, 20), SamplingParams(n=2, max_tokens=20)) for _ in range(6)
    ]
    finishes = {}
    for step in range(100):
        if step == 3:
            for id in ids:
                engine.cancel(id)
        for event in engine.step():
            if event.finish:
                finishes[event.id, event.index] = event.finish
        check_books(engine)
        if not engine.has_work:
            break
    assert len(finishes) == 12 and "cancelled" in finishes.values()
    assert step <= 5 and engine.stats().pages_held == 0


def test_ids_beyond_the_tokenizer_never_come(flat, rng):
    engine = make_engine(CONFIG, flat, num_ids=7, max_rows=1, **SMALL)
    params = SamplingParams(temperature=100.0, max_tokens=30, ignore_eos=True, logprobs=20)
    id = engine.add(rng.integers(1, 257, 5), params)
    assert max(run(engine)[0][id, 0][0]) < 7


def test_deterministic_texts_have_the_same_bits_beside_others(flat, rng):
    # Buckets of one row: a config's own exchange would need waves, by what the others need.
    waves = ExchangeConfig(mode="all_to_all", bucket_rows=1)
    router = dataclasses.replace(CONFIG.moe.router, top_k=4)
    moe = dataclasses.replace(CONFIG.moe, router=router, exchange=waves)
    config = dataclasses.replace(CONFIG, moe=moe)
    engine = make_engine(config, flat, (1, 4, 1), max_rows=8, deterministic=True, **SMALL)
    prompt = rng.integers(1, 257, 21).tolist()
    params = SamplingParams(temperature=1, seed=3, max_tokens=12, logprobs=3, ignore_eos=True)
    found = []
    for others in 0, 1, 9:
        for _ in range(others):
            engine.add(rng.integers(1, 257, rng.integers(1, 40)), SamplingParams(max_tokens=20))
        logprobs, id = {}, engine.add(prompt, params)
        made = collect(engine, logprobs)[id, 0][0]
        found.append((made, logprobs[id, 0]))
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_the_packaged_model(rng):
    source = open_model(None)
    config = dataclasses.replace(source.config, compute_dtype="float32")
    weights = source.weights(Blueprint(config, make_mesh(MeshShape())))
    flat = {name: np.asarray(value) for name, value in weights.items()}
    engine = make_engine(config, flat, (1, 2, 1), max_rows=4, prefill_chunk=16, max_len=128)
    engine.expect(4, 128)  # one shape for decoding
    oracle = Oracle(config, flat, 128)
    lines = ["def __init__(self", "import os\n", "for i in range(", '"""Returns the', "class A:\n"]
    lines += ["def __init__(self, name):\n    self.name = name\n\n    def __repr__(self"]
    requests, results = {}, {}
    for ids in source.tokenizer.encode_batch(lines):
        params = SamplingParams(temperature=0, max_tokens=int(rng.integers(20, 70)))
        requests[engine.add(ids, params)] = (ids.tolist(), params)
        for event in engine.step():
            results.setdefault(event.id, []).extend(event.tokens)
    while engine.has_work:
        for event in engine.step():
            results.setdefault(event.id, []).extend(event.tokens)
    compared = [
        oracle.check(requests[id][0], made, requests[id][1]) for id, made in results.items()
    ]
    assert len(compared) == 6 and sum(compared) > 100


LATENT = dataclasses.replace(
    CONFIG.attention, num_heads=4, num_kv_heads=4, head_dim=12, latent=LatentConfig(16, 4, 8)
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"attention": LATENT},
        {"attention": dataclasses.replace(CONFIG.attention, window=7, sinks=True)},
        {"scan_layers": True, "num_layers": 3, "first_dense_layers": 1, "dense_hidden": 32},
    ],
    ids=["latent", "window", "scanned"],
)
def test_other_models(changes, rng):
    config = dataclasses.replace(CONFIG, **changes)
    flat = random_weights(config, rng)
    engine = make_engine(config, flat, (1, 2, 2), max_rows=4, **SMALL)
    requests, logprobs = {}, {}
    for _ in range(6):
        prompt = rng.integers(1, 257, rng.integers(1, 28)).tolist()
        params = random_params(rng)
        requests[engine.add(prompt, params)] = (prompt, params)
    results = collect(engine, logprobs)
    made = sum(len(tokens) for tokens, _ in results.values())
    assert (
        check_all(Oracle(config, flat, config.max_context), requests, results, logprobs)
        > 0.3 * made
    )
