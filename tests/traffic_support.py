"""Bytes that XLA's own program sends, read from its text."""

import math
import re
from collections import Counter

import numpy as np

from sharding.mesh import AXES, MeshShape
from sharding.traffic import sent_bytes

OPERATION = re.compile(
    r" = (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all)\((?P<rest>.*)"
)

ITEM = {"f32": 4, "s32": 4, "u32": 4, "u8": 1, "pred": 1}


def groups_of(rest: str) -> np.ndarray:
    explicit = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", rest)
    if explicit:
        return np.array([[int(n) for n in g.split(",")] for g in explicit[1][1:-1].split("},{")])
    named = re.search(r"replica_groups=mesh\[([^]]*)\] \{([^}]*)\}", rest)
    if named:  # from jax 0.11 on
        sizes = {a: int(n) for a, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        among = re.findall(r"'(\w+)'", named[2])
        order = [list(sizes).index(a) for a in [*(a for a in sizes if a not in among), *among]]
        devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        return devices.transpose(order).reshape(-1, math.prod(sizes[a] for a in among))
    found = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    assert found, rest
    shape, dims, order = ([int(n) for n in g.split(",")] if g else None for g in found.groups())
    return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)


def compiled_bytes(text: str, mesh: MeshShape) -> dict:
    """Bytes a device sends by (kind, axes), read from XLA's program."""
    total: Counter = Counter()
    for found in OPERATION.finditer(text):
        group = groups_of(found["rest"])[0]
        places = np.array(np.unravel_index(group, mesh.sizes))
        axes = tuple(a for a, p in zip(AXES, places) if len(set(p)) > 1)
        result = sum(
            ITEM[dtype] * math.prod(int(n) for n in shape.split(",") if n)
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", found["result"])
        )
        operand = {"all-gather": result / len(group), "reduce-scatter": result * len(group)}
        kind = found["kind"]
        total[kind, axes] += sent_bytes(kind, len(group), operand.get(kind, result))
    return dict(total)
