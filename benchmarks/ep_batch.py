"""All variants of one shape and pass: compiled together, checked, timed in rounds."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ep_timeline
import jax
from ep_alone import PARTS, hidden_fraction, left_out
from ep_check import SmallCase, difference, limit_of
from ep_options import compile_with, scheduled
from ep_programs import Arrays, Lowered, build_report, lower, make_layer, pushed_bytes
from ep_shapes import PEER, ROUTINGS, Variant, find_shape, make_inputs, predicted_ms, variants
from ep_timing import Rounds, one_line
from jax.sharding import Mesh

LEAST_ROUNDS = 3


class Checks:
    """What all batches share: the small case, on which each way to exchange is checked once, and
    what the layers report.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.case = SmallCase(mesh)
        self.found: dict[Variant, dict[str, float] | str] = {}
        self.lowered: dict[Variant, dict[str, Any]] = {}
        self.reports: dict[Any, dict[str, Any]] = {}

    @staticmethod
    def way(variant: Variant) -> Variant:
        """Without what does not matter for the small case."""
        return replace(variant, shape="", which="fwdbwd")

    def lower(self, variant: Variant) -> dict[str, Any]:
        """Its programs, the same for all options."""
        key = replace(self.way(variant), options="")
        if key not in self.lowered:
            self.lowered[key] = self.case.lower(variant)
        return self.lowered[key]


