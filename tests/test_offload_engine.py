"""The engine with experts on the host: what is computed is what the resident engine computes."""

import dataclasses

import jax
import numpy as np
import pytest
from draws import draws
from fewer_experts_support import model_of
from offload_support import (
    KINDS,
    SOFTMAX,
    Offloaded,
    Source,
    Watched,
    assert_close,
    generate,
    poor_of,
    prompts_of,
    swap,
)
from run_support import kept_programs

from moejax.data.tokenizer import Tokenizer
from moejax.inference.model_folder import save_model_folder
from moejax.inference.source import open_model
from moejax.offload.experts import OffloadedExperts
from moejax.offload.guesses import Guesses
from moejax.offload.sending import THREADS


@pytest.fixture(scope="module", autouse=True)
def programs_are_kept(tmp_path_factory):
    with kept_programs(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module")
def small():
    return Offloaded(SOFTMAX, draws(__name__))


@pytest.fixture(scope="module")
def engine(small):
    """Two slots of eight, so that a batch of four, or a prompt, needs more than fit."""
    engine = small.engine(small.experts(2), max_len=48)
    engine.expect(4, 48)
    engine.warm_up()
    return engine


@pytest.fixture(scope="module")
def prompts():
    return prompts_of(draws(__name__), 5, 21, 1, 9)


@pytest.fixture(scope="module")
def resident(small, prompts):
    return generate(small.engine(None, max_len=48), prompts)


def check_statistics(experts):
    """All transfers and uses are counted, and what the books say is in the slots."""
    stats = experts.stats()
    for uses in stats.decode, stats.prefill:
        assert uses.held + uses.early + uses.missed == uses.total > 0
    size = next(iter(experts.store.banks.values())).expert_bytes
    missed = stats.decode.missed + stats.prefill.missed
    early = stats.decode.early + stats.prefill.early
    assert stats.asked_bytes == missed * size
    waiting = sum(map(len, experts.transfers._groups.values())) * size
    assert stats.guessed_bytes == early * size + stats.vain_bytes + waiting
    assert stats.stall_ms_per_token >= 0
    for at, layer in enumerate(experts.layers):
        for expert, slot in enumerate(experts.slots_of(at)):
            if slot >= 0:
                arrays = zip(experts._slots[at].arrays, experts.store.expert(layer, expert))
                for bank, array in arrays:
                    np.testing.assert_array_equal(bank[slot], array)


def test_texts_are_those_of_the_resident_engine(small, engine, prompts, resident):
    experts = engine._offload
    got = generate(engine, prompts)
    assert assert_close(got, resident) > 10
    check_statistics(experts)
    # A step more for each text: when it has ended is known a step later.
    assert 4 * 5 <= experts.stats().decoded_tokens <= 4 * 6
    assert experts.stats().prefill.missed > 0  # a prompt streams


def random_guesses(monkeypatch):
    random = draws(__name__)
    ahead = Guesses.ahead

    def wrong(self, layer):
        found = ahead(self, layer)
        target = (layer + 1) % self._layers if found is None else found[0]
        return target, random.normal(size=self._experts_L[target])

    monkeypatch.setattr(Guesses, "ahead", wrong)
    monkeypatch.setattr(Guesses, "again", lambda self, layer: random.normal(size=8))


@pytest.mark.parametrize("policy", ["lru", "lfu", "predicted"])
def test_a_guess_changes_no_bit(small, engine, prompts, policy, monkeypatch):
    """Whatever is guessed, and whatever the slots hold: only the order of a step's sums counts,
    and that depends on what the step needs.
    """
    want, hits = None, {}
    for predictor in "routers", "none", "previous", "prompt", "frequent", "random":
        if predictor == "random":
            random_guesses(monkeypatch)
        name = "routers" if predictor == "random" else predictor
        # The program's probe stays that of `routers`; who does not want it does not read it.
        experts = swap(engine, small.experts(2, policy=policy, predictor=name))
        got = generate(engine, prompts)
        want = want or got
        assert got == want
        check_statistics(experts)
        hits[predictor] = experts.stats().decode
        assert (hits[predictor].early > 0) == (predictor != "none"), predictor
    assert len({uses.total for uses in hits.values()}) == 1


def test_going_on_before_the_host_knows_changes_no_bit(small, prompts, monkeypatch):
    """Where something was missing, what was begun in vain leaves nothing behind."""
    engine = small.engine(small.experts(4, predictor="previous"), max_len=48)
    go_on, begun = engine._programs._go_on, []
    monkeypatch.setattr(engine._programs, "_go_on", lambda *a: begun.append(a) or go_on(*a))
    as_it_is, found, runs, layers = OffloadedExperts.likely_whole, [], [], []
    for likely in lambda self, at: False, lambda self, at: True, as_it_is:
        monkeypatch.setattr(OffloadedExperts, "likely_whole", likely)
        experts = swap(engine, small.experts(4, predictor="previous"))
        begun.clear()
        found.append([generate(engine, [prompt], tokens=10) for prompt in prompts])
        check_statistics(experts)
        runs.append(len(begun))
        layers.append(3 * experts.stats().decoded_tokens)
        assert experts.stats().decode.missed > 0 < experts.stats().decode.held
    assert found[1] == found[0] and found[2] == found[0]
    never, always, sometimes = runs
    assert layers[0] == layers[1] <= never < sometimes <= always <= 2 * never


def test_nothing_compiles_when_the_slots_change(small, engine, prompts, caplog):
    programs = engine.stats().programs
    experts = swap(engine, small.experts(2))
    generate(engine, prompts, tokens=2)
    caplog.clear()
    with jax.log_compiles():
        generate(engine, prompts[::-1], tokens=6)
    assert engine.stats().programs == programs
    assert [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()] == []
    assert experts.stats().decode.missed > 0 < experts.stats().prefill.missed


def test_experts_that_are_read_from_files(
    small, engine, prompts, tmp_path, rng, monkeypatch, caplog
):
    """The same bits whenever they come, few of them in host memory at a time."""
    swap(engine, small.experts(2))
    want, programs = generate(engine, prompts), engine.stats().programs
    tokenizer = Tokenizer()
    save_model_folder(tmp_path / "m", small.flat, SOFTMAX, tokenizer, record={}, dtype=np.float32)
    mapped = Offloaded(SOFTMAX, rng, source=open_model(tmp_path / "m"), store="mapped")
    experts = swap(engine, mapped.experts(2))
    caplog.clear()
    with jax.log_compiles():
        assert generate(engine, prompts) == want
    assert engine.stats().programs == programs
    assert [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()] == []
    check_statistics(experts)
    stats, size = experts.stats(), mapped.store.banks[0].expert_bytes
    assert stats.decode.early > 0
    check = sum((experts.slots_of(at) >= 0).sum() for at in range(3)) * size
    # All that was sent was read, and what the check has read; the last guess may be on its way.
    sent = stats.asked_bytes + stats.guessed_bytes + check
    assert 0 <= sent - stats.read_bytes <= 4 * size
    assert f", {stats.read_bytes / 1e9:.2f} GB read from files" in str(stats)
    for policy in "lru", "predicted":
        slow = Watched(mapped.store, rng, 0.003)
        monkeypatch.setattr(mapped, "store", slow)
        experts = swap(engine, mapped.experts(2, policy=policy))
        monkeypatch.undo()
        assert generate(engine, prompts) == want
        assert experts.stats().vain_bytes > 0
        assert len({*slow.begun}) > 3 * THREADS >= 3 * slow.most > 0


def test_copies_of_8_bits(small, engine, prompts, rng, monkeypatch, caplog):
    """Where every expert is missing, texts are those of a model that is quantized; bit by bit."""
    exact = generate(engine, prompts)
    monkeypatch.setattr(OffloadedExperts, "_at_first", lambda self, at: [])
    flat = dict(small.flat)
    for layer, bank in small.store.banks.items():
        experts = [poor_of(small.store, layer, expert) for expert in range(bank.experts)]
        for name, arrays in zip(bank.names, zip(*experts)):
            flat[f"params/layers.{layer}.moe.bank.{name}"] = np.stack(arrays)
    quantized = Offloaded(SOFTMAX, rng, source=Source(SOFTMAX, flat))
    swap(engine, quantized.experts(2, predictor="none"))
    want, programs = generate(engine, prompts), engine.stats().programs
    low = Offloaded(SOFTMAX, rng, source=Source(SOFTMAX, small.flat), miss_dtype="int8")
    experts = swap(engine, low.experts(2, predictor="none", miss_dtype="int8"))
    caplog.clear()
    with jax.log_compiles():
        assert generate(engine, prompts) == want
    assert engine.stats().programs == programs
    assert [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()] == []
    assert want != exact
    for uses in experts.stats().decode, experts.stats().prefill:
        assert uses.low == uses.total > 0
    # The same store without copies.
    swap(engine, low.experts(2))
    assert generate(engine, prompts) == exact


def test_deterministic_texts(small, prompts):
    """Their bits depend neither on other texts, nor on how many experts there is room for."""
    found = []
    for slots in 8, 2, 3:
        engine = small.engine(small.experts(slots), max_len=48, deterministic=True)
        found.append(generate(engine, prompts))
        for prompt, want in zip(prompts[1:3], found[0][1:3]):
            assert generate(engine, [prompt]) == [want]
    assert found[0] == found[1] == found[2]


def test_a_failed_step(small, engine, prompts, monkeypatch):
    """Afterwards nothing wrong is in the slots."""
    swap(engine, small.experts(2))
    want = generate(engine, prompts)
    transfers = engine._offload.transfers
    take, count = transfers.take, iter(range(100))

    def broken(layer, expert, **how):
        if next(count) == 7:
            raise RuntimeError("the link is down")
        return take(layer, expert, **how)

    monkeypatch.setattr(transfers, "take", broken)
    with pytest.raises(RuntimeError, match="link is down"):
        generate(engine, prompts)
    monkeypatch.undo()
    engine.reset()
    assert generate(engine, prompts) == want


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "merged+unequal", "basis", "up", "int8"])
def test_every_kind_of_model(kind, rng):
    config = KINDS.get(kind) or (SOFTMAX if kind == "int8" else model_of(kind))
    small = Offloaded(config, rng, "int8" if kind == "int8" else "none")
    prompts = prompts_of(rng, 4, 18, 7)
    want = generate(small.engine(None, max_len=32), prompts)
    top_k = config.moe.router.top_k
    compared = 0
    for slots in (1, top_k, 5, config.moe.router.num_experts):
        experts = small.experts(slots, wave=int(rng.integers(1, 4)))
        engine = small.engine(experts, max_len=32)
        compared += assert_close(generate(engine, prompts), want)
        compared += assert_close(generate(engine, prompts[:1]), want[:1])
        check_statistics_loosely(experts)
    assert compared > 40


