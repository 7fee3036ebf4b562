"""The model that comes with the package: what it is, and that it answers."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax.data.corpus import reference_compression
from moejax.data.pipeline import held_out_windows
from moejax.data.sources import load_standard_library
from moejax.inference.source import open_model, packaged_model
from moejax.training.state import Blueprint, load_weights
from moejax.training.step import make_eval_step
from sharding.mesh import MeshShape, make_mesh


def test_it_is_small_and_has_many_experts():
    files = [f for f in packaged_model().rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 32e6
    assert max(f.stat().st_size for f in files) <= 16e6
    config = open_model(None).config
    assert config.moe.router.num_experts >= 64
    assert config.moe.router.top_k >= 4
    assert sum(layer.moe is not None for layer in config.layers()) >= 4


@pytest.mark.parametrize("shape", [MeshShape(), MeshShape(data=1, expert=4)], ids=str)
def test_it_predicts_a_held_out_file_better_than_xz(shape):
    """One file that was kept out of training, on one device and expert-parallel."""
    (document,) = [d for d in load_standard_library().documents if d.path == "idlelib/iomenu.py"]
    source = open_model(None)
    config = dataclasses.replace(source.config, compute_dtype="float32")
    blueprint = Blueprint(config, make_mesh(shape))
    params, biases = load_weights(source.weights(blueprint), blueprint, np.float32)
    windows = held_out_windows([document], source.tokenizer, 512)
    rows = -(-len(windows.tokens) // shape.expert) * shape.expert
    fill = ((0, rows - len(windows.tokens)), (0, 0))
    step = make_eval_step(blueprint, loss_chunk=2048)
    nll = step(params, biases, np.pad(windows.tokens, fill), np.pad(windows.mask, fill))
    bits = windows.bits_per_byte(float(nll))
    # Alone the file is harder for xz than among others: compare with the whole set's figure.
    assert bits < 1.3 < reference_compression([document])["xz"]
    assert np.isfinite(bits) and jax.device_count() == 8


def test_it_continues_text(capsys):
    import infer

    assert infer.main(["-p", "def __init__(self", "--max-tokens", "8"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("def __init__(self, ")  # what a model of Python must know
    assert len(text.strip()) > len("def __init__(self, ")
