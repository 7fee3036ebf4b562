"""All gradients of a step from local ones to stored pieces, and stored weights to gathered ones.

Each compressed parameter has collectives of its own, so that XLA may start them while the backward
still computes others; what stays exact and is small goes together, one sum for each set of axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.errors import UserError
from sharding.compression import squares
from sharding.compression.config import GradCompression
from sharding.compression.interface import RESIDUAL, Method, Sent, State
from sharding.compression.leaves import Leaf, leaf_of
from sharding.compression.methods import WEIGHT_BLOCKS, make_method
from sharding.compression.quantized import gather_piece, gathered_bytes
from sharding.compression.savings import compressed_bytes, exact_bytes, explain_larger
from sharding.gradients import norm_of_data_rank
from sharding.mesh import DATA
from sharding.zero import gather_weights, scatter_gradients

__all__ = ["Reducer"]

_TAG = 0x6772  # sets the keys of rounding apart from those of the weights


class Reducer:
    """Compressed reduction and gathering for the parameters of a model on a mesh.

    Args:
        params: the parameters, arrays or ShapeDtypeStructs, of the whole mesh.
        storage: tree of `Storage`, like it.
        axis_sizes: devices along each mesh axis.
        config: what is compressed, and how.
        seed: of the rounding.
        momentum: Adam's b1. Where `squares` are given, the reduced gradients have it in them.
        compute_dtype: in which weights are gathered that are not compressed.
        clip_norm: largest norm of the gradient; 0: none. See `clip`.

    A gradient of which the method would send as many bytes as its exact sum does, or more, is
    summed exactly; after a warm-up, if there is one.

    Raises:
        UserError: `data` cannot be split over the hosts.
    """

    def __init__(
        self,
        params: nnx.State,
        storage: Any,
        axis_sizes: Mapping[str, int],
        config: GradCompression,
        seed: int,
        momentum: float = 0.0,
        compute_dtype: Any = jnp.bfloat16,
        clip_norm: float = 0.0,
    ):
        self._storage, self._sizes = storage, dict(axis_sizes)
        self._config, self._seed, self._momentum = config, seed, momentum
        self._item, self._clip_norm = jnp.dtype(compute_dtype).itemsize, clip_norm
        self._compresses = config.method != "none"
        if config.hosts and axis_sizes[DATA] % config.hosts:
            raise UserError(
                f"hosts={config.hosts} on a mesh with data={axis_sizes[DATA]}: each host has "
                "equally many data ranks; choose a divisor, or 0"
            )
        self.leaves: list[Leaf] = []
        stored = dict(nnx.to_flat_state(storage))
        for path, variable in nnx.to_flat_state(params):
            leaf = leaf_of(path, variable, stored[path], axis_sizes)
            if self._compresses and not leaf.exact and not self._saves(leaf):
                leaf = replace(leaf, exact=True, larger=True)
            self.leaves.append(leaf)

    def _method(self, leaf: Leaf) -> Method:
        return make_method(self._config, leaf.stacked, self._momentum)

    def _saves(self, leaf: Leaf) -> bool:
        """Whether the method sends fewer bytes than the exact sum."""
        sizes, hosts = {a: self._sizes[a] for a in leaf.axes}, self._config.hosts
        method = make_method(replace(self._config, warmup_steps=0), leaf.stacked, self._momentum)
        ours = compressed_bytes(self._crossings(leaf, method), sizes, hosts)
        return ours < exact_bytes(leaf.shape, sizes, leaf.storage.dim, hosts)

    def explain(self) -> str:
        """Which gradients are exact because they would not get smaller; empty if there are none."""
        served = sum(not leaf.exact for leaf in self.leaves)
        larger = [leaf.name for leaf in self.leaves if leaf.larger]
        return explain_larger(self._config.method, served, larger)

    def gather(self, masters: nnx.State, compute_dtype: Any) -> nnx.State:
        """The weights of a step, `gather_weights`, in 8 bits where that is asked for.

        What a parameter must be for its gradient to be compressed, it must be for this, too; and
        its pieces must be fewer bytes so.
        """
        if self._config.weight_gather == "none":
            return gather_weights(masters, self._storage, compute_dtype)
        flat = dict(nnx.to_flat_state(masters))
        for leaf in self.leaves:
            variable = flat[leaf.path]
            if not self._gathers_bytes(leaf):
                flat[leaf.path] = gather_weights(variable, leaf.storage, compute_dtype)
                continue
            assert leaf.storage.dim is not None
            whole = gather_piece(variable.get_value(), leaf.storage.dim, WEIGHT_BLOCKS)
            flat[leaf.path] = variable.replace(whole.astype(compute_dtype))
        return nnx.from_flat_state(flat)

    def _gathers_bytes(self, leaf: Leaf) -> bool:
        if self._config.weight_gather == "none" or leaf.storage.dim is None:
            return False
        piece = math.prod(leaf.shape) // self._sizes[DATA]
        fewer = gathered_bytes(piece, WEIGHT_BLOCKS) < piece * self._item
        return fewer and (leaf.larger or not leaf.exact)

    def gather_operand(self, leaf: Leaf, piece: int) -> int | None:
        """Bytes of a stored piece of so many numbers on the way; None where it travels as it is."""
        return gathered_bytes(piece, WEIGHT_BLOCKS) if self._gathers_bytes(leaf) else None

    @property
    def clips(self) -> bool:
        """Whether `clip` is what limits the gradient's norm, and not the optimizer."""
        asked = self._gives_squares and self._clip_norm > 0
        return asked and not all(leaf.exact for leaf in self.leaves)

    def clip(self, grads: nnx.State) -> nnx.State:
        """Local gradients of a limited norm, where what arrives is older than this step.

        What `top_k` does not send piles up, and what arrives is large where it comes rarely: its
        norm says little of this step's gradient, and one that is far too large would wait in the
        residual for many steps to come. So each data rank limits its own before anything is added
        up, to clip_norm / √data: of as many independent gradients the sum then has clip_norm (Deep
        Gradient Compression, arXiv 1712.01887 §3.2). Of equal ones it has √data times as much.

        Args:
            grads: this device's, not reduced.

        Returns:
            The same in float32, all times one number, if `clips`; NaN where the norm is no finite
            number, so that the step is seen to be none either. Else the gradients as they are.
        """
        if not self.clips:
            return grads
        specs = jax.tree.map(lambda s: s.spec, self._storage)
        norm = norm_of_data_rank(grads, specs)
        scale = jnp.minimum(1.0, self._clip_norm * self._sizes[DATA] ** -0.5 / (norm + 1e-6))
        scale = jnp.where(jnp.isfinite(norm), scale, jnp.nan)
        return jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads)

    def reduce(
        self, grads: nnx.State, state: dict[str, State] | None, step: jax.Array
    ) -> tuple[nnx.State, dict[str, State] | None]:
        """Local gradients → gradients of the global loss for the stored pieces, float32.

        Args:
            grads: of this device's loss share.
            state: this device's, from `init` or the last step; None where `specs` is None.
            step: steps taken, int32 [].

        Returns:
            The pieces as of `sharding.zero.scatter_gradients`, and the new state.
        """
        if not self._compresses:
            return scatter_gradients(grads, self._storage), state
        flat, new = dict(nnx.to_flat_state(grads)), {}
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._seed), _TAG), step)
        together: dict[tuple[str, ...], list[Leaf]] = {}
        for index, leaf in enumerate(self.leaves):
            variable = flat[leaf.path]
            if leaf.exact and leaf.storage.dim is None:
                together.setdefault(leaf.axes, []).append(leaf)
            elif leaf.exact:
                flat[leaf.path] = scatter_gradients(variable, leaf.storage)
            else:
                held = {} if state is None else _inside(state[leaf.name], leaf)
                piece, held = self._method(leaf).reduce(
                    variable.get_value(),
                    held,
                    leaf.axes,
                    leaf.storage.dim,
                    key=jax.random.fold_in(
                        jax.random.fold_in(key, index), lax.axis_index(leaf.differs)
                    ),
                    step=step,
                )
                flat[leaf.path] = variable.replace(piece)
                new[leaf.name] = _outside(held, leaf)
        for axes, leaves in together.items():
            grads_ = [flat[leaf.path].get_value().astype(jnp.float32) for leaf in leaves]
            for leaf, total in zip(leaves, _sum_together(grads_, axes)):
                flat[leaf.path] = flat[leaf.path].replace(total)
        return nnx.from_flat_state(flat), None if state is None else new

    def crossings(self, leaf: Leaf) -> Sequence[Sent] | None:
        """The collectives that sum a gradient, as of `Method`; None where it is exact."""
        if not self._compresses or leaf.exact:
            return None
        return self._crossings(leaf, self._method(leaf))

    def _crossings(self, leaf: Leaf, method: Method) -> Sequence[Sent]:
        sizes = {a: self._sizes[a] for a in leaf.axes}
        found = method.crossings(leaf.shape, sizes, leaf.storage.dim)
        if self._gives_squares:
            found = [*found, *squares.crossings(leaf.shape, sizes, leaf.stacked)]
        return found

    @property
    def _gives_squares(self) -> bool:
        return self._config.method == "top_k"

    def squares(self, grads: nnx.State) -> dict[tuple, jax.Array]:
        """What Adam's second moment is to be made of, where the reduced gradient is not fit for it.

        Of those parameters the reduced gradient is the first moment already.

        Args:
            grads: local ones, as for `reduce`.

        Returns:
            float32 pieces like the reduced gradients, by path; empty but for `top_k`.
        """
        if not self._gives_squares:
            return {}
        flat = dict(nnx.to_flat_state(grads))
        return {
            leaf.path: squares.squares(
                flat[leaf.path].get_value().astype(jnp.float32),
                leaf.axes,
                leaf.storage.dim,
                leaf.stacked,
            )
            for leaf in self.leaves
            if not leaf.exact
        }

    # ── what is kept from step to step ──────────────────────────────────────

    @cached_property
    def shapes(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]] | None:
        """The state of all devices, by parameter; None where the method keeps nothing.

        A residual is [devices along each of `Leaf.axes`…, *parameter]; anything else [devices along
        each of `Leaf.differs`…, *of one device].
        """
        found = {}
        for leaf, local in self._compressed():
            found[leaf.name] = {
                name: jax.ShapeDtypeStruct(
                    (
                        *(self._sizes[a] for a in _rank_axes(name, leaf)),
                        *(leaf.whole if name == RESIDUAL else value.shape),
                    ),
                    value.dtype,
                )
                for name, value in local.items()
            }
        return found if any(found.values()) else None

    @property
    def state_bytes(self) -> int:
        """Bytes of the state on a device."""
        return sum(
            math.prod(x.shape) * x.dtype.itemsize
            for _, local in self._compressed()
            for x in local.values()
        )

    @cached_property
    def specs(self) -> dict[str, dict[str, P]] | None:
        """How `shapes` are split over the mesh."""
        if self.shapes is None:
            return None
        return {
            leaf.name: {
                name: P(*_rank_axes(name, leaf), *(leaf.storage.spec if name == RESIDUAL else ()))
                for name in local
            }
            for leaf, local in self._compressed()
        }

    def init(self) -> dict[str, State]:
        """This device's state at the start, inside the shard_map."""
        key = jax.random.fold_in(jax.random.key(self._seed), _TAG)
        return {
            leaf.name: _outside(self._start(leaf, jax.random.fold_in(key, index)), leaf)
            for index, leaf in enumerate(self.leaves)
            if not leaf.exact
        }

    def _start(self, leaf: Leaf, key: jax.Array) -> State:
        return self._method(leaf).init(leaf.shape, key)

    def _compressed(self) -> Iterator[tuple[Leaf, dict[str, jax.ShapeDtypeStruct]]]:
        for leaf in self.leaves if self._compresses else ():
            if not leaf.exact:
                start = lambda key, leaf=leaf: self._start(leaf, key)  # noqa: E731
                yield leaf, jax.eval_shape(start, jax.random.key(0))


def _rank_axes(name: str, leaf: Leaf) -> tuple[str, ...]:
    return leaf.axes if name == RESIDUAL else leaf.differs


def _inside(state: State, leaf: Leaf) -> State:
    """A device's part of the state, without the dimensions of ranks."""
    return {n: lax.squeeze(x, range(len(_rank_axes(n, leaf)))) for n, x in state.items()}


def _outside(state: State, leaf: Leaf) -> State:
    return {n: lax.expand_dims(x, range(len(_rank_axes(n, leaf)))) for n, x in state.items()}


def _sum_together(grads: list[jax.Array], axes: tuple[str, ...]) -> list[jax.Array]:
    """Each array's sum over the axes, by one all-reduce."""
    if not axes:
        return grads
    total = lax.psum(jnp.concatenate([g.reshape(-1) for g in grads]), axes)
    parts, start = [], 0
    for grad in grads:
        parts.append(lax.slice(total, (start,), (start + grad.size,)).reshape(grad.shape))
        start += grad.size
    return parts
