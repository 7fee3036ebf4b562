"""One training step, and held-out evaluation, inside one fully manual shard_map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.model.decoder import Decoder
from moejax.moe_aux import MoEAux
from moejax.placement import counting
from moejax.routing.bias import update_bias
from moejax.training.anomaly import Verdict, judge
from moejax.training.config import TrainConfig
from moejax.training.optimizer import adamw_update, learning_rate
from moejax.training.residuals import make_reducer
from moejax.training.state import Blueprint, TrainState
from sharding.collectives import axis_index, psum_statistics
from sharding.mesh import AXES, TOKEN_AXES
from sharding.specs import specs_of
from sharding.zero import gather_weights

__all__ = [
    "BATCH_SPEC",
    "compiler_options",
    "make_eval_step",
    "make_gather",
    "make_train_step",
]

BATCH_SPEC = P(None, TOKEN_AXES, None)
"""[accumulation, examples, tokens + 1]: examples are split over `data` × `expert`."""

Metrics = dict[str, Any]


def compiler_options(config: TrainConfig, platform: str) -> dict[str, bool]:
    """Compiler options for a run: deterministic reductions on GPU when asked for."""
    if config.deterministic and platform in ("gpu", "cuda"):
        return {"xla_gpu_deterministic_ops": True}
    return {}


def make_train_step(
    blueprint: Blueprint, config: TrainConfig, **jit_options: Any
) -> Callable[[TrainState, jax.Array, Any], tuple[TrainState, Metrics]]:
    """Builds the jitted step `(state, batch, placement) → (state, metrics)`.

    The batch is int32 [accumulate, examples, seq_len + 1], laid out as `BATCH_SPEC`; the placement
    None or stacked [L_moe, …]. The state's buffers are donated. Metrics are replicated:
    `loss` and `aux_loss` (nats a token), `grad_norm`, `learning_rate`, and `moe`, the layers'
    `MoEAux` summed over devices and microbatches ([L_moe, …]); None without experts.

    A state with `counts` comes back with those of this step, too; older ones fade as
    `config.placement_stats_window` says. Without, nothing is counted.

    A state with a `history` is left as it was by a step that `config.anomaly` does not let through
    (`step` itself counts one that is skipped), and the metrics have its `Verdict` as `anomaly`;
    without, that is None.
    """
    compute_dtype = jnp.dtype(blueprint.config.compute_dtype)
    tokens = config.data.batch_size // config.accumulate * config.data.seq_len
    reducer = make_reducer(blueprint, config)
    optimizer = replace(config.optimizer, clip_norm=0.0) if reducer.clips else config.optimizer
    window = config.placement_stats_window
    decay = 1 - 1 / window if window else 1.0

    def loss_share(
        weights: nnx.State,
        biases: nnx.State,
        batch_BS: jax.Array,
        placement: Any,
        *,
        counted: bool,
    ):
        model, hidden_BSD, extra, aux = forward(
            blueprint, config, weights, biases, batch_BS, placement, counted=counted
        )
        chunk = config.loss_chunk or None
        loss = model.summed_nll(hidden_BSD, batch_BS[:, 1:], scale=1 / tokens, chunk=chunk)
        return loss + extra, (loss, extra, None if aux is None else aux.over_devices())

    def step(state: TrainState, batch: jax.Array, placement: Any):
        weights = reducer.gather(state.masters, compute_dtype)
        share = partial(loss_share, counted=state.counts is not None)
        grads, (loss, extra, moe) = _accumulated(
            jax.grad(share, has_aux=True), weights, state.biases, batch, placement
        )
        grads = reducer.clip(grads)
        squares = reducer.squares(grads)
        grads, residuals = reducer.reduce(grads, state.residuals, state.step)
        rate = learning_rate(config.optimizer, config.steps, state.step)
        history = state.history
        masters, moments, norm = adamw_update(
            optimizer,
            rate,
            state.step if history is None else state.step - history.skipped,
            state.masters,
            state.moments,
            grads,
            blueprint.stored_specs,
            squares,
        )
        biases = _balanced(state.biases, blueprint, moe)
        loss, extra = psum_statistics((loss, extra), TOKEN_AXES)
        new = TrainState(state.step + 1, masters, moments, biases, state.counts, residuals, history)
        verdict = None
        if history is not None:
            verdict, history = judge(config.anomaly, history, *_of_first(loss, norm))
            new = replace(_chosen(verdict, new, state), history=history)
        counts = old_counts = state.counts
        if counts is not None and moe is not None:
            seen = counting.count(moe.experts_TK, blueprint.config.moe.router.num_experts)
            counts, moe = counting.add_step(counts, seen, decay), replace(moe, experts_TK=None)
            if verdict is not None:
                counts = _where(verdict.apply, counts, old_counts)
        metrics = {
            "loss": loss,
            "aux_loss": extra,
            "grad_norm": norm,
            "learning_rate": rate,
            "moe": moe,
            "anomaly": verdict,
        }
        return replace(new, counts=counts), metrics

    counters: Any = counting.COUNTERS_SPEC
    kept: Any = reducer.specs
    everywhere: Any = P()
    specs = replace(blueprint.state_specs(), counts=counters, residuals=kept, history=everywhere)
    mapped = jax.shard_map(
        step,
        mesh=blueprint.mesh,
        in_specs=(specs, BATCH_SPEC, P()),
        out_specs=(specs, P()),
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=0, **jit_options)


def forward(
    blueprint: Blueprint,
    config: TrainConfig,
    weights: nnx.State,
    biases: nnx.State,
    batch_BS: jax.Array,
    placement: Any = None,
    *,
    counted: bool = False,
) -> tuple[Decoder, jax.Array, jax.Array, MoEAux | None]:
    """The forward of a step but for the head, inside the shard_map.

    Args:
        blueprint, config: model and run.
        weights: gathered, in their compute dtype.
        biases: of the routers.
        batch_BS: int32 [B, S + 1], local examples of a microbatch.
        placement: stacked; None for home.
        counted: whether the layers report their tokens' experts.

    Returns:
        the model; what goes into its head, [B, S, D]; this device's share of the routers' own
        losses; what the layers report, None without experts.
    """
    model = blueprint.merge(weights, biases)
    if counted:
        most = max(1, counting.STEP_TOKENS // config.accumulate)
        model.report_experts(counting.sample_stride(batch_BS[:, 1:].size, most))
    out = model(batch_BS[:, :-1], placement=placement)
    if out.aux is None:
        return model, out.hidden_BSD, jnp.zeros((), jnp.float32), None
    extra = jnp.sum(out.aux.losses.load_balance) + jnp.sum(out.aux.losses.z)
    return model, out.hidden_BSD, extra, out.aux


def _of_first(*values: jax.Array) -> jax.Array:
    """What the first device has, [n]: sums in groups of devices may differ in their last bits."""
    here = jnp.stack(values)
    first = sum((axis_index(axis) for axis in AXES), start=jnp.int32(0)) == 0
    return psum_statistics(jnp.where(first, here, 0.0), AXES)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(partial(jnp.where, condition), new, old)


def _chosen(verdict: Verdict, new: TrainState, old: TrainState) -> TrainState:
    """The state after a step, or as it was; a step that is skipped counts as one."""
    chosen = _where(verdict.apply, new, old)
    return replace(chosen, step=jnp.where(verdict.halted, old.step, new.step))


def _accumulated(grad_fn: Callable, weights: Any, biases: Any, batch: jax.Array, placement: Any):
    """Mean gradients and losses over microbatches, float32; statistics summed (waves: largest)."""
    if batch.shape[0] == 1:
        return grad_fn(weights, biases, batch[0], placement)
    count = batch.shape[0]

    def body(carry: Any, micro: jax.Array) -> tuple[Any, MoEAux | None]:
        grads, losses = carry
        new, (*new_losses, moe) = grad_fn(weights, biases, micro, placement)
        grads = jax.tree.map(lambda s, g: s + g.astype(jnp.float32) / count, grads, new)
        losses = jax.tree.map(lambda s, x: s + x / count, losses, tuple(new_losses))
        return (grads, losses), moe

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    start = (zeros, (jnp.zeros((), jnp.float32),) * 2)
    (grads, losses), moe = lax.scan(body, start, batch)
    return grads, (*losses, None if moe is None else moe.summed())


def _balanced(biases: nnx.State, blueprint: Blueprint, moe: MoEAux | None) -> nnx.State:
    """The selection biases after this step's counts; layers in order, stacked or single."""
    rate = blueprint.config.moe.router.bias_update_rate
    if moe is None or rate == 0.0:
        return biases
    rows, flat = 0, dict(nnx.to_flat_state(biases))
    updated = []
    for group in blueprint.groups:
        if group.layer.moe is None:
            continue
        counts_LE = moe.counts_E[rows : rows + group.size, : group.layer.moe.router.num_experts]
        rows += group.size
        for path, variable in flat.items():
            if path[:2] == ("layers", group.name):
                counts = counts_LE if group.scanned else counts_LE[0]
                updated.append((path, variable.replace(update_bias(variable[...], counts, rate))))
    return nnx.from_flat_state(updated)