def check_statistics_loosely(experts):
    stats = experts.stats()
    if stats.slots == stats.experts:
        assert stats.decode.hit_rate == 1 and stats.asked_bytes == stats.guessed_bytes == 0
    else:
        assert stats.decode.missed + stats.prefill.missed > 0


@pytest.mark.slow
def test_drawn_texts_and_penalties(small, prompts):
    """All that a request may ask for goes through the same programs."""
    ask = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "repetition_penalty": 1.2}
    want = generate(small.engine(None, max_len=48), prompts, **ask)
    got = generate(small.engine(small.experts(3), max_len=48), prompts, **ask)
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in want]


@pytest.mark.slow
def test_a_bonus_for_what_is_there(small, prompts):
    """Lossy: fewer misses, another text; with a bonus of nothing the same."""
    found = {}
    for bonus in 0.0, 1e-30, 10.0:
        experts = small.experts(4, predictor="none", bonus=bonus)
        engine = small.engine(experts, max_len=48)
        found[bonus] = generate(engine, prompts, tokens=12), experts.stats().decode
    assert assert_close(found[1e-30][0], found[0.0][0]) > 20
    assert found[10.0][1].missed == 0 < found[0.0][1].missed
    assert found[10.0][0] != found[0.0][0]


@pytest.mark.slow
def test_copies_of_8_bits_where_nothing_is_missing(small, prompts, rng):
    engine = small.engine(small.experts(8), max_len=48)
    want = generate(engine, prompts)
    low = Offloaded(SOFTMAX, rng, source=Source(SOFTMAX, small.flat), miss_dtype="int8")
    experts = swap(engine, low.experts(8, miss_dtype="int8"))
    assert generate(engine, prompts) == want
    assert experts.stats().decode.low == experts.stats().prefill.low == 0


@pytest.mark.slow
def test_bfloat16(rng):
    """One rounding of each copy more, of a sum that is rounded anyway."""
    small = Offloaded(dataclasses.replace(SOFTMAX, compute_dtype="bfloat16"), rng)
    prompts = prompts_of(rng, 5, 18)
    want = generate(small.engine(None, max_len=32), prompts, tokens=2)
    got = generate(small.engine(small.experts(2), max_len=32), prompts, tokens=2)
    # Of 3 layers, each 2^-8 of numbers of size 1 to 4, in logits of that size.
    assert assert_close(got, want, atol=0.25) >= 2
