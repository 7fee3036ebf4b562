"""The text and the bytes of single tokens; special tokens are no text."""

import pytest
from chat_support import byte_level
from data_support import SAMPLE

from moejax.data.tokenizer import Tokenizer
from moejax.inference.text import TextStream, token_text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("m") / "tokenizer.json")
    byte_level().save(path)
    return Tokenizer.from_file(path, "</s>")


def test_token_text(tokenizer):
    for i, token in enumerate(tokenizer.encode(SAMPLE)):
        piece = token_text(tokenizer, int(token))
        assert piece.bytes == tokenizer.decode_bytes([token])
        assert piece.text == piece.bytes.decode(errors="replace"), i
    assert token_text(tokenizer, tokenizer.eos_id).text == "</s>"
    assert token_text(tokenizer, tokenizer.eos_id).bytes == b""
    party = tokenizer.encode("🎉")[0]
    assert token_text(tokenizer, int(party)).text == "\ufffd"


def test_special_tokens_are_no_text(tokenizer):
    stream = TextStream(tokenizer)
    ids = tokenizer.special.encode("a<|im_start|>  b🎉<|im_end|></s>")
    assert "".join(stream.push(int(i)) for i in ids) + stream.flush() == "ab🎉"