def make_eval_step(
    blueprint: Blueprint, loss_chunk: int = 0, *, with_kept: bool = False, **jit_options: Any
) -> Callable[..., Any]:
    """Builds `(params, biases, tokens, mask, placement=None) → summed nll`, float32 [] nats.

    Params are split by their use (`specs_of`); tokens int32 [B, S + 1] and mask bool [B, S] over
    `data` × `expert`; a placement [L, …], None for home. Masked-out targets count nothing; all
    tokens are routed. With `with_kept`, for models with experts, a pair: that, and float32 [2],
    `MoEAux.kept` and tokens, summed over layers.
    """

    def evaluate(
        params: Any, biases: Any, tokens_BS: jax.Array, mask_BS: jax.Array, placement: Any
    ) -> Any:
        model = blueprint.merge(params, biases)
        out = model(tokens_BS[:, :-1], placement=placement, inference=True)
        nll_BS = model.nll(out.hidden_BSD, tokens_BS[:, 1:], chunk=loss_chunk or None)
        nll = psum_statistics(jnp.sum(jnp.where(mask_BS, nll_BS, 0.0)), TOKEN_AXES)
        if not with_kept or out.aux is None:
            return nll
        tokens = jnp.sum(out.aux.num_tokens).astype(jnp.float32)
        kept = tokens if out.aux.kept is None else jnp.sum(out.aux.kept)
        return nll, psum_statistics(jnp.stack([kept, tokens]), TOKEN_AXES)

    rows = P(TOKEN_AXES, None)
    mapped = jax.shard_map(
        evaluate,
        mesh=blueprint.mesh,
        in_specs=(specs_of(blueprint.params), blueprint.bias_specs, rows, rows, P()),
        out_specs=P(),
        check_vma=False,
    )

    def step(params: Any, biases: Any, tokens: Any, mask: Any, placement: Any = None) -> Any:
        return mapped(params, biases, tokens, mask, placement)

    return jax.jit(step, **jit_options)


def make_gather(blueprint: Blueprint) -> Callable[[nnx.State], nnx.State]:
    """Builds `masters → params` for evaluation: gathered over `data`, in the compute dtype."""
    dtype = jnp.dtype(blueprint.config.compute_dtype)
    mapped = jax.shard_map(
        lambda masters: gather_weights(masters, blueprint.storage, dtype),
        mesh=blueprint.mesh,
        in_specs=(blueprint.stored_specs,),
        out_specs=specs_of(blueprint.params),
        check_vma=False,
    )
    return jax.jit(mapped)
