"""What the tests of `infer.py`'s modes share: a small model's folder, and running a mode."""

import dataclasses
import io
import sys

import numpy as np
import pytest
from draws import draws
from inference_support import CONFIG as SMALL
from inference_support import random_weights

import infer
from moejax.data.tokenizer import Tokenizer
from moejax.inference.model_folder import save_model_folder

pytest.importorskip("uvicorn")
CONFIG = dataclasses.replace(SMALL, max_context=96)


def make_weights():
    """Random weights; the model ends no text by itself."""
    weights = random_weights(CONFIG, draws(__name__))
    weights["params/head.w"][:, Tokenizer().eos_id] = 0
    return weights


def make_folder(tmp_path_factory, flat):
    """A model folder of such weights."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model_folder(path, flat, CONFIG, Tokenizer(), record={}, dtype=np.float32)
    return path


def mode_runner(monkeypatch, capsys):
    """Runs `infer.py`: words → exit code, stdout, lines of stderr."""

    def run(*argv, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = infer.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run
