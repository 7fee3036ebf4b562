"""Swaps of two slots' experts, many problems at once: descent, and tabu search from there.

Letters besides those of `moejax.placement.trace`: B problems (layers) side by side, so that
numpy's overhead per call is shared, and R devices of each that are looked at anew in one step.

A state gives every slot an expert; an empty slot holds one without pairs and load. The kin of two
devices, a table [G, G], is the part of a pair's weight that is saved when its experts lie there: 1
on one device, less on two of one host, 0 between hosts. With W the pair weights in slot order and
near[p, g] = Σ_q W[p, q] · kin[g, device of q], swapping slot p of device a with slot q of device b
takes off the cost

    near[p, b] − near[p, a] + near[q, a] − near[q, b] − 2 · W[p, q] · (kin[a, a] − kin[a, b])

(Kernighan & Lin 1970). Load above a device's capacity costs a penalty in proportion. Only the best
value of every pair of devices is kept, and a swap changes those of its two devices: a step takes
the best pair of devices and then its best swap. Descent takes swaps that improve. Tabu search
(Glover 1989, Taillard 1991) takes the best one even if it does not, and forbids what moved to move
again for some steps. Its penalty grows while a capacity is exceeded and shrinks while none is.
"""

from __future__ import annotations

import time

import numpy as np

from moejax.placement.problem import Problem

__all__ = ["EPSILON", "Search"]

_NEVER = np.float32(1e9)
EPSILON = 1e-6  # costs that differ by less are equal
_ROUNDING = 1e-5  # load above capacity, as a share of it, that is none
_PATIENCE = 5  # steps in a row above capacity, or below, that change the penalty
_LEAST_PENALTY, _MOST_PENALTY = 0.05, 1e3


