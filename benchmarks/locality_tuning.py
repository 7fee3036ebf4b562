"""A short training of the packaged model, with experts placed and routing that knows where.

Used by `benchmarks/locality.py`. The step is `train.py`'s own; the placement stays as it is.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from common import beginning

LEARNING_RATE = 5e-4
WARMUP = 5


def tuned(
    flat: dict[str, Any],
    model: Any,
    mesh: Any,
    texts: Any,
    placement: Any,
    *,
    steps: int,
    keep: Path | None = None,
) -> dict[str, Any]:
    """The weights after some steps of one window of each device.

    Args:
        flat: the weights to begin with, `params/…` and `bias/…`.
        model: its configuration, that of routing included.
        mesh: of the devices.
        texts: a `TokenDataset`; step i reads its batch i.
        placement: arrays [L, …] as a step takes them, or None.
        steps: how many.
        keep: a folder in which results are kept and found again by what they were made from.
    """
    import jax
    from jax.sharding import NamedSharding

    from moejax.training.config import DataConfig, OptimizerConfig, TrainConfig
    from moejax.training.state import Blueprint, to_logical
    from moejax.training.step import BATCH_SPEC, make_train_step

    batch = mesh.size
    seq_len = texts.example(0).size - 1
    config = TrainConfig(
        model=model,
        data=DataConfig(seq_len=seq_len, batch_size=batch),
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE, warmup_steps=WARMUP, weight_decay=0.0
        ),
        steps=steps,
    )
    found = None
    if keep is not None:
        slots = None if placement is None else np.asarray(placement.slot_expert_P)
        # The configuration is of the model too: routing, and precision.
        name = key(config, flat, (texts.batch(i, batch) for i in range(steps)), slots)
        found = keep / f"{name}.npz"
    if found is not None and found.is_file():
        with np.load(found) as arrays:
            return dict(arrays)
    blueprint = Blueprint(model, mesh)
    state = jax.block_until_ready(beginning(flat, blueprint))
    step = make_train_step(blueprint, config)
    where, began = NamedSharding(mesh, BATCH_SPEC), time.perf_counter()
    for number in range(steps):
        tokens = jax.device_put(texts.batch(number, batch)[None], where)
        # One program at a time, for fake devices' sake.
        state, metrics = jax.block_until_ready(step(state, tokens, placement))
        if number % 10 == 0 or number + 1 == steps:
            counters, tokens = metrics["moe"].counters, metrics["moe"].num_tokens
            sends = float(np.sum(counters.rows_host) / np.sum(tokens))
            took = time.perf_counter() - began
            said = f"step {number}: loss {float(metrics['loss']):.4f}, {sends:.3f} remote sends"
            print(f"{said}, {took:.0f} s", flush=True)
    weights = {
        name: np.asarray(value)
        for name, value in to_logical(state).items()
        if name.startswith(("params/", "bias/"))
    }
    if found is not None:
        found.parent.mkdir(parents=True, exist_ok=True)
        np.savez(found, **weights)
    return weights


def key(config: Any, flat: dict[str, Any], batches: Iterable[Any], slots: np.ndarray | None) -> str:
    """A short name of all that decides what weights a training ends with.

    Args:
        config: of the training, a dataclass; its model included.
        flat: the weights to begin with.
        batches: its tokens.
        slots: of the placement.
    """
    found = hashlib.sha256(repr(config).encode())
    arrays = [(name, flat[name]) for name in sorted(flat)]
    arrays += [("batch", batch) for batch in batches]
    arrays += [] if slots is None else [("slots", slots)]
    for name, value in arrays:
        array = np.ascontiguousarray(value)
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:16]
