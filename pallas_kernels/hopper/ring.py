"""The ring of stages between the warpgroup that loads and those that multiply.

A stage is full when everything meant for it has arrived, and empty when all multiplying warpgroups
have released it, a step late so that the next product is already issued. Steps are counted over all
tiles of a block; step `at` uses stage `at` mod stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.compat import COMPILER_PARAMS, named_kernel
from pallas_kernels.hopper.config import RowsConfig
from pallas_kernels.hopper.gather import finish_gathers
from pallas_kernels.hopper.tiles import COMPUTE

__all__ = ["CLUSTER", "Ring", "ring_barriers", "ring_kernel"]

CLUSTER = "cluster"  # axis of a cluster's blocks
LOAD_REGISTERS, COMPUTE_REGISTERS = 56, 224  # of a thread; 2 · 224 + 56 fit in an SM's 64 k


def ring_barriers(config: RowsConfig, *, arrivals: int) -> dict[str, Any]:
    """The barriers of a ring by name, as scratch; `arrivals` fill a stage.

    In a cluster a stage is empty when it is in all blocks, for each writes to the others' stages.
    """
    empty: Any = plgpu.Barrier
    if config.cluster > 1:
        empty = partial(plgpu.ClusterBarrier, collective_axes=(CLUSTER,))
    return {
        "full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=config.stages),
        "empty": empty(num_arrivals=COMPUTE, num_barriers=config.stages),
    }


def ring_kernel(
    body: Callable[..., None],
    name: str,
    *,
    out_type: Any,
    scratch: dict[str, Any],
    config: RowsConfig,
) -> Callable[..., Any]:
    """A kernel of one block an SM: `COMPUTE` multiplying warpgroups and a loading one.

    Its axes are `sm`, which counts clusters, `CLUSTER` where those have two blocks, and
    `warpgroup`.
    """
    clusters: dict[str, Any] = {}
    if config.cluster > 1:
        clusters = {"cluster": (config.cluster,), "cluster_names": (CLUSTER,)}
    return named_kernel(
        body,
        name,
        out_type=out_type,
        scratch_types=[scratch],
        grid=(config.clusters,),
        grid_names=("sm",),
        **clusters,
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
    )


@dataclass(frozen=True)
class Ring:
    """The ring as a block sees it.

    config: stages and lag.
    gather: whether an operand is gathered, which its loader must announce.
    full, empty: barriers, one a stage.
    """

    config: RowsConfig
    gather: bool
    full: Any
    empty: Any

    def _slot(self, at: Any) -> Any:
        return lax.rem(at, self.config.stages)

    def _announce(self, at: Any) -> None:
        plgpu.barrier_arrive(self.full.at[self._slot(at)])

    def load(self, body: Callable[[], Any]) -> None:
        """Runs the body, which returns the number of its steps, on the loading warpgroup."""

        @pl.when(lax.axis_index("warpgroup") == COMPUTE)
        def loading():
            plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
            self._end_loading(body())

    def multiply(self, body: Callable[[], None]) -> None:
        """Runs the body on the multiplying warpgroups, and waits for what they store."""

        @pl.when(lax.axis_index("warpgroup") < COMPUTE)
        def multiplying():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            body()
            plgpu.wait_smem_to_gmem(0)

    def begin_loading(self, at: Any) -> tuple[Any, Any]:
        """Waits for room for a step.

        Returns:
            the stage, and the barrier that its copies arrive at.
        """
        slot = self._slot(at)
        if self.gather:  # what was started before, while waiting for room

            @pl.when(at >= self.config.lag)
            def announce_earlier():
                finish_gathers(self.config.lag - 1)
                self._announce(at - self.config.lag)

        @pl.when(at >= self.config.stages)
        def wait_for_room():
            plgpu.barrier_wait(self.empty.at[slot])

        return slot, self.full.at[slot]

    def _end_loading(self, steps: Any) -> None:
        if self.gather:
            finish_gathers(0)
            first = jnp.maximum(steps - self.config.lag, 0)
            lax.fori_loop(first, steps, lambda at, _: self._announce(at), None)

        def drain(at, _):  # every release is awaited before the block ends
            plgpu.barrier_wait(self.empty.at[self._slot(at)])

        lax.fori_loop(jnp.maximum(steps - self.config.stages, 0), steps, drain, None)

    def consume(
        self,
        first: Any,
        count: Any,
        products: Callable[[Any], None],
        *,
        parts: int = 1,
        prepare: Callable[[Any, Any], None] | None = None,
    ) -> None:
        """Multiplies the stages of a tile, at least one; with `prepare` at least two.

        Args:
            first: step of the tile's first.
            count: steps.
            products: starts the products of a stage.
            parts: how many it starts.
            prepare: (stage, step) -> None, changes the first and the last stage beforehand.
        """

        def multiply(k, prepare=None):
            slot = self._slot(first + k)
            plgpu.barrier_wait(self.full.at[slot])
            if prepare is not None:
                prepare(slot, k)
            products(slot)

        def step(k, _, prepare=None):
            multiply(k, prepare)
            plgpu.wgmma_wait(parts)  # those of the step before are through
            self._release(first + k + (self.config.stages - 1))  # the stage before this one

        multiply(0, prepare)  # a condition in the loop would cost a tenth
        if prepare is None:
            lax.fori_loop(1, count, step, None)
        else:
            lax.fori_loop(1, count - 1, step, None)
            step(count - 1, None, prepare)
        plgpu.wgmma_wait(0)
        self._release(first + (count - 1))

    def _release(self, at: Any) -> None:
        plgpu.barrier_arrive(self.empty.at[self._slot(at)])
