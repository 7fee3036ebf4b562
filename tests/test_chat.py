"""Chats to token ids: as transformers writes them, where templates are found, wrong messages."""

import json

import numpy as np
import pytest
from chat_support import (
    CHAT,
    CHATML,
    LLAMA,
    MISTRAL,
    MODELS,
    chat_in_chatml,
    open_chat,
    write_folder,
)
from data_support import one_line

from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference.chat import ChatTemplate

chatml = pytest.fixture(chat_in_chatml, scope="module")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("template", [CHATML, LLAMA, MISTRAL], ids=["chatml", "llama", "mistral"])
def test_equals_transformers(template, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = write_folder(tmp_path / "m", template, MODELS[kind]())
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    theirs.chat_template = template
    ours, _ = open_chat(folder)
    compared = 0
    for messages in (CHAT, CHAT[1:], CHAT[1:2], CHAT[:2]):
        for prompt in (True, False):
            options = {"add_generation_prompt": prompt}
            text = theirs.apply_chat_template(messages, tokenize=False, **options)
            assert ours.render(messages, **options) == text
            ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
            got = ours.encode_chat(messages, **options)
            assert got.dtype == np.int32 and got.tolist() == list(ids)
            compared += len(ids)
    assert compared > 200
    ours.close()


def test_variables(chatml):
    chat, _ = chatml
    plain, without = chat.render(CHAT), chat.render(CHAT, variables={"enable_thinking": False})
    assert without == plain + "No thoughts.\n"
    assert len(chat.encode_chat(CHAT, variables={"enable_thinking": False})) > len(
        chat.encode_chat(CHAT)
    )
    for variables in ({"messages": 1}, {"__class__": 1}, {"x": "<s>"}, {"x": [1]}, {"tools": 1}):
        with pytest.raises(UserError, match=r"^chat_template_kwargs") as error:
            chat.encode_chat(CHAT, variables=variables)
        one_line(error)


def test_where_a_template_is_found(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    folder = write_folder(tmp_path / "m", named)
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "PAD"}))
    chat, tokenizer = open_chat(folder)
    assert chat.render(CHAT) == "yes" and chat.stop == ()
    chat.close()
    (folder / "chat_template.jinja").write_text("{{ bos_token ~ pad_token ~ unk_token }}\n")
    chat, _ = open_chat(folder)  # the file of its own counts
    assert chat.render(CHAT) == "<s>PAD"
    assert chat.encode_chat(CHAT)[0] == tokenizer.special.ids["<s>"]
    chat.close()
    (folder / "chat_template.jinja").unlink()
    write_folder(folder, named[:1])
    with pytest.raises(UserError, match="'default'") as error:
        open_chat(folder)
    one_line(error)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="no JSON object") as error:
        open_chat(folder)
    one_line(error)


def test_without_a_template():
    tokenizer = Tokenizer()
    chat = ChatTemplate(None, tokenizer, bos_id=tokenizer.eos_id)
    expected = "system: Answer  briefly.\nuser: hello\nassistant:"
    messages = [CHAT[0], {"role": "user", "content": "hello \n"}]
    assert chat.render(messages) == expected
    assert chat.encode_chat(messages).tolist() == [256, *expected.encode()]
    assert chat.render(messages, add_generation_prompt=False) == expected[: -len("assistant:")]
    assert "\nuser:" in chat.stop


def test_missing_jinja2(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'moejax\[serve\]'") as error:
        open_chat(write_folder(tmp_path / "m", CHATML))
    one_line(error)


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ("hello", "messages: "),
        ([], "messages: "),
        ([5], r"messages\[0\]: "),
        ([{"role": "user"}], r"messages\[0\].content: "),
        ([{"content": "a"}], r"messages\[0\].role=None"),
        ([{"role": "tool", "content": "a"}], r"messages\[0\].role='tool'"),
        ([{"role": ["user"], "content": "a"}], r"messages\[0\].role="),
        ([CHAT[0], {"role": "user", "content": 5}], r"messages\[1\].content: "),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"messages\[0\].content\[0\].type",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content\[0\].text"),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\].content\[0\]"),
        ([{"role": "user", "content": "\ud800"}], r"messages\[0\].content: character 0"),
        ([{"role": "user", "content": "a", "name": 5}], r"messages\[0\].name=5"),
        ([{"role": "assistant", "content": "a", "tool_calls": [1]}], r"messages\[0\].tool_calls"),
        ([{"role": "user", "content": "a" * (1 << 23)}] * 2, "messages: "),
    ],
)
def test_messages_are_checked(messages, where, chatml):
    for chat in (chatml[0], ChatTemplate(None, Tokenizer())):
        with pytest.raises(UserError, match=f"^{where}") as error:
            chat.encode_chat(messages)
        assert len(one_line(error)) < 300


def test_keys_without_a_value_are_passed_over(chatml):
    chat, _ = chatml
    answer = {"role": "assistant", "content": "b", "tool_calls": None, "refusal": None}
    assert chat.render([CHAT[1], answer]) == chat.render(
        [CHAT[1], {"role": "assistant", "content": "b"}]
    )
