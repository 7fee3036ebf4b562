"""The engine's decisions, on devices that keep tokens in the place of keys and values."""

import builtins
import threading

import numpy as np
import pytest
from engine_support import book_engine, check_books, expected, run

from moejax.errors import UserError
from moejax.inference.engine import EngineSettings, QueueFull
from moejax.inference.params import SamplingParams
from moejax.inference.shapes import Shapes


def params(**changes):
    return SamplingParams(**{"temperature": 0, "max_tokens": None, **changes})


def random_engine(monkeypatch, rng, **changes):
    page_len = int(rng.integers(1, 6))
    settings = {
        "max_rows": int(rng.integers(1, 17)),
        "page_len": page_len,
        "pages": int(rng.integers(-(-30 // page_len), 60)),
        "prefill_chunk": int(rng.choice([1, 7, 16, 33, 100])),
        "deterministic": bool(rng.random() < 0.2),
        **changes,
    }
    devices = int(rng.choice([1, 2, 4]))
    num_ids = int(rng.choice([3, 30]))
    max_context = int(rng.integers(20, 40))
    return book_engine(monkeypatch, devices, num_ids, max_context, **settings), num_ids


def random_prompt(rng, num_ids, engine):
    """Prompts of two ids often begin alike."""
    length = int(rng.integers(1, engine.max_len))
    return rng.integers(0, 2 if rng.random() < 0.7 else num_ids, length).tolist()


@pytest.mark.parametrize("round_", range(30))
def test_any_workload_gives_each_text_as_if_alone(round_, monkeypatch, rng):
    engine, num_ids = random_engine(monkeypatch, rng)
    programs, want, cancelled = engine.warm_up(), {}, set()
    waiting = [random_prompt(rng, num_ids, engine) for _ in range(25)]

    def each(engine, events):
        check_books(engine)
        while waiting and rng.random() < 0.4:
            prompt = waiting.pop()
            n, most = int(rng.integers(1, 4)), int(rng.integers(1, 30))
            ends = [] if rng.random() < 0.3 else [1]
            id = engine.add(prompt, params(n=n, max_tokens=most, stop_token_ids=ends))
            limit = min(len(prompt) + most, engine.max_len)
            for index in range(n):
                want[id, index] = expected(prompt, num_ids, limit, {0, *ends})
        if want and rng.random() < 0.05:
            id, index = list(want)[rng.integers(len(want))]
            index = None if rng.random() < 0.5 else index
            engine.cancel(id, index)
            cancelled.update(key for key in want if key[0] == id and index in (None, key[1]))

    results = {}
    while waiting:
        each(engine, [])
        found, _ = run(engine, each=each)
        results.update(found)
    assert results.keys() == want.keys()
    for key, (tokens, finish) in results.items():
        if finish == "cancelled":
            assert key in cancelled
            assert tokens == want[key][0][: len(tokens)]
        else:
            assert (tokens, finish) == want[key]
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_held) == (0, 0, 0)
    assert stats.generated_tokens == sum(len(tokens) for tokens, _ in results.values())
    assert engine._programs.compiled() == programs, "a shape that was not warmed up"
    assert not engine._unstarted and not engine._requests


def test_few_pages_preempt_and_give_the_same(monkeypatch, rng):
    preemptions = 0
    for _ in range(10):
        engine = book_engine(monkeypatch, 2, 50, 40, max_rows=8, page_len=2, pages=20)
        prompts = [rng.integers(0, 50, 8).tolist() for _ in range(8)]
        ids = [engine.add(prompt, params(max_tokens=24)) for prompt in prompts]
        results, _ = run(engine, each=lambda engine, _: check_books(engine))
        for id, prompt in zip(ids, prompts):
            assert results[id, 0] == expected(prompt, 50, 32)
        preemptions += engine.stats().preemptions
    assert preemptions > 10


def test_deterministic_reuses_and_preempts_nothing(monkeypatch, rng):
    engine = book_engine(
        monkeypatch, 1, 50, 40, max_rows=8, page_len=2, pages=20, deterministic=True
    )
    prompt = rng.integers(0, 50, 8).tolist()
    for _ in range(3):
        engine.add(prompt, params(max_tokens=24, n=3))
    run(engine)
    stats = engine.stats()
    assert (stats.preemptions, stats.reused_tokens, stats.pages_kept) == (0, 0, 0)
    assert len({(p.shape.rows, p.shape.pages, p.shape.tokens) for p in engine._programs.steps}) == 2


def test_a_common_beginning_is_run_once(monkeypatch, rng):
    engine = book_engine(monkeypatch, 2, 50, 64, max_rows=16, page_len=4)
    system = rng.integers(1, 50, 33).tolist()
    engine.add(system, params(max_tokens=1))
    run(engine)
    assert engine.stats().prompt_tokens == 33
    prompts = [[*system, *rng.integers(1, 50, 5).tolist()] for _ in range(3)]
    for prompt in prompts:
        engine.add(prompt, params(max_tokens=4))
    results, _ = run(engine)
    assert engine.stats().reused_tokens == 3 * 32
    assert engine.stats().prompt_tokens == 33 + 3 * 6
    for id, prompt in enumerate(prompts, 1):
        assert results[id, 0] == expected(prompt, 50, 42)

    # Generated tokens serve a conversation that goes on.
    before = engine.stats().reused_tokens
    longer = [*prompts[0], *results[1, 0][0], 7, 8, 9]
    engine.add(longer, params(max_tokens=1))
    run(engine)
    written = len(prompts[0]) + max(len(results[1, 0][0]) - 1, 0)
    assert engine.stats().reused_tokens - before == written // 4 * 4


def test_texts_of_one_request_share_their_prompt(monkeypatch, rng):
    engine = book_engine(monkeypatch, 1, 50, 64, max_rows=8, page_len=4)
    prompt = rng.integers(1, 50, 32).tolist()
    engine.add(prompt, params(max_tokens=20, n=5, ignore_eos=True))
    for _ in range(4):
        engine.step()
    # Seven whole pages are shared; the eighth ends the prompt, which each runs itself.
    assert engine.stats().prompt_tokens == 32 + 4 * 4
    assert engine.stats().pages_held <= 7 + 5 * 2
    results, _ = run(engine)
    assert len(results) == 5 and engine.stats().generated_tokens == 5 * 20


def test_texts_that_wait_share_one_prompt(monkeypatch):
    engine = book_engine(monkeypatch, 1, 50, 64, max_rows=8, page_len=4, pages=200)
    id = engine.add([1] * 60, params(n=9, max_tokens=3, ignore_eos=True))
    texts = engine._added[0]
    assert len({builtins.id(text.tokens) for text in texts}) == 1
    assert texts[0].tokens.itemsize == 4
    results, _ = run(engine)
    # Greedily all are the same, and none writes into another.
    want = expected([1] * 60, 50, 63, ())
    assert all(results[id, index] == want for index in range(9))


def test_every_shape_is_among_all_and_holds_what_it_is_for(rng):
    for _ in range(50):
        settings = EngineSettings(
            page_len=int(rng.integers(1, 40)),
            prefill_chunk=int(rng.integers(1, 600)),
            deterministic=bool(rng.random() < 0.2),
        )
        max_len, rows = int(rng.integers(1, 3000)), int(rng.integers(1, 40))
        shapes = Shapes(settings, rows, max_len)
        every = shapes.all()
        assert len(set(every)) == len(every) < 120
        most_pages = -(-max_len // settings.page_len)
        for _ in range(20):
            count, pages = int(rng.integers(1, rows + 1)), int(rng.integers(1, most_pages + 1))
            decode = shapes.decode(count, pages)
            assert decode.tokens == 0 and decode in every
            size = int(rng.choice(list(shapes.pieces)))
            pieces = int(rng.integers(1, shapes.pieces[size] + 1))
            prefill = shapes.prefill(pieces, size, pages)
            assert prefill.tokens == size and prefill in every
            assert prefill.rows * size <= max(settings.prefill_chunk, size)
            begin = shapes.prefill(pieces, size, 1, begins=True)
            assert (begin.rows, begin.tokens) == (prefill.rows, size) and begin in every
            assert begin.begins != settings.deterministic
            assert begin.pages * settings.page_len >= min(size, max_len)
            for shape, needed in (decode, count), (prefill, pieces):
                assert needed <= shape.rows <= rows and pages <= shape.pages <= most_pages
        if settings.deterministic:
            assert len(every) == 2


def test_no_step_is_run_that_is_known_to_be_for_nothing(monkeypatch, rng):
    engine = book_engine(monkeypatch, 1, 50, 64, max_rows=2, page_len=4)
    engine.add(rng.integers(1, 50, 9), params(max_tokens=12, ignore_eos=True))
    assert run(engine)[0][0, 0][1] == "length"
    stats = engine.stats()
    assert (stats.prefill_steps, stats.decode_steps) == (1, 11)


def test_a_long_prompt_does_not_stall_others(monkeypatch, rng):
    engine = book_engine(monkeypatch, 1, 50, 600, max_rows=8, page_len=8, prefill_chunk=16)
    short = engine.add(rng.integers(1, 50, 5), params(max_tokens=100, ignore_eos=True))
    for _ in range(3):
        engine.step()
    long = engine.add(rng.integers(1, 50, 320), params(max_tokens=2, ignore_eos=True))
    late = engine.add(rng.integers(1, 50, 6), params(max_tokens=2, ignore_eos=True))
    made, first = 0, {}
    for step in range(40):
        for event in engine.step():
            made += event.id == short and len(event.tokens)
            first.setdefault(event.id, step)
    assert made == 40, "each step gives the running text a token"
    assert first[late] < 4, "a short prompt does not wait for a long one"
    assert 320 // 16 <= first[long] <= 320 // 16 + 3


def test_requests_spread_over_devices(monkeypatch, rng):
    engine = book_engine(monkeypatch, 4, 50, 64, max_rows=16, page_len=4)
    prompt = rng.integers(1, 50, 21).tolist()
    for _ in range(12):
        engine.add(prompt, params(max_tokens=20, ignore_eos=True))
        engine.step()
    counts = [len(home.texts) for home in engine._scheduler._homes]
    assert sum(counts) == 12 and max(counts) - min(counts) <= 2
    assert engine.stats().reused_tokens >= 20 * 7


def test_what_is_refused(monkeypatch):
    engine = book_engine(monkeypatch, 1, 50, 64, max_rows=2, page_len=4, pages=10, max_waiting=3)
    assert engine.max_len == 40
    for prompt, match in [
        ([], "without tokens"),
        ([[1]], "without tokens"),
        ([1.5], "token ids"),
        ([3, 50], "id 50: ids lie between 0 and 49"),
        ([-1], "id -1"),
        (np.ones(40, int), "a prompt of 40 tokens: .* give at most 39"),
    ]:
        with pytest.raises(UserError, match=match):
            engine.add(prompt, params())
    for _ in range(3):
        engine.add([1], params(max_tokens=5, ignore_eos=True))
    with pytest.raises(QueueFull, match="3 requests wait already, with max_waiting=3"):
        engine.add([1], params())
    engine.step()  # two begin
    for _ in range(2):
        engine.add([2], params(max_tokens=5))
    with pytest.raises(QueueFull):
        engine.add([1], params())
    engine.cancel(4)
    engine.step()
    engine.add([2], params(max_tokens=5))
    engine.cancel(999)
    run(engine)
    with pytest.raises(UserError, match=r"max_len=65: .* max_context=64"):
        book_engine(monkeypatch, 1, 50, 64, max_len=65)
    with pytest.raises(UserError, match="max_rows=0"):
        EngineSettings(max_rows=0)


def test_an_engine_goes_on_after_an_exception(monkeypatch, rng):
    engine = book_engine(monkeypatch, 2, 50, 64, max_rows=8, page_len=4)
    prompt, run_row, count = rng.integers(0, 50, 9).tolist(), engine._programs._row, 0

    def fail(*args):
        nonlocal count
        count += 1
        if count == 20:
            raise KeyboardInterrupt
        return run_row(*args)

    monkeypatch.setattr(engine._programs, "_row", fail)
    for _ in range(8):
        engine.add(prompt, params(ignore_eos=True))
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    engine.add(prompt, params())
    engine.reset()
    assert not engine.has_work and engine.stats().pages_held == engine.stats().pages_kept == 0
    id = engine.add(prompt, params())
    assert run(engine, each=lambda engine, _: check_books(engine))[0] == {
        (id, 0): expected(prompt, 50, 64)
    }


def test_other_threads_may_add_and_cancel(monkeypatch, rng):
    engine = book_engine(monkeypatch, 2, 50, 64, max_rows=8, page_len=4, max_waiting=10_000)
    want = {}

    def client(seed):
        local = np.random.default_rng(seed)
        for _ in range(40):
            prompt = local.integers(0, 50, local.integers(1, 30)).tolist()
            id = engine.add(prompt, params(max_tokens=8))
            if local.random() < 0.2:
                engine.cancel(id)
            want[id] = expected(prompt, 50, len(prompt) + 8)

    threads = [
        threading.Thread(target=client, args=(seed,)) for seed in rng.integers(2**31, size=4)
    ]
    for thread in threads:
        thread.start()
    results = {}
    while any(thread.is_alive() for thread in threads) or engine.has_work:
        results.update(run(engine)[0])
    assert len(results) == len(want) == 160
    for (id, _), result in results.items():
        assert result == want[id] or result[1] == "cancelled"
