"""How evenly the experts are used."""

from __future__ import annotations

import jax
import numpy as np

__all__ = ["router_metrics"]

ArrayLike = np.ndarray | jax.Array


def router_metrics(
    counts_E: ArrayLike,
    entropy_sum: ArrayLike,
    num_tokens: ArrayLike,
    kept: ArrayLike | None = None,
    experts: ArrayLike | None = None,
) -> dict[str, ArrayLike]:
    """Metrics from the statistics of `Routing`, summed over the devices beforehand.

    Works on numpy arrays, on the host, as on jax arrays, inside jit.

    Args:
        counts_E: int32 [..., E], assignments of each expert; leading dimensions are layers.
        entropy_sum: float32 [...], nats.
        num_tokens: int32 [...], tokens counted.
        kept: float32 [...], score mass kept, summed over tokens; None without locality.
        experts: [...], experts of each layer, where some have fewer than E, with counts filled up
            with 0; None: all have E.

    Returns:
        `tokens_per_expert`: int32 [..., E]; `entropy`: float32 [...], nats, mean over tokens, at
        most log E; `max_over_mean`: float32 [...], load of the busiest expert over the mean load,
        1 when even, E/K at worst, 0 without tokens; with `kept` also `score_mass_kept`, float32 [],
        mean over tokens and layers, 1 where locality changes no choice.
    """
    assignments = counts_E.sum(axis=-1).clip(min=1).astype(np.float32)
    busiest = counts_E.max(axis=-1).astype(np.float32)
    number = counts_E.shape[-1] if experts is None else experts.astype(np.float32)
    mass = {}
    if kept is not None:
        mass["score_mass_kept"] = kept.sum() / num_tokens.sum().clip(min=1).astype(np.float32)
    return {
        "tokens_per_expert": counts_E,
        "entropy": entropy_sum / num_tokens.clip(min=1).astype(np.float32),
        "max_over_mean": busiest * number / assignments,
        **mass,
    }
