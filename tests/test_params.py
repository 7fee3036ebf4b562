"""What a request may ask: defaults, other spellings, refusals of one line."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from data_support import one_line

from moejax.errors import UserError
from moejax.inference.params import SamplingParams


def test_defaults_are_those_of_vllm():
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
    }


def test_other_spellings():
    params = SamplingParams(
        temperature=0, top_k=-1, seed=-1, stop="END", stop_token_ids=[5, 2, 5], max_tokens=None
    )
    assert (params.top_k, params.seed, params.stop) == (0, None, ("END",))
    assert params.stop_token_ids == (5, 2) and params.max_tokens is None
    assert type(params.temperature) is float
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()
    assert SamplingParams(seed=np.uint32(7), top_k=np.int64(3)).seed == 7
    assert dataclasses.replace(params, n=2).stop == ("END",)
    assert hash(params) == hash(dataclasses.replace(params))


@pytest.mark.parametrize(
    "options", [{"presence_penalty": 1}, {"frequency_penalty": -1}, {"repetition_penalty": 1.1}]
)
def test_has_penalties(options):
    assert SamplingParams(**options).has_penalties
    assert not SamplingParams(repetition_penalty=1, presence_penalty=0).has_penalties


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n", [0, -1, 1025, 1.0, True, "1", None]),
        ("temperature", [-0.1, float("nan"), float("inf"), 10**400, True, "1", None]),
        ("top_p", [0, -1, 1.01, float("nan"), None, [0.5]]),
        ("top_k", [-2, 2**31, 1.5, False]),
        ("min_p", [-0.1, 1.1, float("nan"), "x"]),
        ("seed", [2**64, -(2**63) - 1, 0.5, True, "7"]),
        ("stop", ["", ("a", ""), (1,), 5, ("x",) * 65, {"a": 1}]),
        ("stop_token_ids", [(-1,), (2**31,), ("a",), (True,), 5, "ab"]),
        ("ignore_eos", [0, None, "yes"]),
        ("max_tokens", [0, -1, 1.5, True, 2**31]),
        ("min_tokens", [-1, None, 2**31]),
        ("logprobs", [-1, 21, True, 1.0]),
        ("presence_penalty", [-2.1, 2.1, float("nan"), None]),
        ("frequency_penalty", [-2.1, 2.1, float("nan"), None]),
        ("repetition_penalty", [0, -1, float("inf"), 1e-40, None]),
    ],
)
def test_out_of_range(name, values):
    for value in values:
        with pytest.raises(UserError, match=f"^{name}=.*: must ") as error:
            SamplingParams(**{name: value})
        assert len(one_line(error)) < 250


def test_min_tokens_above_max_tokens():
    with pytest.raises(UserError, match=r"^min_tokens=9: must be at most max_tokens=8") as error:
        SamplingParams(min_tokens=9, max_tokens=8)
    one_line(error)
    assert SamplingParams(min_tokens=9, max_tokens=None).min_tokens == 9


def test_needs_no_jax():
    program = "import sys, moejax.inference.params; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
