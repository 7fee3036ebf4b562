"""The data pipeline: sources, split, tokenizers, examples, evaluation windows, prefetching."""

import json
import lzma
import math
import os
import subprocess
import sys
import threading
import time
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax import data
from moejax.data import Document, StreamDecoder, Tokenizer
from moejax.data.corpus import cut_documents, is_held_out
from moejax.errors import UserError

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), max_size=8)
SAMPLE = "def añadir(x):\n    return x + 1  # 例 🎉\n\n\nclass Foo:\n    pass\n"


def documents(n, length=40):
    return [Document(f"d/{i}.py", f"line {i}\n" * (1 + i % length)) for i in range(n)]


@pytest.fixture(scope="module")
def library():
    return data.load_standard_library()


@pytest.fixture(scope="module")
def bpe():
    return data.train_bpe([Document("a", SAMPLE * 3), Document("b", "for x in y: pass\n" * 9)], 300)


@pytest.fixture(scope="module")
def sentencepiece_like():
    """Byte fallback, "▁" for spaces, a space put before the text: the shape of Mixtral's."""
    vocab = {"<unk>": 0, "</s>": 1}
    vocab |= {f"<0x{b:02X}>": 2 + b for b in range(256)}
    for token in ["▁", "d", "e", "f", "x", "de", "def", "▁def"]:
        vocab[token] = len(vocab)
    model = tokenizers.models.BPE(
        vocab=vocab,
        merges=[("d", "e"), ("de", "f"), ("▁", "def")],
        byte_fallback=True,
        unk_token="<unk>",
    )
    tokenizer = tokenizers.Tokenizer(model)
    n, d = tokenizers.normalizers, tokenizers.decoders
    tokenizer.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    tokenizer.decoder = d.Sequence(
        [d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def one_line(error):
    message = str(error.value)
    assert "\n" not in message and len(message) > 20
    return message


# Sources


def test_standard_library(library):
    paths = [document.path for document in library.documents]
    assert paths == sorted(set(paths)) and len(paths) > 300
    assert "ast.py" in paths and "json/decoder.py" in paths
    for path in paths:
        assert path.endswith(".py") and not path.startswith("/")
        assert not {"test", "tests", "idle_test", "site-packages"} & set(path.split("/")[:-1])
    assert 8e6 < library.num_bytes < 16e6
    root = Path(os.__file__).parent
    for document in library.documents[::50]:
        assert document.text.encode() == (root / document.path).read_bytes()
        assert document.num_bytes == (root / document.path).stat().st_size


def test_standard_library_missing(tmp_path):
    with pytest.raises(UserError) as error:
        data.load_standard_library(str(tmp_path))
    assert "--data" in one_line(error)


def test_sources(tmp_path):
    files = {
        "t/a.txt": "á\r\nb".encode(),
        "t/sub/b.py": b"x = 1\n",
        "t/image.png": b"\x89PNG\xff\x00",
        "t/nul.bin": b"a\0b",
        "t/latin.txt": "caña".encode("latin-1"),
        "t/empty.txt": b"",
        "t/.git/config": b"hidden",
        "t/__pycache__/c.pyc": b"cached",
        "t/lines.jsonl": b'{"text": "one\xe2\x80\xa8two"}\n\n{"text": "three", "n": 1}\r\n',
        "lone.md": b"lone",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    corpus = data.load_corpus([str(tmp_path / "t"), str(tmp_path / "lone.md")])
    assert {d.path: d.text for d in corpus.documents} == {
        "a.txt": "á\r\nb",
        "sub/b.py": "x = 1\n",
        "lines.jsonl:1": "one\u2028two",
        "lines.jsonl:3": "three",
        "lone.md": "lone",
    }
    skipped = {os.path.basename(path) for path in corpus.skipped}
    assert skipped == {"image.png", "nul.bin", "latin.txt"}
    assert corpus.num_bytes == sum(len(d.text.encode()) for d in corpus.documents)

    # A file reached twice is taken once; the order of the sources does not matter.
    glob = str(tmp_path / "**" / "*.py")
    folder = str(tmp_path / "t")
    both = data.load_corpus([folder, glob, str(tmp_path / "lone.md")])
    assert sorted(d.text for d in both.documents) == sorted(d.text for d in corpus.documents)
    forth = data.load_corpus([str(tmp_path / "lone.md"), folder])
    assert forth.documents == corpus.documents
    assert [d.path for d in data.load_corpus([glob]).documents] == ["t/sub/b.py"]
    assert [d.path for d in data.load_corpus([str(tmp_path / "t/s*")]).documents] == ["sub/b.py"]


def test_bracket_in_a_real_path_is_not_a_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert data.load_corpus([str(tmp_path / "a[1].txt")]).documents[0].text == "x"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("bad.txt", b"abc\xff", ["bad.txt", "byte 3", "UTF-8"]),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', ["bad.jsonl, line 2", "JSON"]),
        ("bad.jsonl", b'{"body": "a"}\n', ["line 1", "body", '"text"']),
        ("bad.jsonl", b'{"text": 3}\n', ["line 1", '"text"']),
        ("bad.jsonl", b"[1]\n", ["line 1", "list"]),
        ("bad.jsonl", b"\n" + b"[" * 100_000, ["line 2"]),
        ("bad.jsonl", b"9" * 5000, ["line 1"]),
        ("bad.jsonl", b'{"text": "\\ud800"}\n', ["line 1", "surrogate"]),
        ("empty.txt", b"", ["holds no text"]),
    ],
)
def test_bad_files(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        data.load_corpus([str(tmp_path / name)])
    message = one_line(error)
    assert all(part in message for part in expected), message


def test_missing_and_unreadable(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for source, part in [
        ("none.txt", "no such file"),
        ("*.none", "matches nothing"),
        ("pipe", "not a regular file"),
        ("broken", "cannot be read"),
        (".", "holds no text"),
    ]:
        with pytest.raises(UserError) as error:
            data.load_corpus([str(tmp_path / source)])
        assert part in one_line(error) and source.strip("*.") in one_line(error)
    with pytest.raises(UserError):
        data.read_text(str(tmp_path / "none.txt"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_no_permission(tmp_path):
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "secret.txt").chmod(0)
    for source in (tmp_path, tmp_path / "secret.txt"):
        with pytest.raises(UserError) as error:
            data.load_corpus([str(source)])
        assert "secret.txt" in one_line(error)


# Split, hash, compression


def test_split_is_a_function_of_the_path(rng):
    docs = documents(400)
    training, held_out = data.split_held_out(docs, 0.05)
    assert len(training) + len(held_out) == 400 and 5 <= len(held_out) <= 45
    chosen = {d.path for d in held_out}
    some = [docs[i] for i in rng.permutation(400)[:300]]
    assert {d.path for d in data.split_held_out(some, 0.05)[1]} == chosen & {d.path for d in some}
    assert chosen <= {d.path for d in data.split_held_out(docs, 0.2)[1]}
    assert is_held_out("a", 0.999999) and not is_held_out("a", 1e-9)


@pytest.mark.parametrize("fraction", [0, 1, -1, math.nan])
def test_bad_fraction(fraction):
    for split in (data.split_held_out, data.split_or_cut):
        with pytest.raises(UserError) as error:
            split(documents(10), fraction)
        assert "between 0 and 1" in one_line(error)


def test_too_few_documents():
    with pytest.raises(UserError) as error:
        data.split_held_out(documents(1))
    assert "1 document" in one_line(error)
    with pytest.raises(UserError) as error:
        data.split_or_cut([Document("a", "short")])
    assert "5 bytes" in one_line(error)


def test_one_file_is_cut():
    text = "".join(f"line {i}\n" for i in range(5000))
    pieces = cut_documents([Document("a.txt", text)])
    assert "".join(p.text for p in pieces) == text
    assert all(p.text.endswith("\n") for p in pieces) and 100 <= len(pieces) <= 400
    training, held_out = data.split_or_cut([Document("a.txt", text)], 0.05)
    assert len(training) + len(held_out) == len(pieces)
    assert 1 <= len(held_out) <= 0.05 * len(pieces) + 1
    # A corpus that splits by itself stays whole.
    docs = documents(400)
    assert data.split_or_cut(docs) == data.split_held_out(docs)


@given(TEXTS)
@settings(deadline=None, max_examples=50)
def test_cut_loses_nothing(texts):
    docs = [Document(str(i), text * 40) for i, text in enumerate(texts)]
    joined = "".join(p.text for p in cut_documents(docs))
    assert joined == "".join(d.text for d in docs)


def test_corpus_hash():
    a = [Document("a", "xy"), Document("b", "z")]
    others = [
        [Document("ax", "y"), Document("b", "z")],
        [Document("a", "x"), Document("yb", "z")],
        [Document("a", "xy")],
        a[::-1],
    ]
    hashes = {data.corpus_hash(docs) for docs in [a, *others]}
    assert len(hashes) == 5 and all(len(h) == 64 for h in hashes)
    assert data.corpus_hash(list(a)) == data.corpus_hash(a)


def test_reference_compression():
    docs = [Document("a", "añb" * 100), Document("b", SAMPLE)]
    raw = b"".join(d.text.encode() for d in docs)
    got = data.reference_compression(docs)
    assert got["zlib"] == 8 * len(zlib.compress(raw, 9)) / len(raw)
    assert lzma.decompress(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) == raw
    size = len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
    assert got["xz"] == 8 * size / len(raw)
    with pytest.raises(ValueError, match="at least one byte"):
        data.reference_compression([])


# Tokenizers


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
@settings(deadline=None, max_examples=100)
def test_bytes_round_trip(text):
    tokenizer = Tokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)


def test_bpe_round_trip(bpe):
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
    @settings(deadline=None, max_examples=100)
    def check(text):
        text = text + "<|endoftext|>" + SAMPLE
        ids = bpe.encode(text)
        assert ids.dtype == np.int32 and bpe.eos_id not in ids and ids.max() < bpe.vocab_size
        assert bpe.decode(ids) == text
        assert bpe.decode_bytes(ids) == text.encode()

    check()
    assert bpe.vocab_size == 300 and bpe.eos_id == 299
    assert len(bpe.encode(SAMPLE)) < len(SAMPLE.encode())


def test_bpe_agrees_with_the_package(bpe):
    model = tokenizers.Tokenizer.from_str(bpe._model_json)
    assert bpe.encode(SAMPLE).tolist() == model.encode(SAMPLE).ids
    ids = np.arange(bpe.eos_id)
    for i in ids.tolist():
        assert bpe.decode([i]) == model.decode([i])


def test_bpe_is_deterministic():
    docs = [
        Document("a", Path(math_file).read_text()) for math_file in [json.__file__, os.__file__]
    ]
    first, second = (data.train_bpe(docs, 700) for _ in range(2))
    assert first.fingerprint == second.fingerprint != data.train_bpe(docs, 600).fingerprint
    assert first.vocab_size == 700
    with pytest.raises(UserError) as error:
        data.train_bpe(docs, 256)
    assert "257" in one_line(error)


def test_long_texts_are_cut_without_loss(bpe, monkeypatch):
    monkeypatch.setattr("moejax.data.tokenizer._PIECE_CHARS", 50)
    text = SAMPLE * 5 + "x" * 300 + "\n\n  y"
    assert bpe.decode(bpe.encode(text)) == text


def test_decode_bad_ids(bpe):
    for tokenizer in (Tokenizer(), bpe):
        assert tokenizer.decode([tokenizer.eos_id]) == "" and tokenizer.decode([]) == ""
        for ids in ([-1], [tokenizer.vocab_size]):
            with pytest.raises(ValueError, match="token ids"):
                tokenizer.decode(ids)
    assert Tokenizer().decode([97, 0xC3, 98]) == "a\ufffdb"


def test_encode_refuses_surrogates(bpe):
    for tokenizer in (Tokenizer(), bpe):
        with pytest.raises(UserError) as error:
            tokenizer.encode("ab\udcff")
        assert "character 2" in one_line(error)


def test_save_and_load(tmp_path, bpe):
    for name, tokenizer in {"bytes": Tokenizer(), "bpe": bpe}.items():
        folder = tmp_path / name
        folder.mkdir()
        tokenizer.save(folder)
        loaded = Tokenizer.load(folder)
        assert loaded.fingerprint == tokenizer.fingerprint and loaded.kind == tokenizer.kind
        assert loaded.eos_id == tokenizer.eos_id and loaded.vocab_size == tokenizer.vocab_size
        assert loaded.encode(SAMPLE).tolist() == tokenizer.encode(SAMPLE).tolist()
    assert Tokenizer().fingerprint != bpe.fingerprint
    with pytest.raises(UserError) as error:
        bpe.save(tmp_path / "none")
    assert "cannot be written" in one_line(error)


def test_load_damaged(tmp_path, bpe):
    def spoil(change):
        bpe.save(tmp_path)
        change()
        with pytest.raises(UserError) as error:
            Tokenizer.load(tmp_path)
        return one_line(error)

    meta, model = tmp_path / "tokenizer_meta.json", tmp_path / "tokenizer.json"

    def set_meta(**values):
        meta.write_text(json.dumps(json.loads(meta.read_text()) | values))

    spoil(lambda: meta.write_bytes(meta.read_bytes()[:30]))
    spoil(lambda: meta.write_bytes(b"\xff\xfe"))
    spoil(lambda: meta.write_text("[]"))
    spoil(meta.unlink)
    spoil(model.unlink)
    spoil(lambda: model.write_bytes(model.read_bytes()[:-200]))
    spoil(lambda: model.write_text(model.read_text().replace("def", "fed")))
    spoil(lambda: set_meta(eos_id=2))
    spoil(lambda: set_meta(eos_id=10**12))
    spoil(lambda: set_meta(eos_id="2"))
    spoil(lambda: set_meta(kind="pickle"))
    assert "version 2" in spoil(lambda: set_meta(version=2))


def test_given_file(tmp_path, bpe, sentencepiece_like):
    path = tmp_path / "tokenizer.json"
    path.write_text(bpe._model_json)
    given_bpe = Tokenizer.from_file(str(path))
    assert given_bpe.fingerprint == bpe.fingerprint  # no known name: the next id

    with_eos = tokenizers.Tokenizer.from_str(bpe._model_json)
    with_eos.add_tokens(["<|endoftext|>"])  # not marked as special
    with_eos.save(str(path))
    named = Tokenizer.from_file(str(path), eos_token="<|endoftext|>")
    assert named.eos_id == 299 and named.vocab_size == 300
    for tokenizer in (named, Tokenizer.from_file(str(path))):
        ids = tokenizer.encode("a<|endoftext|>b")
        assert 299 not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"
    with pytest.raises(UserError) as error:
        Tokenizer.from_file(str(path), eos_token="<nope>")
    assert "<nope>" in one_line(error)

    sentencepiece_like.save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    assert tokenizer.eos_id == 1
    for text in ("def x", " def", "", "añ</s>\n", "x▁x"[:1]):
        ids = tokenizer.encode(text)
        assert ids.tolist() == sentencepiece_like_ids(sentencepiece_like, text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(tokenizer.encode("x def")) == b" x def"


def sentencepiece_like_ids(model, text):
    model.encode_special_tokens = True
    return model.encode(text, add_special_tokens=False).ids


def test_bad_given_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    word_level = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    few_bytes = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    few_bytes.decoder = tokenizers.decoders.ByteLevel()
    for content, part in [
        (b"{", "not a tokenizer"),
        (b"[1]", "not a tokenizer"),
        (b"\x80\x04", "not UTF-8"),
        (word_level.to_str().encode(), "lose text"),
        (few_bytes.to_str().encode(), "lose text"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            Tokenizer.from_file(str(path))
        assert part in one_line(error)
    with pytest.raises(UserError):
        Tokenizer.from_file(str(tmp_path / "none.json"))


def test_stream_decoder(bpe, rng):
    for tokenizer in (Tokenizer(), bpe):
        text = SAMPLE + "🎉é"
        ids = tokenizer.encode(text)
        stream, out = StreamDecoder(tokenizer), []
        for i in ids:
            out.append(stream.push(int(i)))
            assert "\ufffd" not in out[-1]
        assert "".join(out) + stream.flush() == text
        # Whatever the pieces, and whatever the tokens, the joined text is the same.
        noise = rng.integers(0, tokenizer.vocab_size, 400)
        stream = StreamDecoder(tokenizer)
        parts = np.split(noise, np.sort(rng.integers(0, 400, 20)))
        got = "".join(stream.push(part) for part in parts) + stream.flush()
        assert got == tokenizer.decode_bytes(noise).decode(errors="replace")


# Examples


def test_tokenize(bpe):
    docs = documents(300)
    for tokenizer in (Tokenizer(), bpe):
        tokens = data.tokenize(docs, tokenizer)
        assert tokens.dtype == np.uint16
        ends = np.flatnonzero(tokens == tokenizer.eos_id)
        assert len(ends) == 300 and ends[-1] == len(tokens) - 1
        for document, part in zip(docs, np.split(tokens, ends + 1), strict=False):
            assert tokenizer.decode(part) == document.text


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


# Prefetching


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


def test_the_package_needs_no_jax():
    code = "import sys, moejax.data; print('jax' in sys.modules, 'grain' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.split() == ["False", "False"], out.stderr


def test_default_data_is_quick(library):
    """Load, split, hash and tokenize: about 0.3 s; the bound leaves room for a busy machine."""
    start = time.monotonic()
    corpus = data.load_standard_library()
    training, held_out = data.split_held_out(corpus.documents)
    tokens = data.tokenize(training, Tokenizer())
    assert data.corpus_hash(corpus.documents) == data.corpus_hash(library.documents)
    assert time.monotonic() - start < 10
    held_bytes = sum(d.num_bytes for d in held_out)
    assert len(tokens) == corpus.num_bytes - held_bytes + len(training)
    # Of about 5 % of the files, some are large; the share of the bytes varies more.
    assert 0.01 < held_bytes / corpus.num_bytes < 0.2
    starts = [0, *(np.flatnonzero(tokens == 256) + 1)]
    for document, (a, b) in list(zip(training, pairwise(starts)))[::97]:
        assert bytes(tokens[a : b - 1].astype(np.uint8)) == document.text.encode()
