"""Templates that are hostile, endless or broken end in one line, and the next chat works."""

import io
import queue

import pytest
from chat_support import CHAT, chats, open_chat, write_folder
from data_support import one_line

from moejax.errors import UserError
from moejax.inference import template_process

chat_of = pytest.fixture(chats)


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
