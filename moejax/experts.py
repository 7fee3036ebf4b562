"""Expert banks: the weights of all experts of a layer, and running rows through them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.config import ExpertsConfig
from moejax.exchange.budget import Budget
from moejax.exchange.modes import Rows
from moejax.model.initializers import INIT_STD
from moejax.placement.arrays import Placement, home_slots, num_slots
from moejax.placement.resident import in_slots, resident
from pallas_kernels.fused_experts import api as fused
from pallas_kernels.fused_experts import remote
from pallas_kernels.fused_experts.remote import PushedRows, remote_experts
from pallas_kernels.hopper.tiles import TileMap
from pallas_kernels.route.api import sorted_tiles
from sharding import collectives
from sharding.mesh import EXPERT, TENSOR

__all__ = [
    "ExpertBank",
    "ExpertWeights",
    "at_home",
    "case_of",
    "explain_sending",
    "lay_out",
    "once_along_tensor",
    "places_for",
    "run_experts",
    "with_kernels",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertWeights:
    """Weights of a device's S slots, split over `tensor` along H.

    w_in_SDNH: input projections; N is 2 for gated activations (gate, then up), else 1.
    w_out_SHD: output projection.
    b_in_SNH, b_out_SD: biases or None.
    """

    w_in_SDNH: jax.Array
    w_out_SHD: jax.Array
    b_in_SNH: jax.Array | None
    b_out_SD: jax.Array | None


def at_home(value: jax.Array, devices: int, spec: P) -> nnx.Param:
    """A parameter of a bank, stored at home: [G·S, …], padding slots zero.

    Args:
        value: float32 [E, …], in logical order.
        devices: G.
        spec: how it is split.
    """
    experts = len(value)
    home_E = home_slots(experts, devices)
    padded = devices * num_slots(experts, devices)
    if padded != experts:
        value = jnp.zeros((padded, *value.shape[1:]), value.dtype).at[home_E].set(value)
    return nnx.Param(value, spec=spec, float32=False, home=tuple(map(int, home_E)))


class ExpertBank(nnx.Module):
    """Independent experts, stored at home: [G·S, …] in logical order, padding slots zero.

    After `make_resident` they are stored where they are computed instead, for inference.

    Args:
        d_model: D.
        num_experts: E.
        config: what one expert computes.
        expert_devices: G, the size of the mesh's `expert` axis.
        rngs: source of the initial weights; the values do not depend on G.
        output_std: standard deviation of the output projection's initial values.
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
        self.resident = False
        hidden, num_in = config.hidden, config.num_in

        def bank(shape: tuple[int, ...], scale: float, spec: P) -> nnx.Param:
            value = scale * jax.random.normal(rngs.params(), (num_experts, *shape), jnp.float32)
            return at_home(value, expert_devices, spec)

        self.w_in = bank((d_model, num_in, hidden), INIT_STD, P(EXPERT, None, None, TENSOR))
        self.w_out = bank((hidden, d_model), output_std, P(EXPERT, TENSOR, None))
        self.b_in = self.b_out = nnx.data(None)
        if config.bias:
            self.b_in = bank((num_in, hidden), 0.0, P(EXPERT, None, TENSOR))
            self.b_out = bank((d_model,), 0.0, P(EXPERT, None))

    def weights(self, placement: Placement | None, dtype) -> ExpertWeights:
        """The weights of this device's slots, inside the shard_map.

        Args:
            placement: None computes every expert at home; otherwise copies are fetched from there,
                unless the weights lie in their slots already.
            dtype: dtype of the products.

        Raises:
            UserError: the weights are resident and there is no placement, or one of other slots.
        """

        def cast(parameter: nnx.Param | None) -> Any:
            return None if parameter is None else parameter[...].astype(dtype)

        stored = ExpertWeights(*map(cast, (self.w_in, self.w_out, self.b_in, self.b_out)))
        weights = in_slots(stored, placement, self.num_experts, resident=self.resident)
        if weights.b_out_SD is None:
            return weights
        return replace(weights, b_out_SD=once_along_tensor(weights.b_out_SD))

    def make_resident(self, slots: int) -> None:
        """Stores the weights in slots, where `moejax.placement.migrate` moves them about.

        Afterwards every expert is in the first slots of its home device and the others are empty
        (`moejax.placement.arrays.slots_at_home`), no call exchanges weights, each needs a
        placement, and the layer only infers: nothing sums the gradients of replicas.

        Args:
            slots: S of a device, at least those at home.

        Raises:
            UserError: there are too few slots, or it is done already.
        """
        for name in "w_in", "w_out", "b_in", "b_out":
            parameter = getattr(self, name)
            if parameter is not None:
                setattr(self, name, resident(parameter, self.expert_devices, slots))
        self.resident = True

    def change(self, change: Callable[[ExpertWeights], ExpertWeights]) -> None:
        """Replaces the stored weights, all slots' together; outside of a shard_map."""
        b_in, b_out = (None if b is None else b[...] for b in (self.b_in, self.b_out))
        changed = change(ExpertWeights(self.w_in[...], self.w_out[...], b_in, b_out))
        self.w_in.set_value(changed.w_in_SDNH)
        self.w_out.set_value(changed.w_out_SHD)
        if self.b_in is not None:
            self.b_in.set_value(changed.b_in_SNH)
        if self.b_out is not None:
            self.b_out.set_value(changed.b_out_SD)

    def explain(
        self, config: ExpertsConfig, widths: tuple[int, int], *, dtype: Any, tensor: int = 1
    ) -> str:
        """One line: what computes the experts on the default device, and why not something faster.

        Args:
            config: as for `run`.
            widths: columns of the rows that come and of those that go.
            dtype: of the rows.
            tensor: devices that the hidden width is split over.
        """
        return fused.explain(case_of(config, widths, dtype, tensor))

    def explain_sending(
        self, budget: Budget, config: ExpertsConfig, widths: tuple[int, int], dtype, tensor: int
    ) -> str:
        """One line on mode `remote`: whether the experts' kernels send rows, or why not.

        Args:
            budget: static sizes.
            config, widths, dtype, tensor: as for `explain`.
        """
        return explain_sending(budget, case_of(config, widths, dtype, tensor))

    def run(
        self, rows: Rows, weights: ExpertWeights, *, budget: Budget, config: ExpertsConfig
    ) -> jax.Array:
        """As `run_experts`."""
        return run_experts(rows, weights, budget=budget, config=config)


