"""Fewer experts: what each method costs, before and after the same short training.

    python benchmarks/compress.py                                      all cases, for a GPU
    python benchmarks/compress.py --cases merge:48 prune:48 --steps 50 --batch 16 --windows 64
    python benchmarks/compress.py --steps 0                            without training

Writes benchmarks/results/NAME.json after every case. A case is METHOD:EXPERTS[:FLAG=VALUE,…][@K]
with flags of `python -m moejax.compress`, such as merge:48:merge.fit=each; group:2 has two experts
side by side. With @K the result chooses K outputs a token: those of a merged model are often the
same expert, so that with as many as before it computes less. All are made of one model, calibrated
on the same text, trained on the same examples with the same optimizer, and measured on the same
held-out windows. `none` is the model itself: what training alone changes. `delta_pct` is relative
to the model, `finetuned_delta_pct` to the model trained likewise.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import numpy as np
from common import write_results
from jax.sharding import NamedSharding

from moejax.compress.command import weights_of
from moejax.compress.config import CompressConfig, GroupConfig, MergeConfig, PruneConfig
from moejax.compress.layers import StoredLayers
from moejax.compress.measure import Measured, agreement, measure, prompts_of
from moejax.compress.pipeline import compress
from moejax.compress.texts import read_texts
from moejax.config import ModelConfig
from moejax.data.pipeline import TokenDataset
from moejax.inference.source import open_model
from moejax.sharing_config import SharingConfig
from moejax.training.config import DataConfig, OptimizerConfig, TrainConfig
from moejax.training.state import Blueprint, from_logical, logical_targets, to_logical
from moejax.training.step import BATCH_SPEC, make_train_step
from moejax.training.text import prepare_text
from sharding.mesh import MeshShape, make_mesh

CASES = (
    "merge:48",
    "prune:48",
    "merge:32",
    "prune:32",
    "merge:48:by_layer=True",
    "prune:48:by_layer=True",
    "merge:48:merge.similarity=outputs",
    "merge:48:merge.similarity=parameters",
    "merge:48:merge.fit=each",
    "merge:48:merge.fit=none",
    "prune:48:prune.saliency=frequency",
    "share:0:sharing.kind=up",
    "share:0:sharing.kind=in",
    "share:0:sharing.kind=basis,sharing.rank=48",
    "group:2",
    "group:4",
)


def config_of(case: str, args: argparse.Namespace) -> CompressConfig:
    """What a case asks for."""
    method, experts, *flags = case.partition("@")[0].split(":")
    names = ("", "merge", "prune", "sharing", "group")
    parts: dict[str, dict[str, Any]] = {name: {} for name in names}
    if method == "group":
        parts["group"]["size"], experts = int(experts), "0"
    for flag in filter(None, ",".join(flags).split(",")):
        name, _, value = flag.partition("=")
        group, _, field = name.rpartition(".")
        try:
            parts[group][field] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parts[group][field] = value  # a word
    return CompressConfig(
        args.model,
        "",
        method=method,  # type: ignore[arg-type]
        experts=int(experts),
        merge=MergeConfig(**parts["merge"]),
        prune=PruneConfig(**parts["prune"]),
        sharing=SharingConfig(**parts["sharing"]),
        group=GroupConfig(**parts["group"]),
        data=DataConfig(seq_len=args.length),
        tokens=args.tokens,
        **parts[""],
    )


class Training:
    """The short training that every model gets.

    Args:
        args: the flags.
        tokenizer: of the model.
    """

    def __init__(self, args: argparse.Namespace, model: ModelConfig, tokenizer: Any) -> None:
        self._args = args
        self._data = DataConfig(seq_len=args.length, batch_size=args.batch)
        self._text: TokenDataset | None = None
        if args.steps:
            config = self._config(model)
            self._text = prepare_text(config, tokenizer).dataset

    def _config(self, model: ModelConfig) -> TrainConfig:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        model = dataclasses.replace(
            model,
            scan_layers=True,
            remat="none",
            compute_dtype=dtype,  # type: ignore[arg-type]
        )
        warmup = max(1, self._args.steps // 10)
        optimizer = OptimizerConfig(learning_rate=self._args.learning_rate, warmup_steps=warmup)
        return TrainConfig(
            model=model,
            data=self._data,
            optimizer=optimizer,
            steps=max(1, self._args.steps),
            loss_chunk=4096,
        )

    def __call__(
        self, model: ModelConfig, flat: Mapping[str, Any]
    ) -> Iterator[dict[str, np.ndarray]]:
        """The weights after it, and after it with other examples."""
        assert self._text is not None
        config = self._config(model)
        blueprint = Blueprint(config.model, make_mesh(MeshShape()))
        start = {
            name: np.asarray(flat[name]) if name in flat else np.zeros(target.shape, target.dtype)
            for name, target in logical_targets(blueprint).items()
        }
        step = make_train_step(blueprint, config)
        where = NamedSharding(blueprint.mesh, BATCH_SPEC)
        for repeat in range(self._args.repeats):
            state = from_logical(start, blueprint)
            for index in range(self._args.steps):
                batch = self._text.batch(repeat * self._args.steps + index, self._args.batch)
                batch = jax.device_put(batch[None], where)
                state, _ = jax.block_until_ready(step(state, batch, None))
            after = to_logical(state)
            yield {n: np.asarray(after[n]) for n in flat}


class Bench:
    """The model, the texts, and what the model itself does."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        source = open_model(None if args.model == "packaged" else args.model)
        tokenizer = source.need_tokenizer()
        texts = read_texts(config_of(args.cases[0], args), tokenizer, source.bos_id)
        self._calibration, self._windows = texts.calibration_WS, texts.windows
        self._stored = StoredLayers(source)
        self._prompts = prompts_of(
            texts.windows, args.prompts, source.config.max_context, source.bos_id
        )
        self._train = Training(args, self._stored.config, tokenizer)
        flat = {name: self._stored.read(name) for name in self._stored.names}
        self.before = self._measure(self._stored.config, flat)
        self._flat = flat
        self._made: dict[str, tuple[Any, float]] = {}
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def none(self) -> dict[str, Any]:
        """The model itself."""
        return self._row("none", self._stored.config, self._flat, {"experts": None})

    def _measure(self, model: ModelConfig, flat: Mapping[str, Any]) -> Measured:
        limit = self._args.windows or None
        return measure(model, flat, self._windows, limit=limit, prompts=self._prompts)

    def _compressed(self, case: str) -> tuple[Any, float]:
        """What a case makes and the seconds it took, once for all K."""
        name = case.partition("@")[0]
        with self._locks[name]:
            if name not in self._made:
                began = time.monotonic()
                found = compress(self._stored, self._calibration, config_of(name, self._args))
                self._made[name] = found, time.monotonic() - began
        return self._made[name]

    def case(self, case: str) -> dict[str, Any]:
        """Compresses, measures, trains and measures again."""
        found, seconds = self._compressed(case)
        model = found.config
        if top_k := case.partition("@")[2]:
            router = dataclasses.replace(model.moe.router, top_k=int(top_k))
            model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, router=router))
        flat = {n: np.asarray(a) for n, a in weights_of(self._stored, found).items()}
        numbers = [report.after for report in found.reports]
        more = {
            "experts": sum(numbers) / len(numbers),
            "experts_by_layer": numbers,
            # Known with as many outputs a token as before.
            "used": None if top_k else sum(r.used for r in found.reports) / len(numbers),
            "layer_error": [round(report.error, 4) for report in found.reports],
            "compress_seconds": round(seconds, 1),
        }
        return self._row(case, model, flat, more)

    def _row(
        self, case: str, model: ModelConfig, flat: Mapping[str, Any], more: dict[str, Any]
    ) -> dict[str, Any]:
        found = self._measure(model, flat)
        row = {
            "method": case,
            "parameters": found.parameters,
            "size_fraction": found.parameters / self.before.parameters,
            "active_parameters": found.active,
            "bfloat16_megabytes": 2e-6 * found.parameters,
            "bits_per_byte": found.bits_per_byte,
            "delta_pct": 100 * (found.bits_per_byte / self.before.bits_per_byte - 1),
            **self._agreement("", found),
            **more,
        }
        if self._args.steps:
            after = [self._measure(model, trained) for trained in self._train(model, flat)]
            row["finetuned_bits_per_byte_each"] = [one.bits_per_byte for one in after]
            row["finetuned_bits_per_byte"] = float(np.mean([one.bits_per_byte for one in after]))
            row |= self._agreement("finetuned_", after[0])
        return row

    def _agreement(self, head: str, found: Measured) -> dict[str, float]:
        if not self._prompts:
            return {}
        exact, leading = agreement(found.continuations, self.before.continuations)
        return {f"{head}exact_match": exact, f"{head}same_tokens": leading}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="packaged")
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--tokens", type=int, default=65536, help="of the calibration text")
    parser.add_argument("--windows", type=int, default=0, help="held-out ones; 0: all")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=500, help="of training")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1, help="of training, on other examples")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--name", default="compress")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all cases."""
    args = parse(argv)
    bench = Bench(args)
    done: dict[str, dict[str, Any]] = {}
    sizes = {n: getattr(args, n) for n in ("tokens", "windows", "length", "steps", "batch")}
    sizes |= {"repeats": args.repeats, "learning_rate": args.learning_rate}
    # Most of a case is numpy on one core, and compiling.
    with ThreadPoolExecutor(args.jobs) as pool:
        started = {pool.submit(bench.none): "none"}
        started |= {pool.submit(bench.case, case): case for case in args.cases}
        for one in as_completed(started):
            done[started[one]] = row = one.result()
            print(json.dumps({k: v for k, v in row.items() if not isinstance(v, list)}), flush=True)
            if "none" not in done:
                continue
            rows = [done[case] for case in ("none", *args.cases) if case in done]
            for row in rows if args.steps else ():
                change = row["finetuned_bits_per_byte"] / done["none"]["finetuned_bits_per_byte"]
                row["finetuned_delta_pct"] = 100 * (change - 1)
            write_results(args.name, rows, **sizes)


if __name__ == "__main__":
    main()
