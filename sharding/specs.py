"""How each variable of a model is split over the mesh, read off its metadata."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

__all__ = ["axes_of", "metadata_tree", "shardings_of", "specs_of"]


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def metadata_tree(state: Any, key: str) -> Any:
    """A tree like `state` with one metadata entry in the place of each variable.

    Args:
        state: an `nnx.State`, or any tree of `nnx.Variable`.
        key: name of the entry, such as `spec` or `float32`.
    """
    return jax.tree.map(lambda v: v.get_metadata(key), state, is_leaf=_is_variable)


def specs_of(state: Any) -> Any:
    """The PartitionSpec of each variable, a prefix tree of `state` for shard_map."""
    return metadata_tree(state, "spec")


def shardings_of(state: Any, mesh: Mesh) -> Any:
    """The NamedSharding of each variable."""
    specs = specs_of(state)
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, P))


def axes_of(spec: P) -> tuple[str, ...]:
    """The mesh axes a spec names, in order of appearance."""
    names: list[str] = []
    for entry in spec:
        if entry is not None:
            names.extend([entry] if isinstance(entry, str) else entry)
    return tuple(names)
