"""What the tests of plans share: small configurations, and how a plan's text must look."""

import math
import re

from moejax.config import (
    AttentionConfig,
    ExchangeConfig,
    ExpertsConfig,
    LatentConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    WireConfig,
)
from moejax.training.config import DataConfig, TrainConfig
from moejax.training.residuals import make_reducer
from moejax.training.state import Blueprint
from sharding.compression.config import GradCompression
from sharding.device_kinds import Hardware
from sharding.local_weights import weights_of
from sharding.mesh import MeshShape, abstract_mesh
from sharding.step_time import predict_step
from sharding.traffic_formulas import expected_collectives


def run_config(
    *,
    router: dict | None = None,
    experts: dict | None = None,
    exchange: dict | None = None,
    attention: dict | None = None,
    model: dict | None = None,
    train: dict | None = None,
    batch_size: int = 16,
    seq_len: int = 16,
) -> TrainConfig:
    moe = MoEConfig(
        RouterConfig(**{"num_experts": 8, "top_k": 2, **(router or {})}),
        ExpertsConfig(**{"hidden": 64, **(experts or {})}),
        ExchangeConfig(**(exchange or {})),
    )
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, **(attention or {})}
    config = ModelConfig(
        **{
            "vocab_size": 200,
            "d_model": 128,
            "num_layers": 2,
            "max_context": 64,
            "attention": AttentionConfig(**heads),
            "moe": moe,
            **(model or {}),
        }
    )
    return TrainConfig(config, DataConfig(seq_len=seq_len, batch_size=batch_size), **(train or {}))


