"""Weights that live in the slots where they are computed: for inference, where no master is.

A bank of experts is made at home; made resident, each device's part is widened to its S slots and
nothing has moved yet. From then on `moejax.placement.migrate` moves experts between slots, and a
call only reads them. Resident weights are in no logical order, so nothing can be saved from them.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.errors import UserError
from moejax.model.groups import change_blocks
from moejax.placement.arrays import Placement
from moejax.placement.fetch import fetch
from sharding import collectives
from sharding.mesh import EXPERT

__all__ = [
    "in_slots",
    "is_resident",
    "make_resident",
    "resident",
    "resident_blueprint",
]

Tree = TypeVar("Tree")
Stored = TypeVar("Stored", bound=nnx.Variable)


def in_slots(
    weights: Tree, placement: Placement | None, num_experts: int, *, resident: bool
) -> Tree:
    """The weights of this device's slots, inside the shard_map.

    Args:
        weights: pytree of this device's part of a bank: [S_home, …], or [S, …] if resident.
        placement: of one layer; None for home.
        num_experts: E.
        resident: whether they lie in their slots.

    Raises:
        UserError: resident weights without a placement, or with one of other slots.
    """
    if not resident:
        return weights if placement is None else fetch(weights, placement, num_experts)
    slots = jax.tree.leaves(weights)[0].shape[0]
    if placement is None:
        raise UserError("resident experts without a placement: pass the one that they lie in")
    given = placement.slot_expert_P.shape[0] // collectives.axis_size(EXPERT)
    if given != slots:
        raise UserError(
            f"a placement of {given} slots a device with resident experts in {slots}: they must be "
            "equal; call make_resident with the number that is planned for"
        )
    return weights


def resident(variable: Stored, devices: int, slots: int) -> Stored:
    """A bank's variable [G·S_home, …], global, widened to [G·S, …]; new slots are zero.

    Its metadata say that it lies in slots and no longer that it is at home, so that nothing takes
    it for weights in logical order.

    Args:
        variable: of a bank.
        devices: G.
        slots: S.

    Raises:
        UserError: there are fewer slots than at home, or it is resident already.
    """
    if is_resident(variable):
        raise UserError("make_resident called again: the experts lie in slots; leave it out")
    value = variable[...]
    at_home = value.shape[0] // devices
    if slots < at_home:
        raise UserError(
            f"make_resident with slots={slots}: a device needs at least the {at_home} of its home"
        )
    pieces = _widened(value.reshape(devices, at_home, *value.shape[1:]), slots, axis=1)
    wide: Any = variable.replace(pieces.reshape(-1, *value.shape[1:]), home=None, resident=True)
    return wide


def is_resident(variable: nnx.Variable) -> bool:
    """Whether a variable of a model lies in slots."""
    return bool(variable.get_metadata().get("resident"))


def _widened(value: jax.Array, size: int, axis: int) -> jax.Array:
    missing = [*value.shape[:axis], size - value.shape[axis], *value.shape[axis + 1 :]]
    return jnp.concatenate([value, jnp.zeros(missing, value.dtype)], axis=axis)


def resident_blueprint(blueprint: Any, slots: int) -> Any:
    """The model with its experts in slots, without its weights; it only infers.

    Args:
        blueprint: a `Blueprint`, of quantized experts or others.
        slots: S, of every MoE layer.

    Raises:
        UserError: the model has no experts, or it cannot be done, see `resident`.
    """
    groups = [group for group in blueprint.groups if group.layer.moe is not None]
    if not groups:
        raise UserError(f"make_resident with slots={slots}: the model has no experts; leave it out")
    model: Any = blueprint.merge(blueprint.params, blueprint.biases)
    change_blocks(model, groups, lambda block: block.moe.bank.make_resident(slots))
    return blueprint.around(model)


def make_resident(params: Any, blueprint: Any, wide: Any) -> Any:
    """The weights of a model widened to slots, each on its devices; experts stay at home.

    Arrays of banks are widened one by one and the old ones given up, so that beside the model there
    is one of them in memory (of scanned layers, one of all layers together). Other weights are
    passed on as they are.

    Args:
        params: laid over the mesh, as from `load_weights`; their banks are deleted.
        blueprint: of them.
        wide: from `resident_blueprint`.
    """
    wanted = dict(nnx.to_flat_state(wide.params))
    made = []
    for path, variable in nnx.to_flat_state(params):
        like = wanted[path]
        if is_resident(like):
            spec = like.get_metadata()["spec"]
            size = like.get_value().shape[list(spec).index(EXPERT)] // blueprint.shape.expert
            narrow = variable.get_value()
            value = jax.block_until_ready(_widener(blueprint.mesh, spec, size)(narrow))
            narrow.delete()
            variable = like.replace(value)
        made.append((path, variable))
    return nnx.from_flat_state(made)


@lru_cache(maxsize=32)
def _widener(mesh: Mesh, spec: P, size: int) -> Any:
    axis = list(spec).index(EXPERT)
    body = partial(_widened, size=size, axis=axis)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, spec))
