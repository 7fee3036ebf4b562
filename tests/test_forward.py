"""`Forward`: logits against numpy in float64, on any mesh, and what it refuses."""

import dataclasses

import numpy as np
import pytest
from draws import draws
from inference_support import CONFIG, random_weights
from model_support import attention, rms
from oracle import Dense, dense_moe, relative_error

from moejax.config import RouterConfig
from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference.forward import Forward
from moejax.inference.model_folder import save_model_folder
from moejax.inference.source import open_model
from sharding.mesh import MeshShape

ROUTER = RouterConfig(num_experts=8, top_k=2)
MODEL = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, router=ROUTER))
TIE = 1e-4  # of two experts' logits, closer than which float32 may choose the other one
BOUND = 2e-6  # norm-relative; worst of 12 seeds 2.4e-7


def logits_by_hand(flat, tokens_BS):
    """The logits in float64, and the smallest distance between experts chosen and not."""
    p = {name.removeprefix("params/"): np.asarray(v, np.float64) for name, v in flat.items()}
    eps, gap = MODEL.norm_eps, np.inf
    positions_BS = np.broadcast_to(np.arange(tokens_BS.shape[1]), tokens_BS.shape)
    x_BSD = p["embedding.w"][tokens_BS]
    for at in (f"layers.{i}." for i in range(MODEL.num_layers)):
        own = at + "attention."
        weights = {n.removeprefix(own): v for n, v in p.items() if n.startswith(own)}
        y_BSD = rms(x_BSD, p[at + "attention_norm.scale"], eps)
        x_BSD = x_BSD + attention(weights, y_BSD, positions_BS, MODEL.attention, eps)
        y_TD = rms(x_BSD, p[at + "mlp_norm.scale"], eps).reshape(-1, MODEL.d_model)
        parts = {"router": "router.w_DE", "w_in": "bank.w_in", "w_out": "bank.w_out"}
        weights = {key: p[f"{at}moe.{name}"] for key, name in parts.items()}
        found = dense_moe(Dense(ROUTER.top_k), weights, y_TD, np.zeros_like(y_TD))
        gap = min(gap, found.gap)
        x_BSD = x_BSD + found.y.reshape(x_BSD.shape)
    head = p["embedding.w"].T if MODEL.tie_embeddings else p["head.w"]
    return (rms(x_BSD, p["final_norm.scale"], eps) @ head)[..., : MODEL.vocab_size], gap


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A model folder, texts, and their logits; 3 texts, which no mesh of 4 divides."""
    rng = draws(__name__)
    path = tmp_path_factory.mktemp("model") / "m"
    flat = random_weights(MODEL, rng)
    save_model_folder(path, flat, MODEL, Tokenizer(), record={}, dtype=np.float32)
    for _ in range(20):
        tokens_BS = rng.integers(0, MODEL.vocab_size, (3, 7))
        logits_BSV, gap = logits_by_hand(flat, tokens_BS)
        if gap > TIE:
            return open_model(path), tokens_BS, logits_BSV
    raise AssertionError("every draw has experts that rounding may change")


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_logits_are_those_of_the_weights(stored, sizes):
    source, tokens_BS, wanted_BSV = stored
    found_BSV = Forward(source, MeshShape(*sizes))(tokens_BS)
    assert found_BSV.dtype == np.float32
    assert relative_error(found_BSV, wanted_BSV) < BOUND


def test_texts_it_cannot_read_are_refused(stored):
    forward = Forward(stored[0])
    for tokens, told in (
        (np.zeros(4, np.int32), r"int32\[4\]: must be whole numbers \[texts, tokens\]"),
        (np.zeros((1, 0), np.int32), r"\[1, 0\]: .* at least one"),
        (np.zeros((1, 4), np.float32), r"float32\[1, 4\]: .* give Tokenizer.encode"),
        (np.zeros((1, 49), np.int32), r"49 tokens: .* context of 48; cut"),
        (np.array([[3, 257]]), r"257: ids lie between 0 and 256"),
        (np.array([[-1, 3]]), r"-1: ids lie between 0 and 256"),
    ):
        with pytest.raises(UserError, match=told):
            forward(tokens)
