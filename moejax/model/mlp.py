"""The dense MLP, also used for the experts that every token passes."""

from __future__ import annotations

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.activations import apply_activation
from moejax.config import ExpertsConfig
from moejax.model.initializers import INIT_STD, make_constant, make_normal
from pallas_kernels.precision import precision_of
from sharding.collectives import axis_index, enter_parallel, exit_parallel
from sharding.mesh import TENSOR

__all__ = ["DenseMLP", "add_bias"]


class DenseMLP(nnx.Module):
    """Two products with an activation between, the hidden width split over `tensor`.

    Parameters: w_in [D, n, H] (n = 2 for gated activations, the gate first), w_out [H, D], and
    with `config.bias` b_in [n, H] and b_out [D].
    """

    def __init__(
        self,
        d_model: int,
        config: ExpertsConfig,
        *,
        hidden: int | None = None,
        output_std: float = INIT_STD,
        parallel: bool = True,
        rngs: nnx.Rngs,
    ):
        """Draws the weights.

        Args:
            d_model: width D of input and output.
            config: activation and bias; its `hidden` is the width.
            hidden: a width H to use instead, such as `config.shared_hidden`.
            output_std: standard deviation of w_out.
            parallel: the call enters and leaves the tensor-parallel region by itself. If False
                the caller has entered it, and sums the partial results over `tensor`.
            rngs: the stream `params` is drawn from.
        """
        hidden = config.hidden if hidden is None else hidden
        self.activation = config.activation
        self.parallel = parallel
        self.w_in = make_normal(rngs, (d_model, config.num_in, hidden), P(None, None, TENSOR))
        self.w_out = make_normal(rngs, (hidden, d_model), P(TENSOR, None), output_std)
        bias, shape_in = config.bias, (config.num_in, hidden)
        self.b_in = make_constant(shape_in, P(None, TENSOR), 0.0) if bias else None
        self.b_out = make_constant((d_model,), P(None), 0.0) if bias else None

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D] in x's dtype, inside the shard_map.

        With `parallel=False` the result is this device's term of the sum over `tensor`.
        """
        if self.parallel:
            x_TD = enter_parallel(x_TD, TENSOR)
        dtype, precision = x_TD.dtype, precision_of(x_TD.dtype)
        w_DNH, w_HD = self.w_in[...].astype(dtype), self.w_out[...].astype(dtype)
        h_TNH = jnp.einsum("...D,DNH->...NH", x_TD, w_DNH, precision=precision)
        if self.b_in is not None:
            h_TNH = add_bias(h_TNH, self.b_in[...].astype(dtype))
        h_TH = apply_activation(h_TNH, self.activation)
        y_TD = jnp.einsum("...H,HD->...D", h_TH, w_HD, precision=precision)
        if self.parallel:
            y_TD = exit_parallel(y_TD, TENSOR)
        if self.b_out is not None:
            y_TD = add_bias(y_TD, self._output_bias(dtype))
        return y_TD

    def _output_bias(self, dtype: jnp.dtype) -> jax.Array:
        assert self.b_out is not None
        bias_D = self.b_out[...].astype(dtype)
        if self.parallel:
            return bias_D
        # Inside the region only one device may add the bias, and all must learn its gradient.
        bias_D = enter_parallel(bias_D, TENSOR)
        return jnp.where(axis_index(TENSOR) == 0, bias_D, jnp.zeros_like(bias_D))


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds a bias of the last dimensions in float32, and rounds once.

    So the bias' gradient, a sum over all tokens, is added up in float32: XLA:CPU adds bfloat16
    numbers in pieces that it rounds, 1 to 2 % off for 2048 tokens.

    Args:
        y: [..., *b], any float dtype.
        bias: b in y's dtype.

    Returns:
        y's shape and dtype.
    """
    return (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(y.dtype)
