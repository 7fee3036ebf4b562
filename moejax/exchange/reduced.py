"""Rows of fewer columns: r numbers of D travel, and no row grows back where the experts are.

With U [D, r] a token x travels as x·U, and the experts' first product is that with Uᵀ·w_in: the
inverse is folded into the weights. On the way home, with V [D, r'], the second product is that with
w_out·V, and after the sum over devices Vᵀ is multiplied with once. All of this is linear, so
exchange, waves, rounding and kernels run unchanged on narrower rows.

With orthonormal columns x·U·Uᵀ is the projection of x onto r directions. Those with the least
squared error are the first eigenvectors of the second moment of what travels (Eckart and Young
1936, doi 10.1007/BF02288367). Here projections are parameters: random orthonormal at first, trained
with the rest, or set to `principal_components` of an existing model's rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32

from moejax.config import WireConfig
from moejax.errors import UserError
from moejax.experts import ExpertWeights
from pallas_kernels.precision import precision_of
from sharding.collectives import enter_parallel, psum_statistics
from sharding.mesh import TENSOR

__all__ = ["Projections", "RowMoments", "RowProjections", "principal_components", "row_moments"]


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of factors of one dtype, summed in float32."""
    precision = precision_of(a.dtype)
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def _each_slot(projection_DR: jax.Array, slots: int) -> jax.Array:
    """[…, S, D, R]: products without a batch are what remat="dots" keeps for the backward."""
    shape = (*projection_DR.shape[:-2], slots, *projection_DR.shape[-2:])
    return jnp.broadcast_to(projection_DR[..., None, :, :], shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Projections:
    """What one call of a layer narrows its rows with.

    u_DR, v_DR: for the way to the experts and the way home, in the compute dtype; None sends all
        columns that way, and nothing is computed.
    """

    u_DR: jax.Array | None
    v_DR: jax.Array | None

    def narrow(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T R"]:
        """Tokens as they travel, in their dtype."""
        if self.u_DR is None:
            return x_TD
        return _product("td,dr->tr", x_TD, self.u_DR).astype(x_TD.dtype)

    def widen(self, y_TR: Float32[Array, "T R"]) -> Float32[Array, "T D"]:
        """Summed outputs at home; rounded to the projection's dtype before the product."""
        if self.v_DR is None:
            return y_TR
        return _product("tr,dr->td", y_TR.astype(self.v_DR.dtype), self.v_DR)

    def fold(self, weights: ExpertWeights) -> ExpertWeights:
        """Weights for narrow rows, from those for whole ones.

        Costs 2·D·r·N·H operations a slot for the way out and 2·D·r'·H for the way home, three times
        that with their gradients and a fourth where a layer is recomputed, however many tokens
        there are. Leading dimensions, such as those of scanned layers, are folded one by one.

        Args:
            weights: in the projections' dtype.
        """
        slots, _, parts, hidden = weights.w_in_SDNH.shape[-4:]
        if self.u_DR is not None:
            u_SRD = jnp.swapaxes(_each_slot(self.u_DR, slots), -1, -2)
            flat = weights.w_in_SDNH.reshape(*weights.w_in_SDNH.shape[:-2], -1)
            folded = _product("...srd,...sdk->...srk", u_SRD, flat).astype(flat.dtype)
            folded = folded.reshape(*folded.shape[:-1], parts, hidden)
            weights = replace(weights, w_in_SDNH=folded)
        if self.v_DR is not None:
            v_SDR, w_out = _each_slot(self.v_DR, slots), weights.w_out_SHD
            folded = _product("...shd,...sdr->...shr", w_out, v_SDR).astype(w_out.dtype)
            weights = replace(weights, w_out_SHD=folded)
            if weights.b_out_SD is not None:
                bias_SD, v_DR = (a.astype(jnp.float32) for a in (weights.b_out_SD, self.v_DR))
                folded = jnp.matmul(bias_SD, v_DR, precision="highest")
                weights = replace(weights, b_out_SD=folded.astype(weights.b_out_SD.dtype))
        return weights


class RowProjections(nnx.Module):
    """A layer's projections: parameters U [D, r] and V [D, r'], None for a way in full.

    Optimizers do not decay them (by name, see `moejax.training.optimizer`): their scale multiplies
    that of the weights they are folded into, which is decayed.

    Args:
        d_model: D.
        wire: says r and r'.
        rngs: source of the initial values, which have orthonormal columns.

    Raises:
        UserError: r or r' is larger than D.
    """

    def __init__(self, d_model: int, wire: WireConfig, *, rngs: nnx.Rngs) -> None:
        self.u_DR = self.v_DR = nnx.data(None)
        if wire.dispatch_dim is not None:
            self.u_DR = _random_projection("dispatch_dim", d_model, wire.dispatch_dim, rngs)
        if wire.combine_dim is not None:
            self.v_DR = _random_projection("combine_dim", d_model, wire.combine_dim, rngs)

    def __call__(self, dtype) -> Projections:
        """The projections for rows of a dtype, inside the shard_map."""

        def local(parameter: nnx.Param | None) -> jax.Array | None:
            if parameter is None:
                return None
            return enter_parallel(parameter[...].astype(dtype), TENSOR)

        return Projections(local(self.u_DR), local(self.v_DR))

    def fold(self, weights: ExpertWeights) -> ExpertWeights:
        """`Projections.fold` outside of a shard_map, for weights in the parameters' dtype."""
        u_DR, v_DR = (None if p is None else p[...] for p in (self.u_DR, self.v_DR))
        return Projections(u_DR, v_DR).fold(weights)


def _random_projection(name: str, d_model: int, columns: int, rngs: nnx.Rngs) -> nnx.Param:
    if columns > d_model:
        raise UserError(
            f"{name}={columns} with d_model={d_model}: rows cannot get wider; choose at most "
            f"{d_model}, or None to send all columns"
        )
    drawn_DR = jax.random.normal(rngs.params(), (d_model, columns), jnp.float32)
    return nnx.Param(jnp.linalg.qr(drawn_DR)[0], spec=P(), float32=False)


def principal_components(moment_DD: Float32[Array, "D D"], columns: int) -> Float32[Array, "D R"]:
    """The r orthonormal directions that keep most of rows with this second moment.

    Args:
        moment_DD: Σ x·xᵀ over the rows, not centred; any scale.
        columns: r ≤ D.

    Returns:
        the first r eigenvectors, that of the largest eigenvalue first.
    """
    _, vectors_DD = jnp.linalg.eigh(moment_DD)  # eigenvalues ascend
    return vectors_DD[:, ::-1][:, :columns]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowMoments:
    """Second moments of a layer's rows, summed over tokens: Σ x·xᵀ, float32.

    inputs_DD: of the tokens that are routed.
    outputs_DD: of the routed experts' summed outputs, shared experts left out.
    """

    inputs_DD: Float32[Array, "D D"]
    outputs_DD: Float32[Array, "D D"]


def row_moments(
    x_TD: Float[Array, "T D"],
    y_TD: Float32[Array, "T D"],
    token_mask_T: Bool[Array, " T"] | None,
) -> RowMoments:
    """Moments of this device's tokens, inside the shard_map; no gradient.

    Args:
        x_TD: the layer's input.
        y_TD: this tensor rank's term of the routed experts' output.
        token_mask_T: False for tokens that are not routed.
    """
    if token_mask_T is not None:
        x_TD = jnp.where(token_mask_T[:, None], x_TD, jnp.zeros_like(x_TD))
    square = partial(jnp.einsum, "td,te->de", precision="highest")
    x_TD, y_TD = jax.lax.stop_gradient(x_TD).astype(jnp.float32), psum_statistics(y_TD, TENSOR)
    return RowMoments(square(x_TD, x_TD), square(y_TD, y_TD))
