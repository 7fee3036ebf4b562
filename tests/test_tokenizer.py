"""Tokenizers: bytes, trained and given ones, saved, and decoded piece by piece."""

import json
import lzma
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from data_support import SAMPLE, documents, one_line, small_bpe
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax import data
from moejax.data import Document, StreamDecoder, Tokenizer
from moejax.errors import UserError


@pytest.fixture(scope="module")
def bpe():
    return small_bpe()


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


def test_tokenize(bpe):
    docs = documents(300)
    for tokenizer in (Tokenizer(), bpe):
        tokens = data.tokenize(docs, tokenizer)
        assert tokens.dtype == np.uint16
        ends = np.flatnonzero(tokens == tokenizer.eos_id)
        assert len(ends) == 300 and ends[-1] == len(tokens) - 1
        for document, part in zip(docs, np.split(tokens, ends + 1), strict=False):
            assert tokenizer.decode(part) == document.text
