"""Predicted times of layers against those that were measured, in benchmarks/results."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from planner_support import predicted, run_config

from moejax.config import ExchangeConfig, MoEConfig
from moejax.training.config import TrainConfig
from sharding import device_kinds
from sharding.device_kinds import Hardware, hardware_of
from sharding.mesh import MeshShape

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def layer_config(shape: dict, devices: int, mode: str) -> TrainConfig:
    tokens, wide, hidden, experts, top_k = shape
    config = run_config(
        router={"num_experts": experts, "top_k": top_k, "load_balance_coef": 0.0},
        experts={"hidden": hidden},
        exchange={"mode": mode, "bucket_slack": math.inf},
        model={"d_model": wide, "num_layers": 1, "max_context": tokens},
        batch_size=devices,
        seq_len=tokens,
    )
    return config


SHAPES = {
    "mixtral_8x7b": (16384, 4096, 14336, 8, 2),
    "qwen3_30b_a3b": (32768, 2048, 768, 128, 8),
    "sonic_fine": (32768, 4096, 1024, 128, 8),
}
OVER_FOUR = {
    "mixtral_8x7b": (8192, 4096, 14336, 8, 2),
    "qwen3_30b_a3b": (8192, 2048, 768, 128, 8),
    "dsv3": (4096, 7168, 2048, 256, 8),
}


def layer_seconds(config: TrainConfig, mesh: MeshShape, on: Hardware) -> float:
    """Forward and backward of the MoE layer alone: the step less one whose layer has none."""
    dense = dataclasses.replace(
        config.model,
        first_dense_layers=1,
        dense_hidden=64,
        moe=MoEConfig(exchange=ExchangeConfig()),
    )
    whole = predicted(config, mesh, on).time
    ends = predicted(dataclasses.replace(config, model=dense), mesh, on).time
    parts = ("experts", "products", "activations", "exchange")
    return sum(getattr(whole, p) - getattr(ends, p) for p in parts) - whole.hidden


def measured_ms(name: str, **wanted) -> float:
    rows = json.loads((RESULTS / name).read_text())["rows"]
    (row,) = (r for r in rows if all(r.get(k) == v for k, v in wanted.items()))
    return row["ms"]


@pytest.mark.parametrize("shape", SHAPES)
def test_layers_measured_on_one_h100(shape, monkeypatch):
    """Within 15 %; the experts' rates are those of single kernels, of other runs."""
    monkeypatch.setattr(device_kinds, "machine_of", lambda name: None)
    wanted = {"impl": "moejax", "shape": shape, "pass": "fwdbwd", "routing": "uniform"}
    ms = measured_ms("expert_layer_h100.json", **wanted)
    found = layer_seconds(layer_config(SHAPES[shape], 1, "auto"), MeshShape(), hardware_of("h100"))
    assert 0.85 < 1e3 * found / ms < 1.15


@pytest.mark.parametrize("mode", ["ring", "remote"])
@pytest.mark.parametrize("shape", OVER_FOUR)
def test_layers_measured_on_four_h200(shape, mode, monkeypatch):
    """Within 15 %; rates are those of single kernels on an H100, and of collectives alone."""
    monkeypatch.setattr(device_kinds, "machine_of", lambda name: None)
    wanted = {"shape": shape, "pass": "fwdbwd", "mode_used": mode, "wire": "exact", "chunks": 1}
    ms = measured_ms("ep_layer_h200x4.json", impl="moejax", routing="balanced", **wanted)
    config = layer_config(OVER_FOUR[shape], 4, mode)
    found = layer_seconds(config, MeshShape(expert=4), hardware_of("h200"))
    assert 0.85 < 1e3 * found / ms < 1.15
