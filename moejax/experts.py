"""Expert banks: the weights of all experts of a layer, and running rows through them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.activations import apply_activation
from moejax.config import ExpertsConfig
from moejax.exchange.budget import Budget
from moejax.exchange.modes import Rows
from moejax.exchange.permute import RowMap, gather_rows, sum_rows
from moejax.model.initializers import INIT_STD
from moejax.placement.arrays import Placement, gather_bank, home_slots, num_slots
from pallas_kernels.fused_experts import api as fused
from pallas_kernels.grouped_matmul.api import grouped_matmul, row_alignment
from pallas_kernels.route.api import sorted_places, sorted_tiles
from sharding import collectives
from sharding.mesh import EXPERT, TENSOR

__all__ = ["ExpertBank", "ExpertWeights", "explain_experts", "places_for", "run_experts"]


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


class ExpertBank(nnx.Module):
    """Independent experts, stored at home: [G·S, …] in logical order, padding slots zero.

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
        self.num_experts = num_experts
        hidden, num_in = config.hidden, config.num_in
        home_E = home_slots(num_experts, expert_devices)
        padded = expert_devices * num_slots(num_experts, expert_devices)

        def bank(shape: tuple[int, ...], scale: float, spec: P) -> nnx.Param:
            value = scale * jax.random.normal(rngs.params(), (num_experts, *shape), jnp.float32)
            if padded != num_experts:
                value = jnp.zeros((padded, *shape), jnp.float32).at[home_E].set(value)
            return nnx.Param(value, spec=spec, float32=False, home=tuple(map(int, home_E)))

        self.w_in = bank((d_model, num_in, hidden), INIT_STD, P(EXPERT, None, None, TENSOR))
        self.w_out = bank((hidden, d_model), output_std, P(EXPERT, TENSOR, None))
        self.b_in = self.b_out = nnx.data(None)
        if config.bias:
            self.b_in = bank((num_in, hidden), 0.0, P(EXPERT, None, TENSOR))
            self.b_out = bank((d_model,), 0.0, P(EXPERT, None))

    def weights(self, placement: Placement | None, dtype) -> ExpertWeights:
        """The weights of this device's slots, inside the shard_map.

        Args:
            placement: None computes every expert at home; otherwise copies are gathered there.
            dtype: dtype of the products.
        """

        def fetch(parameter: nnx.Param) -> jax.Array:
            value = parameter[...].astype(dtype)
            return value if placement is None else gather_bank(value, placement, self.num_experts)

        return ExpertWeights(
            fetch(self.w_in),
            fetch(self.w_out),
            None if self.b_in is None else fetch(self.b_in),
            None if self.b_out is None else _once_along_tensor(fetch(self.b_out)),
        )

    def run(
        self, rows: Rows, weights: ExpertWeights, *, budget: Budget, config: ExpertsConfig
    ) -> jax.Array:
        """As `run_experts`."""
        return run_experts(rows, weights, budget=budget, config=config)


def _once_along_tensor(bias: jax.Array) -> jax.Array:
    """A bias added to partial sums counts on one tensor rank; every rank gets its gradient."""
    bias = collectives.enter_parallel(bias, TENSOR)
    return jnp.where(collectives.axis_index(TENSOR) == 0, bias, jnp.zeros_like(bias))


def places_for(slots: int, assignments: int, alignment: int) -> int:
    """Room for all assignments, each slot's padded to a multiple of the alignment."""
    busy = min(slots, assignments)  # groups that can need padding at all
    places = assignments + busy * (alignment - 1)
    return -(-places // alignment) * alignment


def _sorted_layout(
    ids_RJ: jax.Array, slots: int, assignments: int, alignment: int
) -> tuple[RowMap, jax.Array]:
    """Places for assignments, sorted by slot, each slot's group padded to the alignment.

    Args:
        ids_RJ: int32 slots; S for none.
        slots: S.
        assignments: the most there can be.
        alignment: of the groups.

    Returns:
        the map (rows' assignments ↔ places), and group sizes int32 [S].
    """
    place_RJ, sizes_S, copy_A = sorted_places(
        ids_RJ,
        groups=slots,
        alignment=alignment,
        places=places_for(slots, assignments, alignment),
    )
    return RowMap(place_RJ, copy_A), sizes_S


def _case(d_model: int, hidden: int, config: ExpertsConfig, dtype: Any) -> fused.Case:
    return fused.Case(d_model, hidden, config.activation, dtype, bias=config.bias)


def explain_experts(d_model: int, config: ExpertsConfig, *, tensor: int, dtype: Any) -> str:
    """One line: what computes the experts on the default device, and why not something faster.

    Args:
        d_model: D.
        config: what an expert computes.
        tensor: devices that its hidden width is split over.
        dtype: of the products.
    """
    return fused.explain(_case(d_model, config.hidden // tensor, config, dtype))


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
        split over `tensor`. Zero for rows without an assignment here.
    """
    slots, d_model, num_in, hidden = weights.w_in_SDNH.shape
    assignments, dtype = min(budget.assignments, rows.ids_RJ.size), rows.x_RD.dtype
    if fused.kernels_serve(_case(d_model, hidden, config, dtype)):
        places = places_for(slots, assignments, fused.ROW_ALIGNMENT)
        place_RJ, sizes_S, copy_A, tiles = sorted_tiles(rows.ids_RJ, groups=slots, places=places)
        return fused.fused_experts(
            rows.x_RD,
            weights.w_in_SDNH,
            weights.w_out_SHD,
            rows.scores_RJ,
            place_RJ,
            copy_A,
            sizes_S,
            tiles=tiles,
            activation=config.activation,
        )

    alignment = row_alignment(assignments, slots, d_model, hidden, dtype)
    layout, sizes_S = _sorted_layout(rows.ids_RJ, slots, assignments, alignment)
    product = partial(grouped_matmul, group_sizes_G=sizes_S, alignment=alignment)
    x_AD = gather_rows(rows.x_RD, layout)
    h_ANH = product(x_AD, weights.w_in_SDNH.reshape(slots, d_model, num_in * hidden))
    h_ANH = h_ANH.reshape(-1, num_in, hidden)
    if weights.b_in_SNH is not None:
        h_ANH = h_ANH + _bias_of_places(weights.b_in_SNH, sizes_S, alignment, h_ANH.shape[0])
    y_AD = product(apply_activation(h_ANH, config.activation), weights.w_out_SHD)
    if weights.b_out_SD is not None:
        y_AD = y_AD + _bias_of_places(weights.b_out_SD, sizes_S, alignment, y_AD.shape[0])
    return sum_rows(y_AD, rows.scores_RJ, layout).astype(rows.x_RD.dtype)


def _bias_of_places(
    bias_S: jax.Array, sizes_S: jax.Array, alignment: int, places: int
) -> jax.Array:
    """Each place's bias [A, ...]; its gradient sums the places of a slot.

    A product with a column of ones: exact, and its backward sums in float32 and in a fixed order,
    as for any weight. Indexing would scatter-add in the bias's dtype, which in bfloat16 stops
    growing after a few hundred rows.
    """
    inside_A = jnp.arange(places, dtype=jnp.int32) < jnp.sum(sizes_S)
    bias_S1N = bias_S.reshape(bias_S.shape[0], 1, -1)
    column_A1 = inside_A[:, None].astype(bias_S.dtype)
    rows_AN = grouped_matmul(column_A1, bias_S1N, sizes_S, alignment=alignment)
    return rows_AN.reshape(places, *bias_S.shape[1:])
