"""Plans in a thread of its own, a few layers at a time, while the model goes on.

Whoever steps the model asks between two steps what has been planned meanwhile: nobody waits. The
planner is numpy, which lets other threads run while it computes.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable, Sequence

import numpy as np

from moejax.placement.arrays import host_arrays
from moejax.placement.controller import Controller, Rebalance
from moejax.placement.statistics import Statistics

__all__ = ["BackgroundPlanner", "LayerPlan"]

_TOGETHER = 4  # layers: fewer take longer in all, more let the first ones and a stop wait

LayerPlan = tuple[int, np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]
"""A layer, int32 [G·S] the expert in each of its slots, and the arrays of its `Placement`."""


class BackgroundPlanner:
    """Where the experts of all layers should go; see `Controller`.

    One thread, of the model, calls `begin` and `take`.

    Args:
        num_experts: E.
        layers: L, those with experts.
        devices: G along `expert`.
        hosts: the host of each device; None: one for all.
        replicas: slots of a device for copies.

    Raises:
        UserError: as for `Controller`.
    """

    def __init__(
        self,
        num_experts: int,
        layers: int,
        devices: int,
        *,
        hosts: tuple[int, ...] | None = None,
        replicas: int = 0,
    ):
        self._num_experts = num_experts
        self._parts = [slice(i, min(i + _TOGETHER, layers)) for i in range(0, layers, _TOGETHER)]
        self._controllers = [
            Controller(num_experts, part.stop - part.start, devices, hosts=hosts, replicas=replicas)
            for part in self._parts
        ]
        self.max_replicas: int = self._controllers[0].max_replicas
        """R, which never changes."""
        self.failure: BaseException | None = None
        """What ended the planning for good."""
        self._news: queue.SimpleQueue[LayerPlan | Rebalance] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._looks = False  # from `begin` until `take` has handed out what it led to

    @property
    def slots_LP(self) -> np.ndarray:
        """int32 [L, G·S], the expert in each slot as planned last; −1 for none."""
        return np.concatenate([controller.slots_LP for controller in self._controllers])

    @property
    def busy(self) -> bool:
        """Whether a plan is being made."""
        return self._thread is not None and self._thread.is_alive()

    def begin(
        self, read: Callable[[], Statistics], done: Callable[[Statistics, Rebalance], None]
    ) -> bool:
        """Starts a look at the traffic, unless one goes on or is not taken yet, or planning ended.

        Args:
            read: gives what was counted of all layers; called in the planner's thread.
            done: gets it, and what the look led to, of all layers; likewise. An exception of
                either ends the planning.

        Returns:
            whether it has started.
        """
        if self._looks or self.failure is not None or self._stopping.is_set():
            return False
        if self._thread is not None:
            self._thread.join()  # it has said all, and need only end
        self._looks = True
        self._thread = threading.Thread(
            target=self._run, args=(read, done), name="moejax-planner", daemon=True
        )
        self._thread.start()
        return True

    def take(self) -> tuple[list[LayerPlan], Rebalance | None]:
        """What is new: layers whose plan has changed, and what a look led to when it has ended."""
        layers: list[LayerPlan] = []
        while not self._news.empty():
            one = self._news.get()
            if isinstance(one, Rebalance):
                self._looks = False
                return layers, one
            layers.append(one)
        return layers, None

    def stop(self, seconds: float) -> bool:
        """Ends the thread, after the few layers that are being planned.

        Args:
            seconds: to wait for that; a thread that takes longer ends with the process.

        Returns:
            whether it has ended.
        """
        self._stopping.set()
        if self._thread is None:
            return True
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(
        self, read: Callable[[], Statistics], done: Callable[[Statistics, Rebalance], None]
    ) -> None:
        try:
            statistics, each = read(), []
            for part, controller in zip(self._parts, self._controllers, strict=True):
                if self._stopping.is_set():
                    return
                before_LP = controller.slots_LP
                each.append(controller.look(statistics.layers(part)))
                for i in np.flatnonzero((before_LP != controller.slots_LP).any(1)).tolist():
                    slots_P = controller.slots_LP[i]
                    arrays = host_arrays(slots_P, self._num_experts, self.max_replicas)
                    self._news.put((part.start + i, slots_P, arrays))
            told = _together(each, [part.stop - part.start for part in self._parts])
            done(statistics, told)
            self._news.put(told)
        except BaseException as error:
            traceback.print_exc()
            self.failure = error


def _together(each: Sequence[Rebalance], layers: Sequence[int]) -> Rebalance:
    """Several layers' looks as one."""
    kinds = [told.kind for told in each]
    cuts = np.average([told.cut for told in each], axis=0, weights=layers)
    loads = np.max([told.load for told in each], axis=0)
    return Rebalance(
        next(kind for kind in ("waits", "plan", "moves", "none") if kind in kinds),
        moved=sum(told.moved for told in each),
        replicas=sum(told.replicas for told in each),
        cut=(float(cuts[0]), float(cuts[1])),
        load=(float(loads[0]), float(loads[1])),
        tokens=min(told.tokens for told in each),
        seconds=sum(told.seconds for told in each),
    )
