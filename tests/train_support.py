"""What the tests of training share: a tiny model with everything in it, and steps on a mesh."""

import dataclasses

import jax
import numpy as np
from jax.sharding import NamedSharding

from moejax.config import (
    AttentionConfig,
    ExchangeConfig,
    ExpertsConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
)
from moejax.training.config import DataConfig, OptimizerConfig, TrainConfig
from moejax.training.state import Blueprint, from_logical, init_state, to_logical
from moejax.training.step import BATCH_SPEC, make_train_step
from sharding.mesh import MeshShape, make_mesh

SEQ, BATCH, VOCAB, STEPS = 8, 24, 50, 3


def make_config(
    experts=10, model=None, router=None, optimizer=None, bucket_rows=None, **run
) -> TrainConfig:
    """A dense layer, then experts with 2 and with 3 for a token, shared ones, balanced by bias."""
    router = {
        "top_k": 2,
        "selection_bias": True,
        "bias_update_rate": 0.01,
        "load_balance_coef": 0.1,
        "z_loss_coef": 0.01,
    } | (router or {})
    moe = MoEConfig(
        RouterConfig(num_experts=experts, **router),
        ExpertsConfig(hidden=16, shared_hidden=8),
        ExchangeConfig(bucket_rows=bucket_rows),
    )
    model = {
        "num_layers": 3,
        "first_dense_layers": 1,
        "dense_hidden": 48,
        "top_k_by_layer": (1, 2, 3),
        "compute_dtype": "float32",
    } | (model or {})
    # A large eps: Adam would blow rounding of tiny gradients up to whole steps.
    optimizer = {"learning_rate": 0.01, "warmup_steps": 2, "eps": 1e-4, "clip_norm": 0.5} | (
        optimizer or {}
    )
    return TrainConfig(
        model=ModelConfig(
            vocab_size=VOCAB,
            d_model=32,
            max_context=SEQ,
            attention=AttentionConfig(4, 2, 8),
            moe=moe,
            **model,
        ),
        data=DataConfig(seq_len=SEQ, batch_size=BATCH),
        optimizer=OptimizerConfig(**optimizer),
        steps=10,
        **run,
    )


def blueprint_of(config: TrainConfig, sizes) -> Blueprint:
    return Blueprint(config.model, make_mesh(MeshShape(*sizes)))


def host(flat) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in flat.items()}


def initial(config: TrainConfig, seed=0) -> dict[str, np.ndarray]:
    """A fresh state in logical order."""
    return host(to_logical(init_state(blueprint_of(config, (1, 1, 1)), seed)))


def batches(rng, steps=STEPS) -> np.ndarray:
    """Zipf-like tokens, so that there is something to learn; int32 [steps, BATCH, SEQ + 1]."""
    p = 1 / np.arange(1, VOCAB + 1)
    return rng.choice(VOCAB, size=(steps, BATCH, SEQ + 1), p=p / p.sum()).astype(np.int32)


@dataclasses.dataclass
class Trained:
    """Some steps: metrics of each, the logical state after the first and after the last."""

    blueprint: Blueprint
    metrics: list
    first: dict[str, np.ndarray]
    last: dict[str, np.ndarray]
    state: object

    def each(self, name) -> np.ndarray:
        return np.array([m[name] for m in self.metrics])


def train(config: TrainConfig, sizes, start, tokens) -> Trained:
    """Runs a step on each batch, one program in flight at a time."""
    blueprint = blueprint_of(config, sizes)
    state = jax.block_until_ready(from_logical(start, blueprint))
    step = make_train_step(blueprint, config)
    where = NamedSharding(blueprint.mesh, BATCH_SPEC)
    rows = tokens.reshape(len(tokens), config.accumulate, BATCH // config.accumulate, SEQ + 1)
    traced = step.trace(state, jax.device_put(rows[0], where), None)
    # Our code is traced under strict promotion; JAX's attention mixes dtypes in its transpose.
    with jax.numpy_dtype_promotion("standard"):
        compiled = traced.lower().compile()
    metrics, first = [], None
    for batch in rows:
        state, out = jax.block_until_ready(compiled(state, jax.device_put(batch, where), None))
        metrics.append(jax.device_get(out))
        if first is None:
            first = host(jax.block_until_ready(to_logical(state)))
    last = host(jax.block_until_ready(to_logical(state)))
    return Trained(blueprint, metrics, first, last, state)


def assert_same_training(got: Trained, want: Trained, rtol=1e-5, atol=2e-5):
    """Losses, norms, statistics and every number of the state."""
    for name in ("loss", "aux_loss", "grad_norm", "learning_rate"):
        np.testing.assert_allclose(got.each(name), want.each(name), rtol=rtol, err_msg=name)
    for a, b in zip(got.metrics, want.metrics):
        np.testing.assert_array_equal(a["moe"].counts_E, b["moe"].counts_E)
        np.testing.assert_array_equal(a["moe"].num_tokens, b["moe"].num_tokens)
        np.testing.assert_array_equal(a["moe"].counters.dropped, 0)
    assert got.last.keys() == want.last.keys()
    for name, value in want.last.items():
        if name.startswith("bias/") or name == "step":
            np.testing.assert_array_equal(got.last[name], value, err_msg=name)
            continue
        scale = max(1.0, float(np.abs(value).max()))
        if name.startswith(("mu/", "nu/")):
            scale = float(np.abs(value).max())
        np.testing.assert_allclose(
            got.last[name], value, rtol=1e-4, atol=atol * scale, err_msg=name
        )
