"""Whole training steps: how long, and how much of the devices' peak.

    python benchmarks/train_step.py --cases small small:remat=layer --out train_step_h100
    python benchmarks/train_step.py --cases qwen3-10b qwen3-10b:mesh=data=2 --out train_step_h200x2
    python benchmarks/train_step.py --tiny

A case is a model and what differs from its settings: `small:remat=local,batch=32,chunk=0`. The step
is the one that `train.py` runs, state donated, judged for NaN and spikes, metrics read a step late.
Tokens are pairs of bytes of the standard library's source, hashed into the vocabulary, so that they
repeat as words do and another batch comes in every step.

Rows: model, parameters and active ones in 10⁹, mesh, tokens of a sequence and of a step, remat,
compression, the median step in ms and all of them, tokens a second, utilisation (model FLOPs of
`sharding.flops` over the data sheets' bf16 peak of all devices), what the planner predicted, and
bytes that the compiled program holds at once on a device.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from common import write_results
from jax.sharding import NamedSharding

from moejax.config import (
    AttentionConfig,
    ExchangeConfig,
    ExpertsConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
)
from moejax.data.sources import load_standard_library
from moejax.model.attention import choose_attention
from moejax.presets import small, tiny
from moejax.training.anomaly import make_history
from moejax.training.config import DataConfig, OptimizerConfig, TrainConfig
from moejax.training.residuals import with_residuals
from moejax.training.state import Blueprint, init_state
from moejax.training.step import BATCH_SPEC, make_train_step
from pallas_kernels.heads import api as heads_kernels
from pallas_kernels.norm import api as norm_kernels
from sharding.arrays import put
from sharding.compression.config import GradCompression
from sharding.costs import count_parameters
from sharding.device_kinds import find_kind, hardware_of
from sharding.flops import peak_flops, step_flops_per_token
from sharding.mesh import MeshShape, hosts_along_expert, make_mesh
from sharding.planner import plan
from sharding.step_time import predict_plan

WARM = 3  # steps before those that are timed


def qwen3_10b() -> TrainConfig:
    """Layers of Qwen3-30B-A3B's shape, as many as two GPUs of 141 GB train: 16 of 48."""
    moe = MoEConfig(
        RouterConfig(num_experts=128, top_k=8, load_balance_coef=1e-3),
        ExpertsConfig(hidden=768),
        ExchangeConfig(),
    )
    model = ModelConfig(
        vocab_size=151_936,
        d_model=2048,
        num_layers=16,
        max_context=4096,
        attention=AttentionConfig(num_heads=32, num_kv_heads=4, head_dim=128, qk_norm="head"),
        moe=moe,
        scan_layers=True,
        remat="local",
    )
    data = DataConfig(seq_len=4096, batch_size=8)
    return TrainConfig(
        model, data, OptimizerConfig(learning_rate=3e-4), mesh="expert=2", loss_chunk=4096
    )


MODELS = {"small": small, "qwen3-10b": qwen3_10b, "tiny": tiny}
REHEARSAL = ("tiny:mesh=data=2+expert=2", "tiny:mesh=expert=4,remat=local,chunk=128,grads=int8")


def configured(case: str) -> tuple[str, TrainConfig]:
    """The model's name and the run of a case such as `small:remat=layer,batch=16`."""
    name, _, changes = case.partition(":")
    config = MODELS[name]()
    model, data, moe = config.model, config.data, config.model.moe
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        match key:
            case "remat":
                model = dataclasses.replace(model, remat=value)
            case "layers":
                model = dataclasses.replace(model, num_layers=int(value))
            case "scan":
                model = dataclasses.replace(model, scan_layers=value == "1")
            case "batch":
                data = dataclasses.replace(data, batch_size=int(value))
            case "mode" | "chunks":
                chosen = value if key == "mode" else int(value)
                exchange = dataclasses.replace(moe.exchange, **{key: chosen})
                moe = dataclasses.replace(moe, exchange=exchange)
            case "chunk":
                config = dataclasses.replace(config, loss_chunk=int(value))
            case "mesh":  # a + for a comma
                config = dataclasses.replace(config, mesh=value.replace("+", ","))
            case "stream":  # of residual streams and heads: kernels (1) or XLA's programs (0)
                norm_kernels.AUTOMATIC = norm_kernels.BACKENDS[int(value == "0") :]
                heads_kernels.AUTOMATIC = value == "1"
            case "grads":
                grads = GradCompression(value)
                config = dataclasses.replace(config, grad_compression=grads)
            case _:
                raise SystemExit(f"{case}: {key} is not known")
    model = dataclasses.replace(model, moe=moe)
    return name, dataclasses.replace(config, model=model, data=data, steps=10_000)


