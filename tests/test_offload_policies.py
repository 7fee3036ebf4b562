"""Policies, the books of a cache, the bound, and simulated traces, against plain oracles."""

import itertools

import numpy as np
import pytest

from moejax.errors import UserError
from moejax.offload.belady import fewest_misses
from moejax.offload.cache import SlotCache
from moejax.offload.policies import POLICIES, make_policy
from moejax.offload.predictors import make_predictor
from moejax.offload.simulate import Prefetch, best_hit_rate, simulate
from moejax.placement.trace import Trace

E = 7


def steps_of(rng, count, experts=E, most=3):
    return [rng.permutation(experts)[: rng.integers(1, most + 1)].tolist() for _ in range(count)]


def oracle(name, history, guess, expert, decay):
    """What is worth least goes, from all that happened."""
    last = max((i for i, step in enumerate(history) if expert in step), default=-1)
    counts = sum(decay ** (len(history) - 1 - i) for i, s in enumerate(history) if expert in s)
    value = {"lru": 0.0, "lfu": counts, "predicted": 0.0 if guess is None else guess[expert]}
    return value[name], last, expert


@pytest.mark.parametrize("name", POLICIES)
def test_victims(rng, name):
    decay = float(rng.uniform(0.5, 0.95))
    policy, history, guess = make_policy(name, E, decay=decay), [], None
    for step in steps_of(rng, 60):
        policy.used(step)
        history.append(step)
        if rng.random() < 0.5:
            # Few values, so that there are ties.
            guess = None if rng.random() < 0.2 else rng.integers(0, 3, E).astype(np.float32)
            policy.expect(guess)
        held = rng.permutation(E)[:5].tolist()
        keep = held[: rng.integers(0, 4)]
        free = [expert for expert in held if expert not in keep]
        worth = {e: oracle(name, history, guess, e, decay) for e in free}
        # Sums in another order may differ by rounding where counts are equal.
        least = min(value for value, _, _ in worth.values())
        near = {e: w for e, w in worth.items() if w[0] <= least + 1e-12}
        assert policy.victim(held, keep) == min(near, key=lambda e: near[e][1:])


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_left_to_give_up(name):
    with pytest.raises(ValueError, match="all 2 experts"):
        make_policy(name, E).victim([1, 2], {1, 2, 3})


def test_what_policies_refuse():
    with pytest.raises(UserError, match=r"'fifo'.*lru, lfu, predicted"):
        make_policy("fifo", E)
    for decay in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="decay"):
            make_policy("lfu", E, decay=decay)


@pytest.mark.parametrize("name", POLICIES)
def test_books_of_a_cache(rng, name):
    slots = int(rng.integers(3, E))
    start = rng.permutation(E)[: rng.integers(0, slots + 1)].tolist()
    cache = SlotCache(slots, E, make_policy(name, E), start)
    assert set(cache.held) == set(start)
    for step in steps_of(rng, 100):
        before = cache.slot_E.copy()
        missing = cache.missing([*step, *step])
        assert missing == [e for e in step if before[e] < 0]
        cache.used(step)
        for expert in missing:
            slot = cache.admit(expert, step)
            assert cache.slot_E[expert] == slot == cache.admit(expert, step)
        held = np.flatnonzero(cache.slot_E >= 0)
        assert set(held) == set(cache.held) and set(step) <= set(held)
        assert len(held) <= slots
        assert all(expert in cache for expert in step)
        taken = cache.slot_E[held]
        assert len(set(taken)) == len(taken) and taken.min() >= 0 and taken.max() < slots
        # Nothing leaves while there is room, and what stays is not moved.
        assert len(held) == min(slots, len(set(np.flatnonzero(before >= 0)) | set(step)))
        stayed = [e for e in held if before[e] >= 0 and e not in missing]
        assert (cache.slot_E[stayed] == before[stayed]).all()


def test_what_a_cache_refuses():
    with pytest.raises(UserError, match="slots=0"):
        SlotCache(0, E, make_policy("lru", E))
    with pytest.raises(UserError, match="3 experts for 2 slots"):
        SlotCache(2, E, make_policy("lru", E), (0, 1, 4))
    cache = SlotCache(2, E, make_policy("lru", E), (0, 1))
    with pytest.raises(ValueError, match="must stay"):
        cache.admit(2, (0, 1))


