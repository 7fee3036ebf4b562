"""Which experts a cache would hold: hit rates of policies and predictors on recorded traces.

    python benchmarks/offload_traces.py             the packaged model's held-out text
    python benchmarks/offload_traces.py --tokens 16384 --windows 1 --length 192

Writes benchmarks/results/offload_traces.json. Each text's first tokens are its prompt, the rest is
decoded token by token; caches go on from text to text. `belady` is the best that any policy can do
without fetching ahead. Fetching ahead takes what is fetched as being there in time, so these are
hits that a link of enough speed makes possible; `fetched_per_token` says what it has to carry.
Probes of hidden states guess within a token; for the next one `combined` guesses in their place.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from common import write_results

from moejax.compress.layers import StoredLayers
from moejax.inference.source import open_model
from moejax.offload.command import open_texts, recall_table
from moejax.offload.fit_config import FitConfig
from moejax.offload.policies import POLICIES, PolicyName
from moejax.offload.predictors import PREDICTORS, Predictor, make_predictor
from moejax.offload.recall import Recall
from moejax.offload.replay import Replay
from moejax.offload.simulate import Prefetch, best_hit_rate, simulate
from moejax.offload.study import Study, host_recalls, study
from moejax.placement.trace import Trace
from moejax.training.config import DataConfig

FRACTIONS = (0.125, 0.25, 0.5)
PROBES = ("routers", "linear")


class Bench:
    """A model's traces, fits and recalls.

    Args:
        args: the flags.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        config = FitConfig(
            args.model,
            "",
            data=DataConfig(paths=tuple(args.texts), seq_len=args.length),
            tokens=args.tokens,
            windows=args.windows,
            prompt=args.prompt,
        )
        source = open_model(None if args.model == "packaged" else args.model)
        fit_WS, held_WS = open_texts(config, source)
        stored = StoredLayers(source)
        more = {"prompt": args.prompt, "ridge": config.ridge}
        self.found: Study = study(stored, fit_WS, held_WS, keep=True, say=print, **more)
        self.recalls: list[Recall] = [
            *host_recalls(self.found, prompt=args.prompt),
            *self.found.recalls,
        ]
        experts_WSLK = self.found.held_WSLK
        count, length, self._layers, self._top_k = experts_WSLK.shape
        self.trace = Trace(
            experts_WSLK.reshape(-1, self._layers, self._top_k),
            np.full(count, length, np.int64),
            self.found.num_experts,
        )

    def predictor(self, name: str) -> Predictor:
        """One that has seen no text."""
        numbers = (self._layers, self.found.num_experts, self._top_k)
        if name not in PROBES:
            return make_predictor(name, *numbers, self.found.fits)  # type: ignore[arg-type]
        scores = {key[1:]: value for key, value in self.found.scores.items() if key[0] == name}
        otherwise = make_predictor("combined", *numbers, self.found.fits)
        return Replay(scores, self.trace.lens.tolist(), self._args.prompt, otherwise)

    def rows(self, fraction: float) -> Iterator[dict[str, Any]]:
        """All policies and predictors with so many slots."""
        slots = max(self._top_k, round(fraction * self.found.num_experts))
        best = best_hit_rate(self.trace, slots, prompt=self._args.prompt)
        cases: list[tuple[PolicyName, str | None, int]] = [
            (policy, None, 0) for policy in POLICIES if policy != "predicted"
        ]
        cases += [("predicted", name, 0) for name in PREDICTORS]
        cases += [
            (policy, name, experts)
            for policy in ("lfu", "predicted")
            for name in (*PREDICTORS, *PROBES)
            for experts in self._args.prefetch
        ]
        for policy, name, experts in cases:
            found = simulate(
                self.trace,
                slots,
                policy,
                None if name is None else self.predictor(name),
                prefetch=Prefetch(experts),
                prompt=self._args.prompt,
            )
            # Fetching ahead looks at the next layer, policies at the next token.
            distance = 1 if experts else None
            recall = self._recall(name, distance)
            yield {
                "cache_fraction": fraction,
                "slots": slots,
                "policy": policy,
                "predictor": name or "none",
                "prefetch_experts": experts,
                "hit_rate": round(found.hit_rate, 4),
                "belady": round(best, 4),
                "recall_at_k": None if recall is None else round(recall.at_k, 4),
                "recall_at_2k": None if recall is None else round(recall.at_2k, 4),
                "distance": distance,
                "wasted_fraction": round(found.wasted_fraction, 4),
                "misses_per_token": round(found.misses_per_token, 3),
                "fetched_per_token": round(found.fetched_per_token, 3),
            }

    def _recall(self, name: str | None, distance: int | None) -> Recall | None:
        fitting = [r for r in self.recalls if (r.predictor, r.distance) == (name, distance)]
        return fitting[0] if fitting else None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="packaged")
    parser.add_argument("--texts", nargs="*", default=[], help="none: the standard library")
    parser.add_argument("--tokens", type=int, default=98304, help="to fit on")
    parser.add_argument("--length", type=int, default=512, help="tokens of a text")
    parser.add_argument("--windows", type=int, default=2, help="texts of a held-out document")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a text")
    parser.add_argument("--prefetch", type=int, nargs="+", default=[2, 4, 8], help="a layer")
    parser.add_argument("--fractions", type=float, nargs="+", default=list(FRACTIONS))
    parser.add_argument("--name", default="offload_traces")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all cases."""
    args = parse(argv)
    bench = Bench(args)
    print("\n".join(recall_table(bench.recalls)), flush=True)
    rows = []
    for fraction in args.fractions:
        for row in bench.rows(fraction):
            rows.append(row)
            print(row, flush=True)
    texts, length = bench.found.held_WSLK.shape[:2]
    write_results(
        args.name,
        rows,
        fit_tokens=args.tokens,
        texts=texts,
        prompt_tokens=args.prompt,
        decoded_tokens=texts * (length - args.prompt),
        recall=[dataclasses.asdict(recall) for recall in bench.recalls],
    )


if __name__ == "__main__":
    main()