def batches(config: TrainConfig, count: int) -> Iterator[np.ndarray]:
    """int32 [accumulate, examples, S + 1], of the standard library's text."""
    data, vocab = config.data, config.model.vocab_size
    needed = count * data.batch_size * (data.seq_len + 1)
    text, size = bytearray(), 0
    for document in load_standard_library().documents:
        text += document.text.encode()
        size = len(text) // 2
        if size >= needed:
            break
    pairs = np.frombuffer(bytes(text[: 2 * size]), np.uint16).astype(np.uint64)
    tokens = (pairs * np.uint64(2654435761) >> np.uint64(8)) % np.uint64(vocab)
    tokens = np.resize(tokens.astype(np.int32), needed)
    shape = (count, config.accumulate, -1, data.seq_len + 1)
    yield from tokens.reshape(shape)


def predicted_ms(config: TrainConfig, shape: MeshShape, device: Any) -> float | None:
    """What `train.py --dry-run` predicts; None for devices that it does not know."""
    if find_kind(device.device_kind) is None:
        return None
    made = plan(config, shape, platform=device.platform)
    return 1e3 * predict_plan(made, hardware_of(device.device_kind)).time.total


def measure(case: str, steps: int) -> dict[str, Any]:
    """One row."""
    jax.clear_caches()  # of traces that know the last case's kernels
    name, config = configured(case)
    shape = MeshShape.parse(config.mesh)
    mesh = make_mesh(shape)
    attention = choose_attention(mesh.devices.flat[0].platform, config.model)
    blueprint = Blueprint(config.model, mesh, hosts_along_expert(mesh), attention)
    state = with_residuals(init_state(blueprint, 0), blueprint, config)
    state = dataclasses.replace(state, history=make_history(config.anomaly, mesh))
    where = NamedSharding(mesh, BATCH_SPEC)
    data = [put(batch, where) for batch in batches(config, WARM + steps)]
    begun = time.perf_counter()
    with jax.numpy_dtype_promotion("standard"):
        step = make_train_step(blueprint, config).lower(state, data[0], None).compile()
    compiling = time.perf_counter() - begun
    memory = step.memory_analysis()
    losses, ends = [], []
    waiting = None
    for batch in data:
        state, metrics = step(state, batch, None)
        if waiting is not None:
            losses.append(float(waiting["loss"]))  # a step late: the next one runs meanwhile
            ends.append(time.perf_counter())
        waiting = metrics
    losses.append(float(waiting["loss"]))
    ends.append(time.perf_counter())
    assert np.isfinite(losses).all() and losses[-1] < losses[0], losses
    times = 1e3 * np.diff(ends)[WARM - 1 :]
    ms = float(np.median(times))
    tokens = config.data.batch_size * config.data.seq_len
    peak = peak_flops(mesh.devices.flat[0].device_kind, config.model.compute_dtype)
    flops = step_flops_per_token(config.model, config.data.seq_len) * tokens
    size = count_parameters(config.model)
    return {
        "model": name,
        "case": case,
        "params_b": size.total / 1e9,
        "active_b": size.active / 1e9,
        "mesh": str(shape),
        "seq": config.data.seq_len,
        "tokens": tokens,
        "remat": config.model.remat,
        "compression": config.grad_compression.method,
        "step_ms": ms,
        "step_ms_all": [round(float(t), 2) for t in times],
        "tokens_per_s": tokens / ms * 1e3,
        "mfu": None if peak is None else flops / (ms / 1e3) / (peak * shape.size),
        "predicted_ms": predicted_ms(config, shape, mesh.devices.flat[0]),
        "memory_bytes": int(
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        ),
        "compile_seconds": compiling,
        "losses": [round(loss, 4) for loss in losses],
    }


def main() -> None:
    """Measures the cases one after the other; one that fails is told and the next one begins."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=["small"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", default="")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on fake devices")
    flags = parser.parse_args()
    if flags.tiny:
        jax.config.update("jax_num_cpu_devices", 4)
        flags.cases = list(REHEARSAL)
    rows = []
    for case in flags.cases:
        try:
            row = measure(case, flags.steps)
        except Exception as error:
            print(f"{case}: {type(error).__name__}: {str(error)[:400]}", flush=True)
            continue
        finally:
            gc.collect()
        rows.append(row)
        told = {key: value for key, value in row.items() if key not in ("losses", "step_ms_all")}
        print(told, flush=True)
        if flags.out:
            write_results(flags.out, rows)


if __name__ == "__main__":
    main()