class Batch:
    """One shape and pass.

    Args:
        shape_name, which: what.
        mesh: the devices, all along `expert`.
        args: flags of `ep_layer.py`.
        rates: TFLOP/s of a device, GB/s of a link, for the prediction.
    """

    def __init__(
        self,
        shape_name: str,
        which: str,
        mesh: Mesh,
        args: argparse.Namespace,
        rates: tuple[float, float],
    ) -> None:
        self.args, self.mesh, self.rates = args, mesh, rates
        self.shape_name, self.which = shape_name, which
        self.shape = find_shape(shape_name, args.tiny)
        self.arrays = Arrays(self.shape, make_inputs(self.shape, mesh.size), mesh)
        self.variants = list(variants(args, shape_name, which))
        self.parts = ["total"] if args.no_parts else list(PARTS)
        self.info: dict[tuple[Variant, str], dict[str, Any]] = {
            (variant, routing): {}
            for variant in self.variants
            for routing in self.routings(variant)
        }
        self.compiled: dict[tuple[Variant, str], Any] = {}
        self.rounds = Rounds({})
        self.timelines: list[dict[str, Any]] = []

    def routings(self, variant: Variant) -> list[str]:
        """The peer has one, even; it counts as balanced."""
        return [r for r in self.args.routings if variant.impl != PEER or r == ROUTINGS[0]]

    def run(self, put: Callable[[list[dict[str, Any]]], None], checks: Checks) -> None:
        """Everything; `put` gets the rows whenever they change."""
        lowered = self._predict(checks)
        put(self.rows())
        self._compile(lowered, checks)
        put(self.rows())
        self._compare()
        calls = dict(self._calls())
        self.rounds = Rounds(calls)
        self.rounds.warm_up()
        for done in range(self.args.rounds):
            if done >= LEAST_ROUNDS and self._late():
                break
            self.rounds.run()
            put(self.rows())
        if self.args.profile:
            self._profile()

    def rows(self) -> list[dict[str, Any]]:
        """The rows as far as they are known."""
        return [self._row(*key) for key in self.info]

    def _late(self) -> bool:
        return time.monotonic() > self.args.deadline

    def _failed(self, variant: Variant, why: str) -> None:
        """Nothing more is done with a variant."""
        for routing in self.routings(variant):
            self.info[variant, routing].setdefault("error", why)

    def _alive(self, variant: Variant, routing: str | None = None) -> bool:
        routings = self.routings(variant) if routing is None else [routing]
        return any("error" not in self.info[variant, r] for r in routings)

    def _predict(self, checks: Checks) -> dict[tuple[Variant, str], Lowered]:
        """Traces what there is to trace; with what it sends comes the prediction."""
        lowered: dict[tuple[Variant, str], Lowered] = {}
        for part in self.parts:
            with left_out(part):
                for variant in filter(self._alive, self.variants):
                    key = replace(variant, options=""), part
                    try:
                        if self._late():
                            raise TimeoutError("the time was over before it was traced")
                        if key not in lowered:
                            arguments = self.arrays.arguments(variant, ROUTINGS[0])
                            lowered[key] = lower(self.shape, variant, part, self.mesh, arguments)
                    except Exception as why:  # a result as well
                        self._failed(variant, one_line(why))
        for variant, routing in self.info:
            if not self._alive(variant, routing):
                continue
            try:
                self.info[variant, routing] |= self._report(variant, routing, checks.reports)
                program = lowered[replace(variant, options=""), "total"]
                self._add_prediction(variant, routing, program)
            except Exception as why:
                self._failed(variant, one_line(why))
        return lowered

    def _report(
        self, variant: Variant, routing: str, known: dict[Any, dict[str, Any]]
    ) -> dict[str, Any]:
        """Loads and waves: what the layer itself reports of one call."""
        if variant.impl == PEER:
            return {"load": 1.0, "expert_load": 1.0, "waves": 1, "mode_used": "all_to_all"}
        alike = replace(variant, options="", wire="exact", which="fwd")
        if (alike, routing) not in known:
            report = build_report(self.shape, alike, self.mesh)
            aux = jax.jit(report)(*self.arrays.arguments(alike, routing))
            counts_E = jax.device_get(aux.counts_E).astype(float)
            load_G = counts_E.reshape(self.mesh.size, -1).sum(axis=1)
            layer = make_layer(self.shape, alike, self.mesh.size)
            known[alike, routing] = {
                "load": float(load_G.max() / load_G.mean()),
                "expert_load": float(counts_E.max() / counts_E.mean()),
                "waves": int(aux.counters.waves),
                "rows": int(aux.counters.rows_host + aux.counters.rows_network) / self.mesh.size,
                "mode_used": layer.budget(self.shape.tokens).mode,
            }
        return known[alike, routing]

    def _add_prediction(self, variant: Variant, routing: str, program: Lowered) -> None:
        info = self.info[variant, routing]
        info["bytes_sent"] = round(program.sent + program.further * (info["waves"] - 1))
        if info["mode_used"] == "remote":
            info["bytes_sent"] += round(info["rows"] * pushed_bytes(self.shape, variant))
        flops = self.shape.flops(variant.backward)
        info["predicted_ms"] = predicted_ms(
            flops, info["bytes_sent"], variant.chunks, info["load"], *self.rates
        )

    def _compile(self, lowered: dict[tuple[Variant, str], Lowered], checks: Checks) -> None:
        """All programs at once; then the small case of each."""
        large: dict[Variant, dict[str, Future]] = {}
        small: dict[Variant, dict[str, Future]] = {}
        with ThreadPoolExecutor(self.args.threads) as pool:

            def start(program: Any, variant: Variant) -> Future:
                def compiled() -> Any:
                    if self._late():
                        raise TimeoutError("the time was over before it was compiled")
                    how = variant.options, self.shape, variant.chunks, self.rates[1]
                    return compile_with(program, *how)

                return pool.submit(compiled)

            for variant in filter(self._alive, self.variants):
                way, plain = checks.way(variant), replace(variant, options="")
                programs = {part: lowered[plain, part].lowered for part in self.parts}
                large[variant] = {k: start(p, variant) for k, p in programs.items()}
                if way in checks.found or way in small:
                    continue
                try:
                    programs = checks.lower(variant)
                    small[way] = {k: start(p, variant) for k, p in programs.items()}
                except Exception as why:  # a result as well
                    checks.found[way] = one_line(why)
        for way, futures in small.items():
            try:
                done = {k: future.result() for k, future in futures.items()}
                checks.found[way] = checks.case.check(way, done)
            except Exception as why:
                checks.found[way] = one_line(why)
        for variant, futures in large.items():
            errors = checks.found[checks.way(variant)]
            if isinstance(errors, str):
                self._failed(variant, errors)
                continue
            try:
                done = {part: future.result() for part, future in futures.items()}
            except Exception as why:
                self._failed(variant, one_line(why))
                continue
            self.compiled |= {(variant, part): program for part, program in done.items()}
            order = scheduled(done["total"].as_text())
            for routing in self.routings(variant):
                self.info[variant, routing] |= {"errors": errors, "scheduled": order}

    def _compare(self) -> None:
        """Every variant with the first exact one, at full size."""
        first: dict[tuple[str, str], Any] = {}
        for variant, routing in self.info:
            if not self._alive(variant, routing) or (variant, "total") not in self.compiled:
                continue
            info = self.info[variant, routing]
            try:
                arguments = self.arrays.arguments(variant, routing)
                got = self.compiled[variant, "total"](*arguments)
                key = (variant.impl, routing)
                if key not in first and variant.wire == "exact":
                    first[key] = got
                    continue
                if key in first:
                    error = difference(got, first[key])
                    info["difference"] = float(f"{error:.3g}")
                    if not error <= 1.5 * limit_of(variant):
                        raise ArithmeticError(f"differs from the first variant by {error:.3g}")
            except Exception as why:  # a result as well
                info["error"] = one_line(why)

    def _calls(self) -> Iterator[tuple[tuple, Callable[[], Any]]]:
        for (variant, part), program in self.compiled.items():
            for routing in self.routings(variant):
                if self._alive(variant, routing):
                    arguments = self.arrays.arguments(variant, routing)
                    yield (variant, part, routing), partial(program, *arguments)

    def _row(self, variant: Variant, routing: str) -> dict[str, Any]:
        info = self.info[variant, routing]
        ms = {part: self.rounds.ms((variant, part, routing)) for part in PARTS}
        total, key = ms["total"], (variant, "total", routing)
        failed = [self.rounds.errors.get((variant, part, routing)) for part in PARTS]
        error = info.get("error") or next(filter(None, failed), None)
        flops, known = self.shape.flops(variant.backward), all(ms.values())
        return {
            **variant.key,
            "routing": routing,
            "ms": _rounded(total),
            "tflops_per_gpu": None if total is None else round(flops / total / 1e9, 2),
            **{f"ms_{part}": _rounded(ms[part]) for part in PARTS if part != "total"},
            "hidden_fraction": hidden_fraction(ms) if known else None,  # type: ignore[arg-type]
            "bytes_sent": info.get("bytes_sent"),
            "predicted_ms": _rounded(info.get("predicted_ms")),
            "ms_spread": None if total is None else round(self.rounds.spread(key), 4),
            "rounds": len(self.rounds.times.get(key, ())),
            "max_over_mean_load": _rounded(info.get("load")),
            "max_over_mean_expert": _rounded(info.get("expert_load")),
            **{k: info.get(k) for k in ("mode_used", "waves", "errors", "difference", "scheduled")},
            **({"error": error} if error else {}),
        }

    def _profile(self) -> None:
        """One call of each variant, by stream."""
        for (variant, part), program in self.compiled.items():
            if part != "total" or not self._alive(variant, ROUTINGS[0]) or self._late():
                continue
            arguments = self.arrays.arguments(variant, ROUTINGS[0])
            folder = Path(self.args.profile) / "-".join(map(str, variant.key.values()))
            row: dict[str, Any] = {**variant.key, "intervals": []}
            try:
                found = ep_timeline.profile(partial(program, *arguments), folder)
                row |= {"intervals": found, "under": ep_timeline.share_under_experts(found)}
            except Exception as why:  # a result as well
                row["error"] = one_line(why)
            self.timelines.append(row)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
