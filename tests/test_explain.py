"""What a layer says about who computes it."""

from dataclasses import replace

import jax
import pytest
from flax import nnx
from jax import numpy as jnp

from moejax.config import ExchangeConfig, ExpertsConfig, MoEConfig, RouterConfig, WireConfig
from moejax.layer import MoELayer
from moejax.presets import tiny
from moejax.training.report import explain_layer
from pallas_kernels import backends
from pallas_kernels.exchange import push
from sharding.mesh import MeshShape

ON_GPU = jax.default_backend() == "gpu"
OPERATIONS = ["router_product", "top_k", "sorted_tiles", "fused_experts"]


def make(hidden=128, *, bias=False, devices=1, **exchange):
    config = MoEConfig(
        router=RouterConfig(num_experts=8, top_k=2),
        experts=ExpertsConfig(hidden=hidden, bias=bias),
        exchange=ExchangeConfig(**exchange),
    )
    return MoELayer(512, config, expert_devices=devices, rngs=nnx.Rngs(params=0))


def test_a_line_for_each_operation():
    lines = make().explain(64, dtype=jnp.bfloat16)
    assert [line.split(":")[0] for line in lines] == OPERATIONS
    if not ON_GPU:
        assert all("not mosaic_gpu: the device is 'cpu'" in line for line in lines)
    # The shape's reasons come before the device's.
    (experts,) = make(160).explain(64, dtype=jnp.bfloat16)[3:]
    assert "hidden=160 is no multiple of 64" in experts
    (split,) = make(128).explain(64, dtype=jnp.bfloat16, tensor=4)[3:]
    assert "hidden=32 is no multiple of 64" in split
    (biased,) = make(bias=True).explain(64, dtype=jnp.bfloat16)[3:]
    assert "the experts have biases" in biased


def test_the_bank_that_is_there_is_explained():
    layer = make()
    layer.quantize_experts("int8")
    line = layer.explain(64, dtype=jnp.bfloat16)[3]
    assert line.startswith("quantized_experts: ")
    if not ON_GPU:
        assert line.startswith("quantized_experts: blocked; not mosaic_gpu: the device is 'cpu'")


def test_who_sends_rows_is_explained(monkeypatch):
    for module in (push, backends):
        monkeypatch.setattr(module, "hopper_refusal", lambda dtype, *, forced: None)
    monkeypatch.setattr(jax, "__version_info__", max(jax.__version_info__, push.FIRST_JAX))

    def told(**options):
        layer = make(devices=4, mode="remote", **options)
        return layer, layer.explain(64, dtype=jnp.bfloat16)[4:]

    layer, lines = told()
    assert lines == ["push_rows: mosaic_gpu", "remote_experts: mosaic_gpu"]
    assert told(bias=True)[1][1] == "remote_experts: not used: the experts have biases"
    rounded = told(wire=WireConfig(combine="int8"))[1][1]
    assert rounded == "remote_experts: not used: rows are rounded on the wire"
    layer.quantize_experts("int8")
    assert layer.explain(64, dtype=jnp.bfloat16)[5].endswith("not used: the experts have 8 bits")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert told()[1][0].startswith("push_rows: reference; not mosaic_gpu: 2 processes")
    assert "2 processes" in told()[1][1]


def test_of_a_run_by_its_configuration(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(backends, "hopper_refusal", lambda dtype, *, forced: None)
    config = tiny()
    config = replace(config, model=replace(config.model, compute_dtype="bfloat16"))
    lines = explain_layer(config, MeshShape(1, 1, 1))
    assert [line.split(":")[0] for line in lines] == OPERATIONS
    expected = config.model.moe.experts.hidden % 64 == config.model.d_model % 64 == 0
    assert ("fused_experts: mosaic_gpu" in lines[3]) == expected


@pytest.mark.parametrize("tokens", [1, 4096])
def test_layouts_of_few_and_many_assignments(tokens):
    line = make().explain(tokens, dtype=jnp.bfloat16)[2]
    if tokens == 1 and ON_GPU:
        assert line == "sorted_tiles: mosaic_gpu"
    if tokens == 4096:
        assert "sorted_places" in line and "8192 assignments" in line
