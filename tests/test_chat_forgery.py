"""Messages cannot write special tokens, whatever a template does with them."""

import random

import pytest
from chat_support import CHATML, LLAMA, MISTRAL, SPECIALS, chat_in_chatml, chats
from data_support import one_line

from moejax.errors import UserError

chat_of = pytest.fixture(chats)
chatml = pytest.fixture(chat_in_chatml, scope="module")


@pytest.mark.parametrize("template", [CHATML, LLAMA, MISTRAL], ids=["chatml", "llama", "mistral"])
def test_messages_cannot_spell_special_tokens(template, chat_of):
    """Whatever the content, the special tokens are those of a harmless one, and it reads back."""
    chat, tokenizer = chat_of(template)
    special = set(tokenizer.special.names)
    draw = random.Random(1)
    pieces = [*SPECIALS, "<", "<|", "im_end|>", "|>", "<|im_", "s>", "a", " ", "\n", "</think>"]

    def specials_of(ids):
        return [i for i in ids.tolist() if i in special]

    expected = specials_of(chat.encode_chat([{"role": "user", "content": "harmless"}]))
    for _ in range(60):
        content = "x" + "".join(draw.choices(pieces, k=draw.randint(1, 8))) + "x"
        ids = chat.encode_chat([{"role": "user", "content": content}])
        assert specials_of(ids) == expected, content
        assert content in tokenizer.decode(ids)
    # The rest of a special token may come from the template or from another part.
    both = [{"type": "text", "text": "<|im"}, {"type": "text", "text": "_end|>"}]
    assert specials_of(chat.encode_chat([{"role": "user", "content": both}])) == expected


@pytest.mark.parametrize(
    ("template", "content"),
    [
        ("{{ messages[0].content | replace(' ', '') }}<|im_end|>", "<|im_ end|>"),
        ("{{ messages[0].content | lower }}<|im_end|>", "<|IM_END|>"),
        ("<|im_{{ messages[0].content }}|><|im_end|>", "end"),
        ("{{ messages[0].content[:4] ~ messages[0].content[7:] }}<|im_end|>", "<|imXYZ_end|>"),
        ("{% for c in messages[0].content %}{{ c }}{% endfor %}<|im_end|>", "<|im_end|>"),
    ],
)
def test_templates_that_change_a_content_forge_nothing(template, content, chat_of):
    chat, tokenizer = chat_of(template)
    end = tokenizer.special.ids["<|im_end|>"]
    try:
        ids = chat.encode_chat([{"role": "user", "content": content}]).tolist()
    except UserError as error:
        assert "spells a special token" in str(error)
    else:
        assert ids.count(end) == 1 and ids[-1] == end
    fine = chat.encode_chat([{"role": "user", "content": "Fine words"}]).tolist()
    assert fine.count(end) == 1


def test_a_template_that_reads_a_special_token_refuses_it(chat_of):
    chat, _ = chat_of("{{ 'yes' if '</s>' in messages[0].content else 'no' }}")
    assert chat.render([{"role": "user", "content": "a"}]) == "no"
    with pytest.raises(UserError, match="spells a special token") as error:
        chat.encode_chat([{"role": "user", "content": "a</s>"}])
    one_line(error)
    assert len(chat.encode_chat([{"role": "user", "content": "<|im_end|>"}])) > 0


def test_private_characters_of_a_message_are_kept(chatml):
    chat, tokenizer = chatml
    content = "\U000f0000<|im_end|>\U000f0001\U0010fffd"
    ids = chat.encode_chat([{"role": "user", "content": content}])
    assert content in tokenizer.decode(ids)
    everything = "".join(map(chr, range(0xF0000, 0x10FFFE)))
    with pytest.raises(UserError, match="private characters"):
        chat.encode_chat([{"role": "user", "content": everything}])
