"""Training examples and evaluation windows: which tokens, in which order, how often."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
from data_support import SAMPLE, one_line, small_bpe

from moejax import data
from moejax.data import Document, Tokenizer
from moejax.errors import UserError


@pytest.fixture(scope="module")
def bpe():
    return small_bpe()


def test_an_epoch_covers_the_ring():
    tokens = np.arange(1000, dtype=np.uint16)
    dataset = data.TokenDataset(tokens, 32, seed=3)
    assert dataset.num_windows == 31
    orders, cuts = [], []
    for epoch in range(3):
        examples = [dataset.example(epoch * 31 + i) for i in range(31)]
        for example in examples:
            assert example.dtype == np.int32 and example.shape == (33,)
            assert ((example[1:] - example[:-1]) % 1000 == 1).all()
        starts = np.array([example[0] for example in examples])
        # Every target at most once, and all but fewer than a window of them.
        targets = np.concatenate([example[1:] for example in examples])
        assert len(set(targets.tolist())) == 31 * 32
        cuts.append(starts.min() % 32)
        orders.append(tuple(np.argsort(starts)))
    assert len(set(orders)) == 3 and len(set(cuts)) > 1


def test_example_is_a_function_of_seed_and_number(rng):
    tokens = rng.integers(0, 257, 5000).astype(np.uint16)
    a, b = (data.TokenDataset(tokens, 16, seed=7) for _ in range(2))
    other = data.TokenDataset(tokens, 16, seed=8)
    numbers = [0, 5, 311, 312, 10_000, 10**12]
    for n in numbers:
        np.testing.assert_array_equal(a.example(n), b.example(n))
    assert any((a.example(n) != other.example(n)).any() for n in numbers)
    for step in (0, 3, 40):
        full = a.batch(step, 12)
        assert full.shape == (12, 17) and full.dtype == np.int32
        for row in range(12):
            np.testing.assert_array_equal(full[row], a.example(step * 12 + row))
        # However many hosts share the rows.
        for hosts in (1, 2, 3, 4, 6, 12):
            size = 12 // hosts
            parts = [b.batch(step, 12, slice(h * size, (h + 1) * size)) for h in range(hosts)]
            np.testing.assert_array_equal(np.concatenate(parts), full)
    # Steps of different batch sizes read the same stream of examples.
    np.testing.assert_array_equal(np.concatenate([a.batch(s, 4) for s in range(3)]), b.batch(0, 12))


def test_examples_do_not_depend_on_the_process():
    """The same in another process, with another hash seed."""
    code = (
        "import numpy as np; from moejax.data import TokenDataset;"
        "d = TokenDataset(np.arange(3000) % 251, 64, 11); print(int(d.batch(9, 8).sum()), "
        "d.batch(100, 8)[:, 0].tolist())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "123"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    dataset = data.TokenDataset(np.arange(3000) % 251, 64, 11)
    want = f"{int(dataset.batch(9, 8).sum())} {dataset.batch(100, 8)[:, 0].tolist()}"
    assert out.stdout.strip() == want, out.stderr


def test_neighbouring_seeds_share_no_epoch():
    tokens = np.arange(2000, dtype=np.int32)
    one, two = (data.TokenDataset(tokens, 10, seed) for seed in (0, 1))
    n = one.num_windows
    starts = [[int(d.example(i)[0]) for i in range(2 * n)] for d in (one, two)]
    # Steps from window to window do not depend on where the ring is cut.
    second, first = np.diff(starts[0][n:]) % 2000, np.diff(starts[1][:n]) % 2000
    assert (second != first).any()


def test_shortest_data():
    tokens = np.arange(9)
    dataset = data.TokenDataset(tokens, 8, 0)
    assert dataset.num_windows == 1 and sorted(dataset.example(4)) == list(range(9))
    with pytest.raises(UserError) as error:
        data.TokenDataset(tokens, 9, 0)
    assert "9 tokens" in one_line(error) and "10" in one_line(error)
    with pytest.raises(UserError):
        data.TokenDataset(tokens, 0, 0)
    with pytest.raises(ValueError, match="negative"):
        dataset.batch(-1, 2)


# Evaluation windows


def windows_of(seq_len, context, lengths, rng):
    docs = [
        Document(str(i), "".join(map(chr, rng.integers(32, 120, n)))) for i, n in enumerate(lengths)
    ]
    return docs, data.held_out_windows(docs, Tokenizer(), seq_len, context)


@pytest.mark.parametrize("context", [0, 1, 3, 7])
def test_every_token_is_predicted_once(rng, context):
    lengths = [1, 7, 8, 9, 16, 17, 63, 0, *rng.integers(1, 90, 5)]
    docs, windows = windows_of(8, context, lengths, rng)
    assert windows.tokens.shape == (len(windows.mask), 9) and windows.tokens.dtype == np.int32
    assert windows.mask.dtype == bool and windows.mask.any(axis=1).all()
    targets = windows.tokens[:, 1:][windows.mask]
    assert bytes(targets.astype(np.uint8)) == b"".join(d.text.encode() for d in docs)
    assert windows.total_bytes == len(targets)

    # A model that predicts by brute force from what a window shows it: the inputs before a
    # counted target are the text before it, and at least `context` of it where there is so much.
    flat = iter([(d.text, i) for d in docs for i in range(len(d.text))])
    for row, mask in zip(windows.tokens, windows.mask):
        for place in np.flatnonzero(mask):
            text, i = next(flat)
            assert row[place + 1] == ord(text[i])
            before = [256, *text.encode()][max(0, i - place) : i + 1]
            assert len(before) == place + 1 or i < place
            np.testing.assert_array_equal(row[: place + 1][-len(before) :], before)
            assert place >= min(i, context)
    assert next(flat, None) is None


def test_bits_per_byte_is_exact(rng, bpe):
    docs = [Document("a", SAMPLE * 3), Document("b", "añ")]
    windows = data.held_out_windows(docs, bpe, 16, context=5)
    log_probs = np.log(rng.dirichlet(np.ones(bpe.vocab_size)))
    nll = -(log_probs[windows.tokens[:, 1:]] * windows.mask).sum()
    want = -sum(log_probs[bpe.encode(d.text)].sum() for d in docs) / math.log(2)
    want /= sum(len(d.text.encode()) for d in docs)
    assert windows.bits_per_byte(nll) == pytest.approx(want, rel=1e-12)
    uniform = data.held_out_windows(docs, Tokenizer(), 16)
    assert uniform.bits_per_byte(uniform.mask.sum() * math.log(257)) == pytest.approx(
        math.log2(257)
    )


def test_bad_windows(rng):
    for context in (-1, 8):
        with pytest.raises(UserError) as error:
            windows_of(8, context, [20], rng)
        assert "context" in one_line(error)
    with pytest.raises(UserError):
        windows_of(8, 0, [0], rng)
