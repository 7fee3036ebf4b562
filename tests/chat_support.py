"""What the tests of chats share: templates, tokenizers, and folders that hold both."""

import json

import pytest
import tokenizers
from data_support import small_bpe

from moejax.data.tokenizer import Tokenizer
from moejax.inference.chat import ChatTemplate

pytest.importorskip("jinja2")

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]

CHATML = """
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\nBe kind.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- 'No thoughts.\n' }}{%- endif %}
{%- endif %}
"""

LLAMA = """
{%- if messages[0]['role'] == 'system' -%}
    {%- set head = '<<SYS>>\n' + messages[0]['content'].strip() + '\n<</SYS>>\n\n' -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set head = '' -%}{%- set rest = messages -%}
{%- endif -%}
{%- for m in rest -%}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must take turns: user, assistant') }}
    {%- endif -%}
    {%- set content = head + m['content'] if loop.first else m['content'] -%}
    {%- if m['role'] == 'user' -%}
        {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- else -%}
        {{ ' ' + content.strip() + ' ' + eos_token }}
    {%- endif -%}
{%- endfor -%}
"""

MISTRAL = """
{%- set ns = namespace(system='') -%}
{%- for m in messages if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}{% endfor -%}
{{ bos_token }}
{%- for m in messages -%}
    {%- if m.role == 'system' %}{% continue %}{% endif -%}
    {%- if m.role == 'user' -%}
        [INST]{{ (ns.system if loop.last else '') ~ m.content | trim }}[/INST]
    {%- elif m.role == 'assistant' -%}
        {% generation %}
        {{- m.content.split('</think>')[-1] | trim }}{{ eos_token }}
        {%- endgeneration %}
    {%- else -%}{{ raise_exception('unknown role') }}
    {%- endif -%}
{%- endfor -%}
{%- if tools %}{{ tools | tojson }}{% endif %}
"""

CHAT = [
    {"role": "system", "content": "Answer  briefly."},
    {"role": "user", "content": " def añadir(x):\n    return 🎉 "},
    {"role": "assistant", "content": "<think>one</think>\nx + 1"},
    {"role": "user", "content": "\n\n<x> for y in x: <|pass|>\n"},
]


def byte_level():
    """Byte-level pairs; one of the special tokens takes in the spaces behind it, as in Phi-3."""
    model = tokenizers.Tokenizer.from_str(small_bpe()._model_json)
    model.add_special_tokens(SPECIALS[:2] + SPECIALS[3:])
    model.add_special_tokens([tokenizers.AddedToken("<|im_start|>", special=True, rstrip=True)])
    model.add_tokens(["<think>"])
    return model


def sentencepiece(scheme):
    """Byte fallback and "▁" for spaces; `scheme` says where one is put before the text."""
    vocab = {"<unk>": 0} | {f"<0x{b:02X}>": 1 + b for b in range(256)}
    for token in ["▁", "d", "e", "f", "x", "de", "def", "▁def", "▁x"]:
        vocab[token] = len(vocab)
    merges = [("d", "e"), ("de", "f"), ("▁", "def"), ("▁", "x")]
    bpe = tokenizers.models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")
    model = tokenizers.Tokenizer(bpe)
    n, d = tokenizers.normalizers, tokenizers.decoders
    if scheme == "normalizer":
        model.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    else:
        model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", scheme, split=False)
    model.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse()])
    model.add_special_tokens(SPECIALS)
    return model


MODELS = {
    "byte_level": byte_level,
    "normalizer": lambda: sentencepiece("normalizer"),
    "first": lambda: sentencepiece("first"),
    "always": lambda: sentencepiece("always"),
}


def write_folder(folder, template, model=None, **config):
    folder.mkdir(exist_ok=True)
    (model or byte_level()).save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        **config,
    }
    if template is not None:
        config["chat_template"] = template
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def open_chat(folder, **options):
    options.setdefault("seconds", 20.0)  # the machine may be busy
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"), "</s>")
    return ChatTemplate(folder, tokenizer, **options), tokenizer


def chats(tmp_path):
    """The fixture `chat_of`: from a template to (chat, tokenizer); all are closed at the end."""
    opened = []

    def make(template, **options):
        chat, tokenizer = open_chat(write_folder(tmp_path / "m", template), **options)
        opened.append(chat)
        return chat, tokenizer

    yield make
    for chat in opened:
        chat.close()


def chat_in_chatml(tmp_path_factory):
    """The fixture `chatml`: (chat, tokenizer) that the tests of a module share."""
    chat, tokenizer = open_chat(write_folder(tmp_path_factory.mktemp("m") / "m", CHATML))
    yield chat, tokenizer
    chat.close()
