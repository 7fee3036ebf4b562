"""A layer's program with its exchange, its experts, or both left out, to time what remains.

Without exchange every device runs as if all others were clones of itself: an all-to-all gives its
own bucket G times, a gather its own piece G times, a sum its own term. So it has as many rows as
with the exchange, and as many assignments of each of its experts as if all tokens were routed as
its own are. These copies are made in memory, since rows that arrive are there, too. Without experts
each row that arrived is multiplied with the sum of its weights: read once and written once.
Everything else is the same program: routing, planning, packing, rounding, sums. In mode `remote`,
whose experts' kernels send the rows themselves, the parts are of the program in which kernels of
their own do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
from jax import lax
from jax import numpy as jnp

import moejax.exchange.remote
import moejax.layer
from moejax.exchange.budget import Budget
from moejax.experts import ExpertBank
from sharding import collectives

PARTS = {
    "total": (True, True),
    "no_comm": (False, True),
    "no_compute": (True, False),
    "neither": (False, False),
}
"""Programs of a variant: with its exchange, with its experts."""


class _Clones:
    """Stands for `jax.lax` where collectives are named."""

    def __getattr__(self, name: str) -> Any:
        return getattr(lax, name)

    def all_to_all(self, x: jax.Array, axis_name: str, *, split_axis: int, concat_axis: int):
        """The own bucket as if everybody had sent it."""
        if split_axis or concat_axis or x.shape[0] != lax.axis_size(axis_name):
            raise NotImplementedError("an exchange other than of whole buckets along one axis")
        # Barriers: all buckets are made before, and all are there after.
        x = lax.optimization_barrier(x)
        own = lax.dynamic_index_in_dim(x, lax.axis_index(axis_name), 0)
        return lax.optimization_barrier(jnp.broadcast_to(own, x.shape))

    def all_gather(self, x: jax.Array, *, axis_name: Any, axis: int, tiled: bool):
        """The own piece as if everybody had sent it."""
        del tiled
        x = lax.optimization_barrier(x)
        copies = [x] * collectives.axis_size(axis_name)
        return lax.optimization_barrier(jnp.concatenate(copies, axis))

    def psum(self, x: Any, axis_name: Any) -> Any:
        """The own term."""
        del axis_name
        return x

    def pmax(self, x: Any, axis_name: Any) -> Any:
        """The own value."""
        del axis_name
        return x


def _clone_rows(x_NW: jax.Array, entries_M: jax.Array, axis: str, tokens: int) -> jax.Array:
    """The own tokens, or rows of the own tokens, as if everybody had sent them."""
    del entries_M
    x_NW = lax.optimization_barrier(x_NW)
    if x_NW.shape[0] != tokens:
        x_NW = lax.dynamic_slice_in_dim(x_NW, lax.axis_index(axis) * tokens, tokens)
    copies = [x_NW] * lax.axis_size(axis)
    return lax.optimization_barrier(jnp.concatenate(copies))


def _apart(budget: Budget, *others: Any) -> Budget:
    del others
    return budget


def weighted_copy(rows_RD: jax.Array, weight_R: jax.Array) -> jax.Array:
    """What stands for the experts."""
    rows_RD = lax.optimization_barrier(rows_RD)
    y_RD = rows_RD.astype(jnp.float32) * weight_R[:, None]
    return lax.optimization_barrier(y_RD.astype(rows_RD.dtype))


def _run(self: ExpertBank, rows: Any, weights: Any, *, budget: Any, config: Any) -> jax.Array:
    del self, weights, config
    here_RJ = (rows.ids_RJ >= 0) & (rows.ids_RJ < budget.slots)
    return weighted_copy(rows.x_RD, jnp.sum(jnp.where(here_RJ, rows.scores_RJ, 0.0), axis=1))


@contextmanager
def left_out(part: str) -> Iterator[None]:
    """While this lasts, programs are traced as `PARTS` says."""
    exchange, experts = PARTS[part]
    if exchange and experts:
        yield
        return
    with (
        mock.patch.object(ExpertBank, "run", ExpertBank.run if experts else _run),
        mock.patch.object(collectives, "lax", lax if exchange else _Clones()),
        mock.patch.object(moejax.layer, "with_kernels", _apart),
        mock.patch.object(
            moejax.exchange.remote,
            "push_rows",
            moejax.exchange.remote.push_rows if exchange else _clone_rows,
        ),
    ):
        # Functions with gradients of their own are traced once and remembered.
        jax.clear_caches()
        yield
    jax.clear_caches()


def left_in(part: str, sent: float) -> None:
    """Checks what a traced program sends against what its part is.

    Raises:
        ArithmeticError: something travels where nothing should, or nothing where something should.
    """
    exchange, _ = PARTS[part]
    if exchange != (sent > 0):
        raise ArithmeticError(f"{part}: a device sends {sent:.0f} bytes")


def hidden_fraction(ms: dict[str, float]) -> float | None:
    """(computation + exchange − total) / exchange.

    Computation is the program without exchange; exchange is what it adds where there are no
    experts: `no_compute` − `neither`. So routing, planning and packing, which every program does,
    count once, and so do the copies that stand for what arrives. None where no exchange is seen.
    """
    exchange = ms["no_compute"] - ms["neither"]
    if exchange <= 0:
        return None
    return round((ms["no_comm"] + exchange - ms["total"]) / exchange, 4)
