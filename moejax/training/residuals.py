"""What compressed gradients keep from step to step: begun, saved, restored onto any mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.model.canonical import canonical
from moejax.training.config import TrainConfig
from moejax.training.state import (
    Blueprint,
    TrainState,
    fitting_spec,
    from_logical_part,
    in_logical_order,
)
from sharding.compression.interface import RESIDUAL
from sharding.compression.leaves import Leaf
from sharding.compression.reduction import Reducer
from sharding.mesh import AXES, MeshShape, abstract_mesh

__all__ = [
    "PREFIX",
    "continuation_notes",
    "make_reducer",
    "reducer_of",
    "residual_arrays",
    "residual_metadata",
    "residual_targets",
    "with_residuals",
]

PREFIX = "residuals/"
"""How their names in a checkpoint begin."""

ROUNDED = ("int8", "int4")
"""Methods whose residuals mean the same: what rounding kept of the gradients until now. Those of
others hold the gradients of many steps, which no step of another method should send at once."""


def make_reducer(blueprint: Blueprint, config: TrainConfig) -> Reducer:
    """The reduction of a run's gradients on the blueprint's mesh."""
    return reducer_of(blueprint.params, blueprint.storage, blueprint.shape, config)


def reducer_of(params: nnx.State, storage: Any, mesh: MeshShape, config: TrainConfig) -> Reducer:
    """The same where only shapes are known.

    Args:
        params, storage: as of a `Blueprint`.
        mesh: sizes of the axes.
        config: the run.
    """
    sizes, compression = dict(zip(AXES, mesh.sizes)), config.grad_compression
    return Reducer(
        *(params, storage, sizes, compression, config.seed, config.optimizer.b1),
        compute_dtype=config.model.compute_dtype,
        clip_norm=config.optimizer.clip_norm,
    )


def residual_arrays(state: TrainState) -> dict[str, jax.Array]:
    """What a checkpoint holds of them, by name, as it lies on the devices."""
    return {
        f"{PREFIX}{leaf}/{name}": value
        for leaf, held in (state.residuals or {}).items()
        for name, value in held.items()
    }


def residual_metadata(blueprint: Blueprint, config: TrainConfig) -> dict[str, str]:
    """What tells, beside the arrays, how they lie and what they mean."""
    return {"mesh": str(blueprint.shape), "method": config.grad_compression.method}


def residual_targets(
    blueprint: Blueprint, config: TrainConfig, content: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """What of a checkpoint's residuals is read for this run: shapes, dtypes, shardings.

    On the mesh they were saved from they are read as they lie; on another one only what can be
    summed and handed out anew; nothing of another method, but of int8 for int4 and the reverse.

    Args:
        blueprint: model and mesh.
        config: the run.
        content: `arrays` and `metadata` of the checkpoint's manifest.
    """
    reducer = make_reducer(blueprint, config)
    shapes, specs = reducer.shapes, reducer.specs
    saved = content["metadata"].get("residuals", {})
    if shapes is None or specs is None:
        return {}
    if not _means_the_same(saved.get("method"), config.grad_compression.method):
        return {}
    found = {}
    for leaf in reducer.leaves:
        for name, shape in shapes.get(leaf.name, {}).items():
            key = f"{PREFIX}{leaf.name}/{name}"
            if key not in content["arrays"]:
                continue
            there = tuple(content["arrays"][key]["shape"])
            spec = specs[leaf.name][name]
            if saved["mesh"] != str(blueprint.shape):
                if name != RESIDUAL:
                    continue
                ranks = len(there) - len(leaf.whole)
                spec = fitting_spec(P(*[None] * ranks, *leaf.storage.stored), there, blueprint.mesh)
            elif there != shape.shape:  # such as another rank of the matrices
                continue
            found[key] = jax.ShapeDtypeStruct(
                there, shape.dtype, sharding=NamedSharding(blueprint.mesh, spec)
            )
    return found


def _means_the_same(before: str | None, method: str) -> bool:
    return before == method or (before in ROUNDED and method in ROUNDED)


def continuation_notes(
    blueprint: Blueprint, config: TrainConfig, content: Mapping[str, Any], step: int
) -> list[str]:
    """What is to be told where a run goes on with gradients that are compressed in another way.

    Args:
        blueprint: model and mesh.
        config: the run.
        content: `arrays` and `metadata` of the checkpoint's manifest.
        step: steps taken.
    """
    notes, method = [], config.grad_compression.method
    before = content["metadata"].get("residuals", {}).get("method", "none")
    kept = {n for n in content["arrays"] if n.startswith(PREFIX) and n.endswith(f"/{RESIDUAL}")}
    found = residual_targets(blueprint, config, content)
    lost = kept - found.keys()
    if lost:
        some = "" if lost == kept else f" of {len(lost)} of {len(kept)} parameters"
        notes.append(f"note: what {before} gradients had left to send{some} is not sent any more")
    if method == "top_k" and step >= config.grad_compression.warmup_steps:
        # What is summed exactly has no beginning, and what has a residual goes on.
        served = make_reducer(blueprint, config).shapes or {}
        new = [name for name in served if f"{PREFIX}{name}/{RESIDUAL}" not in found]
        if new:
            some = "" if len(new) == len(served) else f" for {len(new)} of {len(served)} parameters"
            notes.append(
                f"note: top_k begins without a warm-up{some}, whose steps count from the run's "
                f"first; for one pass --grad-compression.warmup-steps {step} and as many more as "
                "it is to have"
            )
    return notes


def with_residuals(
    state: TrainState,
    blueprint: Blueprint,
    config: TrainConfig,
    flat: Mapping[str, jax.Array] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> TrainState:
    """The state with the residuals of a checkpoint, and fresh ones where it has none.

    From another mesh, each parameter's residuals are summed over the ranks that held them, and each
    new rank gets an equal share. A parameter that needs no compression here, as on one device, has
    none: what was left to send is forgotten.

    Args:
        state: without residuals.
        blueprint: model and mesh.
        config: the run.
        flat: what was read of `residual_targets`, among other arrays; None: nothing was.
        metadata: of that checkpoint.
    """
    reducer = make_reducer(blueprint, config)
    if reducer.specs is None:
        return state
    mesh, specs = blueprint.mesh, reducer.specs
    init = jax.shard_map(reducer.init, mesh=mesh, in_specs=(), out_specs=specs, check_vma=False)
    fresh = jax.block_until_ready(jax.jit(init)())
    saved = {n: x for n, x in (flat or {}).items() if n.startswith(PREFIX)}
    if not saved:
        return replace(state, residuals=fresh)
    assert metadata is not None
    before = metadata["residuals"]["mesh"]
    if before != str(blueprint.shape):
        old = Blueprint(config.model, abstract_mesh(MeshShape.parse(before)))
        saved = _handed_out(saved, old, blueprint, reducer)
    found = {
        leaf: {name: saved.get(f"{PREFIX}{leaf}/{name}", value) for name, value in held.items()}
        for leaf, held in fresh.items()
    }
    return replace(state, residuals=found)


def _handed_out(
    saved: Mapping[str, jax.Array], old: Blueprint, new: Blueprint, reducer: Reducer
) -> dict[str, jax.Array]:
    """Residuals of the old mesh's ranks as those of the new ranks."""
    assert reducer.shapes is not None and reducer.specs is not None
    leaves = {f"{PREFIX}{leaf.name}/{RESIDUAL}": leaf for leaf in reducer.leaves}
    shapes = {name: reducer.shapes[leaves[name].name][RESIDUAL].shape for name in saved}
    specs = {name: reducer.specs[leaves[name].name][RESIDUAL] for name in saved}

    def build(saved: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        found = {}
        for name, value in saved.items():
            total = _moved(value, leaves[name], old, new)
            ranks = shapes[name][: len(leaves[name].axes)]
            share = total * jnp.float32(1 / math.prod(ranks))
            found[name] = jnp.broadcast_to(share, shapes[name])
        return found

    shardings = {name: NamedSharding(new.mesh, spec) for name, spec in specs.items()}
    return jax.block_until_ready(jax.jit(build, out_shardings=shardings)(dict(saved)))


def _moved(value: jax.Array, leaf: Leaf, old: Blueprint, new: Blueprint) -> jax.Array:
    """The sum over ranks of one parameter's residuals, experts where they live on the new mesh."""
    before = dict(nnx.to_flat_state(old.params))[leaf.path]
    after = dict(nnx.to_flat_state(new.params))[leaf.path]
    ranks = value.ndim - len(before.get_value().shape)
    total = jnp.sum(value, axis=tuple(range(ranks)))
    summed = canonical(nnx.from_flat_state([(leaf.path, before.replace(total))]))
    flat = {f"{RESIDUAL}/{name}": in_logical_order(v) for name, v in summed.items()}
    like = nnx.from_flat_state([(leaf.path, after)])
    return dict(nnx.to_flat_state(from_logical_part(flat, RESIDUAL, like)))[leaf.path].get_value()
