"""Fewer experts: what each method costs, before and after the same short training.

    python benchmarks/compress.py                                      all cases, for a GPU
    python benchmarks/compress.py --cases merge:48 prune:48 --steps 50 --batch 16 --windows 64
    python benchmarks/compress.py --steps 0                            without training

Writes benchmarks/results/NAME.json after every case. A case is METHOD:EXPERTS[:FLAG=VALUE,…] with
flags of `python -m moejax.compress`, such as merge:48:merge.fit=each; group:2 has two experts side
by side. All are made of one model, calibrated on the same text, trained on the same examples with
the same optimizer, and measured on the same held-out windows. `none` is the model itself: what
training alone changes. `delta_pct` is relative to the model, `finetuned_delta_pct` to the model
trained likewise.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import time
from collections.abc import Mapping, Sequence
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
from moejax.data.pipeline import HeldOutWindows, TokenDataset
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
    method, experts, *flags = case.split(":")
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

    def __call__(self, model: ModelConfig, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The weights after it."""
        assert self._text is not None
        config = self._config(model)
        blueprint = Blueprint(config.model, make_mesh(MeshShape()))
        start = {
            name: np.asarray(flat[name]) if name in flat else np.zeros(target.shape, target.dtype)
            for name, target in logical_targets(blueprint).items()
        }
        state = from_logical(start, blueprint)
        step = make_train_step(blueprint, config)
        where = NamedSharding(blueprint.mesh, BATCH_SPEC)
        for index in range(self._args.steps):
            batch = self._text.batch(index, self._args.batch)[None]
            state, _ = jax.block_until_ready(step(state, jax.device_put(batch, where), None))
        after = to_logical(state)
        return {n: np.asarray(after[n]) for n in flat}


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
        self.before = self._measure(self._stored.config, flat, self._windows)
        self.row = self._row("none", self._stored.config, flat, {"experts": None})

    def _measure(
        self, model: ModelConfig, flat: Mapping[str, Any], windows: HeldOutWindows
    ) -> Measured:
        limit = self._args.windows or None
        return measure(model, flat, windows, limit=limit, prompts=self._prompts)

    def case(self, case: str) -> dict[str, Any]:
        """Compresses, measures, trains and measures again."""
        config, began = config_of(case, self._args), time.monotonic()
        found = compress(self._stored, self._calibration, config)
        seconds = time.monotonic() - began
        flat = {n: np.asarray(a) for n, a in weights_of(self._stored, found).items()}
        numbers = [report.after for report in found.reports]
        more = {
            "experts": sum(numbers) / len(numbers),
            "experts_by_layer": numbers,
            "used": sum(report.used for report in found.reports) / len(numbers),
            "layer_error": [round(report.error, 4) for report in found.reports],
            "compress_seconds": round(seconds, 1),
        }
        return self._row(case, found.config, flat, more)

    def _row(
        self, case: str, model: ModelConfig, flat: Mapping[str, Any], more: dict[str, Any]
    ) -> dict[str, Any]:
        found = self._measure(model, flat, self._windows)
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
            after = self._measure(model, self._train(model, flat), self._windows)
            row["finetuned_bits_per_byte"] = after.bits_per_byte
            row |= self._agreement("finetuned_", after)
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
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--name", default="compress")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all cases."""
    args = parse(argv)
    bench = Bench(args)
    done: dict[str, dict[str, Any]] = {}

    def add(case: str, row: dict[str, Any]) -> None:
        if args.steps:
            control = bench.row["finetuned_bits_per_byte"]
            row["finetuned_delta_pct"] = 100 * (row["finetuned_bits_per_byte"] / control - 1)
        print({k: v for k, v in row.items() if "pct" in k or k == "method"}, flush=True)
        done[case] = row
        rows = [done[c] for c in ("none", *args.cases) if c in done]
        sizes = {n: getattr(args, n) for n in ("tokens", "windows", "length", "steps", "batch")}
        write_results(args.name, rows, **sizes, learning_rate=args.learning_rate)

    add("none", bench.row)
    # Most of a case is numpy on one core, and compiling.
    with ThreadPoolExecutor(args.jobs) as pool:
        started = {pool.submit(bench.case, case): case for case in args.cases}
        for one in as_completed(started):
            add(started[one], one.result())


if __name__ == "__main__":
    main()
