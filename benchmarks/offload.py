"""Decoding with experts in host memory: tokens a second, hits and stalls, on one GPU.

    python benchmarks/offload.py                                  # Mixtral 8x7B's shape; an H200
    python benchmarks/offload.py --model packaged --fractions .25 .5
    python benchmarks/offload.py --model olmoe_1b_7b --folder DIR # with experts in files
    JAX_PLATFORMS=cpu python benchmarks/offload.py --tiny         # a rehearsal; writes nothing

Writes benchmarks/results/offload_h200.json after every case: a row for each share of the experts
that has slots, and each `POLICY:PREDICTOR`, with `:all` (every guess is sent, paying or not) and
`:int8` (what is missing comes in 8 bits) or `:mapped` (experts stay in files; random weights only
with `--folder`) behind it. Weights, prompts
and drawn tokens are random (temperature 1) but for the packaged model, whose prompts are its
held-out text; one text at a time, through the engine of `infer.py`.

- `hit_rate`: uses, decoding, whose expert was held or had been guessed. `belady`: the best without
  guesses for the same choices. `guessed_share`: of uses that were not held, those that had been
  guessed; see `offload_traces.py` for recall by distance.
- `tokens_per_s`: one over the median time of a decoding step. `resident_tokens_per_s`: the same
  engine with all weights on the device. `stall_ms_per_token`: that the host waited for weights.
- `low_share`: of uses, decoding, those with weights of 8 bits. `read_gb`: from files, or from the
  system's cache of them.
- `link_fraction`: experts sent one after the other as the runtime sends them, over one copy of
  `LINK_BYTES` from pinned memory (`link_gbs`). `least_ms`: bytes of the experts that were missed,
  over the link: what no overlap can hide.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from common import write_results
from inference import generate
from inference_models import model_of, random_prompts, random_source
from jax import numpy as jnp
from offload_folder import stored_source
from offload_recording import Recording

from moejax.errors import UserError
from moejax.inference.engine import Engine, EngineSettings
from moejax.inference.source import ModelSource, open_model
from moejax.model.attention import choose_attention
from moejax.offload.command import open_texts
from moejax.offload.config import OffloadConfig
from moejax.offload.fit_config import FitConfig
from moejax.offload.host_limit import allow_pinned_memory
from moejax.offload.load import OffloadedModel
from moejax.offload.low import low_bytes
from moejax.offload.room import Room
from moejax.offload.store import host_memory
from moejax.offload.transfers import Transfers
from moejax.serving.start import load_model
from moejax.training.state import Blueprint
from sharding.mesh import MeshShape, make_mesh

NAME = "offload_h200"
LINK_BYTES = 2**31
CASES = (
    *("lru:none", "lfu:none", "lfu:previous", "lru:routers", "lfu:routers", "predicted:routers"),
    *("lru:routers:all", "lfu:routers:all"),
    *("lfu:none:int8", "lfu:routers:int8", "lfu:none:mapped", "lfu:routers:mapped"),
)
STORES: dict[str, dict[str, Any]] = {
    "pinned": {},
    "int8": {"miss_dtype": "int8"},
    "mapped": {"store": "mapped"},
}


class Bench:
    """A model in host memory or in files, and what its link does.

    Args:
        args: the flags.
        source: the model.
        prompts: its prompts.
        store: of `STORES`.
    """

    def __init__(
        self, args: argparse.Namespace, source: ModelSource, prompts: list[np.ndarray], store: str
    ) -> None:
        self._args, self._store = args, store
        self.source, self.prompts = source, prompts
        config, platform = self.source.config, jax.default_backend()
        dtype: Any = "float32" if platform == "cpu" else config.compute_dtype
        config = dataclasses.replace(config, compute_dtype=dtype, scan_layers=False)
        attention = choose_attention(platform, config)
        self._blueprint = Blueprint(config, make_mesh(MeshShape()), attention=attention)
        self._model = OffloadedModel(self.source, self._blueprint)
        start = time.perf_counter()
        loaded = self._model.load(OffloadConfig(**STORES[store]))
        self.params, self.biases, self.store = loaded
        print(f"weights after {time.perf_counter() - start:.0f} s", flush=True)
        self.bank = next(iter(self.store.banks.values()))
        self.link = self._link()

    def _link(self) -> dict[str, float]:
        """Bytes a second of one large copy, and of experts in a row; medians."""
        mesh = self._blueprint.mesh
        kind = host_memory(mesh.devices.flat[0])
        host = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(), memory_kind=kind)
        here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        size = 2**22 if self._args.tiny else LINK_BYTES
        large = jax.block_until_ready(jax.device_put(jnp.ones(size // 4, jnp.float32), host))

        def seconds(run: Any) -> float:
            times = []
            for _ in range(5):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            return median(times[1:])

        whole = size / seconds(lambda: jax.block_until_ready(jax.device_put(large, here)))
        transfers = Transfers(self.store, mesh, 0)
        layer, count = next(iter(self.store.banks)), min(8, self.bank.experts)

        def send() -> None:
            transfers.ask(layer, range(count))
            for expert in range(count):
                transfers.take(layer, expert)

        experts = count * self.bank.expert_bytes / seconds(send)
        found = {"link_gbs": whole / 1e9, "link_fraction": experts / whole}
        print(found, flush=True)
        return found

    def settings(self) -> EngineSettings:
        """For one text."""
        args = self._args
        longest = max(map(len, self.prompts)) + args.steps + 2
        return EngineSettings(max_rows=1, max_len=longest, prefix_reuse=False)

    def speed(self, engine: Engine) -> list[float]:
        """Seconds of decoding steps, of all prompts one after the other; the first is a warm-up."""
        times: list[float] = []
        for number, prompt in enumerate([self.prompts[0], *self.prompts]):
            _, steps = generate(engine, [prompt], self._args.steps)
            if number:
                times += steps.tolist()
        return times

    def case(self, fraction: float, case: str) -> dict[str, Any]:
        """One row."""
        policy, predictor, *more = case.split(":")
        how: dict[str, Any] = {"policy": policy, "predictor": predictor, **STORES[self._store]}
        if "all" in more:
            how["guesses"] = "all"
        config = OffloadConfig(**how)
        slots = max(round(fraction * self.bank.experts), 1)
        top_k = self._model.top_k
        guess = 0 if predictor == "none" else top_k * self.bank.expert_bytes
        wave = min(top_k, self.bank.experts)
        room = Room(tuple(min(slots, b.experts) for b in self.store.banks.values()), wave, guess)
        experts = self._model.experts(self.store, room, config)
        trace = Recording(experts)
        engine = Engine(
            self._model.parts.blueprint,
            self.params,
            self.biases,
            offload=experts,
            settings=self.settings(),
        )
        seconds = self.speed(engine)
        stats = experts.stats()
        uses, step = stats.decode, median(seconds)
        size = low_bytes(self.bank) if config.low else self.bank.expert_bytes
        missed = uses.missed * size / max(stats.decoded_tokens, 1)
        late = uses.early + uses.missed
        engine.close()
        return {
            "cache_fraction": slots / self.bank.experts,
            "policy": policy,
            "predictor": predictor,
            "guesses": config.guesses,
            "store": self._store,
            "hit_rate": uses.hit_rate,
            "held_rate": uses.held / uses.total,
            "belady": trace.belady(slots),
            "guessed_share": uses.early / late if predictor != "none" and late else None,
            "tokens_per_s": 1 / step,
            "ms_per_token": 1e3 * step,
            "stall_ms_per_token": stats.stall_ms_per_token,
            "vain_fraction": stats.vain_bytes / max(stats.guessed_bytes, 1),
            "low_share": uses.low / uses.total,
            "read_gb": stats.read_bytes / 1e9,
            "least_ms": 1e-6 * missed / self.link["link_gbs"],
            "steps": len(seconds),
            **self.link,
        }

    def resident(self) -> float | None:
        """Tokens a second with all weights on the device; None where they do not fit."""
        try:
            loaded = load_model(self.source, MeshShape(), "auto")
            engine = Engine(*loaded, settings=self.settings())
            return 1 / median(self.speed(engine))
        except (UserError, RuntimeError, ValueError) as why:  # out of memory among these
            print(f"not resident: {str(why)[:200]}", flush=True)
            return None


def _model(args: argparse.Namespace) -> tuple[ModelSource, list[np.ndarray]]:
    """The model and its prompts."""
    if args.model == "packaged":
        source = open_model(None)
        _, held_out = open_texts(FitConfig("packaged", "", windows=args.prompts), source)
        return source, [each[: args.prompt] for each in held_out[: args.prompts]]
    config = model_of(args.model, tiny=args.tiny)
    return random_source(config), random_prompts(config, args.prompts, args.prompt)


def main() -> None:
    allow_pinned_memory()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mixtral_8x7b", help="of inference_models, or packaged")
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.25, 0.5])
    cases = "POLICY:PREDICTOR, with :all, :int8 or :mapped"
    parser.add_argument("--cases", nargs="+", default=list(CASES), help=cases)
    parser.add_argument("--folder", type=Path, help="random weights are written there, and kept")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=64, help="decoding steps of a prompt")
    parser.add_argument("--no-resident", action="store_true", help="it does not fit the device")
    parser.add_argument("--name", default=NAME)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        args.steps, args.prompt = 10, 12
    with tempfile.TemporaryDirectory() as passing:
        if args.tiny and args.folder is None:
            args.folder = Path(passing) / "model"
        measure(args)


def _store(case: str) -> str:
    """Where the experts of a case are, of `STORES`."""
    return next((part for part in case.split(":")[2:] if part in STORES), "pinned")


def measure(args: argparse.Namespace) -> None:
    """All cases, those of one store together: there may be no room for two."""
    (source, prompts), rows, resident = _model(args), [], None
    for store in STORES:
        cases = [case for case in args.cases if _store(case) == store]
        if store == "mapped" and cases and source.files is None:
            if args.folder is None:
                print("no --folder: experts are not read from files", flush=True)
                continue
            source = stored_source(source.config, args.folder)
        if not cases:
            continue
        try:
            bench = Bench(args, source, prompts, store)
        except UserError as why:  # such as too little host memory for copies
            print(f"not {store}: {why}", flush=True)
            continue
        if not (rows or args.no_resident):
            resident = bench.resident()
        gc.collect()
        for fraction, case in itertools.product(args.fractions, cases):
            row = {"model": args.model} | bench.case(fraction, case)
            row["resident_tokens_per_s"] = resident
            rows.append(row)
            print(json.dumps(row), flush=True)
            gc.collect()
            if not args.tiny:
                write_results(args.name, rows, prompt=args.prompt, steps=args.steps)
        del bench
        gc.collect()


if __name__ == "__main__":
    main()