def once_along_tensor(bias: jax.Array) -> jax.Array:
    """A bias added to partial sums counts on one tensor rank; every rank gets its gradient."""
    bias = collectives.enter_parallel(bias, TENSOR)
    return jnp.where(collectives.axis_index(TENSOR) == 0, bias, jnp.zeros_like(bias))


def case_of(config: ExpertsConfig, widths: tuple[int, int], dtype: Any, tensor: int) -> fused.Case:
    """What the experts' kernels are asked for; arguments as of `ExpertBank.explain`."""
    (d_model, d_out), hidden = widths, config.hidden // tensor
    return fused.Case(d_model, hidden, config.activation, dtype, config.bias, d_out)


def explain_sending(budget: Budget, case: fused.Case) -> str:
    """As `ExpertBank.explain_sending`."""
    reason = _why_apart(budget, case)
    return f"remote_experts: {'mosaic_gpu' if reason is None else f'not used: {reason}'}"


def places_for(slots: int, assignments: int) -> int:
    """Room for all assignments, each slot's padded to a multiple of `fused.ROW_ALIGNMENT`."""
    busy = min(slots, assignments)  # groups that can need padding at all
    places = assignments + busy * (fused.ROW_ALIGNMENT - 1)
    return -(-places // fused.ROW_ALIGNMENT) * fused.ROW_ALIGNMENT


def lay_out(rows: Rows, slots: int, budget: Budget) -> tuple[int, tuple[jax.Array, ...], TileMap]:
    """Places for the assignments that arrived, each slot's in whole tiles.

    Args:
        rows: what arrived in this wave.
        slots: S.
        budget: static sizes.

    Returns:
        the most assignments there can be; the place of each, the flat assignment at each place, and
        the slots' sizes, as the kernels' functions take them; the tiles.
    """
    assignments = min(budget.assignments, rows.ids_RJ.size)
    places = places_for(slots, assignments)
    place_RJ, sizes_S, copy_A, tiles = sorted_tiles(rows.ids_RJ, groups=slots, places=places)
    return assignments, (place_RJ, copy_A, sizes_S), tiles


def with_kernels(budget: Budget, weights: ExpertWeights, config: ExpertsConfig, dtype) -> Budget:
    """The budget, `fused` where the experts' kernels can send the rows themselves.

    Args:
        budget: static sizes.
        weights: of this device's slots.
        config: what an expert computes.
        dtype: of the rows.
    """
    if budget.mode != "remote":
        return budget
    _, d_model, _, hidden = weights.w_in_SDNH.shape
    d_out = weights.w_out_SHD.shape[2]
    case = fused.Case(d_model, hidden, config.activation, dtype, config.bias, d_out)
    return replace(budget, fused=_why_apart(budget, case) is None)


def _why_apart(budget: Budget, case: fused.Case) -> str | None:
    """Why the experts' kernels cannot send the rows of mode `remote`; None if they can."""
    if any(form != "compute" for form in budget.wire.formats):
        return "rows are rounded on the wire"
    return remote.refusal(case)


def run_experts(
    rows: Rows, weights: ExpertWeights, *, budget: Budget, config: ExpertsConfig
) -> jax.Array:
    """Runs each row through its experts and sums their weighted outputs.

    Args:
        rows: what arrived in this wave.
        weights: of this device's slots, in the rows' dtype.
        budget: static sizes.
        config: what an expert computes.

    Returns:
        [R, D] in the rows' dtype, summed in float32 and rounded once; partial sums when H is
        split over `tensor`. Zero for rows without an assignment here. Of rows that the kernels
        send themselves, the sums at home: float32 [T, D].
    """
    assignments, layout, tiles = lay_out(rows, weights.w_in_SDNH.shape[0], budget)
    if isinstance(rows.routes, PushedRows):
        return remote_experts(
            rows.x_RD,
            weights.w_in_SDNH,
            weights.w_out_SHD,
            rows.scores_RJ,
            *layout,
            rows=rows.routes,
            activation=config.activation,
            tiles=tiles,
            assignments=assignments,
            reserve_sms=budget.reserve_sms,
        )
    return fused.fused_experts(
        rows.x_RD,
        weights.w_in_SDNH,
        weights.w_out_SHD,
        rows.scores_RJ,
        *layout,
        b_in_SNH=weights.b_in_SNH,
        b_out_SD=weights.b_out_SD,
        assignments=assignments,
        tiles=tiles,
        activation=config.activation,
        reserve_sms=budget.reserve_sms,
    )
