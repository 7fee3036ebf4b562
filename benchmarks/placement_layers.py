"""One MoE layer over several GPUs with its experts placed: what a placement saves, and costs.

    python benchmarks/placement_layers.py --trace routes.npz
    JAX_PLATFORMS=cpu python benchmarks/placement_layers.py --tiny    # a rehearsal on fake devices

Writes benchmarks/results/placement_layers.json (kept as placement_layers_h200x2.json), after every
round. A trace's first half is planned
on, tokens of the other half are routed, document after document over the devices; the router
chooses just what the trace says (`placement_programs.choosing`), everything else is normal. Traces:
files of `infer.py routes --trace` (shapes of OLMoE, as the packaged model has 64 experts, 8 for a
token), and generated ones (`moejax.placement.generator`, share 0.8) with shapes of OLMoE and of
Qwen3-30B-A3B: `generated` with a popularity as Zipf's of exponent 0.8, `skewed` of 1.6.

- `what` = `forward`, `forward_backward`: median ms of a call of the layer, router included, in
  bf16. `placement`: `home` (no placement), `planned` (each expert once), `copies` (a quarter more
  slots). `weights`: `slots` as in serving, where they lie; `fetched` from home in every call, as in
  training.
- `remote_rows`: rows a token sends to other devices; `load`: assignments of the busiest device
  over the mean; `predicted_ms`: the layer's FLOPs on the busiest device at --tflops, and its rows
  there and back at --link-gbs, one after the other; fetching adds the bytes of the fullest waves.
- `what` = `migration`: median ms of moving `moved` experts of a layer to other devices and back, a
  move each.
- `what` = `counting`: ms of counting one layer's choices, and the share of its forward pass.
- Every program's output is compared with `home` at full size first: `difference`, relative.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import expert_mesh, write_results
from ep_timing import Rounds, one_line
from jax.sharding import NamedSharding
from layer_shapes import SHAPES as ONE_DEVICE
from layer_shapes import Shape
from placement_programs import (
    ROWS,
    Weights,
    Where,
    choosing,
    counting,
    forward,
    moving,
    timed,
)

from moejax.placement.fetch import fetch_traffic
from moejax.placement.generator import generate, make_traffic
from moejax.placement.planner import plan
from moejax.placement.replicas import add_replicas
from moejax.placement.statistics import statistics_of
from moejax.placement.topology import Topology
from moejax.placement.trace import Trace, read_trace

SHAPES = {
    "olmoe": Shape(8192, 2048, 1024, 64, 8),
    "qwen3_30b_a3b": replace(ONE_DEVICE["qwen3_30b_a3b"], tokens=8192),
}
MODES = ("auto", "ring", "remote", "all_to_all")
GENERATED = {"generated": 0.8, "skewed": 1.6}
EXTRA = 0.25
COPIES = 4
LIMIT = 1.5e-2  # of two bf16 results, each within 1e-2 of the exact one
KEY = ("trace", "shape", "what", "placement", "weights", "mode", "moved")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", nargs="*", default=[], metavar="FILE")
    names = list(GENERATED)
    parser.add_argument("--generated", nargs="*", choices=names, default=names)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["remote", "all_to_all"])
    parser.add_argument("--passes", nargs="+", choices=(1, 2), type=int, default=[1, 2])
    parser.add_argument("--moved", nargs="+", type=int, default=[2, 4, 16])
    parser.add_argument("--tokens", type=int, help="of a device; default: the shape's")
    parser.add_argument("--devices", type=int, help="default: all")
    parser.add_argument("--layer", type=int, default=0, help="of a trace with several")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=8.0, help="ends cleanly after these")
    parser.add_argument("--tflops", type=float, default=600.0)
    parser.add_argument("--link-gbs", type=float, default=300.0)
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to rehearse anywhere")
    parser.add_argument("--name", help="result file; default placement_layers, none for --tiny")
    args = parser.parse_args(words)
    if args.name is None and not args.tiny:
        args.name = "placement_layers"
    args.deadline = time.monotonic() + 60 * args.minutes
    return args


def shape_of(name: str, args: argparse.Namespace) -> Shape:
    shape = SHAPES[name]
    if args.tiny:
        return Shape(args.tokens or 64, 128, 64, 16, 4)
    return replace(shape, tokens=args.tokens or shape.tokens)


def cases(args: argparse.Namespace, devices: int) -> Iterator[tuple[str, str, Shape, Trace]]:
    """Names of a trace and a shape, and both."""
    for path in args.trace:
        trace = read_trace(path)
        for name in args.shapes:
            shape = shape_of(name, args)
            sizes = trace.num_experts, trace.experts_NLK.shape[2]
            if sizes == (shape.experts, shape.top_k):
                yield Path(path).stem, name, shape, trace
    for kind, name in itertools.product(args.generated, args.shapes):
        shape, zipf = shape_of(name, args), GENERATED[kind]
        traffic = make_traffic(shape.experts, 1, choices=shape.top_k, share=0.8, zipf=zipf, seed=0)
        yield kind, name, shape, generate(traffic, 2 * shape.tokens * devices, seed=0)


def placements(trace: Trace, layer: int, devices: int) -> list[Where]:
    """Everything that is compared."""
    statistics = statistics_of(trace).layers(slice(layer, layer + 1))
    topology = Topology.even(trace.num_experts, devices)
    once_LP = plan(statistics, topology).slots_LP
    whole = replace(topology, slots=topology.slots + max(1, round(EXTRA * topology.slots)))
    copies_LP = add_replicas(once_LP, statistics, whole, load_cap=1.05, max_replicas=COPIES)
    found = [Where("home", None, resident=True)]
    for name, slots_LP, most in ("planned", once_LP, 1), ("copies", copies_LP, COPIES):
        found += [Where(name, slots_LP[0], resident, most) for resident in (True, False)]
    return found


class Case:
    """A trace on a shape: its programs, checked and timed in rounds."""

    def __init__(self, names: tuple[str, str], shape: Shape, trace: Trace, args: Any, mesh: Any):
        self.names, self.shape, self.args, self.mesh = names, shape, args, mesh
        seen, unseen = trace.split(0.5)
        self.layer = min(args.layer, trace.experts_NLK.shape[1] - 1)
        chosen_NK = unseen.experts_NLK[:, self.layer]
        chosen_NK = chosen_NK[(chosen_NK >= 0).all(axis=1)]
        count = shape.tokens * mesh.size
        self.chosen_NK = np.resize(chosen_NK, (count, shape.top_k))
        self.wheres = placements(seen, self.layer, mesh.size)
        rng = np.random.default_rng(0)
        put = NamedSharding(mesh, ROWS)

        def rows(a: np.ndarray) -> Any:
            return jax.device_put(a.astype(jax.numpy.bfloat16), put)

        self.x_TD = rows(choosing(self.chosen_NK, shape, rng))
        self.ct_TD = rows(rng.standard_normal((count, shape.d_model), np.float32))
        self.experts_TK = jax.device_put(self.chosen_NK.astype(np.int32), put)
        self.weights = Weights(shape, mesh)
        self.info: dict[tuple, dict[str, Any]] = {}

    def run(self, put: Any) -> None:
        """Everything; `put` gets the rows whenever they change."""
        calls = {**self._layers(), **self._migrations(), **self._counting()}
        with ThreadPoolExecutor(4) as pool:
            calls = dict(zip(calls, pool.map(_compiled, calls.values())))
        rounds = Rounds(calls)
        rounds.warm_up()
        for _ in range(self.args.rounds):
            if time.monotonic() > self.args.deadline:
                break
            rounds.run()
            put(self._rows(rounds))
        put(self._rows(rounds))

    def _layers(self) -> dict[tuple, Any]:
        calls: dict[tuple, Any] = {}
        for mode in self.args.modes:
            want = None
            for where in self.wheres:
                ways = {1: "forward", 2: "forward_backward"}
                # Weights in slots only infer; at home they do both.
                passes = [1] if where.resident and where.slots_P is not None else [1, 2]
                key = (where.name, "slots" if where.resident else "fetched", mode, None)
                try:
                    weights = self.weights.of(where)
                    arrays = weights, self.weights.placement(where), self.x_TD
                    run = jax.jit(forward(self.shape, mode, where, self.mesh))
                    y_TD, slots_TK, aux = jax.device_get(run(*arrays))
                    got = y_TD.astype(np.float32)
                    want = got if want is None else want
                    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
                    if not error <= LIMIT:
                        raise ArithmeticError(f"differs from home by {error:.3g}")
                    about = self._about(where, slots_TK, aux) | {
                        "difference": float(f"{error:.3g}")
                    }
                except Exception as why:  # a result as well
                    for number in self.args.passes:
                        if number in passes:
                            self.info[ways[number], *key] = {"error": one_line(why)}
                    continue
                for number in (n for n in self.args.passes if n in passes):
                    program = timed(self.shape, mode, where, self.mesh, backward=number == 2)
                    given = (*arrays, self.ct_TD) if number == 2 else arrays
                    name = (ways[number], *key)
                    self.info[name] = about | {"predicted_ms": self._floor(where, about, number)}
                    calls[name] = partial(jax.jit(program), *given)
        return calls

    def _about(self, where: Where, slots_TK: np.ndarray, aux: Any) -> dict[str, Any]:
        """What the layer reports; its choice must be the trace's."""
        wanted_E = np.bincount(self.chosen_NK.reshape(-1), minlength=self.shape.experts)
        if not np.array_equal(aux.counts_E, wanted_E):
            raise ArithmeticError("the router chose others than the trace says")
        tokens, counters, devices = len(self.chosen_NK), aux.counters, self.mesh.size
        slots = -(-self.shape.experts // devices)
        if where.slots_P is not None:
            slots = len(where.slots_P) // devices
        load_G = np.bincount(slots_TK.reshape(-1) // slots, minlength=devices)
        about = {
            "remote_rows": int(counters.rows_host + counters.rows_network) / tokens,
            "padding_rows": int(counters.rows_padding) / tokens,
            "waves": int(counters.waves),
            "load": round(float(load_G.max() / load_G.mean()), 4),
        }
        return about

    def _floor(self, where: Any, about: dict[str, Any], number: int) -> float:
        """ms: FLOPs of the busiest device, then its rows both ways, in each pass."""
        flops = self.shape.flops(number == 2) * about["load"]
        row = self.shape.d_model * 2 * self.shape.tokens
        sent = 2 * number * row * about["remote_rows"]
        if not where.resident:
            sent += (1 + (number == 2)) * self._fetched(where)
        return flops / self.args.tflops / 1e9 + sent / self.args.link_gbs / 1e6

    def _fetched(self, where: Any) -> float:
        """Bytes that a device sends to fill all slots once, padding included."""
        expert = 3 * self.shape.d_model * self.shape.hidden * 2
        return fetch_traffic(where.slots_P, self.mesh.size).on_wire / self.mesh.size * expert

    def _migrations(self) -> dict[tuple, Any]:
        """Experts exchanged in pairs between neighbours, and back again."""
        once = next(w for w in self.wheres if w.name == "planned" and w.resident)
        calls: dict[tuple, Any] = {}
        for moved in self.args.moved:
            slots_GS = once.slots_P.reshape(self.mesh.size, -1).copy()
            pairs = moved // 2
            if pairs > slots_GS.shape[1] * (self.mesh.size // 2):
                continue
            for i in range(pairs):
                a, slot = 2 * (i % (self.mesh.size // 2)), i // (self.mesh.size // 2)
                slots_GS[[a, a + 1], slot] = slots_GS[[a + 1, a], slot]
            swapped_P = slots_GS.reshape(-1).astype(np.int32)
            calls["migration", "planned", "slots", None, moved] = _Moving(
                self.weights, once.slots_P.astype(np.int32), swapped_P, self.mesh
            )
        return calls

    def _counting(self) -> dict[tuple, Any]:
        program = jax.jit(counting(self.shape, self.mesh))
        return {("counting", None, None, None, None): partial(program, self.experts_TK)}

    def _rows(self, rounds: Any) -> list[dict[str, Any]]:
        names = dict(zip(("trace", "shape"), self.names))
        sizes = {"devices": self.mesh.size, "tokens": self.shape.tokens}
        keys = dict.fromkeys([*self.info, *rounds.times, *rounds.errors])
        rows = []
        for key in keys:
            ms = rounds.ms(key)
            row = {**names, **dict(zip(KEY[2:], key)), **sizes, **self.info.get(key, {})}
            row["ms"] = None if ms is None else round(ms, 5)
            row["ms_spread"] = None if ms is None else round(rounds.spread(key), 4)
            if key in rounds.errors:
                row["error"] = rounds.errors[key]
            rows.append(row)
        return rows


def _compiled(call: Any) -> Any:
    """A call whose program is compiled; as it was where that fails, which its first use tells."""
    if not isinstance(call, partial):
        return call
    try:
        return partial(call.func.lower(*call.args).compile(), *call.args)
    except Exception:
        return call


class _Moving:
    """A call moves a layer's experts to the other of two placements."""

    def __init__(self, weights: Any, old_P: np.ndarray, new_P: np.ndarray, mesh: Any):
        self._banks, self._ends, self._move = weights.in_slots(old_P), (old_P, new_P), moving(mesh)

    def __call__(self) -> Any:
        self._banks = self._move(self._banks, *self._ends)
        self._ends = self._ends[::-1]
        return self._banks


def show(row: dict[str, Any]) -> None:
    head = " ".join(str(row[k]) for k in KEY if row[k] is not None)
    ms = "–" if row["ms"] is None else f"{row['ms']:.3f} ms ±{row['ms_spread']:.1%}"
    more = {k: row[k] for k in ("predicted_ms", "remote_rows", "load", "error") if row.get(k)}
    print(f"{head}: {ms} {more}", flush=True)


def main() -> None:
    args = parse()
    mesh = expert_mesh(args.devices, args.tiny)
    done: dict[tuple, dict[str, Any]] = {}

    def put(rows: list[dict[str, Any]]) -> None:
        done.update({tuple(row[k] for k in KEY): row for row in rows})
        if args.name is not None:
            write_results(args.name, list(done.values()), devices=mesh.size)

    for trace_name, shape_name, shape, trace in cases(args, mesh.size):
        if time.monotonic() > args.deadline:
            print(f"the {args.minutes:g} minutes are over before {trace_name} {shape_name}")
            continue
        case = Case((trace_name, shape_name), shape, trace, args, mesh)
        case.run(put)
        for row in done.values():
            if (row["trace"], row["shape"]) == (trace_name, shape_name):
                show(row)
        del case


if __name__ == "__main__":
    main()
