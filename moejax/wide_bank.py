"""Experts that are computed in groups: stored side by side, each group as one wide expert.

Routing, losses and what experts compute are those of single experts; `ExpertsConfig.together` says
how many are computed at once. A token goes to a group once and is multiplied with all its members,
those it has not chosen included: fewer rows, more products, exact
(`pallas_kernels.fused_experts.blockwise`). It pays where tokens choose most of a group, which they
do where experts that are chosen together lie together (`moejax.compress`, `--group.routing
experts`), if anywhere.

Members' input projections lie next to each other in what is stored, so that no call copies them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.config import ExpertsConfig
from moejax.errors import UserError
from moejax.exchange.budget import Budget
from moejax.exchange.modes import Rows
from moejax.experts import at_home, places_for
from moejax.model.initializers import INIT_STD
from moejax.placement.arrays import Placement
from pallas_kernels.fused_experts.blockwise import by_groups, wide_experts
from pallas_kernels.grouped_matmul.api import Case, explain
from pallas_kernels.hopper.tiles import ROWS
from pallas_kernels.route.api import sorted_tiles
from sharding import collectives
from sharding.mesh import EXPERT, TENSOR

__all__ = ["WideExpertBank", "WideWeights", "laid_wide"]


Weights = TypeVar("Weights", jax.Array, np.ndarray)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WideWeights:
    """Weights of a device's Q groups of M experts.

    w_in_QDNH: input projections [Q, D, N, M·H].
    w_out_QHD: output projections [Q, M·H, D].
    """

    w_in_QDNH: jax.Array
    w_out_QHD: jax.Array


def laid_wide(w_in_EDNH: Weights, w_out_EHD: Weights, members: int) -> tuple[Weights, Weights]:
    """The projections of neighbouring experts side by side, of JAX or of numpy.

    Args:
        w_in_EDNH, w_out_EHD: of single experts, [E, D, N, H] and [E, H, D].
        members: M, a divisor of E.

    Returns:
        [E/M, D, N, M·H] and [E/M, M·H, D].
    """
    E, D, N, H = w_in_EDNH.shape
    w_in = w_in_EDNH.reshape(E // members, members, D, N, H).transpose(0, 2, 3, 1, 4)
    return (
        w_in.reshape(E // members, D, N, members * H),
        w_out_EHD.reshape(E // members, members * H, -1),
    )


class WideExpertBank(nnx.Module):
    """Takes the place of an `ExpertBank` where `ExpertsConfig.together` says so.

    Args:
        d_model: D.
        num_experts: E.
        config: what one expert computes, and how many are computed together.
        expert_devices: G, the size of the mesh's `expert` axis.
        rngs: source of the initial weights; the values are those of an `ExpertBank`.
        output_std: standard deviation of the output projections' initial values.

    Raises:
        UserError: a group would lie on two devices.
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
        self.members = config.together
        if num_experts % (expert_devices * self.members):
            raise UserError(
                f"together={self.members} with {num_experts} experts on {expert_devices} devices: "
                "each must hold whole groups; take a number of devices along expert that divides "
                f"{num_experts // self.members}"
            )

        def drawn(scale: float, *shape: int) -> jax.Array:
            return scale * jax.random.normal(rngs.params(), (num_experts, *shape), jnp.float32)

        w_in = drawn(INIT_STD, d_model, config.num_in, config.hidden)
        w_out = drawn(output_std, config.hidden, d_model)
        w_in, w_out = laid_wide(w_in, w_out, self.members)
        self.w_in = at_home(w_in, expert_devices, P(EXPERT, None, None, None))
        self.w_out = at_home(w_out, expert_devices, P(EXPERT, None, None))

    def weights(self, placement: Placement | None, dtype) -> WideWeights:
        """The weights of this device's groups, inside the shard_map.

        Args:
            placement: must be None.
            dtype: dtype of the products.

        Raises:
            UserError: there is a placement, or the mesh has devices along `tensor`.
        """
        if placement is not None:
            raise UserError(
                f"a placement with together={self.members}: slots hold single experts; set "
                "together=1, or leave the placement out"
            )
        tensor = collectives.axis_size(TENSOR)
        if tensor > 1:
            raise UserError(
                f"together={self.members} on a mesh of tensor={tensor}: a group's hidden units "
                "would be split between its members; set together=1, or tensor=1"
            )
        return WideWeights(self.w_in[...].astype(dtype), self.w_out[...].astype(dtype))

    def make_resident(self, slots: int) -> None:
        """Groups have no slots.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"make_resident with slots={slots}, of experts that are computed together: slots hold "
            "single experts; set together=1"
        )

    def explain(
        self, config: ExpertsConfig, widths: tuple[int, int], *, dtype: Any, tensor: int = 1
    ) -> str:
        """As `ExpertBank.explain`, of the two products."""
        wide = config.hidden * self.members
        up = explain(Case(ROWS, widths[0], config.num_in * wide, ROWS, dtype))
        down = explain(Case(ROWS, wide, widths[1], ROWS, dtype))
        return f"experts computed {self.members} together: up {up}; down {down}"

    def explain_sending(
        self, budget: Budget, config: ExpertsConfig, widths: tuple[int, int], dtype, tensor: int
    ) -> str:
        """As `ExpertBank.explain_sending`."""
        return "remote_experts: not used: experts are computed together"

    def run(
        self, rows: Rows, weights: WideWeights, *, budget: Budget, config: ExpertsConfig
    ) -> jax.Array:
        """As `moejax.experts.run_experts`."""
        groups = len(weights.w_in_QDNH)
        group_RJ, scores_RJM = by_groups(
            rows.ids_RJ, rows.scores_RJ, groups=groups, members=self.members
        )
        # A row has at most all groups of a device.
        most = min(group_RJ.size, len(group_RJ) * groups)
        assignments = min(budget.assignments, most)
        places = places_for(groups, assignments)
        place_RJ, sizes_Q, copy_A, _ = sorted_tiles(group_RJ, groups=groups, places=places)
        return wide_experts(
            rows.x_RD,
            weights.w_in_QDNH,
            weights.w_out_QHD,
            scores_RJM,
            *(place_RJ, copy_A, sizes_Q),
            activation=config.activation,
            assignments=assignments,
            reserve_sms=budget.reserve_sms,
        )