def fewest_by_search(steps, slots, held):
    """Over all that may be held after each step, fetching more than is missing included."""
    costs = {frozenset(held): 0}
    for step in map(frozenset, steps):
        new = {}
        for state, cost in costs.items():
            others = set(range(E)) - step
            for size in range(slots - len(step) + 1):
                for more in itertools.combinations(others, size):
                    after = step | frozenset(more)
                    price = cost + len(after - state)
                    if price < new.get(after, np.inf):
                        new[after] = price
        costs = new
    return min(costs.values())


def as_array(steps):
    trace = np.full((len(steps), 3), -1, np.int16)
    for row, step in zip(trace, steps):
        row[: len(step)] = step
    return trace


def test_the_bound_is_the_best_of_all_schedules(rng):
    for _ in range(6):
        slots = int(rng.integers(3, 5))
        held = rng.permutation(E)[: rng.integers(0, slots + 1)].tolist()
        steps = steps_of(rng, 9)
        found = fewest_misses(as_array(steps), E, slots, held)
        assert found == fewest_by_search(steps, slots, held)


def test_the_bound_by_hand():
    # After {0, 1}, fetching 2 gives up 1, which comes last, not 0.
    steps = [[0, 1], [0, 2], [0, 2], [2], [0], [1]]
    assert fewest_misses(as_array(steps), E, 3) == 3
    assert fewest_misses(as_array(steps), E, 3, (0, 1)) == 1
    with pytest.raises(UserError, match="slots=1"):
        fewest_misses(as_array(steps), E, 1)


def trace_of(rng, texts=4, layers=3, experts=8, k=2):
    """Texts of which each prefers some experts."""
    lens = rng.integers(6, 12, texts)
    parts = []
    for length in lens:
        liking = rng.dirichlet(np.full(experts, 0.5), layers) + 1e-6
        noise = rng.gumbel(size=(length, layers, experts)) + np.log(liking)
        parts.append(np.argsort(-noise, axis=-1)[..., :k])
    return Trace(np.concatenate(parts).astype(np.int16), lens.astype(np.int64), experts)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_a_trace_is_counted_as_by_hand(rng, policy):
    trace, slots, prompt = trace_of(rng), 4, 3
    places = np.concatenate([np.arange(n) for n in trace.lens])
    decoded = trace.experts_NLK[places >= prompt]
    hits = 0
    for layer in range(3):
        held, history = set(), []
        for step in decoded[:, layer].tolist():
            hits += len(held & set(step))
            history.append(step)
            for expert in [e for e in step if e not in held]:
                if len(held) == slots:
                    free = held - set(step)
                    held.remove(min(free, key=lambda e: oracle(policy, history, None, e, 0.75)))
                held.add(expert)
    found = simulate(trace, slots, policy, prompt=prompt, decay=0.75)  # exact in binary
    assert (found.tokens, found.uses, found.hits) == (len(decoded), decoded.size, hits)
    assert found.prefetched == found.wasted == 0
    assert found.misses_per_token == (decoded.size - hits) / len(decoded)


class Guessing:
    """Scores that were drawn for each token, layer and target."""

    def __init__(self, rng, tokens, layers, experts):
        self.drawn, self.token = rng.integers(0, 5, (tokens, layers, layers, experts)), -1

    def begin(self, counts_LE):
        pass

    def observe(self, layer, experts_K):
        self.token += layer == 0

    def scores(self, layer, target):
        return self.drawn[self.token, layer, target].astype(np.float32)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ahead", [(0, 1), (2, 1), (3, 2)])
