"""The Mixture-of-Experts layer: route → place → exchange around the experts → sum.

Runs inside the fully manual shard_map of `train.py` or `infer.py`. Inside somebody else's Flax
model use `moejax.standalone.ShardedMoELayer`, which wraps it.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from moejax.exchange.reduced import RowProjections, row_moments
from moejax.experts import ExpertBank, ExpertWeights, places_for, with_kernels
from moejax.model.initializers import INIT_STD
from moejax.model.mlp import DenseMLP
from moejax.moe_aux import MoEAux
from moejax.placement.arrays import Placement, home_slots
from moejax.placement.choice import place
from moejax.quantized_bank import ExpertRows, QuantizedExpertBank, WeightDtype
from moejax.routing.locality import Reach, reach_of
from moejax.routing.router import Router, Routing
from moejax.shared_bank import ExpandedExpertBank, SharedExpertBank
from moejax.wide_bank import WideExpertBank
from pallas_kernels.exchange import push
from pallas_kernels.exchange.received import received
from pallas_kernels.route import api as route
from pallas_kernels.route.router_product import explain_router_product
from sharding.collectives import axes_are_bound, enter_parallel, exit_parallel
from sharding.mesh import AXES, TENSOR

__all__ = ["MoELayer", "hosts_along_experts"]


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
        bank: type[ExpertBank] | type[SharedExpertBank] | type[WideExpertBank] = ExpertBank
        if config.experts.sharing.active:
            bank = SharedExpertBank
        elif config.experts.together > 1:
            bank = WideExpertBank
        self.bank: ExpertBank | SharedExpertBank | QuantizedExpertBank | WideExpertBank = bank(
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
        routing = self.route(x_TD, placement, token_mask_T=token_mask_T)
        slots_TK, budget, dropped = self._place(routing, placement)
        # Kept with what is received: chosen again in a backward that rounds another way, one expert
        # would move the rows of all tokens behind.
        slots_TK = received(slots_TK)
        x_in, scores_TK = enter_parallel((x_TD, routing.scores_TK), TENSOR)
        plans = exchange.make_plans(slots_TK, budget)
        y_TD = self._routed(x_in, scores_TK, placement, plans, budget)
        moments = row_moments(x_TD, y_TD, token_mask_T) if self.measure_rows else None
        y_TD = self.finish(x_in, y_TD)
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

    def route(
        self,
        x_TD: Float[Array, "T D"],
        placement: Placement | None = None,
        *,
        token_mask_T: Bool[Array, " T"] | None = None,
        bonus_E: Float32[Array, " E"] | None = None,
    ) -> Routing:
        """The first part of a call: which experts the tokens want, before any drop.

        Args:
            x_TD, placement, token_mask_T: as for a call.
            bonus_E: see `Router`.
        """
        reach = self._reach(placement)
        return self.router(x_TD, token_mask_T=token_mask_T, reach=reach, bonus_E=bonus_E)

    def within_capacity(self, routing: Routing) -> tuple[jax.Array, jax.Array]:
        """The experts int32 [T, K] that are computed, −1 for what an optional capacity drops.

        Args:
            routing: of this device's tokens.

        Returns:
            them, and how many assignments are dropped, int32 [].
        """
        experts_TK, dropped = routing.experts_TK, jnp.zeros((), jnp.int32)
        factor, num_experts = self.config.exchange.capacity_factor, self.config.router.num_experts
        if factor is None:
            return experts_TK, dropped
        tokens, top_k = experts_TK.shape
        room = exchange.expert_capacity(factor, tokens, top_k, num_experts, self.expert_devices)
        return exchange.drop_over_capacity(experts_TK, routing.scores_TK, num_experts, room)

    def serve(
        self,
        x_TD: Float[Array, "T D"],
        scores_TK: Float32[Array, "T K"],
        slots_TK: Int32[Array, "T K"],
        slots: int,
    ) -> Float32[Array, "T D"]:
        """The second part alone, on one device: some of the experts, in slots of the bank.

        Args:
            x_TD: tokens in the compute dtype.
            scores_TK: weights of the assignments.
            slots_TK: their slots, distinct within a token, −1 for those that are left out.
            slots: S, how many the bank has; which experts lie there is the caller's affair.

        Returns:
            The weighted sums, rounded once to the compute dtype; zero where all are left out.
        """
        tokens, top_k = slots_TK.shape
        budget = exchange.choose(
            self.config.exchange,
            tokens=tokens,
            top_k=top_k,
            num_experts=self.config.router.num_experts,
            slots=slots,
            devices=1,
        )
        plans = exchange.make_plans(slots_TK, budget)
        return self._routed(x_TD, scores_TK, None, plans, budget)

    def finish(self, x_TD: Float[Array, "T D"], y_TD: Float32[Array, "T D"]) -> Float[Array, "T D"]:
        """The last part: adds the experts that every token uses.

        Args:
            x_TD: tokens, as they entered the tensor parallel part.
            y_TD: what the routed experts gave, this tensor rank's term.

        Returns:
            [T, D] in x's dtype, whole.
        """
        if self.shared is not None:
            y_TD = y_TD + self._shared(x_TD, self.shared)
        return exit_parallel(y_TD, TENSOR).astype(x_TD.dtype)

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

    def expand_experts(self) -> None:
        """Makes experts that share parameters independent, once and not in every call.

        The layer computes the same and has more parameters. Where nothing is shared nothing
        changes.

        Raises:
            UserError: the experts are computed together.
        """
        if isinstance(self.bank, WideExpertBank):
            raise UserError(
                f"together={self.bank.members}: this needs the weights of single experts; name a "
                "model with together=1"
            )
        if isinstance(self.bank, SharedExpertBank):
            self.bank = ExpandedExpertBank(self.bank)

    def fold_projections(self) -> None:
        """Folds the projections into the experts' weights, once and not in every call.

        Experts that share parameters are made independent first (`expand_experts`). Afterwards the
        layer only infers: the weights have lost what the projections leave out. Without projections
        nothing else changes.

        Raises:
            UserError: it is done already; quantizing does it.
        """
        self.expand_experts()
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

        Experts that share parameters are made independent first, and projections of the rows are
        folded into the weights.

        Args:
            dtype: `int8` or `float8_e4m3fn`.
            rows: `float8` multiplies rows as float8, too: for prompts, at a cost in accuracy.
            tensor: devices along the mesh's `tensor` axis.

        Raises:
            UserError: they cannot be, see `QuantizedExpertBank`.
        """
        self.expand_experts()
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
        budget = self.budget(routing.experts_TK.shape[0], placement)
        experts_TK, dropped = self.within_capacity(routing)
        num_experts = self.config.router.num_experts
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
