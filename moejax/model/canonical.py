"""Names of parameters that do not depend on whether layers are scanned: for checkpoints.

A stacked variable `layers.1:4.attention.w_q` [3, D, N, h] appears as `layers.1.attention.w_q`,
`layers.2.…`, `layers.3.…`, each [D, N, h].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.errors import UserError

__all__ = ["canonical", "from_canonical"]


def canonical(state: nnx.State) -> dict[str, nnx.Variable]:
    """Flattens a decoder's state, or one shaped like it (moments, gradients), layer by layer.

    Args:
        state: values may be arrays, numpy arrays or ShapeDtypeStructs.

    Returns:
        Name to variable, sorted by name; the metadata comes along, with
        the `spec` of a stacked variable freed of its layer dimension.
    """
    flat = {}
    for path, variable in nnx.to_flat_state(state):
        for index, name in _names(path):
            flat[name] = variable if index is None else _layer_of(variable, index)
    return dict(sorted(flat.items()))


def from_canonical(values: Mapping[str, Any], like: nnx.State) -> nnx.State:
    """The inverse of `canonical`.

    Args:
        values: name to variable or bare value, as from `canonical` of any model with the same
            layers, scanned or not.
        like: a state of the target model; structure and metadata are taken from it, not values.

    Raises:
        UserError: names are missing or unknown.
    """
    wanted = {name for path, _ in nnx.to_flat_state(like) for _, name in _names(path)}
    if wanted != values.keys():
        missing, unknown = sorted(wanted - values.keys()), sorted(values.keys() - wanted)
        raise UserError(
            f"parameters of another model: {len(missing)} missing {missing[:3]}, {len(unknown)} "
            f"unknown {unknown[:3]} (first three of each): use the config they were made with"
        )
    built = []
    for path, variable in nnx.to_flat_state(like):
        named = [(index, _value(values[name])) for index, name in _names(path)]
        stacked = named[0][0] is not None
        value = _stack([v for _, v in named]) if stacked else named[0][1]
        built.append((path, variable.replace(value)))
    return nnx.from_flat_state(built)


def _names(path: tuple) -> list[tuple[int | None, str]]:
    # Pairs of position in the stack (None where there is no stack) and canonical name.
    for at, key in enumerate(path):
        start, colon, stop = str(key).partition(":")
        if colon:
            layers = range(int(start), int(stop))
            return [(i - layers.start, _join((*path[:at], i, *path[at + 1 :]))) for i in layers]
    return [(None, _join(path))]


def _join(path: tuple) -> str:
    return ".".join(map(str, path))


def _value(entry: Any) -> Any:
    return entry.get_value() if isinstance(entry, nnx.Variable) else entry


def _layer_of(variable: nnx.Variable, index: int) -> nnx.Variable:
    spec = variable.get_metadata().get("spec")
    updates = {} if spec is None else {"spec": P(*spec[1:])}
    value = variable.get_value()
    if isinstance(value, jax.ShapeDtypeStruct):
        sharding = value.sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
        value = jax.ShapeDtypeStruct(value.shape[1:], value.dtype, sharding=sharding)
    else:
        value = value[index]
    return variable.replace(value, **updates)


def _stack(values: list) -> Any:
    first = values[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        sharding = first.sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, P(None, *sharding.spec))
        return jax.ShapeDtypeStruct((len(values), *first.shape), first.dtype, sharding=sharding)
    if all(isinstance(v, np.ndarray) for v in values):
        return np.stack(values)
    return jnp.stack(values)
