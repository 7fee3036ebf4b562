"""Seeded synthetic traffic: popular experts, clusters that are chosen together, drift.

A token belongs to a cluster of experts, each with equal chance, and draws its K choices one after
the other, without replacement: each with chance `share` among the experts of its cluster, else
among all, in proportion to their popularity. Popularity is Zipf's (of rank r: r^−zipf) in random
order; sizes of clusters are uneven. Neither has any relation to an expert's number, so that
contiguous placement profits from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moejax.errors import UserError
from moejax.placement.trace import Trace

__all__ = ["Traffic", "drift", "generate", "make_traffic"]

_TOGETHER = 1 << 22  # random numbers drawn at once


@dataclass(frozen=True)
class Traffic:
    """What tokens are drawn from.

    Attributes:
        popularity_LE: float64, positive, each layer sums to 1.
        cluster_LE: int64, the cluster of each expert.
        choices: K.
        share: the chance that a choice is drawn inside the token's cluster.
    """

    popularity_LE: np.ndarray
    cluster_LE: np.ndarray
    choices: int
    share: float


def make_traffic(
    num_experts: int = 64,
    layers: int = 1,
    *,
    choices: int = 6,
    share: float = 0.8,
    zipf: float = 0.8,
    cluster_size: float = 8.0,
    seed: int = 0,
) -> Traffic:
    """Popularity and clusters of every layer.

    Args:
        num_experts: E.
        layers: L, drawn independently.
        choices: K.
        share: the chance that a choice is drawn inside the token's cluster.
        zipf: the exponent of popularity.
        cluster_size: experts of a cluster in the mean; sizes are as uneven as Dirichlet's with 2.
        seed: equal numbers give equal traffic.

    Raises:
        UserError: a number lies outside its range.
    """
    if not 1 <= choices <= num_experts:
        raise UserError(f"choices={choices}: must lie between 1 and num_experts={num_experts}")
    if not 0 <= share <= 1 or zipf < 0 or cluster_size < 1 or layers < 1:
        raise UserError(
            f"share={share}, zipf={zipf}, cluster_size={cluster_size}, layers={layers}: share lies "
            "between 0 and 1, zipf is not negative, the others are at least 1"
        )
    rng = np.random.default_rng(seed)
    clusters = max(1, round(num_experts / cluster_size))
    popularity_LE, cluster_LE = [], []
    for _ in range(layers):
        ranked_E = np.arange(1, num_experts + 1) ** -float(zipf)
        popularity_LE.append(rng.permutation(ranked_E / ranked_E.sum()))
        # One expert each, the rest by chance.
        ends = np.cumsum(rng.dirichlet(np.full(clusters, 2.0))) * (num_experts - clusters)
        ends = np.round(ends) + np.arange(1, clusters + 1)
        of_place = np.searchsorted(ends, np.arange(num_experts), side="right")
        cluster_LE.append(rng.permutation(of_place))
    return Traffic(np.stack(popularity_LE), np.stack(cluster_LE), choices, share)


def drift(traffic: Traffic, amount: float, seed: int = 0) -> Traffic:
    """Traffic some time later: popularities wander and a few experts change their cluster.

    Args:
        traffic: as before.
        amount: between 0 (nothing changes) and 1 (all is drawn anew).
        seed: equal numbers give equal drift.

    Raises:
        UserError: the amount lies outside.
    """
    if not 0 <= amount <= 1:
        raise UserError(f"drift: amount {amount}: must lie between 0 and 1")
    rng = np.random.default_rng(seed)
    # A geometric mean with a shuffled self: what was popular fades, something else rises.
    shuffled_LE = rng.permuted(traffic.popularity_LE, axis=1)
    popularity_LE = traffic.popularity_LE ** (1 - amount) * shuffled_LE**amount
    popularity_LE /= popularity_LE.sum(1, keepdims=True)
    cluster_LE = traffic.cluster_LE.copy()
    for cluster_E in cluster_LE:
        movers = np.flatnonzero(rng.random(len(cluster_E)) < amount)
        cluster_E[movers] = cluster_E[rng.permutation(movers)]
    return replace(traffic, popularity_LE=popularity_LE, cluster_LE=cluster_LE)


def generate(
    traffic: Traffic,
    tokens: int,
    *,
    mean_length: int = 256,
    seed: int = 0,
) -> Trace:
    """Draws tokens.

    Args:
        traffic: what from.
        tokens: N.
        mean_length: tokens of a document in the mean; lengths are geometric.
        seed: equal numbers give equal traces.

    Raises:
        UserError: there is no token.
    """
    if tokens < 1 or mean_length < 1:
        raise UserError(f"tokens={tokens}, mean_length={mean_length}: must be at least 1")
    layers, num_experts = traffic.popularity_LE.shape
    rng = np.random.default_rng(seed)
    experts_NLK = np.empty((tokens, layers, traffic.choices), np.int16)
    step = max(1, _TOGETHER // num_experts)
    for layer in range(layers):
        for start in range(0, tokens, step):
            part = experts_NLK[start : start + step, layer]
            part[...] = _draw(rng, traffic, layer, len(part))
    ends = np.flatnonzero(rng.random(tokens) < 1 / mean_length) + 1
    lens = np.diff(np.unique(np.concatenate([[0], ends, [tokens]])))
    return Trace(experts_NLK, lens.astype(np.int64), num_experts)


def _draw(rng: np.random.Generator, traffic: Traffic, layer: int, tokens: int) -> np.ndarray:
    popularity_E, cluster_E = traffic.popularity_LE[layer], traffic.cluster_LE[layer]
    clusters = int(cluster_E.max()) + 1
    inside_CE = (cluster_E == np.arange(clusters)[:, None]) * popularity_E
    inside_CE /= inside_CE.sum(1, keepdims=True)
    chance_CE = traffic.share * inside_CE + (1 - traffic.share) * popularity_E / popularity_E.sum()
    cluster_N = rng.integers(0, clusters, tokens)
    # Exponential clocks: the K first to ring are K draws without replacement.
    clock_NE = rng.standard_exponential((tokens, len(popularity_E)), np.float32)
    clock_NE /= np.maximum(chance_CE, 1e-9).astype(np.float32)[cluster_N]
    return _first(clock_NE, traffic.choices)


def _first(clock_NE: np.ndarray, choices: int) -> np.ndarray:
    if choices < clock_NE.shape[1]:
        first_NK = np.argpartition(clock_NE, choices - 1, axis=1)[:, :choices]
    else:
        first_NK = np.broadcast_to(np.arange(choices), clock_NE.shape)
    order_NK = np.argsort(np.take_along_axis(clock_NE, first_NK, 1), axis=1)
    return np.take_along_axis(first_NK, order_NK, 1)
