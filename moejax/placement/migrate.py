"""Weights that live in their slots, moved from one placement to another.

Where there is no master at home (serving), a placement's weights come from the slots they lie in.
A slot takes its expert from its own device if that has one, else from the holder whose link to it
is least used; then `moejax.placement.moves` carries them. A new placement is new arrays: nothing
is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32

from moejax.errors import UserError
from moejax.placement.moves import carry_out, make_moves
from moejax.placement.resident import is_resident
from sharding import collectives
from sharding.mesh import EXPERT, in_turn

__all__ = ["Migrator", "choose_sources", "migrate"]


def migrate(banks: Any, old_P: Int32[Array, " P"], new_P: Int32[Array, " P"]) -> Any:
    """A layer's weights in their new slots, inside the shard_map; bits are kept, no gradient.

    Args:
        banks: pytree of [S, …], any dtype: this device's slots now.
        old_P: int32 [G·S], the expert in each slot now; −1 for none.
        new_P: int32, the expert that each is to hold.

    Returns:
        pytree of [S, …]; slots that are to be empty, or whose expert is nowhere, are zero.
    """
    devices = collectives.axis_size(EXPERT)
    rows = old_P.shape[0] // devices
    # Few experts of a layer travel at a time: small buckets, which are not much padded then.
    bucket = max(1, rows // (8 * devices))
    return carry_out(banks, make_moves(choose_sources(old_P, new_P, devices), rows, bucket))


def choose_sources(old_P: jax.Array, new_P: jax.Array, devices: int) -> jax.Array:
    """The slot that each new slot is filled from; every device finds the same.

    A holder on the slot's device comes first. What only one device holds must come from there. The
    rest, slot by slot, from the holder that has sent least to this device so far, of those the one
    that has sent least to all: the fullest pair decides how many waves there are.

    Args:
        old_P: int32 [G·S], −1 for an empty slot.
        new_P: int32 [G·S'], likewise.
        devices: G.

    Returns:
        int32 [G·S'] slots of `old_P`; −1 where none holds the expert, or there is none.
    """
    old, new = old_P.shape[0], new_P.shape[0]
    from_P = jnp.arange(old, dtype=jnp.int32) // (old // devices)
    to_P = jnp.arange(new, dtype=jnp.int32) // (new // devices)
    holds_PQ = (new_P[:, None] == old_P) & (new_P >= 0)[:, None]
    here_PQ = holds_PQ & (to_P[:, None] == from_P)
    here_P = jnp.any(here_PQ, axis=1)
    holders_P = jnp.sum(holds_PQ, axis=1, dtype=jnp.int32)
    first_P = jnp.argmax(jnp.where(here_P[:, None], here_PQ, holds_PQ), axis=1).astype(jnp.int32)
    source_P = jnp.where(holders_P > 0, first_P, -1)

    open_P = ~here_P & (holders_P > 1)
    settled_P = (~here_P & (holders_P == 1)).astype(jnp.int32)
    pairs_GG = jnp.zeros((devices, devices), jnp.int32)
    pairs_GG = pairs_GG.at[from_P[first_P], to_P].add(settled_P)
    order_P = jnp.argsort(~open_P, stable=True).astype(jnp.int32)

    def one(carry: Any) -> Any:
        i, source_P, pairs_GG = carry
        slot = order_P[i]
        to = to_P[slot]
        cost_G = pairs_GG[:, to] * (new + 1) + jnp.sum(pairs_GG, axis=1, dtype=jnp.int32)
        cost_P = jnp.where(holds_PQ[slot], cost_G[from_P], jnp.iinfo(jnp.int32).max)
        best = jnp.argmin(cost_P).astype(jnp.int32)
        return i + 1, source_P.at[slot].set(best), pairs_GG.at[from_P[best], to].add(1)

    start = (jnp.zeros((), jnp.int32), source_P, pairs_GG)
    count = jnp.sum(open_P, dtype=jnp.int32)
    return lax.while_loop(lambda carry: carry[0] < count, one, start)[1]


class Migrator:
    """Moves the experts of a model's layers, a few layers at a call.

    One program serves all layers whose weights have the same shapes, whatever the placements.

    Example:
        >>> wide = resident_blueprint(blueprint, slots=10)
        >>> params = make_resident(params, blueprint, wide)
        >>> migrator = Migrator(wide)
        >>> params = migrator.move(params, present_LP, planned_LP, layers=[0, 1])

    Args:
        blueprint: from `resident_blueprint`.

    Raises:
        UserError: its experts do not lie in slots.
    """

    def __init__(self, blueprint: Any):
        self._blueprint = blueprint
        self._places = [
            (group.name, index if group.scanned else None)
            for group in blueprint.groups
            if group.layer.moe is not None
            for index in range(group.size)
        ]
        self._paths: dict[str, list[tuple]] = {name: [] for name, _ in self._places}
        sizes = set()
        for path, variable in nnx.to_flat_state(blueprint.params):
            if is_resident(variable):
                self._paths[str(path[1])].append(path)
                sizes.add(variable.get_value().shape[list(_spec(variable)).index(EXPERT)])
        if not all(self._paths.values()) or not sizes:
            raise UserError(
                "Migrator of a model whose experts are at home: make them resident first, see "
                "moejax.placement.resident"
            )
        (self._slots,) = sizes  # of all devices: G·S
        self._programs: dict[Any, Any] = {}

    def move(
        self,
        params: Any,
        old_LP: np.ndarray,
        new_LP: np.ndarray,
        layers: Sequence[int] | None = None,
    ) -> Any:
        """Moves the experts of some layers; the buffers of what is moved are given up.

        The devices are only told to: the call returns before they have done it, and what is
        started afterwards with the new weights waits for them.

        Args:
            params: weights of the model, resident.
            old_LP: int [L_moe, G·S], the expert in each slot now, −1 for none.
            new_LP: int, likewise, as it is to be.
            layers: which of the MoE layers, counted from 0; None: all. Where nothing changes
                nothing is done.

        Returns:
            the weights with these layers moved.

        Raises:
            UserError: the arrays do not fit the model, or an expert would be lost.
        """
        old_LP, new_LP = (np.asarray(a, np.int32) for a in (old_LP, new_LP))
        chosen = range(len(self._places)) if layers is None else layers
        self._check(old_LP, new_LP, chosen)
        variables = dict(nnx.to_flat_state(params))
        for layer in chosen:
            if np.array_equal(old_LP[layer], new_LP[layer]):
                continue
            self._move(variables, layer, old_LP[layer], new_LP[layer])
        return nnx.from_flat_state(list(variables.items()))

    def warm_up(self, params: Any, slots_LP: np.ndarray) -> Any:
        """Compiles all that `move` may need, by moving experts to where they are.

        Args:
            params: weights of the model, resident; the buffers of a few layers are given up.
            slots_LP: int [L_moe, G·S], the expert in each slot.

        Returns:
            the weights, the same.
        """
        slots_LP = np.asarray(slots_LP, np.int32)
        first = {name: layer for layer, (name, _) in reversed([*enumerate(self._places)])}
        self._check(slots_LP, slots_LP, list(first.values()))
        variables, known = dict(nnx.to_flat_state(params)), set()
        for name, layer in first.items():
            banks = [variables[path] for path in self._paths[name]]
            kind = tuple((v.get_value().shape, v.get_value().dtype, _spec(v)) for v in banks)
            if kind not in known:
                known.add(kind)
                self._move(variables, layer, slots_LP[layer], slots_LP[layer])
        return nnx.from_flat_state(list(variables.items()))

    def _move(self, variables: Any, layer: int, old_P: np.ndarray, new_P: np.ndarray) -> None:
        name, index = self._places[layer]
        banks = tuple(variables[path] for path in self._paths[name])
        program = self._program(tuple(map(_spec, banks)))
        values = tuple(bank.get_value() for bank in banks)
        moved = program(values, np.int32(index or 0), old_P, new_P)
        moved = in_turn(self._blueprint.mesh, moved)
        for path, bank, value in zip(self._paths[name], banks, moved, strict=True):
            variables[path] = bank.replace(value)

    def compiled(self) -> int:
        """How many programs have been compiled."""
        return sum(program._cache_size() for program in self._programs.values())

    def _check(self, old_LP: np.ndarray, new_LP: np.ndarray, layers: Sequence[int]) -> None:
        wanted = (len(self._places), self._slots)
        for name, array in ("old", old_LP), ("new", new_LP):
            if array.shape != wanted:
                raise UserError(
                    f"migration with {name} slots of shape {array.shape}: must be {wanted}, the "
                    "MoE layers and the slots of all devices"
                )
        experts = np.arange(self._blueprint.config.moe.router.num_experts)
        for layer in layers:
            if not 0 <= layer < wanted[0]:
                raise UserError(
                    f"migration of layer {layer}: must lie between 0 and {wanted[0] - 1}"
                )
            for name, array in ("old", old_LP), ("new", new_LP):
                lacking = np.setdiff1d(experts, array[layer])
                strange = np.setdiff1d(array[layer], [-1, *experts])
                if strange.size or lacking.size:
                    what = f"expert {strange[0]}" if strange.size else f"no expert {lacking[0]}"
                    raise UserError(
                        f"migration with {what} in the {name} slots of layer {layer}: they must "
                        f"hold each of 0 to {experts[-1]} at least once, and -1 where empty"
                    )

    def _program(self, specs: tuple[P, ...]) -> Callable[..., Any]:
        if specs not in self._programs:
            stacked = [list(spec).index(EXPERT) == 1 for spec in specs]
            assert len(set(stacked)) == 1

            def body(banks: Any, index: jax.Array, old_P: jax.Array, new_P: jax.Array) -> Any:
                if not stacked[0]:
                    return migrate(banks, old_P, new_P)
                layer = [lax.dynamic_index_in_dim(b, index, keepdims=False) for b in banks]
                moved = migrate(layer, old_P, new_P)
                return tuple(
                    lax.dynamic_update_index_in_dim(bank, new, index, 0)
                    for bank, new in zip(banks, moved, strict=True)
                )

            mapped = jax.shard_map(
                body,
                mesh=self._blueprint.mesh,
                in_specs=(specs, P(), P(), P()),
                out_specs=specs,
                check_vma=False,
            )
            # Spelt as they were: with other words for the same split, what takes the weights next
            # would be looked up anew.
            shardings = tuple(NamedSharding(self._blueprint.mesh, spec) for spec in specs)
            self._programs[specs] = jax.jit(mapped, donate_argnums=0, out_shardings=shardings)
        return self._programs[specs]


def _spec(variable: nnx.Variable) -> P:
    return variable.get_metadata()["spec"]
