"""Prefetching: the order, how far ahead, errors, and closing."""

import threading
import time

import pytest

from moejax import data
from moejax.errors import UserError


def test_prefetcher_order():
    with data.Prefetcher(lambda step: step * step, 5) as prefetcher:
        assert [next(prefetcher) for _ in range(50)] == [s * s for s in range(5, 55)]
    with pytest.raises(RuntimeError, match="closed"):
        next(prefetcher)


def test_prefetcher_works_ahead_but_not_far():
    made = []
    with data.Prefetcher(lambda step: made.append(step) or step, 0, depth=3) as prefetcher:
        deadline = time.monotonic() + 20
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert made == [0, 1, 2]
        assert next(prefetcher) == 0


def test_prefetcher_raises_in_place():
    def make(step):
        if step == 3:
            raise UserError("the disk is full")
        return step

    with data.Prefetcher(make, 0) as prefetcher:
        assert [next(prefetcher) for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(UserError, match="disk"):
                next(prefetcher)


def test_prefetcher_closes_cleanly():
    before = threading.active_count()
    for _ in range(20):
        prefetcher = data.Prefetcher(lambda step: step, 0)
        next(prefetcher)
        prefetcher.close()
        prefetcher.close()
    assert threading.active_count() == before
    # close() wakes a consumer that waits.
    release = threading.Event()
    prefetcher = data.Prefetcher(lambda step: release.wait(20), 0)
    outcome = []

    def consume():
        try:
            next(prefetcher)
        except RuntimeError as error:
            outcome.append(str(error))

    consumer = threading.Thread(target=consume)
    consumer.start()
    closer = threading.Thread(target=prefetcher.close)
    closer.start()
    consumer.join(20)
    release.set()
    closer.join(20)
    assert outcome == ["the prefetcher is closed"] and not closer.is_alive()
