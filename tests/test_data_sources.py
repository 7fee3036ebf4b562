"""Sources of data: what is read, what is refused, and which documents are held out."""

import math
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from data_support import documents, one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax import data
from moejax.data import Document, Tokenizer
from moejax.data.corpus import cut_documents, is_held_out
from moejax.errors import UserError

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), max_size=8)


@pytest.fixture(scope="module")
def library():
    return data.load_standard_library()


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
