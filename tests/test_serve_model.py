"""The server as a program, with the model that comes with the package."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from serve_support import events

from moejax.inference.generate import Generator
from moejax.inference.sampling import SamplingConfig
from moejax.inference.source import open_model
from moejax.inference.text import complete
from moejax.serving.start import load_model
from sharding.mesh import MeshShape

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

ROOT = Path(__file__).parent.parent
# Few shapes of steps, as compiling takes most of the time.
FLAGS = ("--max-rows", "2", "--max-len", "128", "--prefill-chunk", "16", "--no-warm-up")


class Program:
    """`infer.py serve` on a free port; its stderr is collected."""

    def __init__(self, home, *flags):
        environment = {**os.environ, "HOME": str(home), "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "infer.py", "serve", "--port", "0", *FLAGS, *flags],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.url = re.search(r"http://\S+", self.wait_for("serving "))[0]

    def _read(self):
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def wait_for(self, begin, seconds=200):
        end = time.monotonic() + seconds
        while not (found := [line for line in list(self.lines) if line.startswith(begin)]):
            assert self.process.poll() is None and time.monotonic() < end, self.lines
            time.sleep(0.02)
        return found[0]

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join(10)
        self.process.stderr.close()
        return code


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    key = tmp_path_factory.mktemp("keys") / "key"
    key.write_text("a-key\n")
    program = Program(tmp_path_factory.mktemp("home"), "--api-key-file", str(key))
    yield program
    if program.process.poll() is None:
        program.process.kill()
        program.end()


@pytest.fixture(scope="module")
def client(program):
    options = {"api_key": "a-key", "max_retries": 0, "timeout": 200}
    with openai.OpenAI(base_url=program.url, **options) as client:
        yield client


@pytest.fixture(scope="module")
def solo():
    """Texts of the packaged model without any server."""
    source = open_model(None)
    blueprint, *weights = load_model(source, MeshShape(), "float32")
    generator = Generator(blueprint, *weights, num_ids=source.tokenizer.vocab_size)

    def run(prompt, most, stop=()):
        sampling = SamplingConfig()
        (found,) = complete(
            generator, source.tokenizer, [prompt], sampling=sampling, max_tokens=most, stop=stop
        )
        return found

    return run


def test_texts_are_those_of_the_model_alone(client, solo):
    prompts = ["def __init__(self", "import numpy", "", "for é in"]
    found = client.completions.create(
        model="reference", prompt=prompts, max_tokens=12, temperature=0, stop=["\n"]
    )
    for prompt, choice in zip(prompts, found.choices, strict=True):
        alone = solo(prompt, 12, ["\n"])
        assert choice.text == alone.text
        assert choice.finish_reason == ("length" if alone.reason == "max_tokens" else "stop")
    chat = {"model": "reference", "messages": [{"role": "user", "content": "print 5"}]}
    answer = client.chat.completions.create(**chat, max_tokens=12, temperature=0)
    stop = ("\nuser:", "\nsystem:", "\ndeveloper:")
    assert answer.choices[0].message.content == solo("user: print 5\nassistant:", 12, stop).text
    chunks = client.chat.completions.create(**chat, max_tokens=12, temperature=0, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content


def test_seeds(client):
    def texts(**options):
        found = client.completions.create(
            model="reference", prompt="def ", max_tokens=12, temperature=1.5, **options
        )
        return [choice.text for choice in found.choices]

    three = texts(n=3, seed=5)
    assert len(set(three)) == 3 and texts(n=3, seed=5) == three and texts(seed=5) == three[:1]
    assert texts() != texts()


def test_log_probabilities_in_both_styles(client):
    prompt = "class Stack:\n    def"
    old = client.completions.create(
        model="reference", prompt=prompt, max_tokens=10, temperature=0, logprobs=3
    ).choices[0]
    logprobs = old.logprobs
    assert "".join(logprobs.tokens) == old.text and len(logprobs.tokens) == 10
    offsets = np.cumsum([0, *map(len, logprobs.tokens[:-1])])
    assert logprobs.text_offset == offsets.tolist()
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
        assert len(top) == 3 and top[token] == logprob == max(top.values()) <= 0
        assert np.exp(list(top.values())).sum() <= 1 + 1e-5
    none = client.completions.create(model="reference", prompt=prompt, max_tokens=3, logprobs=0)
    assert none.choices[0].logprobs.top_logprobs is None
    assert len(none.choices[0].logprobs.token_logprobs) == 3

    chat = {"model": "reference", "messages": [{"role": "user", "content": "é"}]}
    options = {"max_tokens": 10, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    new = client.chat.completions.create(**chat, **options).choices[0]
    spelled = b"".join(bytes(one.bytes) for one in new.logprobs.content)
    assert spelled.decode(errors="replace") == new.message.content
    for one in new.logprobs.content:
        assert one.top_logprobs[0].token == one.token
        assert one.top_logprobs[0].logprob == one.logprob >= one.top_logprobs[1].logprob
    streamed = [
        one
        for chunk in client.chat.completions.create(**chat, **options, stream=True)
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert streamed == new.logprobs.content
    plain = client.chat.completions.create(**chat, max_tokens=2)
    assert plain.choices[0].logprobs is None


def test_errors(client, program):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="reference", prompt="x" * 2000)
    assert "context" in str(caught.value) and caught.value.param == "prompt"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt", prompt="x")
    with (
        openai.OpenAI(base_url=program.url, api_key="no", max_retries=0) as wrong,
        pytest.raises(openai.AuthenticationError),
    ):
        wrong.models.list()


def test_ctrl_c_lets_texts_end(client, program):
    """The last test of the program: a request under way is answered whole, then it ends with 0."""
    import http.client

    host, port = program.url.removeprefix("http://").removesuffix("/v1").split(":")
    body = {"prompt": "def f", "max_tokens": 100, "ignore_eos": True, "stream": True}
    headers = {"content-type": "application/json", "authorization": "Bearer a-key"}
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=60)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        begun = response.read(10)
        program.process.send_signal(signal.SIGINT)
        *chunks, done = events(response, begun)
    assert done == "[DONE]" and chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert program.process.wait(60) == 0
    program.end()
    assert not [line for line in program.lines if "Traceback" in line or "Error" in line]
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
