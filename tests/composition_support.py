"""Combinations of techniques: rows that hold every pair of settings, and what they mean."""

import dataclasses
import itertools

import jax
import numpy as np
from train_support import make_config

from moejax.config import LocalityConfig, SharingConfig
from moejax.placement.arrays import from_slots
from moejax.training.config import TrainConfig
from moejax.wide_bank import laid_wide
from sharding.compression.config import GradCompression

EXPERTS, LAYERS, REPLICAS = 8, 2, 2

FACTORS = {
    "mesh": [(1, 4, 1), (1, 4, 2), (2, 2, 1), (2, 2, 2), (2, 4, 1)],
    "mode": ["all_to_all", "ring", "remote", "two_hosts"],
    "wire": ["compute", "int8", "float8", "fewer_columns"],
    "chunks": [1, 2],
    "placement": ["home", "moved", "copies"],
    "locality": ["none", "penalty", "max_devices"],
    "sharing": ["none", "up", "in", "basis", "together"],
    "compression": ["none", "int8", "top_k", "low_rank"],
    "remat": ["none", "local", "layer", "dots"],
    "scan_layers": [False, True],
    "accumulate": [1, 3],
}
"""Settings of every technique of a train step, the plainest first."""

PLAIN = {name: levels[0] for name, levels in FACTORS.items()}


def pairwise(factors, forbidden, rng):
    """Rows of settings in which every pair of two factors' settings occurs that is not forbidden.

    Greedy: each row begins with a pair that is missing, and takes of each further factor what adds
    the most missing pairs (Cohen et al., IEEE TSE 23(7), 1997, the AETG method).
    """
    names = list(factors)

    def pair(a, x, b, y):
        return frozenset([(a, x), (b, y)])

    missing = {
        pair(a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in factors[a]
        for y in factors[b]
        if pair(a, x, b, y) not in forbidden
    }
    rows = []
    while missing:
        best = None
        for _ in range(30):
            ordered = sorted(missing, key=sorted_key)
            row = dict(ordered[rng.integers(len(ordered))])
            for name in rng.permutation([n for n in names if n not in row]):
                allowed = [
                    x
                    for x in factors[name]
                    if not any(pair(name, x, b, y) in forbidden for b, y in row.items())
                ]
                if not allowed:
                    break
                gains = [
                    sum(pair(name, x, b, y) in missing for b, y in row.items()) for x in allowed
                ]
                row[str(name)] = allowed[int(np.argmax(gains))]
            if len(row) < len(names):
                continue
            new = {pair(*one, *two) for one, two in itertools.combinations(row.items(), 2)}
            if best is None or len(new & missing) > len(best[1] & missing):
                best = row, new
        assert best is not None, f"no row has one of {missing}"
        rows.append({name: best[0][name] for name in names})
        missing -= best[1]
    return rows


def sorted_key(found):
    """An order of pairs that does not depend on hashes."""
    return sorted(map(str, found))


def config_of(row) -> TrainConfig:
    """The run of a row: two equal layers of experts."""
    config = make_config(
        EXPERTS,
        model={
            "num_layers": LAYERS,
            "first_dense_layers": 0,
            "top_k_by_layer": (),
            "scan_layers": row["scan_layers"],
            "remat": row["remat"],
        },
        accumulate=row["accumulate"],
        grad_compression=COMPRESSION[row["compression"]],
    )
    moe = config.model.moe
    wire = dataclasses.replace(moe.exchange.wire, **WIRES[row["wire"]])
    hosts = row["mode"] == "two_hosts"
    exchange = dataclasses.replace(
        moe.exchange,
        mode="all_to_all" if hosts else row["mode"],
        host_devices=row["mesh"][1] // 2 if hosts else None,
        chunks=row["chunks"],
        wire=wire,
    )
    moe = dataclasses.replace(
        moe,
        experts=dataclasses.replace(moe.experts, **SHARING[row["sharing"]]),
        exchange=exchange,
        locality=LOCALITY[row["locality"]],
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


WIRES = {
    "compute": {},
    "int8": dict.fromkeys(("dispatch", "combine", "dispatch_grad", "combine_grad"), "int8"),
    "float8": dict.fromkeys(("dispatch", "combine", "dispatch_grad", "combine_grad"), "float8"),
    "fewer_columns": {"dispatch_dim": 24, "combine_dim": 24},
}
SHARING = {
    "none": {},
    "up": {"sharing": SharingConfig("up")},
    "in": {"sharing": SharingConfig("in")},
    "basis": {"sharing": SharingConfig("basis", 3)},
    "together": {"together": 2},
}
LOCALITY = {
    "none": LocalityConfig(),
    "penalty": LocalityConfig(device_penalty=0.3),
    "max_devices": LocalityConfig(max_devices=1),
}
COMPRESSION = {
    "none": GradCompression(),
    "int8": GradCompression("int8"),
    "top_k": GradCompression("top_k", density=0.1),
    "low_rank": GradCompression("low_rank", rank=2),
}


def slots_of(rng, kind, devices) -> np.ndarray | None:
    """Contents of the slots of each layer, [L, G·S]; None for home."""
    if kind == "home":
        return None
    copies = devices if kind == "copies" else 0
    rows = []
    for _ in range(LAYERS):
        held = rng.permutation(EXPERTS).reshape(devices, -1)
        extra = np.roll(held[:, :1], 1, axis=0) if copies else np.full((devices, 1), -1)
        rows.append(rng.permuted(np.concatenate([held, extra], axis=1), axis=1).reshape(-1))
    return np.stack(rows)


def placement_of(slots_LP):
    """The arrays of such slots, stacked over layers."""
    if slots_LP is None:
        return None
    layers = [from_slots(slots_P, EXPERTS, REPLICAS) for slots_P in slots_LP]
    return jax.tree.map(lambda *a: np.stack(a), *layers)


def laid_together(flat) -> dict[str, np.ndarray]:
    """Arrays of single experts, by name, as those of a model that computes two together."""
    flat = dict(flat)
    for name in [name for name in flat if name.endswith(".bank.w_in")]:
        out = name.removesuffix("in") + "out"
        flat[name], flat[out] = laid_wide(flat[name], flat[out], 2)
    return flat
