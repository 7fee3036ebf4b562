"""Experts whose kernels move the rows themselves: dispatch → experts → combine on NVIDIA GPUs.

Forward: the first product receives this device's tokens and writes them where they belong while it
multiplies what has arrived (`exchange.arrivals`); after the second one the weighted sums are
written home (`exchange.sums`). Backward the same with cotangents: they are spread, and the rows'
cotangents are summed as they go home.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import jax
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.exchange import mosaic_gpu as pushing_kernel
from pallas_kernels.exchange import push
from pallas_kernels.exchange.arrivals import Arrivals, Arriving
from pallas_kernels.exchange.pushing import Pusher
from pallas_kernels.exchange.received import received
from pallas_kernels.exchange.sums import push_sums
from pallas_kernels.fused_experts import api, mosaic_gpu
from pallas_kernels.hopper.compat import sm_count
from pallas_kernels.hopper.tiles import COMPUTE, ROWS, TileMap

__all__ = ["PushedRows", "group_slots", "refusal", "remote_experts"]

GROUPS = 16  # in which a device's rows arrive, at most
BLOCKS = 16  # that write rows while the others multiply
PUSH_BYTES = 300e9  # a second, of a device that writes to all others while it multiplies
PRODUCT_FLOPS = 4.9e12  # a second, a multiprocessor's


def group_slots(slots: int) -> int:
    """Slots of a group: rows arrive ordered by the group of their first slot."""
    return -(-slots // GROUPS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PushedRows:
    """Which rows travel; entries as in `exchange.push`.

    out_M: int32 [M], of this device's tokens, sorted by the group of the row's first slot there.
    firsts_Q: int32 [Q + 1], where the groups begin in it, and the end of the last.
    back_M: int32 [M], of the rows received.
    goes_GT: bool, whether token t of this device has a row on device g.
    axis: mesh axis of size G.
    expected: rows that a device sends to others, about.
    """

    out_M: Int32[Array, " M"]
    firsts_Q: Int32[Array, " Q+1"]
    back_M: Int32[Array, " M"]
    goes_GT: Bool[Array, "G T"]
    axis: str = field(metadata={"static": True})
    expected: float = field(metadata={"static": True})


def refusal(case: api.Case, *, forced: bool = False) -> str | None:
    """Why these kernels cannot serve a layer; None if they can.

    Args:
        case: what is asked.
        forced: do not look at the devices.
    """
    return push.refusal("mosaic_gpu", forced) or api.refusal("mosaic_gpu", case, forced=forced)


def remote_experts(
    x_TD: Float[Array, "T D"],
    w_in_SDNH: Float[Array, "S D N H"],
    w_out_SHD: Float[Array, "S H D'"],
    scores_RJ: Float32[Array, "R J"],
    place_RJ: Int32[Array, "R J"],
    copy_A: Int32[Array, " A"],
    sizes_S: Int32[Array, " S"],
    *,
    rows: PushedRows,
    activation: str,
    tiles: TileMap,
    assignments: int,
    reserve_sms: int = 0,
) -> Float32[Array, "T D'"]:
    """The experts' weighted outputs for this device's tokens, whichever device computes them.

    Args:
        x_TD: this device's tokens, bfloat16.
        w_in_SDNH, w_out_SHD: as for `api.fused_experts`.
        scores_RJ: of the tokens of all devices, R = G·T.
        place_RJ, copy_A, sizes_S, tiles, assignments: layout of the assignments computed here.
        rows: which tokens go where.
        activation, reserve_sms: as there; the kernels that only send leave them free, too.

    Returns:
        float32 [T, D'], summed over the devices in their order; each device's term is rounded to
        bfloat16. Gradients for x, the projections and the scores.
    """
    arrays = (x_TD, w_in_SDNH, w_out_SHD, scores_RJ)
    layout = (place_RJ, copy_A, sizes_S, tiles)
    return _remote(arrays, layout, rows, activation, api.Sizing(assignments, reserve_sms))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _remote(arrays, layout, rows, activation, sizing):
    return _forward(arrays, layout, rows, activation, sizing, keep=False)[0]


def _forward(arrays, layout, rows, activation, sizing, *, keep):
    """The outputs, and what the backward needs: rows that arrived, and the projections."""
    x_TD, w_in, w_out, scores_RJ = arrays
    place_RJ, copy_A, sizes_S, _ = layout
    copies = place_RJ.shape[1]
    few = not keep and sizing.assignments <= api.FEW_ROWS * sizes_S.shape[0]
    options, _, within = api.options_of(layout, w_out.shape[1], "mosaic_gpu", sizing, few=few)
    options["few"] = few
    arriving = None
    reserve_sms = sizing.reserve_sms
    if within and not few and sm_count() - reserve_sms >= 2 * BLOCKS:
        arriving = Arriving(rows.out_M, rows.firsts_Q, _arrivals(x_TD, w_in.shape[0], rows))
        options_up = {"copy_A": copy_A, "copies": copies, "arriving": arriving}
        own = x_TD
    else:
        x_RD = _spread(x_TD, rows, reserve_sms)
        own, options_up = api.rows_of(x_RD, copy_A, copies, within, options["tiles"])
    a_AH, h, *arrived = mosaic_gpu.up(
        own, w_in, sizes_S, activation=activation, keep=keep, **options_up, **options
    )
    if arriving is not None:
        (x_RD,) = arrived
    y_AD = mosaic_gpu.down(a_AH, w_out, sizes_S, **options)
    return _home(y_AD, scores_RJ, place_RJ, rows, reserve_sms), (x_RD, h)


def _spread(x_TD, rows, reserve_sms):
    """Tokens, or their cotangents, to the devices that need them."""
    return pushing_kernel.push_rows(
        x_TD, rows.out_M, rows.axis, x_TD.shape[0], reserve_sms=reserve_sms
    )


def _home(rows_AD, weights_RJ, place_RJ, rows, reserve_sms):
    """Each received row's weighted sum goes home, where those of all devices are summed."""
    tokens = rows.goes_GT.shape[1]
    back_RD = push_sums(
        rows_AD, weights_RJ, place_RJ, rows.back_M, rows.axis, tokens, reserve_sms=reserve_sms
    )
    return push.sum_devices(back_RD, rows.goes_GT)


def _arrivals(x_TD, slots, rows):
    """How the first product and the writing of rows share the multiprocessors."""
    tokens, d_model = x_TD.shape
    devices, row_bytes = rows.goes_GT.shape[0], 2 * d_model
    pusher = Pusher(rows.axis, devices, tokens, row_bytes, BLOCKS * (COMPUTE + 1))
    tile_flops = 2 * ROWS * 256 * d_model
    late = round(rows.expected * row_bytes / PUSH_BYTES / (tile_flops / PRODUCT_FLOPS))
    slots_each = group_slots(slots)
    return Arrivals(pusher, slots_each, -(-slots // slots_each), BLOCKS, late)


def _remote_fwd(arrays, layout, rows, activation, sizing):
    y_TD, kept = _forward(arrays, layout, rows, activation, sizing, keep=True)
    # One kernel writes the rows and multiplies them: both are kept, or both are made again.
    y_TD, (x_RD, h) = received((y_TD, kept))
    return y_TD, ((x_RD, *arrays[1:]), layout, rows, h)


def _remote_bwd(activation, sizing, residuals, ct_TD):
    arrays, layout, rows, h = residuals
    dtype, reserve_sms = arrays[0].dtype, sizing.reserve_sms
    ct_RD = _spread(ct_TD.astype(dtype), rows, reserve_sms)
    x_ct_AD, *others = api.backward(arrays, layout, h, ct_RD, activation, "mosaic_gpu", sizing)
    x_ct_TD = _home(x_ct_AD, None, layout[0], rows, reserve_sms).astype(dtype)
    return (x_ct_TD, *others), None, None


_remote.defvjp(_remote_fwd, _remote_bwd)
