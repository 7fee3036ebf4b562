"""Writing rows straight into the other GPUs' memory: what kernels that do so share.

An entry r = g·T + t of a list says: a row to device g, to row me·T + t of its result, where T is
the tokens of a device and `me` this one. A worker, a warpgroup, takes a few entries at a time: its
threads load 16 bytes each of all their rows, then store them. The list may come in groups; when a
worker has written its rows of a group it adds 1 to the group's semaphore on every device, so that
kernels wait for a group and not for all.

Why nothing races:
- Entry. XLA runs a barrier of all GPUs on the stream right before a kernel that writes to others
  (jaxlib/mosaic/gpu/custom_call.cc, from 0.11.1 on), after everything the stream did earlier, so a
  peer's result and its zeroed semaphores are free when they are written.
- Exit. A kernel ends only after every signal meant for it has arrived, and each signal follows the
  writes it stands for (release at system scope; who waits acquires).
- No deadlock: workers write and go on, without waiting; who waits needs nothing of its own GPU but
  blocks of a lower index.
No NVLink multicast and no multimem instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.exchange.lines import address, emit_rows
from pallas_kernels.hopper.simt_emit import assembly

__all__ = ["Pusher", "on_device", "wait_for_signals"]

AT_ONCE = 16 * 1024  # bytes that a worker loads before it stores them
MOST_ROWS = 8  # of them
PATIENCE_NS = 20_000_000_000  # then waiting for peers ends in a trap, an error of the program


@dataclass(frozen=True)
class Pusher:
    """What all workers of a kernel know.

    axis: mesh axis of size G.
    devices: G.
    tokens: T.
    row_bytes: of a row, a multiple of 16.
    workers: on a device.
    """

    axis: str
    devices: int
    tokens: int
    row_bytes: int
    workers: int

    @property
    def rows(self) -> int:
        """Entries that a worker takes at a time."""
        return max(1, min(MOST_ROWS, AT_ONCE // self.row_bytes))

    @property
    def signals(self) -> int:
        """That a semaphore gets."""
        return self.devices * self.workers

    def push(
        self, source: Any, entries: Any, begin: Any, end: Any, received: Any, worker: Any
    ) -> None:
        """Writes a worker's share of the rows of entries[begin:end].

        Args:
            source: [N, W]; entry r stands for row r mod N.
            entries: int32 [M] in global memory; those outside 0 … G·T − 1 are skipped.
            begin, end: a group of the list.
            received: [G·T, W], the result that all devices have.
            worker: 0 to `workers` − 1.
        """
        count, me = self.rows, lax.axis_index(self.axis)
        pieces = lax.div(end - begin + (count - 1), count)
        mine = lax.div(pieces - worker + (self.workers - 1), self.workers)
        last, limit = entries.shape[0] - 1, self.devices * self.tokens

        def fetch(i: Any) -> tuple[Any, ...]:
            first = begin + (worker + i * self.workers) * count
            places = [first + n for n in range(count)]
            found = [entries[jnp.minimum(at, last)] for at in places]
            pairs = zip(places, found, strict=True)
            return tuple(jnp.where(at < end, entry, limit) for at, entry in pairs)

        def step(i: Any, now: tuple[Any, ...]) -> tuple[Any, ...]:
            following = fetch(i + 1)  # on its way while these rows are
            goes = [(entry >= 0) & (entry < limit) for entry in now]
            safe = [jnp.where(go, entry, 0) for go, entry in zip(goes, now, strict=True)]
            targets = [
                on_device(received, self.axis, lax.div(entry, self.tokens)) for entry in safe
            ]
            sources = [lax.rem(entry, source.shape[0]) for entry in safe]
            rows = [me * self.tokens + lax.rem(entry, self.tokens) for entry in safe]
            words = [*sources, *rows, *(go.astype(jnp.int32) for go in goes)]
            self._copy(source, targets, words)
            return following

        lax.fori_loop(0, mine, step, fetch(jnp.int32(0)))

    def _copy(self, source: Any, targets: Sequence[Any], words: Sequence[Any]) -> None:
        refs, splats = len(targets) + 1, [plgpu.Layout.WG_SPLAT] * len(words)

        @plgpu.inline_mgpu(arg_types=((plgpu.RefType(),) * refs + tuple(splats)))
        def copy(_: Any, source: Any, *rest: Any) -> None:
            numbers = [word.registers.item() for word in rest[refs - 1 :]]
            emit_rows(source, rest[: refs - 1], numbers, self.row_bytes)

        copy(source, *targets, *words)

    def signal(self, semaphore: Any) -> None:
        """Adds 1 to the semaphore on every device, after all that the warpgroup has written."""
        me = lax.axis_index(self.axis)
        peers = [lax.rem(me + step, self.devices) for step in range(self.devices)]
        everywhere = [on_device(semaphore, self.axis, peer) for peer in peers]

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(everywhere))
        def add(_: Any, *semaphores: Any) -> None:
            from jax.experimental.mosaic.gpu import utils

            utils.warpgroup_barrier()
            with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
                assembly("fence.acq_rel.sys;", "", None)
                for semaphore in semaphores:
                    add_one = "red.relaxed.sys.global.add.u32 [$0], 1;"
                    assembly(add_one, "l", None, address(semaphore))

        add(*everywhere)


def on_device(ref: Any, axis: str, device: Any) -> Any:
    """What a reference is on another device of the axis."""
    where: Any = {axis: device}
    return plgpu.remote_ref(ref, where)


def wait_for_signals(semaphore: Any, count: int) -> None:
    """Until a semaphore has been signalled so often; what came before the signals is then seen.

    A trap, which ends the program with an error, after `PATIENCE_NS`.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait(_: Any, semaphore: Any) -> None:
        from jax.experimental.mosaic.gpu import utils

        with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
            assembly(
                f"""{{
                .reg .pred enough, late;
                .reg .u32 seen;
                .reg .u64 begin, now;
                mov.u64 begin, %globaltimer;
                again:
                ld.acquire.sys.global.u32 seen, [$0];
                setp.ge.u32 enough, seen, {count};
                @enough bra finished;
                mov.u64 now, %globaltimer;
                sub.u64 now, now, begin;
                setp.gt.u64 late, now, {PATIENCE_NS};
                @late trap;
                bra again;
                finished:
                }}""",
                "l",
                None,
                address(semaphore),
            )
        utils.warpgroup_barrier()

    wait(semaphore)
