"""Experts with weights of 8 bits, for inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.config import ExpertsConfig
from moejax.errors import UserError
from moejax.exchange.budget import Budget
from moejax.exchange.modes import Rows
from moejax.experts import ExpertBank, lay_out
from moejax.placement.arrays import Placement
from moejax.placement.resident import in_slots, resident
from pallas_kernels.quantized_experts import api as quantized_experts
from pallas_kernels.quantized_experts.format import (
    BLOCK,
    QuantizedMatrices,
    quantize,
)
from sharding import collectives
from sharding.mesh import EXPERT, TENSOR

__all__ = ["ExpertRows", "QuantizedExpertBank", "QuantizedWeight", "WeightDtype"]

WeightDtype = Literal["int8", "float8_e4m3fn"]
ExpertRows = Literal["compute", "float8"]


class QuantizedWeight(nnx.Variable):
    """Values or scales of 8-bit weights. No parameter: optimizers do not see it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedExpertWeights:
    """Weights of a device's S slots: values [S, N, H, D] and [S, D, H]."""

    w_in: QuantizedMatrices
    w_out: QuantizedMatrices


class QuantizedExpertBank(nnx.Module):
    """Takes the place of an `ExpertBank`; it has no gradient.

    Matrices are quantized by blocks of 128 × 128, each with a float32 scale (DeepSeek-V3,
    arXiv 2412.19437 §3.3): about half the bytes of bfloat16.

    Args:
        bank: the experts to quantize, without biases.
        dtype: `int8` or `float8_e4m3fn`.
        rows: what tokens and hidden activations are multiplied as: `compute`, the layer's dtype,
            or `float8`, quantized by blocks of 128 columns (with `float8_e4m3fn` weights alone).
        tensor: devices along `tensor` that the hidden width is split over.

    Raises:
        UserError: the experts have biases; blocks would straddle devices; int8 with float8 rows.
    """

    def __init__(
        self,
        bank: ExpertBank,
        dtype: WeightDtype,
        *,
        rows: ExpertRows = "compute",
        tensor: int = 1,
    ) -> None:
        self.check(bank, dtype, rows=rows, tensor=tensor)
        self.num_experts, self.expert_devices = bank.num_experts, bank.expert_devices
        self.rows, self.tensor, self.resident = rows, tensor, False
        # [slots, D, N, H] → matrices [slots, N, D, H]; values come out with H before D.
        w_in = quantize(jnp.swapaxes(bank.w_in[...], 1, 2), jnp.dtype(dtype))
        w_out = quantize(bank.w_out[...], jnp.dtype(dtype))

        home = bank.w_in.get_metadata()["home"]

        def kept(value: jax.Array, spec: P) -> QuantizedWeight:
            return QuantizedWeight(value, spec=spec, home=home)

        spec_in, spec_out = P(EXPERT, None, TENSOR, None), P(EXPERT, None, TENSOR)
        self.w_in_values, self.w_in_scales = (
            kept(value, spec_in) for value in (w_in.values, w_in.scales)
        )
        self.w_out_values, self.w_out_scales = (
            kept(value, spec_out) for value in (w_out.values, w_out.scales)
        )

    @staticmethod
    def check(bank: ExpertBank, dtype: WeightDtype, *, rows: ExpertRows, tensor: int) -> None:
        """Raises the UserErrors of the constructor, with its arguments."""
        if bank.resident:
            raise UserError("quantize_experts after make_resident: quantize the experts first")
        if bank.b_in is not None:
            raise UserError("quantized experts with bias=True: only experts without biases can be")
        hidden = bank.w_out.shape[1]
        if tensor > 1 and hidden % (tensor * BLOCK):
            raise UserError(
                f"hidden={hidden} over tensor={tensor} devices: quantized experts need a multiple "
                f"of {BLOCK} on each; use a smaller tensor axis"
            )
        if rows == "float8" and dtype != "float8_e4m3fn":
            raise UserError(
                f"rows='float8' with {dtype} weights: float8 rows need float8_e4m3fn weights"
            )

    @property
    def _kernel_rows(self) -> quantized_experts.Rows:
        return "float8" if self.rows == "float8" else "bfloat16"

    def weights(self, placement: Placement | None, dtype) -> QuantizedExpertWeights:
        """The weights of this device's slots, inside the shard_map; as for `ExpertBank`.

        Raises:
            UserError: the mesh has another number of devices along `tensor` than was said; as for
                `ExpertBank`.
        """
        devices = collectives.axis_size(TENSOR)
        if devices != self.tensor:
            raise UserError(
                f"experts quantized for tensor={self.tensor} on a mesh of tensor={devices}: pass "
                f"tensor={devices} to quantize_experts"
            )

        stored = QuantizedExpertWeights(
            QuantizedMatrices(self.w_in_values[...], self.w_in_scales[...]),
            QuantizedMatrices(self.w_out_values[...], self.w_out_scales[...]),
        )
        return in_slots(stored, placement, self.num_experts, resident=self.resident)

    def make_resident(self, slots: int) -> None:
        """As `ExpertBank.make_resident`."""
        for name in "w_in_values", "w_in_scales", "w_out_values", "w_out_scales":
            setattr(self, name, resident(getattr(self, name), self.expert_devices, slots))
        self.resident = True

    def explain(
        self, config: ExpertsConfig, widths: tuple[int, int], *, dtype: Any, tensor: int = 1
    ) -> str:
        """As `ExpertBank.explain`."""
        (d_model, d_out), hidden = widths, self.w_out_values.shape[2]
        return quantized_experts.explain(
            quantized_experts.Case(
                d_model,
                hidden // tensor,
                config.activation,
                dtype,
                self.w_out_values.dtype,
                self._kernel_rows,
                d_out,
            )
        )

    def explain_sending(self, *case: Any) -> str:
        """As `ExpertBank.explain_sending`."""
        del case
        return "remote_experts: not used: the experts have 8 bits"

    def run(
        self, rows: Rows, weights: QuantizedExpertWeights, *, budget: Budget, config: ExpertsConfig
    ) -> jax.Array:
        """As `moejax.experts.run_experts`."""
        assignments, layout, _ = lay_out(rows, weights.w_in.values.shape[0], budget)
        return quantized_experts.quantized_experts(
            rows.x_RD,
            weights.w_in,
            weights.w_out,
            rows.scores_RJ,
            *layout,
            assignments=assignments,
            expected=budget.tokens * budget.top_k,
            activation=config.activation,
            rows=self._kernel_rows,
        )
