"""Training by several data-parallel ranks on one device, with the collectives of the real step.

A rank is an entry of a dimension that `jax.vmap` calls `data`: psum, reduce-scatter, all-to-all and
all-gather over it are then reshapes and sums in one program. `expert` and `tensor` are mesh axes of
one device. Everything that a rank computes is the library's own: model, `Reducer`, optimizer, and
pieces of masters and moments as `sharding.zero` stores them. Several runs of different seeds are
one more dimension, so that small products fill a large device.

Not simulated: gradients added up over microbatches, selection biases that are updated, placements.

    S seeds     R ranks     B examples of a rank     L tokens of an example
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from moejax.errors import UserError
from moejax.training.config import TrainConfig
from moejax.training.optimizer import adamw_update, init_moments, learning_rate
from moejax.training.residuals import make_reducer
from moejax.training.state import Blueprint
from pallas_kernels import backends
from sharding.collectives import psum_statistics
from sharding.compression.interface import State
from sharding.mesh import DATA, EXPERT, TENSOR, TOKEN_AXES, MeshShape, abstract_mesh
from sharding.zero import gather_weights

__all__ = ["RankState", "SimulatedRanks", "plain_backends"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RankState:
    """What a step changes, of all seeds and ranks: every array is [S, R, …].

    masters: float32 pieces.
    moments: Adam's first and second, likewise.
    biases: of the routers.
    residuals: of compressed gradients, by parameter and name; None where nothing is kept.
    """

    masters: nnx.State
    moments: tuple[Any, Any]
    biases: nnx.State
    residuals: dict[str, State] | None


class SimulatedRanks:
    """The programs of a run whose ranks are all on one device.

    Args:
        config: the run; its batch is that of all ranks together.
        ranks: R, devices along `data` of the mesh that is simulated.
        device: where it runs, or where it is compiled for; None: the default one.

    Raises:
        UserError: the batch cannot be split over the ranks, or the run needs what is not simulated.
    """

    def __init__(self, config: TrainConfig, ranks: int, device: Any = None) -> None:
        if config.data.batch_size % ranks:
            raise UserError(
                f"batch_size={config.data.batch_size} on {ranks} ranks: each rank has equally many "
                "examples; choose a multiple"
            )
        if config.accumulate != 1 or config.model.moe.router.bias_update_rate:
            raise UserError(
                f"accumulate={config.accumulate}, bias_update_rate="
                f"{config.model.moe.router.bias_update_rate}: neither microbatches nor changing "
                "biases are simulated; choose 1 and 0"
            )
        self.config, self.ranks = config, ranks
        self._blueprint = Blueprint(
            config.model, abstract_mesh(MeshShape(data=ranks)), attention="xla"
        )
        self.reducer = make_reducer(self._blueprint, config)
        # JAX does not gather over several axes at once of which only one is simulated.
        self.reducer.leaves = [
            replace(leaf, axes=tuple(a for a in leaf.axes if a == DATA))
            for leaf in self.reducer.leaves
        ]
        devices = np.array([jax.devices()[0] if device is None else device]).reshape(1, 1)
        self.mesh = Mesh(devices, (EXPERT, TENSOR), axis_types=(AxisType.Auto,) * 2)

    # ── programs ────────────────────────────────────────────────────────────

    def begin(self, seeds: Sequence[int], noise: float = 0.0) -> RankState:
        """The state of step 0, the weights those of `init_state` with the same seed.

        Args:
            seeds: of the runs.
            noise: every weight is multiplied with 1 + noise · n, n normal: what is left of a
                difference as small as rounding shows how much of a result is chance.
        """

        def one(key: jax.Array) -> RankState:
            params, biases = self._blueprint.make(key)
            if noise:
                params = _shaken(params, jax.random.fold_in(key, 1), noise)
            masters = self._split(params)
            kept = None if self.reducer.shapes is None else self.reducer.init()
            biases, kept = (
                jax.tree.map(lambda x: jnp.broadcast_to(x, (self.ranks, *x.shape)), tree)
                for tree in (biases, kept)
            )
            return RankState(masters, init_moments(masters), biases, kept)

        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        return jax.jit(jax.vmap(one))(keys)

    def make_steps(self) -> jax.stages.Wrapped:
        """Builds the jitted `(state, tokens, first) → (state, losses)` of several steps in a row.

        Tokens are integers [steps, S, R, B, L + 1], `first` int32 [] the number of the first step;
        the losses float32 [steps, S], of a step's own tokens in nats. The state is donated.
        """

        def step(carry: tuple[RankState, jax.Array], tokens: jax.Array):
            state, number = carry
            of_ranks = jax.vmap(partial(self._rank_step, number), axis_name=DATA)
            state, losses_SR = jax.vmap(of_ranks)(state, tokens.astype(jnp.int32))
            return (state, number + 1), losses_SR[:, 0]

        def steps(state: RankState, tokens: jax.Array, first: jax.Array):
            (state, _), losses = lax.scan(step, (state, first), tokens)
            return state, losses

        return jax.jit(self._on_one_device(steps, 3), donate_argnums=0)

    def make_evaluation(self) -> jax.stages.Wrapped:
        """Builds the jitted `(masters, biases, tokens, mask) → summed nll`, float32 [S] nats.

        Tokens are int32 [batches, R, B, L + 1], the mask bool [batches, R, B, L].
        """
        dtype = jnp.dtype(self.config.model.compute_dtype)

        def of_rank(masters: Any, biases: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            weights = gather_weights(masters, self._blueprint.storage, dtype)
            model = self._blueprint.merge(weights, biases)
            hidden_BSD = model(tokens[:, :-1], inference=True).hidden_BSD
            nll_BS = model.nll(hidden_BSD, tokens[:, 1:])
            return psum_statistics(jnp.sum(jnp.where(mask, nll_BS, 0.0)), TOKEN_AXES)

        def evaluate(masters: Any, biases: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            of_ranks = jax.vmap(of_rank, axis_name=DATA)
            of_seeds = jax.vmap(of_ranks, in_axes=(0, 0, None, None))

            def add(total_S: jax.Array, batch: tuple[jax.Array, jax.Array]):
                return total_S + of_seeds(masters, biases, *batch)[:, 0], None

            seeds = jax.tree.leaves(masters)[0].shape[0]
            return lax.scan(add, jnp.zeros(seeds, jnp.float32), (tokens, mask))[0]

        return jax.jit(self._on_one_device(evaluate, 4))

    def weights(self, state: RankState, seed: int = 0) -> nnx.State:
        """The whole master weights of one run, by its place among the seeds."""

        def whole(masters: Any) -> nnx.State:
            return self._joined(jax.tree.map(lambda x: x[seed], masters))

        return jax.jit(whole)(state.masters)

    # ── what one rank does ──────────────────────────────────────────────────

    def _rank_step(
        self, number: jax.Array, state: RankState, tokens_BL: jax.Array
    ) -> tuple[RankState, jax.Array]:
        """As the step of `moejax.training.step.make_train_step`, which tests compare it with."""
        config, reducer = self.config, self.reducer
        weights = reducer.gather(state.masters, jnp.dtype(config.model.compute_dtype))
        share = jax.grad(self._loss_share, has_aux=True)
        grads, loss = share(weights, state.biases, tokens_BL)
        grads = reducer.clip(grads)
        squares = reducer.squares(grads)
        grads, residuals = reducer.reduce(grads, state.residuals, number)
        rate = learning_rate(config.optimizer, config.steps, number)
        optimizer = replace(config.optimizer, clip_norm=0.0) if reducer.clips else config.optimizer
        masters, moments, _ = adamw_update(
            optimizer,
            rate,
            number,
            state.masters,
            state.moments,
            grads,
            self._blueprint.stored_specs,
            squares,
        )
        return RankState(masters, moments, state.biases, residuals), psum_statistics(
            loss, TOKEN_AXES
        )

    def _loss_share(
        self, weights: Any, biases: Any, tokens_BL: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        model, data = self._blueprint.merge(weights, biases), self.config.data
        out = model(tokens_BL[:, :-1])
        nll_BS = model.nll(out.hidden_BSD, tokens_BL[:, 1:], chunk=self.config.loss_chunk or None)
        loss = jnp.sum(nll_BS) / (data.batch_size * data.seq_len)
        if out.aux is None:
            return loss, loss
        return loss + jnp.sum(out.aux.losses.load_balance) + jnp.sum(out.aux.losses.z), loss

    # ── how things are laid out ─────────────────────────────────────────────

    def _on_one_device(self, function: Callable[..., Any], arguments: int) -> Callable[..., Any]:
        specs = (P(),) * arguments
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=P(), check_vma=False
        )

    def _split(self, whole: Any) -> Any:
        """Arrays as the pieces that ranks store: [R, …]."""

        def split(dim: int | None, x: jax.Array) -> jax.Array:
            if dim is None:
                return jnp.broadcast_to(x, (self.ranks, *x.shape))
            pieces = x.reshape(*x.shape[:dim], self.ranks, -1, *x.shape[dim + 1 :])
            return jnp.moveaxis(pieces, dim, 0)

        return self._by_storage(split, whole)

    def _joined(self, pieces: Any) -> Any:
        """The inverse of `_split`."""

        def join(dim: int | None, x: jax.Array) -> jax.Array:
            if dim is None:
                return x[0]
            x = jnp.moveaxis(x, 0, dim)
            return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])

        return self._by_storage(join, pieces)

    def _by_storage(self, function: Callable[[int | None, jax.Array], Any], tree: Any) -> Any:
        def one(storage: Any, part: Any) -> Any:
            return jax.tree.map(partial(function, storage.dim), part)

        return jax.tree.map(one, self._blueprint.storage, tree)


def _shaken(params: Any, key: jax.Array, noise: float) -> Any:
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        tree,
        [
            x * (1 + noise * jax.random.normal(k, x.shape, x.dtype))
            for x, k in zip(leaves, keys, strict=True)
        ],
    )


@contextlib.contextmanager
def plain_backends() -> Iterator[None]:
    """Programs that are traced inside use no kernel of a device: `vmap` has no rule for these."""
    before = backends.choose

    def choose(operation: str, names: Sequence[str], backend: str | None, refusal: Any) -> str:
        def refuses(name: str, forced: bool) -> str | None:
            if name.startswith(("mosaic", "triton")):
                return "ranks are simulated by vmap"
            return refusal(name, forced)

        return before(operation, names, backend, refuses)

    backends.choose = choose  # type: ignore[assignment]
    try:
        yield
    finally:
        backends.choose = before
