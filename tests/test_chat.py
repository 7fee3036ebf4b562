"""Chat templates: as transformers writes them, and what messages cannot do."""

import io
import json
import queue
import random

import numpy as np
import pytest
import tokenizers
from data_support import SAMPLE, one_line, small_bpe

from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference import template_process
from moejax.inference.chat import ChatTemplate, GenerationDefaults
from moejax.inference.text import TextStream, token_text

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


@pytest.fixture
def chat_of(tmp_path):
    opened = []

    def make(template, **options):
        chat, tokenizer = open_chat(write_folder(tmp_path / "m", template), **options)
        opened.append(chat)
        return chat, tokenizer

    yield make
    for chat in opened:
        chat.close()


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    chat, tokenizer = open_chat(write_folder(tmp_path_factory.mktemp("m") / "m", CHATML))
    yield chat, tokenizer
    chat.close()


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


@pytest.mark.parametrize(
    "template",
    [
        "{% import 'os' as os %}{{ os.getcwd() }}",
        "{% include 'x' %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ strftime_now.__self__ }}",
        "{{ lipsum.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ messages.append(1) }}",
        "{% for a in range(9999999) %}{% endfor %}",
        "{{ 'x' * 9999999999 }}",
        "{{ 'x'.center(9999999999) }}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for a in range(99) %}"
        "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ missing.field }}",
        "{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
        "{{ raise_exception('no\nsuch thing') }}",
    ],
)
def test_hostile_templates_end_in_one_line(template, chat_of):
    chat, _ = chat_of(template)
    for _ in range(2):  # the second time as the first
        with pytest.raises(UserError, match=r"the chat template") as error:
            chat.encode_chat(CHAT)
        assert len(one_line(error)) < 600


def test_answers_of_a_template_have_a_largest_size(chat_of, monkeypatch):
    monkeypatch.setattr(template_process, "_MAX_LINE_BYTES", 20_000)
    refusing = "{{ raise_exception('x' * 3000000) }}"
    for template in refusing, "{{ messages['y' * 3000000] | length + missing['x' * 3000000] }}":
        chat, _ = chat_of(template)  # an error is cut where it is made
        with pytest.raises(UserError, match=r"the chat template (refuses: x|fails).*x"):
            chat.render(CHAT)
    chat, _ = chat_of("{{ 'x' * (30000 if messages[0].content == 'long' else 3) }}")
    for _ in range(2):
        with pytest.raises(UserError, match="too much memory"):
            chat.render([{"role": "user", "content": "long"}])
        assert chat.render(CHAT) == "xxx"
    answers = queue.Queue()
    template_process._read_lines(io.BytesIO(b"1\n" + b"2" * 30_000 + b"\n3\n"), answers)
    assert [answers.get() for _ in range(answers.qsize())] == [b"1\n", b""]


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ (messages | length * 9) ** (9 ** 9) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    ],
)
def test_templates_that_take_too_long(template, chat_of):
    chat, _ = chat_of(template)
    chat._process._seconds = 0.5
    for _ in range(2):
        with pytest.raises(UserError, match=r"longer than 0\.5 s|the chat template") as error:
            chat.encode_chat(CHAT)
        one_line(error)


def test_a_render_works_after_one_that_was_too_long(chat_of):
    chat, _ = chat_of(
        "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}"
        "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}fine"
    )
    chat._process._seconds = 1
    with pytest.raises(UserError, match="longer than 1 s"):
        chat.render([{"role": "user", "content": "loop"}])
    chat._process._seconds = 60
    assert chat.render([{"role": "user", "content": "go"}]) == "fine"
    chat.close()
    assert chat.render([{"role": "user", "content": "go"}]) == "fine"


@pytest.mark.parametrize(
    "template",
    ["{% if %}", "{{ x", "{% for a in b %}", "x" * (1 << 20) + "x", "{% nope %}", 5, []]
    + ["{{ 9 ** (9 ** 9) }}"],
)
def test_templates_that_do_not_compile(template, tmp_path):
    folder = write_folder(tmp_path / "m", template)
    with pytest.raises(UserError, match=r"tokenizer_config\.json") as error:
        open_chat(folder, seconds=1 if "9 **" in str(template) else 20)
    assert len(one_line(error)) < 600


def test_where_a_template_is_found(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    folder = write_folder(tmp_path / "m", named)
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "PAD"}))
    chat, tokenizer = open_chat(folder)
    assert chat.render(CHAT) == "yes" and chat.has_template and chat.stop == ()
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
    assert chat.render(messages) == expected and not chat.has_template
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


def test_generation_defaults(tmp_path):
    assert GenerationDefaults.read(tmp_path) == GenerationDefaults({}, ())
    path = tmp_path / "generation_config.json"
    path.write_text(
        json.dumps(
            {
                "temperature": 0.6,
                "top_p": 0.95,
                "top_k": 20,
                "min_p": None,
                "repetition_penalty": 1.05,
                "max_new_tokens": 2048,
                "do_sample": True,
                "eos_token_id": [5, 7],
                "transformers_version": "5.0",
            }
        )
    )
    defaults = GenerationDefaults.read(tmp_path)
    params = defaults.params(top_p=0.5)
    assert defaults.end_ids == (5, 7)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.6, 0.5, 20, 0.0)
    assert (params.repetition_penalty, params.max_tokens) == (1.05, 2048)
    path.write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": 3}')
    defaults = GenerationDefaults.read(tmp_path)
    assert defaults.params().temperature == 0 and defaults.end_ids == (3,)
    assert defaults.params(temperature=1).temperature == 1
    bad = [
        '{"top_p": 7}',
        "[]",
        "{",
        '{"eos_token_id": "x"}',
        '{"eos_token_id": [-1]}',
        "[" * 99999,
    ]
    for text in bad:
        path.write_text(text)
        with pytest.raises(UserError, match=r"generation_config\.json") as error:
            GenerationDefaults.read(tmp_path)
        one_line(error)


def test_token_text(chatml):
    _, tokenizer = chatml
    for i, token in enumerate(tokenizer.encode(SAMPLE)):
        piece = token_text(tokenizer, int(token))
        assert piece.bytes == tokenizer.decode_bytes([token])
        assert piece.text == piece.bytes.decode(errors="replace"), i
    assert token_text(tokenizer, tokenizer.eos_id).text == "</s>"
    assert token_text(tokenizer, tokenizer.eos_id).bytes == b""
    party = tokenizer.encode("🎉")[0]
    assert token_text(tokenizer, int(party)).text == "\ufffd"


def test_special_tokens_are_no_text(chatml):
    _, tokenizer = chatml
    stream = TextStream(tokenizer)
    ids = tokenizer.special.encode("a<|im_start|>  b🎉<|im_end|></s>")
    assert "".join(stream.push(int(i)) for i in ids) + stream.flush() == "ab🎉"
