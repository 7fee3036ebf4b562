"""Predictions and recommended layouts as text: columns of at most 100 characters."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence

from sharding.device_kinds import Hardware
from sharding.mesh import MeshShape
from sharding.plan_text import format_bytes, format_count
from sharding.recommend import Planned, Recommendation
from sharding.step_time import Prediction

__all__ = ["format_prediction", "format_recommendation"]

PARTS = {
    "experts": "products of the experts",
    "attention": "scores of attention",
    "products": "other products of layers",
    "head": "logits and loss",
    "activations": "activations read and written beside products",
    "weights": "weights cast and copied, gradients summed up",
    "optimizer": "optimizer",
    "exchange": "rows to their experts and back",
    "tensor": "sums over tensor",
    "reduction": "weights gathered, gradients reduced",
    "hidden": "of the exchange, beside the experts' products",
}
NOT_FITTING = 3  # layouts without room that are shown: what more memory would give
WHY = 6  # reasons that are shown for meshes left out


def format_prediction(
    prediction: Prediction, hardware: Hardware, devices: int, needed: float | None
) -> Iterator[str]:
    """A plan's step on some hardware, part by part.

    Args:
        prediction: of the step.
        hardware: it was made for.
        devices: of the mesh.
        needed: bytes of a device that the plan counts; None where the memory there is known better.
    """
    seconds = prediction.time.total
    yield f"predicted for {devices} × {hardware.kind.name}"
    yield f"  ({hardware.source})"
    if prediction.slow:
        yield f"  experts by XLA, at a rate that is assumed: {prediction.slow}"
    for name, value in vars(prediction.time).items():
        if value:
            sign, share = ("−", -value) if name == "hidden" else ("", value)
            text = f"{sign}{1e3 * value:.2f} ms"
            yield f"  {PARTS[name]:<60}{text:>14}{share / seconds:>8.0%}"
    rate = format_count(prediction.tokens_per_second, "kMG")
    text = f"{1e3 * seconds:.2f} ms"
    yield f"  {'step: ' + rate + ' tokens/s':<60}{text:>14}"
    share = f"{prediction.utilisation:.1%}"
    yield f"  {'utilisation, of the FLOPs that the model needs':<60}{share:>14}"
    if needed is None:
        return
    limit = hardware.kind.usable_memory
    verdict = "enough" if needed <= limit else f"NOT ENOUGH for {format_bytes(needed)}"
    of = f"memory that JAX takes by default: {verdict}"
    yield f"  {of:<60}{format_bytes(limit):>14}"


def format_recommendation(found: Recommendation, command: Sequence[str]) -> Iterator[str]:
    """The recommended layouts as a table, and how to run the first.

    Args:
        found: by `recommend`.
        command: words that run the configuration as it was given.
    """
    hardware = found.hardware
    meshes = [one.layout.mesh for one in found.best] + [one.mesh for one in found.left_out]
    yield f"layouts for {meshes[0].size} × {hardware.kind.name}"
    yield f"  {hardware.host_devices} of them joined by fast links"
    yield f"  ({hardware.source})"
    columns = f"{'mesh d×e×t':<17}{'microbatches':>12}  {'remat':<6}{'chunks':>6}{'in a host':>10}"
    yield f"  {columns}{'step ms':>10}{'tokens/s':>9}{'MFU':>7}{'memory':>10}  verdict"
    for one in found.best:
        yield _row(one, "fits")
    faster = [p for p in found.too_large if not found.best or _before(p, found.best[0])]
    for one in faster[:NOT_FITTING]:
        yield _row(one, "no room")
    if any(one.prediction.slow for one in found.best):
        yield "  *: experts by XLA, at a rate that is assumed; our kernels do not serve them"
    some = "" if found.best else "no layout: "
    yield f"  {some}a device has {format_bytes(found.limit)} for arrays"
    yield from _left_out(found)
    if found.best:
        words = shlex.join([*command, *found.best[0].layout.flags()])
        yield ""
        yield f"to run the first: {words}"


def _before(one: Planned, other: Planned) -> bool:
    return one.prediction.time.total < other.prediction.time.total


def _row(one: Planned, verdict: str) -> str:
    layout, seconds = one.layout, one.prediction.time.total
    mesh, inside = "×".join(map(str, layout.mesh.sizes)), layout.exchange_hosts or "–"
    row = f"  {mesh:<17}{layout.accumulate:>12}  {layout.remat:<6}{layout.chunks:>6}{inside:>10}"
    rate = format_count(one.prediction.tokens_per_second, "kMG")
    row += f"{1e3 * seconds:>10.1f}{rate:>9}{one.prediction.utilisation:>7.1%}"
    slow = "*" if one.prediction.slow else " "
    return f"{row}{format_bytes(one.plan.memory.total):>10}{slow} {verdict}"


def _left_out(found: Recommendation) -> Iterator[str]:
    """Meshes without a layout above, those with one reason together."""
    reasons: dict[str, list[MeshShape]] = {}
    for one in found.left_out:
        reasons.setdefault(one.reason, []).append(one.mesh)
    if reasons:
        yield "left out"
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
    for reason, meshes in ordered[:WHY]:
        more = f" and {len(meshes) - 1} more" if len(meshes) > 1 else ""
        text = f"{meshes[0]}{more}: {reason}"
        yield from textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent="    ")
    if len(ordered) > WHY:
        yield f"  {sum(len(m) for _, m in ordered[WHY:])} more for other reasons"
