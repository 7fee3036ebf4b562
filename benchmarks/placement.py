"""What placements save, and what planning them takes: fan-out, remote sends, load, time.

    JAX_PLATFORMS=cpu python benchmarks/placement.py
    JAX_PLATFORMS=cpu python benchmarks/placement.py --tiny --name try
    JAX_PLATFORMS=cpu python benchmarks/placement.py --trace routes.npz --devices 16 --hosts 2

Writes benchmarks/results/placement.json. Every method plans on some documents of a trace and is
measured on the others: generated traces (`moejax.placement.generator`), held-out text of several
domains read by the packaged model, and files of `infer.py routes --trace` or made elsewhere.
Numbers are means over layers of tokens that lie on the devices in streams, document after document.
`load_max_mean` is of all tokens together, `batch_load` [mean, largest] of each batch of `--batch`
tokens; `cut` is the share of pair weight between devices, of the part that is planned on; `moved`
counts the experts of a layer on another device than with contiguous placement (online: than
before), after renaming devices that are alike. Times are by the clock, and of this process alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import placement_baselines as baselines
from common import write_results

from moejax.cli import run_main
from moejax.placement.choice_reference import at_random, reference
from moejax.placement.evaluate import Choice, cut, devices_of, mean_of, measure_slots
from moejax.placement.generator import drift, generate, make_traffic
from moejax.placement.online import rebalance
from moejax.placement.planner import plan
from moejax.placement.relabel import relabel
from moejax.placement.replicas import add_replicas
from moejax.placement.statistics import statistics_of
from moejax.placement.topology import Topology
from moejax.placement.trace import Trace, read_trace

GENERATED = {64: 8, 256: 8, 512: 64}  # experts: devices
CAP = 1.05
EXTRA = 0.25  # slots for replicas, as a share of a device's slots
DRIFT = 0.25  # of generated traffic, over all rebalances
Slots = np.ndarray


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", nargs="*", default=[], metavar="FILE", help="only these traces")
    parser.add_argument("--devices", type=int, default=8, help="for the packaged model and --trace")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32_768, help="to plan on; as many to measure")
    parser.add_argument("--layers", type=int, default=8, help="of generated traces")
    parser.add_argument("--batch", type=int, default=8192, help="tokens of all devices together")
    parser.add_argument("--rebalances", type=int, default=8, help="while traffic drifts")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: few tokens, 64 experts")
    parser.add_argument("--name", default="placement")
    args = parser.parse_args()
    if args.tiny:
        args.tokens, args.layers, args.batch, args.rebalances = 4096, 2, 2048, 2
    return args


# ---- traces -----------------------------------------------------------------------------------


def packaged_trace(tokens: int) -> Trace:
    """What the packaged model chooses for held-out text, about `tokens` tokens of each domain.

    Domains: Python of the standard library, by the split of its training; this repository's
    documentation, prose in Markdown; and the interpreter's header files, C. Documents of more
    than 1,024 tokens are cut off there.
    """
    import sysconfig

    from jax import numpy as jnp

    from moejax.data.corpus import split_held_out
    from moejax.data.pipeline import tokenize
    from moejax.data.sources import load_corpus, load_standard_library
    from moejax.inference.source import open_model
    from moejax.placement.record import trace_of
    from moejax.training.state import Blueprint, load_weights
    from sharding.mesh import MeshShape, make_mesh

    source = open_model(None)
    root = Path(__file__).parents[1]
    texts = {
        "python": split_held_out(load_standard_library().documents, 0.05)[1],
        "markdown": load_corpus([str(root / "docs" / "*.md"), str(root / "*.md")]).documents,
        "c": load_corpus([sysconfig.get_path("include")]).documents,
    }
    documents, domains = [], []
    for domain, found in texts.items():
        order = np.random.default_rng(0).permutation(len(found))
        taken = 0
        for i in order:
            ids = tokenize([found[i]], source.tokenizer)[:1024]
            if taken >= tokens:
                break
            documents.append(ids)
            domains.append(domain)
            taken += len(ids)
    blueprint = Blueprint(source.config, make_mesh(MeshShape()))
    params, biases = load_weights(source.weights(blueprint), blueprint, jnp.float32)
    return trace_of(blueprint, params, biases, documents, domains)


def traces(args: argparse.Namespace) -> Iterator[tuple[str, int, Trace, Trace]]:
    """Name, devices, the part to plan on, the part to measure on."""
    for path in args.trace:
        yield Path(path).stem, args.devices, *read_trace(path).split(0.5)
    if args.trace:
        return
    for experts, devices in GENERATED.items():
        if args.tiny and experts > 64:
            continue
        for share in (0.5, 0.8):
            traffic = make_traffic(experts, args.layers, share=share, seed=experts)
            seen, unseen = (generate(traffic, args.tokens, seed=seed) for seed in (1, 2))
            yield f"generated, share {share}", devices, seen, unseen
    seen, unseen = packaged_trace(2 * args.tokens // 3).split(0.5)
    yield "packaged", args.devices, seen, unseen
    for domain in sorted(set(unseen.domains or ())):
        yield f"packaged, {domain}", args.devices, seen, unseen.of_domain(domain)


# ---- measuring --------------------------------------------------------------------------------


def measured(
    trace: Trace, slots_LP: Slots, topology: Topology, choose: Choice, batch: int
) -> dict[str, Any]:
    """Fan-out, sends and loads on a trace; each device reads a stream of its own."""
    devices = topology.devices
    own = max(1, min(batch, trace.num_tokens) // devices)
    batches = max(1, trace.num_tokens // (own * devices))
    tokens = np.arange(devices * batches * own).reshape(devices, batches, own).swapaxes(0, 1)
    source_N = np.repeat(np.arange(devices), own)
    whole, loads = [], []
    for layer, slots_P in enumerate(slots_LP):
        chosen = []
        for rows in tokens.reshape(batches, -1) % trace.num_tokens:
            experts_NK = trace.experts_NLK[rows, layer].astype(np.int64)
            chosen.append(choose(experts_NK, slots_P, topology, source_N))
            loads.append(measure_slots(chosen[-1], topology, source_N).load_max_mean)
        all_N = np.tile(source_N, batches)
        whole.append(measure_slots(np.concatenate(chosen), topology, all_N))
    mean = mean_of(whole)
    return {
        "fanout": round(mean.fanout, 3),
        "remote_sends": round(mean.remote_sends, 3),
        **({"remote_hosts": round(mean.remote_hosts, 3)} if topology.num_hosts > 1 else {}),
        "load_max_mean": round(mean.load_max_mean, 3),
        "batch_load": [round(float(np.mean(loads)), 3), round(max(loads), 3)],
    }


def moved(slots_LP: Slots, before_LP: Slots, topology: Topology, experts: int) -> float:
    """Experts of a layer on another device; devices that are alike are renamed first."""
    new_LE, old_LE = (devices_of(s, topology, experts) for s in (slots_LP, before_LP))
    return float(np.mean([(relabel(n, o, topology) != o).sum() for n, o in zip(new_LE, old_LE)]))


def timed(work: Callable[[], Slots]) -> tuple[Slots, dict[str, float]]:
    """What a plan is, and its time for each layer, by the clock and of this process alone."""
    wall, own = time.perf_counter(), time.process_time()
    slots_LP = work()
    wall, own = time.perf_counter() - wall, time.process_time() - own
    layers = len(slots_LP) / 1e3
    return slots_LP, {
        "plan_ms_per_layer": round(wall / layers, 2),
        "cpu_ms_per_layer": round(own / layers, 2),
    }


class Bench:
    """The methods, on one trace after the other."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        """Keeps and prints a row."""
        self.rows.append(row)
        print(row, flush=True)

    def compare(self, name: str, devices: int, seen: Trace, unseen: Trace) -> None:
        """All methods that plan once."""
        experts = seen.num_experts
        lean = Topology.even(experts, devices, self.args.hosts)
        more = Topology(devices, lean.slots + max(1, round(EXTRA * lean.slots)), lean.hosts)
        statistics = statistics_of(seen)
        full = partial(plan, statistics, lean, load_cap=CAP)

        def with_replicas() -> Slots:
            return add_replicas(full().slots_LP, statistics, more, load_cap=CAP)

        methods: dict[str, tuple[Callable[[], Slots], Topology, Choice]] = {
            "contiguous": (lambda: baselines.in_order(statistics, lean), lean, reference),
            "round_robin": (lambda: baselines.in_turn(statistics, lean), lean, reference),
            "eplb": (lambda: baselines.eplb(statistics, lean), lean, at_random),
            "metis": (lambda: baselines.metis(statistics, lean), lean, reference),
            "planner, first plan": (lambda: full(seconds=0).slots_LP, lean, reference),
            "planner": (lambda: full().slots_LP, lean, reference),
            "eplb, replicas at random": (lambda: baselines.eplb(statistics, more), more, at_random),
            "eplb, replicas by choice": (lambda: baselines.eplb(statistics, more), more, reference),
            "planner, replicas": (with_replicas, more, reference),
        }
        if not baselines.HAVE_METIS:
            methods.pop("metis")
            self.add(
                trace=name,
                method="metis",
                skipped="pymetis is not installed: pip install moejax[bench]",
            )
        start = baselines.in_order(statistics, lean)
        for method, (work, topology, choose) in methods.items():
            slots_LP, times = timed(work)
            numbers = measured(unseen, slots_LP, topology, choose, self.args.batch)
            more_numbers: dict[str, Any] = {"moved": None, "cut": None}
            if (np.sort(slots_LP)[:, -experts:] == np.arange(experts)).all() and topology is lean:
                device_LE = devices_of(slots_LP, lean, experts)
                more_numbers = {
                    "moved": round(moved(slots_LP, start, lean, experts), 1),
                    "cut": round(float(cut(statistics.pairs_LEE, device_LE).mean()), 4),
                }
            self.add(
                **self.about(name, seen, topology),
                method=method,
                **numbers,
                **times,
                **more_numbers,
            )

    def about(self, name: str, trace: Trace, topology: Topology) -> dict[str, Any]:
        """What a row is of."""
        return {
            "trace": name,
            "experts": trace.num_experts,
            "top_k": trace.experts_NLK.shape[2],
            "layers": trace.num_layers,
            "devices": topology.devices,
            "slots": topology.slots,
        }

    def follow(self, share: float) -> None:
        """Traffic drifts: the old plan, a few swaps at a time, and a plan from nothing."""
        args, devices, experts = self.args, GENERATED[64], 64
        topology = Topology.even(experts, devices, args.hosts)
        traffic = make_traffic(experts, args.layers, share=share, seed=experts)
        seen = generate(traffic, args.tokens, seed=1)
        counted = statistics_of(seen)
        before = present = plan(counted, topology, load_cap=CAP).slots_LP
        changes, spent = [], []
        for step in range(args.rebalances):
            traffic = drift(traffic, DRIFT / args.rebalances, seed=step)
            window = generate(traffic, args.tokens // 2, seed=10 + step)
            counted = counted.decay(0.5).plus(statistics_of(window))
            work = partial(rebalance, present, counted, topology, load_cap=CAP)
            new, times = timed(lambda work=work: work().slots_LP)  # type: ignore[misc]
            was, now = (devices_of(slots, topology, experts) for slots in (present, new))
            changes.append((was != now).sum(1))
            spent.append(list(times.values()))
            present = new
        anew, times = timed(lambda: plan(counted, topology, load_cap=CAP).slots_LP)
        unseen = generate(traffic, args.tokens, seed=2)
        rows = {
            "planned before the drift": (before, {"moved": 0.0}),
            "online": (
                present,
                {
                    **dict(zip(times, np.mean(spent, 0).round(2).tolist())),
                    "moved": round(float(np.mean(changes)), 2),
                    "most_moved": int(np.max(changes)),
                    "rebalances": args.rebalances,
                },
            ),
            "planned anew": (
                anew,
                {**times, "moved": round(moved(anew, before, topology, experts), 1)},
            ),
        }
        for method, (slots_LP, more) in rows.items():
            numbers = measured(unseen, slots_LP, topology, reference, args.batch)
            name = f"generated, share {share}, drifting"
            self.add(**self.about(name, seen, topology), method=method, **numbers, **more)


def main() -> None:
    args = parse()
    bench = Bench(args)
    for name, devices, seen, unseen in traces(args):
        bench.compare(name, devices, seen, unseen)
        write_results(args.name, bench.rows)
    if not args.trace:
        for share in (0.5, 0.8):
            bench.follow(share)
    write_results(args.name, bench.rows)


if __name__ == "__main__":
    sys.exit(run_main(main))
