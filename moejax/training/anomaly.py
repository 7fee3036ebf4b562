"""Which steps are applied: judged on the devices, by losses and norms of the steps before.

The history is part of the state, so a run that is continued judges as one that never stopped, and
all devices judge alike: what they look at is the same on each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.training.anomaly_config import AnomalyConfig
from sharding.arrays import put

__all__ = [
    "NONE",
    "NONFINITE",
    "SPIKE",
    "History",
    "Verdict",
    "history_shapes",
    "history_to_json",
    "judge",
    "make_history",
]

NONE, NONFINITE, SPIKE = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """What the last steps were like; replicated.

    recent_2W: float32, loss and norm of the gradient of the last W steps that were applied; step i
        of those applied is at i mod W.
    applied: int32 [], steps applied.
    skipped: int32 [], steps skipped.
    in_a_row: int32 [], of those the ones since the last step that was applied.
    halted: bool [], nothing is applied any more.
    """

    recent_2W: jax.Array
    applied: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array
    halted: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Verdict:
    """What is done with a step.

    kind: int32 [], one of NONE, NONFINITE, SPIKE.
    apply: bool [], weights and optimizer change.
    halted: bool [], the step is not taken at all and none after it.
    mean_2, limit_2: float32 [2], of loss and norm: the mean of the window, and what a spike lies
        above; infinite while the window is not half full.
    """

    kind: jax.Array
    apply: jax.Array
    halted: jax.Array
    mean_2: jax.Array
    limit_2: jax.Array


def judge(
    config: AnomalyConfig, history: History, loss: jax.Array, norm: jax.Array
) -> tuple[Verdict, History]:
    """Whether a step is applied, and the history with it.

    Args:
        config: what is looked at, and what follows.
        history: of the steps before.
        loss: of all devices, float32 []; the same bits on each.
        norm: of the whole gradient before clipping, likewise.
    """
    window = history.recent_2W.shape[1]
    seen_2 = jnp.stack([loss, norm])
    count = jnp.minimum(history.applied, window)
    there_W = lax.iota(jnp.int32, window) < count
    parts = jnp.maximum(count, 1).astype(jnp.float32)
    mean_2 = jnp.sum(jnp.where(there_W, history.recent_2W, 0.0), axis=1) / parts
    away_2W = jnp.where(there_W, history.recent_2W - mean_2[:, None], 0.0)
    deviation_2 = jnp.sqrt(jnp.sum(jnp.square(away_2W), axis=1) / parts)
    enough = count >= window // 2
    limit_2 = jnp.where(enough, mean_2 + jnp.float32(config.sigma) * deviation_2, jnp.inf)

    finite = jnp.all(jnp.isfinite(seen_2))
    spike = finite & jnp.any(seen_2 > limit_2) & (config.spike != "ignore")
    broken = ~finite & (config.nonfinite != "ignore")
    kind = jnp.where(broken, NONFINITE, jnp.where(spike, SPIKE, NONE)).astype(jnp.int32)

    skip = (broken & (config.nonfinite == "skip")) | (spike & (config.spike == "skip"))
    in_a_row = jnp.where(skip, history.in_a_row + 1, 0)
    halted = (
        history.halted
        | (broken & (config.nonfinite == "stop"))
        | (spike & (config.spike == "stop"))
        | (in_a_row > config.most_in_a_row)
    )
    apply = ~(skip | halted)
    at = history.applied % window
    written = history.recent_2W.at[:, at].set(seen_2)
    one = jnp.int32(1)
    new = History(
        recent_2W=jnp.where(apply & finite, written, history.recent_2W),
        applied=history.applied + jnp.where(apply & finite, one, 0),
        skipped=history.skipped + jnp.where(skip & ~halted, one, 0),
        in_a_row=jnp.where(halted, history.in_a_row, in_a_row),
        halted=halted,
    )
    return Verdict(kind, apply, halted, mean_2, limit_2), new


def history_to_json(history: History) -> dict[str, Any]:
    """What a checkpoint keeps, exactly.

    That a run has stopped is no part of it: the next start begins to count steps in a row anew.
    """
    history = jax.device_get(history)
    applied, window = int(history.applied), history.recent_2W.shape[1]
    order = np.arange(max(0, applied - window), applied) % window
    losses, norms = history.recent_2W[:, order].tolist()
    counts = {name: int(getattr(history, name)) for name in ("applied", "skipped", "in_a_row")}
    counts["in_a_row"] *= not bool(history.halted)
    return {"losses": losses, "norms": norms, **counts}


def history_shapes(config: AnomalyConfig) -> History:
    """Shapes and dtypes of a history."""
    whole = jax.ShapeDtypeStruct((), jnp.int32)
    recent = jax.ShapeDtypeStruct((2, config.window), jnp.float32)
    halted = jax.ShapeDtypeStruct((), jnp.bool_)
    return History(recent, whole, whole, whole, halted)  # type: ignore[arg-type]


def make_history(
    config: AnomalyConfig, mesh: jax.sharding.Mesh, kept: Mapping[str, Any] | None = None
) -> History:
    """A run's history as its steps take it.

    A longer window than that of before begins with what is there.

    Args:
        config: with the window W.
        mesh: of the run.
        kept: of `history_to_json`; None at a run's start, and of checkpoints that have none.
    """
    recent_2W = np.zeros((2, config.window), np.float32)
    counts = dict.fromkeys(("applied", "skipped", "in_a_row"), 0)
    if kept is not None:
        counts = {name: int(kept[name]) for name in counts}
        last = np.array([kept["losses"], kept["norms"]], np.float32)[:, -config.window :]
        count = last.shape[1]
        if count < config.window:
            counts["applied"] = count  # the window is not full, whatever came before
        applied = counts["applied"]
        recent_2W[:, np.arange(applied - count, applied) % config.window] = last
    whole = {name: np.array(count, np.int32) for name, count in counts.items()}
    history = History(recent_2W, **whole, halted=np.zeros((), np.bool_))  # type: ignore[arg-type]
    return put(history, NamedSharding(mesh, P()))
