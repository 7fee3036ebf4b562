"""A plan as text: columns of at most 100 characters."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from sharding.mesh import AXES
from sharding.traffic import Crossing

if TYPE_CHECKING:
    from moejax.exchange.budget import Budget
    from sharding.planner import Plan

__all__ = ["format_bytes", "format_count", "format_plan"]

MEMORY = {
    "masters": "master weights, float32",
    "moments": "Adam's moments, float32",
    "residuals": "what compressed gradients have left to send",
    "weights": "gathered weights, {dtype}",
    "gradients": "gradients, whole and reduced",
    "kept": "activations kept for the backward (remat={remat})",
    "working": "activations of the one piece that is recomputed",
    "exchange": "exchange buckets of one layer",
    "logits": "logits, their gradient, the sum of the head's, float32",
    "balance": "{balance}",
}

LESS = "less, as not all of these are there at the same time"
MORE = "more, for what is on its way in the backward"


def format_bytes(count: float) -> str:
    """Bytes with a binary unit, such as `1.50 GiB`; whole below 1 KiB."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if count < 999.5 or unit == "TiB":
            break
    return f"{count:.{_decimals(count)}f} {unit}"


def format_count(count: float, units: str = "kMGTP") -> str:
    """A number with a decimal unit, such as `46.7 G`; whole below 1000."""
    if count < 1000:
        return f"{count:.0f}"
    for unit in units:
        count /= 1000
        if count < 999.5 or unit == units[-1]:
            break
    return f"{count:.{_decimals(count)}f} {unit}"


def _decimals(count: float) -> int:
    # At least three digits.
    return 2 if count < 9.995 else 1 if count < 99.95 else 0


def format_plan(plan: Plan) -> str:
    """The plan for people; nothing in it depends on the machine but the memory of its devices."""
    return "\n".join([*_model(plan), "", *_memory(plan), "", *_collectives(plan)])


def _model(plan: Plan) -> Iterator[str]:
    config, model = plan.config, plan.config.model
    yield f"plan for the mesh {plan.mesh}: {_number(plan.mesh.size, 'device')}"
    text = f"{_number(model.num_layers, 'layer')} of width {model.d_model}, vocabulary "
    yield _fact("model", f"{text}{model.vocab_size}, computed in {model.compute_dtype}")
    router, experts = model.moe.router, model.moe.experts
    if plan.parameters.experts:
        shared = f", shared {experts.shared_hidden}" if experts.shared_hidden else ""
        choices = " or ".join(str(k) for k in sorted({b.top_k for _, b in plan.exchanges}))
        few, many = min(model.expert_numbers), max(model.expert_numbers)
        count = f"{many}" if few == many else f"{few} to {many} by layer"
        count += f", merged from {router.merged_from}," if router.merged_from else ""
        text = f"{count} of width {experts.hidden}, {choices} for a token"
        if experts.sharing.active:
            of = f" of rank {experts.sharing.rank}" if experts.sharing.rank else ""
            shared += f", sharing '{experts.sharing.kind}'{of}"
        if experts.together > 1:
            shared += f", computed {experts.together} together"
        yield _fact("experts", text + shared)
    total, active = plan.parameters.total, plan.parameters.active
    text = f"{format_count(total, 'kMB')} ({total}), {format_count(active, 'kMB')} active"
    yield _fact("parameters", text)
    flops = plan.flops
    text = f"forward {format_count(flops.forward)}, with backward {format_count(flops.step)} "
    text += f"(6 × weights {format_count(flops.weights)}, the rest attention)"
    yield _fact("FLOPs a token", text)
    if flops.recomputed:
        text = f"{format_count(flops.recomputed)} more, recomputed (remat={model.remat})"
        yield _fact("", text)
    tokens = config.data.batch_size * config.data.seq_len
    text = f"{tokens} tokens, {plan.tokens} on a device at once"
    if config.accumulate > 1:
        text += f" in each of {config.accumulate} microbatches"
    yield _fact("a step", f"{text}; {format_count(flops.step * tokens)}FLOP".replace("  ", " "))
    for layers, budget in plan.exchanges:
        text = f"{_number(layers, 'layer')}: {budget.mode} ({budget.reason})"
        text += f", in {budget.chunks} chunks" if budget.chunks > 1 else ""
        yield _fact("exchange", text)
        yield from _room(budget)
        if budget.inside is not None:
            inside = budget.inside
            yield _fact("", f"between {budget.devices} hosts; in each {inside.devices} devices:")
            yield _fact("", f"{inside.mode} ({inside.reason})")
            yield from _room(inside)


def _room(budget: Budget) -> Iterator[str]:
    if budget.mode != "local":
        waves = "one wave" if budget.single_wave else "more waves if a bucket overflows"
        expected = f"{budget.rows} rows a bucket, {budget.assignments} assignments a device"
        yield _fact("", f"{expected}; {waves}")


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _fact(name: str, text: str) -> str:
    return f"  {name:<15}{text}"


def _memory(plan: Plan) -> Iterator[str]:
    model = plan.config.model
    exact = "three" if plan.memory.residuals else "two"
    yield f"memory of a device ({exact} lines exact, the others estimated before fusion)"
    for field, count in vars(plan.memory).items():
        if count:
            balance = LESS if count < 0 else MORE
            words = {"dtype": model.compute_dtype, "remat": model.remat, "balance": balance}
            label = MEMORY[field].format(**words)
            sign = "-" if count < 0 else ""
            yield f"  {label:<60}{sign + format_bytes(abs(count)):>12}"
    yield f"  {'total':<60}{format_bytes(plan.memory.total):>12}"
    if plan.device_memory:
        limit = plan.device_memory
        verdict = "enough" if plan.memory.total <= limit else "NOT ENOUGH"
        yield f"  {'what JAX may use of a device here: ' + verdict:<60}{format_bytes(limit):>12}"


def _collectives(plan: Plan) -> Iterator[str]:
    once = [c for c in plan.collectives if not c.extra]
    extra = [c for c in plan.collectives if c.extra]
    if not once:
        yield "nothing is sent: one device"
        return
    yield "sent by a device in a step (ring algorithms; it receives as much)"
    yield from _table(once)
    for axis in AXES:
        over = sum(c.sent for c in once if axis in c.axes)
        if over:
            yield f"  {'all over ' + axis:<84}{format_bytes(over):>12}"
    yield f"  {'all':<84}{format_bytes(plan.sent()):>12}"
    if extra:
        yield ""
        yield "sent besides for each further wave, if every layer needs it"
        yield from _table(extra)
    yield ""
    yield from textwrap.wrap(plan.uncompressed, 100)
    if plan.formulas_agree:
        yield "counted in the traced program; the closed formulas give the same"
    else:
        other = sum(c.sent for c in plan.formulas if not c.extra)
        yield f"counted in the traced program; the closed formulas give {format_bytes(other)}"


def _table(crossings: Iterable[Crossing]) -> Iterator[str]:
    yield f"  {'collective':<20}{'':<12}{'kind':<16}{'over':<24}{'times':>12}{'bytes':>12}"
    for c in crossings:
        over = " × ".join(c.axes) + (f", {c.part}" if c.part else "")
        row = f"  {c.name:<20}{c.phase:<12}{c.kind:<16}{over:<24}{c.times:>12}"
        yield f"{row}{format_bytes(c.sent):>12}"
