"""Which guesses pay: by how often they are right, how long experts travel and layers compute."""

import numpy as np
import pytest
from draws import draws
from offload_support import SOFTMAX, Offloaded, generate, prompts_of, swap

from moejax.offload.config import OffloadConfig
from moejax.offload.experts import OffloadedExperts
from moejax.offload.worth import Worth


def taught(each, idle, right, steps=400):
    """Worth of guesses that were right so often, by rank."""
    worth = Worth(len(right))
    worth.sent(each)
    worth.idle(True, idle)
    for step in range(steps):
        worth.expect(3, range(len(right)))
        worth.chosen(True, 3, [rank for rank, share in enumerate(right) if step % 10 < 10 * share])
    return worth


def saved(each, idle, right, count):
    """Seconds that the first guesses save on the average, one after the other on the link."""
    free = np.clip(idle - each * np.arange(count), 0, each)
    right = np.array(right[:count])
    return float(np.sum(right * free - (1 - right) * (each - free)))


def test_what_pays_is_sent(rng):
    """The count saves the most of all, where guesses are the less right the later they come."""
    for _ in range(200):
        most = int(rng.integers(1, 6))
        right = sorted(rng.choice([0.1, 0.3, 0.5, 0.7, 0.9], most).tolist(), reverse=True)
        each, idle = rng.uniform(0.1, 5, 2)
        worth = taught(each, idle, right)
        learned = worth.right(True)
        np.testing.assert_allclose(learned, right, atol=0.3)
        gains = [saved(each, idle, learned, count) for count in range(most + 1)]
        assert gains[worth.count(True, most)] == pytest.approx(max(gains))
        assert worth.count(True, 0) == 0 and worth.count(True, 1) <= 1


def test_the_two_ends():
    right = [0.6, 0.5, 0.4]
    assert taught(0.1, 5.0, right).count(True, 3) == 3  # they cost nothing
    assert taught(5.0, 0.1, right).count(True, 3) == 0  # a wrong one holds up what is lacking
    assert taught(5.0, 0.1, [1.0, 0.2, 0.0]).count(True, 3) == 1
    assert taught(5.0, 0.1, right).count(False, 3) == 3  # nothing is known of other steps


def test_nothing_is_known_at_first():
    worth = Worth(2)
    assert worth.count(True, 5) == 2 and Worth(0).count(True, 5) == 0
    worth.expect(0, [1, 2, 3])
    worth.forget()
    worth.chosen(True, 0, [])
    assert worth.right(True) == worth.right(False) == [0.5, 0.5]


@pytest.mark.parametrize("slow", [True, False])
def test_texts_and_what_is_sent(slow, monkeypatch):
    """The same texts; guesses go where the link has time for them, and nowhere else."""
    small = Offloaded(SOFTMAX, draws(__name__))
    prompts = prompts_of(draws(__name__), 6)
    engine = small.engine(small.experts(3), max_len=32)
    want = generate(engine, prompts)
    monkeypatch.setattr(Worth, "sent", lambda self, seconds: None)
    monkeypatch.setattr(Worth, "idle", lambda self, decodes, seconds: None)
    fill = OffloadedExperts._fill

    def known(self):
        fill(self)
        self.worth._each = 1.0
        self.worth._idle = {True: 0.01 if slow else 100.0, False: 0.01 if slow else 100.0}

    monkeypatch.setattr(OffloadedExperts, "_fill", known)
    config = OffloadConfig(guesses="paying")
    experts = small.model.experts(small.store, small.experts(3).room, config)
    swap(engine, experts)
    assert generate(engine, prompts) == want
    assert (experts.stats().guessed_bytes == 0) == slow
