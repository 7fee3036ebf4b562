"""What a cache, a policy and a predictor do to a trace: hits, misses, and guesses in vain.

Shape letters: N tokens, L layers with experts, E experts, K experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moejax.errors import UserError
from moejax.offload.belady import fewest_misses
from moejax.offload.cache import SlotCache
from moejax.offload.policies import PolicyName, make_policy
from moejax.offload.predictors import Predictor
from moejax.offload.recall import count_choices
from moejax.placement.trace import Trace

__all__ = ["Prefetch", "Simulated", "best_hit_rate", "simulate"]


@dataclass(frozen=True)
class Prefetch:
    """What is fetched before it is needed.

    Attributes:
        experts: fetched at most after each layer; 0: none.
        layers: ahead that are looked at, the nearest first.
        likeliest: of a layer's experts that are worth fetching; 0: as many as a token chooses.
    """

    experts: int = 0
    layers: int = 1
    likeliest: int = 0

    def __post_init__(self) -> None:
        if self.experts < 0 or self.layers < 1 or self.likeliest < 0:
            raise UserError(
                f"prefetch of {self.experts} experts, {self.layers} layers ahead, of the "
                f"{self.likeliest} likeliest: experts and likeliest must be 0 or more, layers 1 or "
                "more"
            )


@dataclass(frozen=True)
class Simulated:
    """What happened to the tokens that were decoded.

    tokens: how many.
    uses: of experts, over all layers.
    hits: those whose expert was held when it was needed, fetched ahead or not.
    prefetched: experts that were fetched ahead.
    wasted: those of them that were given up, or left at the end, without a use.
    """

    tokens: int
    uses: int
    hits: int
    prefetched: int
    wasted: int

    @property
    def misses(self) -> int:
        """Uses that waited for their expert."""
        return self.uses - self.hits

    @property
    def hit_rate(self) -> float:
        """Share of the uses."""
        return self.hits / max(self.uses, 1)

    @property
    def misses_per_token(self) -> float:
        """Over all layers."""
        return self.misses / max(self.tokens, 1)

    @property
    def fetched_per_token(self) -> float:
        """Experts transferred, over all layers."""
        return (self.misses + self.prefetched) / max(self.tokens, 1)

    @property
    def wasted_fraction(self) -> float:
        """Of what was fetched ahead."""
        return self.wasted / max(self.prefetched, 1)


def simulate(
    trace: Trace,
    slots: int,
    policy: PolicyName,
    predictor: Predictor | None = None,
    *,
    prefetch: Prefetch = Prefetch(),
    prompt: int = 0,
    decay: float | None = None,
) -> Simulated:
    """Decodes the texts of a trace one after the other with one cache for each layer.

    Caches are empty at first and go on from text to text. What is fetched ahead is there in time.

    Args:
        trace: the texts.
        slots: of each layer.
        policy: of each layer.
        predictor: for the policy, and for what is fetched ahead; None: there are no guesses.
        prefetch: what is fetched ahead.
        prompt: tokens of each text that are not decoded: the predictor learns how often they chose
            each expert, the caches see nothing of them.
        decay: of `lfu`; None: the usual one.

    Raises:
        UserError: fetching ahead without a predictor.
    """
    if prefetch.experts and predictor is None:
        raise UserError("prefetch: nothing says what to fetch ahead; give a predictor as well")
    run = _Run(trace, slots, policy, predictor, prefetch, decay)
    for experts_SLK in np.split(trace.experts_NLK, np.cumsum(trace.lens)[:-1]):
        if predictor is not None:
            asked = experts_SLK[:prompt]
            predictor.begin(count_choices(asked, trace.num_experts) if len(asked) else None)
        for experts_LK in experts_SLK[prompt:]:
            run.token(experts_LK)
    return run.result()


def best_hit_rate(trace: Trace, slots: int, *, prompt: int = 0) -> float:
    """Of the best schedule without fetching ahead, on the tokens that are decoded.

    Args:
        trace: the texts.
        slots: of each layer, at least as many as a token chooses.
        prompt: tokens of each text that are not decoded.
    """
    places = np.concatenate([np.arange(length) for length in trace.lens])
    decoded_NLK = trace.experts_NLK[places >= prompt]
    misses = sum(
        fewest_misses(decoded_NLK[:, layer], trace.num_experts, slots)
        for layer in range(trace.num_layers)
    )
    return 1 - misses / max(int((decoded_NLK >= 0).sum()), 1)


class _Run:
    """The caches, and what was counted."""

    def __init__(
        self,
        trace: Trace,
        slots: int,
        policy: PolicyName,
        predictor: Predictor | None,
        prefetch: Prefetch,
        decay: float | None,
    ) -> None:
        more = {} if decay is None else {"decay": decay}
        experts = trace.num_experts
        self._caches = [
            SlotCache(slots, experts, make_policy(policy, experts, **more))
            for _ in range(trace.num_layers)
        ]
        self._predictor, self._ahead = predictor, prefetch
        self._guides = policy == "predicted" and predictor is not None
        self._likeliest = prefetch.likeliest or trace.experts_NLK.shape[2]
        self._untried: list[set[int]] = [set() for _ in self._caches]  # fetched ahead, no use yet
        self._tokens = self._uses = self._hits = self._prefetched = self._wasted = 0

    def token(self, experts_LK: np.ndarray) -> None:
        """Decodes one."""
        self._tokens += 1
        for layer, experts_K in enumerate(experts_LK):
            chosen = [expert for expert in experts_K.tolist() if expert >= 0]
            self._use(layer, chosen, experts_K)
            if self._ahead.experts:
                self._fetch_ahead(layer)

    def _use(self, layer: int, chosen: list[int], experts_K: np.ndarray) -> None:
        cache = self._caches[layer]
        missing = cache.missing(chosen)
        self._uses += len(chosen)
        self._hits += len(chosen) - len(missing)
        self._untried[layer].difference_update(chosen)
        cache.used(chosen)
        if self._predictor is not None:
            self._predictor.observe(layer, experts_K)
        if missing and self._guides:
            assert self._predictor is not None
            cache.policy.expect(self._predictor.scores(layer, layer))
        for expert in missing[: max(0, cache.slots - (len(chosen) - len(missing)))]:
            self._admit(layer, expert, chosen)

    def _fetch_ahead(self, layer: int) -> None:
        assert self._predictor is not None
        left, layers = self._ahead.experts, len(self._caches)
        for distance in range(1, min(self._ahead.layers, layers - 1) + 1):
            target = (layer + distance) % layers
            guess_E = self._predictor.scores(layer, target)
            best = np.argsort(-guess_E, kind="stable")[: self._likeliest]
            likely = [int(e) for e in best if np.isfinite(guess_E[e])]
            cache = self._caches[target]
            likely = likely[: cache.slots]
            if self._guides:
                cache.policy.expect(guess_E)
            for expert in cache.missing(likely)[:left]:
                self._admit(target, expert, likely)
                self._untried[target].add(expert)
                self._prefetched += 1
                left -= 1

    def _admit(self, layer: int, expert: int, keep: list[int]) -> None:
        cache, untried = self._caches[layer], self._untried[layer]
        cache.admit(expert, keep)
        gone = [other for other in untried if other not in cache]
        self._wasted += len(gone)
        untried.difference_update(gone)

    def result(self) -> Simulated:
        """What was counted."""
        left = sum(map(len, self._untried))
        return Simulated(
            self._tokens, self._uses, self._hits, self._prefetched, self._wasted + left
        )
