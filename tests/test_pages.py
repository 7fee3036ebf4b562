"""The allocator of pages: states, reference counts and reuse, against plain records."""

import numpy as np
import pytest

from moejax.inference.pages import PagePool, page_keys


def check(pool, texts):
    """Every page is free, kept or held, as often as texts hold it.

    Args:
        texts: the pages of each living text.
    """
    holders = np.zeros(pool.size, int)
    for pages in texts:
        assert len(set(pages)) == len(pages)
        holders[pages] += 1
    assert pool._holders == holders.tolist()
    free, kept = set(pool._free), set(pool._kept)
    assert len(free) == len(pool._free) and not free & kept
    assert free | kept == set(np.flatnonzero(holders == 0).tolist())
    assert (pool.available, pool.kept) == (len(free) + len(kept), len(kept))
    assert pool.held == np.sum(holders > 0)
    assert {page: key for key, page in pool._page_of.items()} == pool._key_of
    assert kept <= set(pool._key_of) and not free & set(pool._key_of)


def test_keys_name_everything_before(rng):
    tokens = rng.integers(0, 9, 23).tolist()
    keys = page_keys(tokens, 4)
    assert len(keys) == 5
    assert page_keys(tokens, 4, keys[:2]) == keys
    assert page_keys(tokens[:11], 4) == keys[:2]
    other = [*tokens[:3], tokens[3] + 1, *tokens[4:]]
    assert not set(page_keys(other, 4)) & set(keys)
    assert page_keys([1, 2, 1, 2], 2)[0] != page_keys([1, 2, 1, 2], 2)[1]


def test_kept_pages_serve_again_and_go_longest_unused_first():
    pool = PagePool(4)
    keys = page_keys(range(8), 2)
    first = pool.take(2)
    for page, key in zip(first, keys):
        pool.name(page, key)
    pool.release(first)
    assert pool.match(keys) == first and pool.kept == 2
    assert pool.room_beside(first) == 2 and pool.room_beside([]) == 4
    pool.hold(first[:1])
    assert pool.held == 1 and pool.match(keys) == first
    pool.release(first[:1])
    # The second page has been unused for longer now.
    taken = pool.take(3)
    assert first[1] in taken and pool.match(keys) == first[:1]
    check(pool, [taken])
    with pytest.raises(AssertionError, match="2 pages asked for, 1 available"):
        pool.take(2)


def test_any_order_of_operations_keeps_the_books(rng):
    """Random texts that begin alike; each page of a key must hold what its key says."""
    page_len, pool = 2, PagePool(int(rng.integers(4, 12)))
    content = {}  # page → the tokens up to its end, as its writer wrote them
    texts = []  # (pages, tokens)
    reused = evicted = 0
    for _ in range(600):
        if texts and (rng.random() < 0.45 or pool.available < 2):
            pages, _ = texts.pop(rng.integers(len(texts)))
            pool.release(pages)
        else:
            tokens = rng.integers(0, 2, rng.integers(1, 10)).tolist()
            keys = page_keys(tokens, page_len)
            shared = pool.match(keys)
            for i, page in enumerate(shared):
                assert content[page] == tokens[: (i + 1) * page_len]
            need = -(-len(tokens) // page_len) - len(shared)
            if need > pool.room_beside(shared):
                continue
            before = set(pool._kept)
            pool.hold(shared)
            pages = [*shared, *pool.take(need)]
            evicted += len(before & set(pages[len(shared) :]))
            reused += len(shared)
            for i, page in enumerate(pages[len(shared) :], len(shared)):
                content[page] = tokens[: (i + 1) * page_len]
            for page, key in zip(pages, keys):
                pool.name(page, key)
            texts.append((pages, tokens))
        check(pool, [pages for pages, _ in texts])
    assert reused > 20 and evicted > 5