CASES = {
    "buckets, layers rematted and scanned, two microbatches, loss in chunks": (
        (2, 4, 2),
        run_config(
            exchange={"mode": "all_to_all", "bucket_rows": 8},
            attention={"qk_norm": "full"},
            experts={"bias": True, "shared_hidden": 32, "shared_gate": True},
            model={"num_layers": 3, "scan_layers": True, "remat": "layer"},
            train={"accumulate": 2, "loss_chunk": 12},
        ),
    ),
    "ring, capacity, products kept": (
        (1, 4, 2),
        run_config(
            exchange={"mode": "ring", "capacity_factor": 1.25},
            attention={"qk_norm": "head"},
            router={"num_experts": 6, "load_balance_coef": 0.0, "z_loss_coef": 1e-3},
            model={"remat": "dots", "first_dense_layers": 1, "dense_hidden": 64},
        ),
    ),
    "one wave, unrolled, float32, different k": (
        (2, 2, 2),
        run_config(
            exchange={"mode": "all_to_all", "bucket_slack": math.inf},
            router={"load_balance_coef": 0.0},
            model={"top_k_by_layer": (1, 3), "compute_dtype": "float32", "tie_embeddings": True},
        ),
    ),
    "buckets, four ways of rounding": (
        (2, 4, 1),
        run_config(
            exchange={
                "mode": "all_to_all",
                "bucket_rows": 8,
                "wire": WireConfig("int8", "float8", "compute", "int4"),
            },
        ),
    ),
    "ring, rounded and rotated": (
        (1, 4, 2),
        run_config(
            exchange={
                "mode": "ring",
                "bucket_slack": math.inf,
                "wire": WireConfig("float8", "int8", "int4", "int8", rotate=True),
            },
            model={"remat": "layer"},
        ),
    ),
    "fewer columns, rematted, in chunks between hosts": (
        (1, 4, 1),
        run_config(
            exchange={
                "mode": "all_to_all",
                "bucket_rows": 8,
                "host_devices": 2,
                "chunks": 2,
                "wire": WireConfig("int8", dispatch_dim=64, combine_dim=96),
            },
            model={"remat": "layer"},
        ),
    ),
    "fewer columns in a ring, products kept": (
        (1, 4, 1),
        run_config(
            exchange={"mode": "ring", "wire": WireConfig(combine_dim=96)},
            model={"remat": "dots", "num_layers": 1},
        ),
    ),
    "buckets in four chunks": (
        (2, 4, 1),
        run_config(exchange={"mode": "all_to_all", "bucket_rows": 3, "chunks": 4}),
    ),
    "two hosts of two, in two chunks": (
        (2, 4, 1),
        run_config(
            exchange={"mode": "all_to_all", "bucket_rows": 3, "chunks": 2, "host_devices": 2},
            model={"remat": "layer"},
        ),
    ),
    "rounded between two hosts, everything fits": (
        (1, 4, 2),
        run_config(
            exchange={
                "bucket_slack": math.inf,
                "host_devices": 2,
                "wire": WireConfig("int8", "int8", "int8", "int8"),
            },
        ),
    ),
    "single rows, rounded, rematted, in two chunks and several waves": (
        (1, 4, 2),
        run_config(
            exchange={
                "mode": "remote",
                "chunks": 2,
                "bucket_slack": 0.1,
                "wire": WireConfig("int8", "compute", "float8", "int8", combine_dim=96),
            },
            model={"remat": "layer", "num_layers": 1},
        ),
    ),
    "single rows, exact, one wave": (
        (2, 4, 1),
        run_config(exchange={"mode": "remote", "bucket_slack": math.inf}),
    ),
    "biases, sinks, windows, rematted": (
        (2, 2, 2),
        run_config(
            attention={"bias": True, "output_bias": True, "sinks": True, "qk_norm": "head"},
            model={"window_by_layer": (4, 0, 0), "num_layers": 3, "remat": "layer"},
        ),
    ),
    "latent attention, queries too, rematted and scanned": (
        (2, 2, 2),
        run_config(
            attention={
                "num_kv_heads": 4,
                "head_dim": 24,
                "latent": LatentConfig(rank=32, rope_dim=8, value_dim=20, query_rank=48),
            },
            model={"num_layers": 3, "scan_layers": True, "remat": "layer"},
        ),
    ),
    "latent attention, float32": (
        (1, 2, 4),
        run_config(
            attention={"num_kv_heads": 4, "latent": LatentConfig(32, 8, 12)},
            model={"compute_dtype": "float32"},
        ),
    ),
    "gradients of 4 bits with feedback, weights gathered in 8": (
        (2, 4, 2),
        run_config(
            model={"scan_layers": True, "remat": "layer"},
            train={
                "accumulate": 2,
                "grad_compression": GradCompression(
                    "int4", rounding="error_feedback", weight_gather="int8"
                ),
            },
        ),
    ),
    "gradients of low rank": (
        (4, 2, 1),
        run_config(train={"grad_compression": GradCompression("low_rank", rank=2)}),
    ),
    "the largest numbers of gradients": (
        (4, 2, 1),
        run_config(
            model={"scan_layers": True},
            train={"grad_compression": GradCompression("top_k", density=0.05)},
        ),
    ),
    "gradients of 8 bits between two hosts": (
        (4, 2, 1),
        run_config(
            model={"num_layers": 1, "tie_embeddings": True},
            train={"grad_compression": GradCompression("int8", hosts=2)},
        ),
    ),
    "data alone": ((8, 1, 1), run_config(model={"scan_layers": True, "remat": "layer"})),
    "one device": ((1, 1, 1), run_config()),
}


def assert_columns(text: str) -> None:
    assert max(map(len, text.splitlines())) <= 100, text
    assert not re.search(r"[ \t]$", text, re.M)


def predicted(config: TrainConfig, mesh: MeshShape, on: Hardware):
    """By formulas alone, so that nothing is traced."""
    blueprint = Blueprint(config.model, abstract_mesh(mesh))
    reducer = make_reducer(blueprint, config)
    params, storage = blueprint.params, blueprint.storage
    sent = expected_collectives(config, mesh, params, storage, reducer)
    weights = weights_of(config, mesh, params, storage)
    return predict_step(config, mesh, weights, sent, on)
