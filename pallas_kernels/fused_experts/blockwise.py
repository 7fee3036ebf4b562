"""Experts of a group computed together, each member's hidden units weighted by its own score.

A row goes to a group once, however many of its members it has chosen. One product makes the hidden
units of all members, those of each are multiplied by the row's score of it, 0 where it was not
chosen, and one product sums:

    Σ_m s_m · (act(x @ w_in_m) @ w_out_m) = [s_1·act(x @ w_in_1), …, s_M·act(x @ w_in_M)] @ w_out

Both products are grouped ones of wide matrices, by the backend that serves them, and so are their
gradients. Shape letters: R rows, J assignments of a row, A places, Q groups, M members of a group,
S = Q·M slots, D model width, N input projections, H hidden width of a member.
"""

from __future__ import annotations

from functools import partial

from jax import numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.fused_experts.activations import activate
from pallas_kernels.fused_experts.grouped import blocks_of_places
from pallas_kernels.grouped_matmul.api import grouped_matmul, row_alignment
from pallas_kernels.row_map import RowMap, gather_rows, sum_rows

__all__ = ["by_groups", "wide_experts"]


def by_groups(
    ids_RJ: Int32[Array, "R J"], scores_RJ: Float32[Array, "R J"], *, groups: int, members: int
) -> tuple[Int32[Array, "R J"], Float32[Array, "R J M"]]:
    """Assignments to experts as assignments to groups, at most one of each to a row.

    Args:
        ids_RJ: slots from 0 to Q·M − 1, distinct within a row; others for none. Slot s is member
            s % M of group s // M.
        scores_RJ: their scores; of no slot anything.
        groups: Q.
        members: M.

    Returns:
        The group at the first assignment of a row to one of its members, Q elsewhere; the row's
        scores of that group's members, 0 of those not chosen. Gradients flow to the scores.
    """
    wanted_RJ = (ids_RJ >= 0) & (ids_RJ < groups * members)
    group_RJ = jnp.where(wanted_RJ, ids_RJ // members, groups)
    same_RJJ = (group_RJ[:, :, None] == group_RJ[:, None, :]) & wanted_RJ[:, None, :]
    before_JJ = jnp.tri(ids_RJ.shape[1], k=-1, dtype=bool)
    first_RJ = wanted_RJ & ~jnp.any(same_RJJ & before_JJ, axis=2)
    # One after the other: a sum of J terms of which one is not 0, without J·J·M numbers a row.
    scores_RJM = jnp.zeros((*ids_RJ.shape, members), jnp.float32)
    for j in range(ids_RJ.shape[1]):
        mine_RM = (ids_RJ[:, j, None] % members) == jnp.arange(members, dtype=jnp.int32)
        here_RJM = same_RJJ[:, :, j, None] & mine_RM[:, None]
        scores_RJM = scores_RJM + jnp.where(here_RJM, scores_RJ[:, j, None, None], 0.0)
    return jnp.where(first_RJ, group_RJ, groups), scores_RJM


def wide_experts(
    x_RD: Float[Array, "R D"],
    w_in_QDNH: Float[Array, "Q D N M*H"],
    w_out_QHD: Float[Array, "Q M*H D"],
    scores_RJM: Float32[Array, "R J M"],
    place_RJ: Int32[Array, "R J"],
    copy_A: Int32[Array, " A"],
    sizes_Q: Int32[Array, " Q"],
    *,
    activation: str,
    assignments: int,
    reserve_sms: int = 0,
    backend: str | None = None,
) -> Float[Array, "R D"]:
    """Rows through wide experts whose members have scores of their own.

    Args:
        x_RD: rows.
        w_in_QDNH: input projections in x's dtype, members' units next to each other.
        w_out_QHD: output projections likewise.
        scores_RJM: of the members of the group of each assignment, as `by_groups` makes them.
        place_RJ, copy_A, sizes_Q: as for `pallas_kernels.fused_experts.api.fused_experts`, of
            assignments to groups.
        activation: name.
        assignments: the most that have a place.
        reserve_sms: multiprocessors that the Hopper kernels leave free.
        backend: of the products, see `grouped_matmul`; None tries them in order.

    Returns:
        [R, D] in x's dtype, summed in float32. A unit is weighted in float32 and rounded once to
        x's dtype before the second product; in float32 the sums are the plain experts' but for
        their order.
    """
    groups, d_model, parts, wide = w_in_QDNH.shape
    members = scores_RJM.shape[2]
    block = row_alignment(assignments, groups, d_model, wide, x_RD.dtype)
    blocks, layout = blocks_of_places(
        place_RJ, copy_A, sizes_Q, assignments=assignments, block=block
    )
    product = partial(
        grouped_matmul,
        group_sizes_G=blocks.count_G * block,
        alignment=block,
        reserve_sms=reserve_sms,
        backend=backend,
    )
    h_AM = product(gather_rows(x_RD, layout), w_in_QDNH.reshape(groups, d_model, parts * wide))
    a_AMH = activate(h_AM, activation).reshape(len(h_AM), members, wide // members)
    # Each assignment is a source of its own here, and has one copy.
    alone = RowMap(layout.row_NJ.reshape(-1, 1), layout.copy_M)
    scores_AM = gather_rows(scores_RJM.reshape(-1, members), alone)
    weighted_AMH = (a_AMH.astype(jnp.float32) * scores_AM[..., None]).astype(x_RD.dtype)
    y_AD = product(weighted_AMH.reshape(len(h_AM), wide), w_out_QHD)
    return sum_rows(y_AD, None, layout).astype(x_RD.dtype)
