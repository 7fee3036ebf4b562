"""The Mixture-of-Experts layer: route → place → exchange around the experts → sum.

Runs inside the fully manual shard_map of `train.py` or `infer.py`. Inside somebody else's Flax
model use `moejax.standalone.ShardedMoELayer`, which wraps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int32

from moejax import exchange
from moejax.config import MoEConfig
from moejax.errors import UserError
from moejax.exchange import codec
from moejax.exchange.counters import ExchangeCounters, over_devices
from moejax.exchange.reduced import RowMoments, RowProjections, row_moments
from moejax.experts import ExpertBank, ExpertWeights, places_for, with_kernels
from moejax.model.initializers import INIT_STD
from moejax.model.mlp import DenseMLP
from moejax.placement.arrays import Placement, home_slots
from moejax.placement.choice import place
from moejax.quantized_bank import ExpertRows, QuantizedExpertBank, WeightDtype
from moejax.routing.locality import Reach, reach_of
from moejax.routing.losses import RouterLosses
from moejax.routing.router import Router, Routing
from pallas_kernels.exchange import push
from pallas_kernels.route import api as route
from pallas_kernels.route.router_product import explain_router_product
from sharding.collectives import axes_are_bound, enter_parallel, exit_parallel, psum_statistics
from sharding.mesh import AXES, TENSOR, TOKEN_AXES

__all__ = ["MoEAux", "MoELayer", "hosts_along_experts"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoEAux:
    """What a layer reports besides its output; all of it local to the device.

    losses: this device's shares of the auxiliary losses, coefficients included.
    counts_E: int32 [E], assignments to each logical expert, before any drop.
    entropy_sum: float32 [], nats, summed over tokens.
    num_tokens: int32 [], unmasked tokens.
    counters: what moved.
    moments: of the rows, where `MoELayer.measure_rows` asks for them.
    experts_TK: int32 [T', K'], the experts of some tokens in order, before any drop, −1 for none;
        where `MoELayer.report_experts` asks for them.
    kept: float32 [], the share of its score mass that a token keeps under `MoEConfig.locality`,
        summed over tokens; None where that is off. See `moejax.routing.near.mass_kept`.
    slots_TK: int32 [T, K'], the slots that serve the tokens, in order, of all devices along
        `expert`: slot p is on device p // S. After any drop, −1 for none; where
        `MoELayer.report_slots` asks for them.
    """

    losses: RouterLosses
    counts_E: Int32[Array, " E"]
    entropy_sum: Float32[Array, ""]
    num_tokens: Int32[Array, ""]
    counters: ExchangeCounters
    moments: RowMoments | None = None
    experts_TK: Int32[Array, "T2 K2"] | None = None
    kept: Float32[Array, ""] | None = None
    slots_TK: Int32[Array, "T K2"] | None = None

    def over_devices(self) -> MoEAux:
        """The same of all devices together, inside the shard_map; no gradient.

        `experts_TK` and `slots_TK` stay this device's.
        """
        counters = over_devices(self.counters, TOKEN_AXES)
        total = psum_statistics(replace(self, experts_TK=None, slots_TK=None), TOKEN_AXES)
        return replace(total, counters=counters, experts_TK=self.experts_TK, slots_TK=self.slots_TK)

    def summed(self) -> MoEAux:
        """Summed over a leading dimension (microbatches) of [A, L, …]; waves are the largest.

        Tokens of `experts_TK` and `slots_TK` come behind each other.
        """
        total = jax.tree.map(
            lambda a: jnp.sum(a, axis=0, dtype=a.dtype),
            replace(self, experts_TK=None, slots_TK=None),
        )
        counters = replace(total.counters, waves=jnp.max(self.counters.waves, axis=0))
        experts_TK, slots_TK = _in_a_row(self.experts_TK), _in_a_row(self.slots_TK)
        return replace(total, counters=counters, experts_TK=experts_TK, slots_TK=slots_TK)


def _in_a_row(ids_ALTK: jax.Array | None) -> jax.Array | None:
    """The tokens of microbatches behind each other: [A, L, T, K] to [L, A · T, K]."""
    if ids_ALTK is None:
        return None
    ids_LATK = jnp.moveaxis(ids_ALTK, 0, 1)
    layers, _, _, columns = ids_LATK.shape
    return ids_LATK.reshape(layers, -1, columns)


def hosts_along_experts(
    config: MoEConfig, devices: int, hosts: Sequence[int] | None
) -> tuple[int, ...] | None:
    """The host of each device along `expert`; None: all on one.

    Args:
        config: what its exchange says of hosts goes first.
        devices: G.
        hosts: of the processes.
    """
    size = config.exchange.host_devices
    if size is not None:
        return tuple(device // size for device in range(devices))
    return None if hosts is None else tuple(hosts)


class MoELayer(nnx.Module):
    """Routed experts, expert-parallel over `expert`, plus the experts every token uses.

    Args:
        d_model: D.
        config: router, experts and exchange.
        expert_devices: G, the size of the mesh's `expert` axis.
        rngs: source of the initial weights.
        output_std: standard deviation of the output projections.
        hosts: the host of each device along `expert`, for the counters; None: one host. What
            `ExchangeConfig.host_devices` says goes first.
    """

    def __init__(
        self,
        d_model: int,
        config: MoEConfig,
        *,
        expert_devices: int,
        rngs: nnx.Rngs,
        output_std: float = INIT_STD,
        hosts: Sequence[int] | None = None,
    ) -> None:
        wire = config.exchange.wire
        ways = (wire.dispatch, wire.dispatch_grad), (wire.combine, wire.combine_grad)
        for width, formats in zip(wire.widths(d_model), ways, strict=True):
            rounded = any(form != "compute" for form in formats)
            if wire.rotate and rounded and width % codec.BLOCK:
                raise UserError(
                    f"rows of {width} columns with rotate=True: a rotated wire needs a multiple of "
                    f"{codec.BLOCK}; leave rotate off"
                )
        self.config = config
        self.expert_devices = expert_devices
        self.hosts = None if hosts is None else tuple(hosts)
        self.router = Router(d_model, config.router, rngs=rngs)
        self.bank: ExpertBank | QuantizedExpertBank = ExpertBank(
            d_model,
            config.router.num_experts,
            config.experts,
            expert_devices=expert_devices,
            output_std=output_std,
            rngs=rngs,
        )
        self.shared = self.shared_gate = nnx.data(None)
        if config.experts.shared_hidden:
            self.shared = DenseMLP(
                d_model,
                config.experts,
                hidden=config.experts.shared_hidden,
                output_std=output_std,
                parallel=False,
                rngs=rngs,
            )
        if config.experts.shared_gate:
            gate_D = jax.random.normal(rngs.params(), (d_model,), jnp.float32) * d_model**-0.5
            self.shared_gate = nnx.Param(gate_D, spec=P(), float32=True)
        self.projections = RowProjections(d_model, wire, rngs=rngs)
        self.folded = False
        self.measure_rows = False  # whether a call reports the moments of its rows
        self._report_columns, self._report_stride = 0, 1
        self._slot_columns = 0

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        placement: Placement | None = None,
        *,
        token_mask_T: Bool[Array, " T"] | None = None,
    ) -> tuple[Float[Array, "T D"], MoEAux]:
        """Applies the layer to this device's tokens, inside the shard_map.

        Args:
            x_TD: tokens in the compute dtype, replicated along `tensor`.
            placement: where copies of the experts live; None: at home, contiguous.
            token_mask_T: bool, False for padding that must not be routed.

        Returns:
            [T, D] in x's dtype, and what is reported.

        Raises:
            UserError: called outside of a shard_map.
        """
        if not axes_are_bound(AXES):
            raise UserError(
                "MoELayer called outside of a shard_map over data, expert and tensor: use "
                "moejax.standalone.ShardedMoELayer, which brings its own"
            )
        reach = self._reach(placement)
        routing = self.router(x_TD, token_mask_T=token_mask_T, reach=reach)
        slots_TK, budget, dropped = self._place(routing, placement)
        x_in, scores_TK = enter_parallel((x_TD, routing.scores_TK), TENSOR)
        plans = exchange.make_plans(slots_TK, budget)
        y_TD = self._routed(x_in, scores_TK, placement, plans, budget)
        moments = row_moments(x_TD, y_TD, token_mask_T) if self.measure_rows else None
        if self.shared is not None:
            y_TD = y_TD + self._shared(x_in, self.shared)
        y_TD = exit_parallel(y_TD, TENSOR).astype(x_TD.dtype)
        counters = exchange.count(plans, budget, dropped, self.hosts)
        return y_TD, MoEAux(
            routing.losses,
            routing.counts_E,
            routing.entropy_sum,
            routing.num_tokens,
            counters,
            moments,
            _reported(routing.experts_TK, self._report_columns, self._report_stride),
            self._kept(routing),
            _reported(slots_TK, self._slot_columns),
        )

    def _reach(self, placement: Placement | None) -> Reach | None:
        """Where experts are, if routing is to know; on one device all are near."""
        locality, router, devices = self.config.locality, self.config.router, self.expert_devices
        if not locality.active or devices == 1:
            return None
        hosts = hosts_along_experts(self.config, devices, self.hosts)
        return reach_of(locality, router.top_k, placement, router.num_experts, devices, hosts)

    def _kept(self, routing: Routing) -> jax.Array | None:
        if self.config.locality.active and routing.kept is None:
            return routing.num_tokens.astype(jnp.float32)  # all of it, on one device
        return routing.kept

    def report_experts(self, columns: int, stride: int = 1) -> None:
        """From now on a call reports the experts of its tokens in `MoEAux.experts_TK`.

        Args:
            columns: K', at least the experts of a token; further columns hold −1, so that layers
                with fewer experts a token can be stacked with others.
            stride: of tokens; 1 reports all.
        """
        self._report_columns, self._report_stride = columns, stride

    def report_slots(self, columns: int) -> None:
        """From now on a call reports where its tokens are served, in `MoEAux.slots_TK`.

        Args:
            columns: K', as in `report_experts`.
        """
        self._slot_columns = columns

    def _routed(
        self,
        x_TD: jax.Array,
        scores_TK: jax.Array,
        placement: Placement | None,
        plans: Sequence[exchange.Plan],
        budget: exchange.Budget,
    ) -> jax.Array:
        """Dispatch → experts → combine; float32 [T, D], this tensor rank's term."""
        projections = self.projections(x_TD.dtype)
        weights = self.bank.weights(placement, x_TD.dtype)
        if isinstance(weights, ExpertWeights) and not self.folded:
            weights = projections.fold(weights)
        if isinstance(weights, ExpertWeights):
            budget = with_kernels(budget, weights, self.config.experts, x_TD.dtype)
        run = partial(self.bank.run, budget=budget.innermost, config=self.config.experts)
        experts = exchange.inside_hosts(run, budget)
        rows_TR = projections.narrow(x_TD)
        y_TR = exchange.run_waves(rows_TR, scores_TK, weights, plans, budget, experts)
        return projections.widen(y_TR)

    def fold_projections(self) -> None:
        """Folds the projections into the experts' weights, once and not in every call.

        Afterwards the layer only infers: the weights have lost what the projections leave out.
        Without projections nothing changes.

        Raises:
            UserError: it is done already; quantizing does it.
        """
        if self.folded or not isinstance(self.bank, ExpertBank):
            raise UserError(
                "fold_projections called again: the experts' weights are folded already, "
                "quantize_experts does it, too; leave the call out"
            )
        self.bank.change(self.projections.fold)
        self.folded = True

    def quantize_experts(
        self, dtype: WeightDtype, *, rows: ExpertRows = "compute", tensor: int = 1
    ) -> None:
        """Replaces the routed experts' weights by 8-bit ones; afterwards the layer only infers.

        Projections of the rows are folded into the weights first.

        Args:
            dtype: `int8` or `float8_e4m3fn`.
            rows: `float8` multiplies rows as float8, too: for prompts, at a cost in accuracy.
            tensor: devices along the mesh's `tensor` axis.

        Raises:
            UserError: they cannot be, see `QuantizedExpertBank`.
        """
        if not isinstance(self.bank, ExpertBank):
            raise UserError("quantize_experts called again: the experts are quantized already")
        QuantizedExpertBank.check(self.bank, dtype, rows=rows, tensor=tensor)
        if not self.folded:
            self.fold_projections()
        self.bank = QuantizedExpertBank(self.bank, dtype, rows=rows, tensor=tensor)

    def explain(self, tokens: int, *, dtype: Any, tensor: int = 1) -> list[str]:
        """What computes the layer on the default device, and why not something faster.

        Args:
            tokens: T of a device.
            dtype: of the tokens and the products.
            tensor: devices that the experts' hidden width is split over.

        Returns:
            a line for each operation: the backend that serves it, and the others' refusals.
        """
        d_model, experts = self.router.w_DE.shape
        copies, budget = self.config.router.top_k, self.budget(tokens).innermost
        rows = -(-budget.assignments // budget.copies)  # that arrive
        places = places_for(budget.slots, budget.assignments)
        widths = self.config.exchange.wire.widths(d_model)
        experts_config, sent = self.config.experts, []
        if budget.mode == "remote":
            how = self.bank.explain_sending(budget, experts_config, widths, dtype, tensor)
            sent = [push.explain(), how]
        return [
            explain_router_product(tokens, d_model, experts, dtype),
            route.explain_top_k(tokens, experts, copies),
            route.explain_sorted_tiles(rows, budget.copies, budget.slots, places),
            self.bank.explain(experts_config, widths, dtype=dtype, tensor=tensor),
            *sent,
        ]

    def budget(self, tokens: int, placement: Placement | None = None) -> exchange.Budget:
        """The static sizes and the mode of the exchange for T tokens a device."""
        devices, slots = self.expert_devices, None
        if placement is not None:
            slots = placement.slot_expert_P.shape[-1] // devices
        return exchange.choose_for(self.config, tokens=tokens, devices=devices, slots=slots)

    def _place(
        self, routing: Routing, placement: Placement | None
    ) -> tuple[jax.Array, exchange.Budget, jax.Array]:
        """Physical slots of all assignments, after any drops."""
        tokens, top_k = routing.experts_TK.shape
        budget = self.budget(tokens, placement)
        experts_TK, dropped = routing.experts_TK, jnp.zeros((), jnp.int32)
        factor, num_experts = self.config.exchange.capacity_factor, self.config.router.num_experts
        if factor is not None:
            room = exchange.expert_capacity(factor, tokens, top_k, num_experts, self.expert_devices)
            experts_TK, dropped = exchange.drop_over_capacity(
                experts_TK, routing.scores_TK, num_experts, room
            )
        if placement is not None:
            hosts = hosts_along_experts(self.config, self.expert_devices, self.hosts)
            slots = budget.innermost.slots
            slots_TK = place(experts_TK, placement, slots, hosts, routing.devices_TG)
            return slots_TK, budget, dropped
        home_E = home_slots(num_experts, self.expert_devices)
        if np.array_equal(home_E, np.arange(num_experts)):
            return experts_TK, budget, dropped
        slots_TK = jnp.where(experts_TK >= 0, jnp.asarray(home_E)[jnp.maximum(experts_TK, 0)], -1)
        return slots_TK, budget, dropped

    def _shared(self, x_TD: jax.Array, shared: DenseMLP) -> jax.Array:
        """The experts every token uses, this tensor rank's term; float32 [T, D]."""
        y_TD = shared(x_TD).astype(jnp.float32)
        if self.shared_gate is not None:
            gate_D = enter_parallel(self.shared_gate[...], TENSOR)
            logit_T = jnp.dot(x_TD.astype(jnp.float32), gate_D, precision="highest")
            y_TD = y_TD * jax.nn.sigmoid(logit_T)[:, None]
        return y_TD


def _reported(ids_TK: jax.Array, columns: int, stride: int = 1) -> jax.Array | None:
    """What is reported of experts or slots: every stride-th token, −1 up to K' columns."""
    if not columns:
        return None
    more = columns - ids_TK.shape[1]
    return jnp.pad(ids_TK[::stride], ((0, 0), (0, more)), constant_values=-1)
