"""generation_config.json: what a folder recommends, and values that are refused."""

import json

import pytest
from data_support import one_line

from moejax.errors import UserError
from moejax.inference.defaults import GenerationDefaults


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