def test_guesses_are_counted_as_by_hand(rng, policy, ahead):
    trace, slots, layers, likeliest = trace_of(rng, texts=6), 5, 3, 3
    guessing = Guessing(rng, trace.num_tokens, layers, 8)
    held, history = [set() for _ in range(layers)], [[] for _ in range(layers)]
    guess, untried = [None] * layers, [set() for _ in range(layers)]
    hits = prefetched = wasted = 0

    def fetch(layer, expert, keep):
        nonlocal wasted
        if len(held[layer]) == slots:
            worth = {e: oracle(policy, history[layer], guess[layer], e, 0.75) for e in held[layer]}
            gone = min(held[layer] - set(keep), key=worth.get)
            held[layer].remove(gone)
            wasted += gone in untried[layer]
            untried[layer].discard(gone)
        held[layer].add(expert)

    for token, layer in np.ndindex(trace.num_tokens, layers):
        step = trace.experts_NLK[token, layer].tolist()
        hits += len(held[layer] & set(step))
        untried[layer] -= set(step)
        history[layer].append(step)
        missing = [e for e in step if e not in held[layer]]
        if missing:
            guess[layer] = guessing.drawn[token, layer, layer]
        for expert in missing:
            fetch(layer, expert, step)
        left = ahead[0]
        for distance in range(1, ahead[1] + 1) if left else ():
            target = (layer + distance) % layers
            guess[target] = guessing.drawn[token, layer, target]
            likely = sorted(range(8), key=lambda e: (-guess[target][e], e))[:likeliest]
            for expert in [e for e in likely if e not in held[target]][:left]:
                fetch(target, expert, likely)
                untried[target].add(expert)
                prefetched += 1
                left -= 1
    found = simulate(
        trace, slots, policy, guessing, prefetch=Prefetch(*ahead, likeliest), decay=0.75
    )
    right = (hits, prefetched, wasted + sum(map(len, untried)))
    assert (found.hits, found.prefetched, found.wasted) == right


class Knowing:
    """Knows what every token will choose; `false`: says the opposite."""

    def __init__(self, trace, false=False):
        self.trace, self.token, self.false = trace, -1, false

    def begin(self, counts_LE):
        assert counts_LE is None

    def observe(self, layer, experts_K):
        self.token += layer == 0
        assert (experts_K == self.trace.experts_NLK[self.token, layer]).all()

    def scores(self, layer, target):
        token = min(self.token + (target <= layer), self.trace.num_tokens - 1)
        chosen_E = np.zeros(self.trace.num_experts, np.float32)
        chosen_E[self.trace.experts_NLK[token, target]] = 1
        return 1 - chosen_E if self.false else chosen_E


@pytest.mark.parametrize("policy", POLICIES)
def test_right_guesses_hit_and_wrong_ones_are_in_vain(rng, policy):
    trace, layers, k = trace_of(rng), 3, 2
    plain = simulate(trace, 4, policy)
    right = simulate(trace, 4, policy, Knowing(trace), prefetch=Prefetch(k))
    # All but the very first layer of the first token is fetched ahead.
    assert right.misses == k and right.uses == plain.uses == trace.experts_NLK.size
    assert right.wasted <= k  # of the token that does not come
    bound = (1 - best_hit_rate(trace, 4)) * right.uses
    assert right.misses + right.prefetched >= round(bound)
    wrong = simulate(trace, 4, policy, Knowing(trace, false=True), prefetch=Prefetch(1))
    assert wrong.uses == plain.uses and 0 < wrong.wasted <= wrong.prefetched
    assert wrong.prefetched <= trace.num_tokens * layers
    # Nothing that is guessed is used at once; but it may be later.
    assert wrong.fetched_per_token * trace.num_tokens >= round(bound)


def test_policies_lie_below_the_bound(rng):
    trace = trace_of(rng, texts=8)
    for slots in (2, 4, 8):
        best = best_hit_rate(trace, slots, prompt=2)
        for policy in POLICIES:
            predictor = make_predictor("prompt", 3, 8, 2) if policy == "predicted" else None
            found = simulate(trace, slots, policy, predictor, prompt=2)
            assert found.hit_rate <= best + 1e-12
    # With all experts held, only first uses miss.
    places = np.concatenate([np.arange(n) for n in trace.lens])
    decoded = trace.experts_NLK[places >= 2]
    first = sum(len(np.unique(decoded[:, layer])) for layer in range(3))
    assert found.misses == first and best == 1 - first / decoded.size


def test_fewer_slots_than_a_token_uses(rng):
    trace = trace_of(rng, k=3)
    found = simulate(trace, 2, "lru", Knowing(trace), prefetch=Prefetch(3))
    assert found.uses == trace.experts_NLK.size and 0 < found.hits < found.uses


def test_what_a_simulation_refuses(rng):
    with pytest.raises(UserError, match="predictor"):
        simulate(trace_of(rng), 4, "lru", prefetch=Prefetch(1))
    with pytest.raises(UserError, match="-1 experts"):
        Prefetch(-1)
