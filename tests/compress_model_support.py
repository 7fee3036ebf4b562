"""A tiny model to compress: a dense layer, then two with experts; and text for it."""

import numpy as np

from moejax.compress.config import CompressConfig
from moejax.compress.layers import StoredLayers
from moejax.config import AttentionConfig, ExpertsConfig, ModelConfig, MoEConfig, RouterConfig
from moejax.data.tokenizer import Tokenizer
from moejax.inference.model_folder import save_model_folder
from moejax.inference.source import open_model
from moejax.training.state import Blueprint, logical_targets
from sharding.mesh import MeshShape, abstract_mesh

E, K, SEQ = 6, 2, 16
CONFIG = ModelConfig(
    vocab_size=257,
    d_model=16,
    num_layers=3,
    max_context=48,
    first_dense_layers=1,
    dense_hidden=24,
    attention=AttentionConfig(2, 1, 8),
    moe=MoEConfig(RouterConfig(E, K, selection_bias=True), ExpertsConfig(8, shared_hidden=4)),
    compute_dtype="float32",
)


def weights_of(rng, config=CONFIG):
    """Values of a size with which layers matter and every expert is chosen."""
    targets = logical_targets(Blueprint(config, abstract_mesh(MeshShape())), ("params", "bias"))
    flat = {}
    for name, target in targets.items():
        value = rng.normal(size=target.shape) * (3.0 if "embedding" in name else 0.3)
        if "norm" in name:
            value = 1 + 0.3 * value
        elif "bias_E" in name:
            value = 0.02 * value
        flat[name] = np.asarray(value, np.float32)
    return flat


def save(path, flat, config=CONFIG):
    save_model_folder(path, flat, config, Tokenizer(), record={}, dtype=np.float32)
    return StoredLayers(open_model(path))


def options(**more):
    return CompressConfig("in", "out", **{"experts": 4, **more})


def write_text(folder, rng):
    """Files of random words; the flags that read them."""
    words = ["def", "return", "import", "x", "y", "(", ")", "="]
    for index in range(40):
        (folder / f"t{index}.py").write_text(" ".join(rng.choice(words, 200)))
    return ["--data.paths", str(folder / "*.py"), "--data.seq-len", "48"]
