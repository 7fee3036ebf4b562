"""Experts that share parameters: each one's matrices are made of its own parts and common ones.

What is an expert's own is stored at home as in `ExpertBank`, and is all that travels when a
placement copies experts. What they share is on every device along `expert`, so its gradient is
summed over `data` and `expert`; a basis of M matrices takes less memory of a device than its own
experts would where it has more than M of them.

A call makes the matrices of a device's slots from both, and what computes with them knows nothing
of it. With remat="none" these are kept for the backward of each layer: S experts in the compute
dtype, as copies are that a placement fetches; otherwise they are made again, one layer's at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import ExpertsConfig
from moejax.errors import UserError
from moejax.exchange.budget import Budget
from moejax.exchange.modes import Rows
from moejax.experts import (
    ExpertBank,
    ExpertWeights,
    at_home,
    case_of,
    explain_sending,
    once_along_tensor,
    run_experts,
)
from moejax.model.initializers import INIT_STD, make_normal
from moejax.placement.arrays import Placement
from moejax.placement.resident import in_slots
from pallas_kernels.fused_experts import api as fused
from pallas_kernels.precision import precision_of
from sharding import collectives
from sharding.mesh import EXPERT, TENSOR

__all__ = ["ExpandedExpertBank", "SharedExpertBank", "expanded"]

SPECS = {
    "w_in": P(EXPERT, None, None, TENSOR),
    "w_out": P(EXPERT, TENSOR, None),
    "b_in": P(EXPERT, None, TENSOR),
    "b_out": P(EXPERT, None),
    "c_in": P(EXPERT, None),
    "c_out": P(EXPERT, None),
    "w_shared": P(None, None, TENSOR),
    "w_basis_in": P(None, None, None, TENSOR),
    "w_basis_out": P(None, TENSOR, None),
}
"""How each part is split. Combinations of a basis are whole along `tensor`."""


def expanded(own: Mapping[str, jax.Array], shared: Mapping[str, jax.Array]) -> ExpertWeights:
    """The matrices of some experts, in the dtype of their parts.

    Combinations are summed in float32 and rounded once, and so are gradients of shared parts over
    the slots. A basis costs 2·S·M·D·H·(N + 1) operations, three times that with its gradients and a
    fourth where a layer is recomputed, however many tokens there are.

    Args:
        own: parts of S experts by name, [S, …], see `SharingConfig.own`; b_in and b_out, if any.
        shared: parts of all, see `SharingConfig.shared`.
    """
    slots = next(iter(own.values())).shape[0]
    if "c_in" in own:
        w_in = _combined(own["c_in"], shared["w_basis_in"])
        w_out = _combined(own["c_out"], shared["w_basis_out"])
    else:
        w_in, w_out = _for_each(shared["w_shared"], slots), own["w_out"]
        if "w_in" in own:  # the gate, which comes first
            w_in = jnp.concatenate([own["w_in"], w_in], axis=2)
    return ExpertWeights(w_in, w_out, own.get("b_in"), own.get("b_out"))


def _for_each(part: jax.Array, slots: int) -> jax.Array:
    """[S, *part]; the gradient is summed over the slots in float32."""
    wide = part.astype(jnp.float32)[None]
    return jnp.broadcast_to(wide, (slots, *part.shape)).astype(part.dtype)


def _combined(c_SM: jax.Array, basis: jax.Array) -> jax.Array:
    """Σ_m c_sm·basis_m: [S, …]."""
    flat_MF = basis.reshape(len(basis), -1)
    # A product without a batch is what remat="dots" keeps for the backward.
    flat_ZSF = jnp.einsum(
        "zsm,zmf->zsf",
        c_SM[None],
        flat_MF[None],
        precision=precision_of(basis.dtype),
        preferred_element_type=jnp.float32,
    )
    return flat_ZSF[0].astype(basis.dtype).reshape(len(c_SM), *basis.shape[1:])


class SharedExpertBank(nnx.Module):
    """Takes the place of an `ExpertBank` where `ExpertsConfig.sharing` says so.

    An expert's matrices have the deviation at first that those of independent experts have, and
    those of a basis are combined by vectors of length 1. Optimizers do not decay these (by name,
    see `moejax.training.optimizer`): their scale multiplies that of the basis, which is decayed.

    Args:
        d_model: D.
        num_experts: E.
        config: what one expert computes, and what they share.
        expert_devices: G, the size of the mesh's `expert` axis.
        rngs: source of the initial weights; the values do not depend on G.
        output_std: standard deviation of the output projections' initial values.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        config: ExpertsConfig,
        *,
        expert_devices: int,
        rngs: nnx.Rngs,
        output_std: float = INIT_STD,
    ) -> None:
        self.num_experts, self.expert_devices = num_experts, expert_devices
        sizes = d_model, config.num_in, config.hidden, d_model
        own, shared = config.sharing.own(*sizes), config.sharing.shared(*sizes)
        if config.bias:
            own |= {"b_in": (config.num_in, config.hidden), "b_out": (d_model,)}
        self.own, self.common = tuple(own), tuple(shared)
        stds = {"w_out": output_std, "w_basis_out": output_std}
        for name, shape in own.items():
            shape = (num_experts, *shape)
            if name.startswith("b"):
                value = jnp.zeros(shape, jnp.float32)
            else:
                value = jax.random.normal(rngs.params(), shape, jnp.float32)
                if name.startswith("c"):
                    value = value / jnp.linalg.norm(value, axis=1, keepdims=True)
                else:
                    value = value * stds.get(name, INIT_STD)
            setattr(self, name, at_home(value, expert_devices, SPECS[name]))
        for name, shape in shared.items():
            setattr(self, name, make_normal(rngs, shape, SPECS[name], stds.get(name, INIT_STD)))

    def parts(self, dtype: Any = None) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """What is each expert's own, and what they share, by name, as it is stored.

        Args:
            dtype: None leaves that in which it is stored.
        """

        def cast(names: tuple[str, ...]) -> dict[str, jax.Array]:
            values = {name: getattr(self, name)[...] for name in names}
            return {name: value.astype(dtype or value.dtype) for name, value in values.items()}

        return cast(self.own), cast(self.common)

    def weights(self, placement: Placement | None, dtype) -> ExpertWeights:
        """The matrices of this device's slots, inside the shard_map; as for `ExpertBank`.

        Args:
            placement: None makes every expert's at home; otherwise own parts are fetched from
                there.
            dtype: dtype of the products.
        """
        own, shared = self.parts(dtype)
        for name in "c_in", "c_out":
            if name in own:  # each tensor rank has a share of what is combined
                own[name] = collectives.enter_parallel(own[name], TENSOR)
        own = in_slots(own, placement, self.num_experts, resident=False)
        weights = expanded(own, shared)
        if weights.b_out_SD is None:
            return weights
        return replace(weights, b_out_SD=once_along_tensor(weights.b_out_SD))

    def make_resident(self, slots: int) -> None:
        """Shared parts have no slots.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"make_resident with slots={slots}, of experts that share parameters: slots hold whole "
            "experts; make them independent first (MoELayer.expand_experts, of a whole model "
            "moejax.compress.sharing.expand_model)"
        )

    def explain(
        self, config: ExpertsConfig, widths: tuple[int, int], *, dtype: Any, tensor: int = 1
    ) -> str:
        """As `ExpertBank.explain`."""
        return fused.explain(case_of(config, widths, dtype, tensor))

    def explain_sending(
        self, budget: Budget, config: ExpertsConfig, widths: tuple[int, int], dtype, tensor: int
    ) -> str:
        """As `ExpertBank.explain_sending`."""
        return explain_sending(budget, case_of(config, widths, dtype, tensor))

    def run(
        self, rows: Rows, weights: ExpertWeights, *, budget: Budget, config: ExpertsConfig
    ) -> jax.Array:
        """As `moejax.experts.run_experts`."""
        return run_experts(rows, weights, budget=budget, config=config)


class ExpandedExpertBank(ExpertBank):
    """Independent experts that compute what those of a bank with shared parts do.

    Args:
        bank: keeps its parts; outside of a shard_map.
    """

    def __init__(self, bank: SharedExpertBank) -> None:
        self.num_experts, self.expert_devices = bank.num_experts, bank.expert_devices
        self.resident = False
        stored = getattr(bank, bank.own[0])
        home = stored.get_metadata()["home"]
        home_E = jnp.asarray(home, jnp.int32)

        def whole(own: Any, shared: Any) -> dict[str, jax.Array]:
            made = expanded(own, shared)
            arrays = (made.w_in_SDNH, made.w_out_SHD, made.b_in_SNH, made.b_out_SD)
            named = {n: a for n, a in zip(("w_in", "w_out", "b_in", "b_out"), arrays)}
            # Shared parts are in padding slots, too.
            return {
                name: jnp.zeros_like(a).at[home_E].set(a[home_E])
                for name, a in named.items()
                if a is not None
            }

        parts = bank.parts()
        where = getattr(stored.get_value(), "sharding", None)
        shardings = None
        if isinstance(where, NamedSharding):
            names = jax.eval_shape(whole, *parts)
            shardings = {name: NamedSharding(where.mesh, SPECS[name]) for name in names}
        made = jax.jit(whole, out_shardings=shardings)(*parts)
        self.b_in = self.b_out = nnx.data(None)
        for name, value in made.items():
            setattr(self, name, nnx.Param(value, spec=SPECS[name], float32=False, home=home))