class Search:
    """The state of a search.

    Attributes:
        order_BP: int64, the expert (an index into the problem's P) in each slot.
        best_BP: the best order met: least excess load, then least cost.
        best_cost_B: float64, what its pairs cost.
        best_excess_B: float64, its load above capacity, as a multiple of the mean capacity.
    """

    def __init__(
        self,
        problem: Problem,
        order_BP: np.ndarray,
        rng: np.random.Generator,
        penalty_B: np.ndarray | float = 1.0,
    ):
        """Begins at an order.

        Args:
            problem: what to solve.
            order_BP: the expert in each slot.
            rng: for how long what moved is forbidden.
            penalty_B: what load above capacity costs at first, as a multiple of its share.
        """
        self.problem, self.rng = problem, rng
        batch, slots = order_BP.shape
        devices = problem.capacity_BG.shape[1]
        self.shape = batch, devices, slots // devices
        self._row_B = np.arange(batch)
        self._unit_B = np.maximum(problem.capacity_BG.mean(1, dtype=np.float64), 1e-30)
        self._step = 0
        self._penalty_B = np.full(batch, penalty_B, np.float32)
        self._streak_B = np.zeros(batch, np.int64)  # steps above capacity; negative: below
        self._until_BP = np.where(problem.open_P, 0, 1 << 40) + np.zeros((batch, 1), np.int64)
        self.order_BP = order_BP.astype(np.int64)
        # Twice the pairs, as every use of a single one wants it.
        row_B11 = self._row_B[:, None, None]
        self._twice_BPP = 2 * problem.pairs_BPP[row_B11, order_BP[:, :, None], order_BP[:, None]]
        near_BPG = self._twice_BPP.reshape(batch, slots, devices, -1).sum(3) / 2
        self._near_BPG = near_BPG if problem.kin_GG is None else near_BPG @ problem.kin_GG
        self._load_BP = np.take_along_axis(problem.load_BP, order_BP, 1)
        self._load_BG = self._load_BP.reshape(batch, devices, -1).sum(2)
        self._cost_B = problem.cost(problem.devices_of(self.order_BP))
        self._tables = [self._near_BPG, self._load_BP, self.order_BP]  # what has a row for a slot
        # Two without pairs and load would change places forever.
        idle_BP = (self._load_BP == 0) & (self._twice_BPP.max(2) == 0)
        self._idle_BP = idle_BP * _NEVER if idle_BP.any() else None
        if self._idle_BP is not None:
            self._tables.append(self._idle_BP)
        if problem.home_BP is not None:
            home_BP = np.take_along_axis(problem.home_BP, order_BP, 1)
            self._home_BPG = (home_BP[:, :, None] == np.arange(devices)).astype(np.float32)
            self._settled_B = (home_BP >= 0).sum(1)
            self._tables.append(self._home_BPG)
        self.best_BP = self.order_BP.copy()
        self.best_cost_B = np.full(batch, np.inf)
        self.best_excess_B = np.full(batch, np.inf)
        self._best_BGG = np.full((batch, devices, devices), -np.inf, np.float32)
        self._refresh_all()
        self._keep()

    # ---- searches -----------------------------------------------------------------------------

    def descend(self, most_steps: int, deadline: float = np.inf) -> None:
        """Swaps that improve, until there are none, or the clock `time.monotonic` says enough."""
        for _ in range(most_steps):
            if not self._advance(None):
                # With kin between devices, values of others may have become stale.
                self._refresh_all()
                if self._best_BGG.max() <= EPSILON:
                    return
            if time.monotonic() > deadline:
                return

    def roam(self, steps: int, deadline: float = np.inf) -> None:
        """Tabu search; the best order met is kept."""
        slots = int(self.problem.open_P.sum())
        tenure = max(1, slots // 32), max(4, slots // 10)
        if self.problem.home_BP is not None:
            # Short where few may move: at the limit one must return before another goes.
            tenure = 1, max(4, min(slots // 4, 2 * self.problem.most_moved))
        for _ in range(steps):
            self._advance(tenure)
            self._weigh_load()
            if time.monotonic() > deadline:
                return

    def _advance(self, tenure: tuple[int, int] | None) -> bool:
        """One step of every problem, with tabu if given a tenure; whether any moved."""
        batch, devices, _ = self.shape
        pair_B = self._best_BGG.reshape(batch, -1).argmax(1)
        a_B, b_B = pair_B // devices, pair_B % devices
        p_B, q_B, score_B, gain_B = self._best_swap(a_B, b_B)
        still_B = score_B <= (EPSILON if tenure is None else -_NEVER / 2)
        self._swap(p_B, np.where(still_B, p_B, q_B), np.where(still_B, 0, gain_B))
        self._step += 1
        look = [a_B, b_B]
        if tenure is not None:
            length_B = self.rng.integers(*tenure, batch, endpoint=True)
            until_B = np.where(still_B, 0, self._step + length_B)
            for slot_B in (p_B, q_B):
                at = self._row_B, slot_B
                # Empty slots stay free to take: who left them is forbidden, that is enough.
                mine_B = until_B if self._idle_BP is None else until_B * (self._idle_BP[at] == 0)
                self._until_BP[at] = np.maximum(self._until_BP[at], mine_B)
            # Those that may move again are noticed in turn.
            look.append(np.full(batch, self._step % devices))
        self._keep()
        self._refresh(np.stack(look, axis=1))
        return not still_B.all()

    def _keep(self) -> None:
        over_BG = self._load_BG - self.problem.capacity_BG
        excess_B = np.maximum(over_BG, 0).sum(1, dtype=np.float64) / self._unit_B
        excess_B[excess_B < _ROUNDING] = 0
        better_B = (excess_B < self.best_excess_B - EPSILON) | (
            (excess_B <= self.best_excess_B) & (self._cost_B < self.best_cost_B - EPSILON)
        )
        if better_B.any():
            self.best_BP[better_B] = self.order_BP[better_B]
            self.best_excess_B[better_B] = excess_B[better_B]
            self.best_cost_B[better_B] = self._cost_B[better_B]
        self._within_B = excess_B == 0

    def _weigh_load(self) -> None:
        step_B = np.where(self._within_B, -1, 1)
        self._streak_B = np.where(self._streak_B * step_B > 0, self._streak_B, 0) + step_B
        factor_B = np.where(abs(self._streak_B) < _PATIENCE, 1, 1.5**step_B).astype(np.float32)
        self._streak_B[abs(self._streak_B) >= _PATIENCE] = 0
        self._penalty_B = np.clip(self._penalty_B * factor_B, _LEAST_PENALTY, _MOST_PENALTY)

    # ---- what swaps gain ----------------------------------------------------------------------

    def _own(self, table_BPG: np.ndarray) -> np.ndarray:
        """[B, P]: each slot's entry of its own device."""
        batch, devices, size = self.shape
        table = table_BPG.reshape(batch, devices, size, devices)
        return np.diagonal(table, axis1=1, axis2=3).transpose(0, 2, 1).reshape(batch, -1)

    def _across(
        self, table_BPG: np.ndarray, own_BP: np.ndarray, device_BR: np.ndarray
    ) -> np.ndarray:
        """[B, R, S, P]: what the table gains if slots of device r and slots P change places."""
        batch, devices, size = self.shape
        at = self._row_B[:, None], device_BR
        there = table_BPG.reshape(batch, devices, size, devices)[at]
        there = there - own_BP.reshape(batch, devices, size)[at][..., None]
        here_BRP = table_BPG.transpose(0, 2, 1)[at] - own_BP[:, None]
        across = np.repeat(there, size, axis=3)
        across += here_BRP[:, :, None]
        return across

    def _refresh(self, device_BR: np.ndarray) -> None:
        """Computes anew the best value of every pair with one of R devices."""
        batch, devices, size = self.shape
        problem = self.problem
        at = self._row_B[:, None], device_BR
        held_BP = self._own(self._near_BPG) + (self._until_BP > self._step) * _NEVER
        score = self._across(self._near_BPG, held_BP, device_BR)
        twice = self._twice_BPP.reshape(batch, devices, size, -1)[at]
        if problem.kin_GG is not None:
            twice *= np.repeat(1 - problem.kin_GG, size, axis=1)[device_BR][:, :, None]
        score -= twice
        # Loads as what they cost, so that the penalty is multiplied once.
        load_BP = self._load_BP * self._penalty_B[:, None]
        over_BG = (self._load_BG - problem.capacity_BG) * self._penalty_B[:, None]
        rest_BP = np.repeat(over_BG, size, axis=1) - load_BP
        load_BRS, rest_BRS = (x.reshape(batch, devices, size)[at] for x in (load_BP, rest_BP))
        over = np.add(rest_BRS[..., None], load_BP[:, None, None], out=twice)
        score -= np.maximum(over, 0, out=over)
        np.add(load_BRS[..., None], rest_BP[:, None, None], out=over)
        score -= np.maximum(over, 0, out=over)
        if self._idle_BP is not None:
            mine_BRS = self._idle_BP.reshape(batch, devices, size)[at]
            score -= np.minimum(mine_BRS[..., None], self._idle_BP[:, None, None], out=over)
        if problem.home_BP is not None:
            score -= self._too_many(device_BR)
        best_BRG = score.max(2).reshape(batch, -1, devices, size).max(3)
        # What both devices have too much of now.
        excess_BG = np.maximum(over_BG, 0)
        best_BRG += excess_BG[:, None] + excess_BG[at][..., None]
        best_BRG[self._row_B[:, None], np.arange(device_BR.shape[1]), device_BR] = -np.inf
        self._best_BGG[at] = best_BRG
        self._best_BGG[self._row_B[:, None], :, device_BR] = best_BRG

    def _too_many(self, device_BR: np.ndarray) -> np.ndarray:
        own_BP = self._own(self._home_BPG)
        moved_B = self._settled_B - own_BP.sum(1)
        spare_B = (self.problem.most_moved - moved_B).astype(np.float32)
        after = self._across(self._home_BPG, own_BP, device_BR) + spare_B[:, None, None, None]
        return (after < 0) * _NEVER

    def _refresh_all(self) -> None:
        for device in range(self.shape[1]):
            self._refresh(np.full((self.shape[0], 1), device))

    def _best_swap(self, a_B: np.ndarray, b_B: np.ndarray) -> tuple[np.ndarray, ...]:
        """The best slots p of device a, q of b; the swap's score, and what it takes off cost."""
        batch, _, size = self.shape
        row = self._row_B[:, None]
        p_BS, q_BS = (g_B[:, None] * size + np.arange(size) for g_B in (a_B, b_B))
        a_B1, b_B1 = a_B[:, None], b_B[:, None]

        def across(table: np.ndarray) -> np.ndarray:
            there = table[row, p_BS, b_B1] - table[row, p_BS, a_B1]
            here = table[row, q_BS, a_B1] - table[row, q_BS, b_B1]
            return there[:, :, None] + here[:, None]

        twice = self._twice_BPP[row[..., None], p_BS[:, :, None], q_BS[:, None]]
        if self.problem.kin_GG is not None:
            twice = twice * (1 - self.problem.kin_GG[a_B, b_B])[:, None, None]
        gain = across(self._near_BPG) - twice
        shift = self._load_BP[row, q_BS][:, None] - self._load_BP[row, p_BS][:, :, None]
        over_BG = self._load_BG - self.problem.capacity_BG
        over_a, over_b = (over_BG[self._row_B, g_B][:, None, None] for g_B in (a_B, b_B))
        relief = np.maximum(over_a, 0) + np.maximum(over_b, 0)
        relief = relief - np.maximum(over_a + shift, 0) - np.maximum(over_b - shift, 0)
        score = gain + relief * self._penalty_B[:, None, None]
        held_BP = (self._until_BP > self._step) * _NEVER
        score -= held_BP[row, p_BS][:, :, None] + held_BP[row, q_BS][:, None]
        if self._idle_BP is not None:
            score -= np.minimum(
                self._idle_BP[row, p_BS][:, :, None], self._idle_BP[row, q_BS][:, None]
            )
        if self.problem.home_BP is not None:
            moved_B = self._settled_B - self._own(self._home_BPG).sum(1)
            after = moved_B[:, None, None] - across(self._home_BPG)
            score -= (after > self.problem.most_moved) * _NEVER
        at_B = score.reshape(batch, -1).argmax(1)
        s_B, t_B = at_B // size, at_B % size
        chosen = self._row_B, s_B, t_B
        return a_B * size + s_B, b_B * size + t_B, score[chosen], gain[chosen]

    def _swap(self, p_B: np.ndarray, q_B: np.ndarray, gain_B: np.ndarray) -> None:
        row_B, size, kin_GG = self._row_B, self.shape[2], self.problem.kin_GG
        a_B, b_B = p_B // size, q_B // size
        twice = self._twice_BPP
        change_BP = (twice[row_B, q_B] - twice[row_B, p_B]) / 2
        if kin_GG is None:
            self._near_BPG[row_B, :, a_B] += change_BP
            self._near_BPG[row_B, :, b_B] -= change_BP
        else:
            self._near_BPG += change_BP[:, :, None] * (kin_GG[a_B] - kin_GG[b_B])[:, None]
        shift_B = self._load_BP[row_B, q_B] - self._load_BP[row_B, p_B]
        self._load_BG[row_B, a_B] += shift_B
        self._load_BG[row_B, b_B] -= shift_B
        for table in (*self._tables, twice, twice.transpose(0, 2, 1)):
            table[row_B, p_B], table[row_B, q_B] = table[row_B, q_B], table[row_B, p_B]
        self._cost_B -= gain_B
