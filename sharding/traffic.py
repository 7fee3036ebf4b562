"""Collectives of a traced program: what each device sends, counted from the jaxpr.

The bytes are those of the textbook ring algorithms over n devices, for b bytes of operand on each:

    all-reduce       2·(n-1)/n · b        reduce-scatter   (n-1)/n · b
    all-gather         (n-1)   · b        all-to-all       (n-1)/n · b        permute   b

(Thakur, Rabenseifner, Gropp 2005, doi 10.1177/1094342005051521.) A device receives as much. On an
axis of one device nothing moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jax.interpreters import partial_eval

__all__ = ["Crossing", "add_up", "collectives_of", "live_jaxpr", "sent_bytes", "where"]

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "permute"]
Phase = Literal["forward", "recomputed", "backward", ""]
Part = Literal["inside hosts", "between hosts", ""]

KINDS: dict[str, Kind] = {
    "psum": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "all-to-all",
    "ppermute": "permute",
}
LOCAL = {"axis_index", "pvary", "pcast", "reshard", "sharding_constraint"}
"""Primitives that name a mesh axis and move nothing."""

_ROOTS = tuple(str(Path(__file__).resolve().parents[1] / p) + "/" for p in ("moejax", "sharding"))


@dataclass(frozen=True)
class Crossing:
    """One collective of a step, or several alike added up.

    name: what it is for, see `NAMES`.
    phase: of the differentiated part: `forward`, `recomputed` for the backward, `backward`;
        empty outside of it.
    kind: which collective.
    axes: mesh axes it runs over, those of one device left out.
    times: executions a step.
    sent: bytes that a device sends a step.
    extra: it is in a loop whose length the data decide (further waves of an exchange); times and
        bytes are then those of one turn of each such loop.
    part: of an axis in groups: `inside hosts` where they are of neighbours, `between hosts` where
        they are not; empty for whole axes.
    """

    name: str
    phase: Phase
    kind: Kind
    axes: tuple[str, ...]
    times: int
    sent: float
    extra: bool = False
    part: Part = ""

    @property
    def key(self) -> tuple:
        """What distinguishes rows of a table."""
        return (self.name, self.phase, self.kind, self.axes, self.extra, self.part)


def sent_bytes(kind: Kind, devices: int, operand: float) -> float:
    """Bytes a device sends in one collective; see the formulas above.

    Args:
        kind: which collective.
        devices: n, over all its axes.
        operand: b, bytes of what one device puts in.
    """
    if devices == 1:
        return 0.0
    match kind:
        case "all-reduce":
            return 2 * (devices - 1) / devices * operand
        case "all-gather":
            return (devices - 1) * operand
        case "permute":
            return operand
        case _:
            return (devices - 1) / devices * operand


NAMES: tuple[tuple[str, str, str], ...] = (
    ("zero", "gather_weights", "weight gather"),
    ("zero", "scatter_gradients", "gradient reduction"),
    ("reduction", "Reducer.gather", "weight gather"),
    ("reduction", "Reducer.reduce", "gradient reduction"),
    ("reduction", "Reducer.squares", "gradient reduction"),
    ("gradients", "global_norm", "gradient norm"),
    ("gradients", "norm_of_data_rank", "gradient norm"),
    ("losses", "router_losses", "router statistics"),
    ("plan", "make_plans", "number of waves"),
    ("hierarchy", "make_plans", "number of waves"),
    ("capacity", "drop_over_capacity", "capacity counts"),
    ("arrays", "gather_bank", "replica gather"),
    ("fetch", "", "replica fetch"),
    ("migrate", "", "migration"),
    ("modes", "dispatch", "dispatch"),
    ("modes", "combine", "combine"),
    ("waves", "run_waves", "further wave"),
    ("attention", "Attention", "attention"),
    ("latent_attention", "LatentAttention", "attention"),
    ("mlp", "DenseMLP", "MLP"),
    ("moe_aux", "MoEAux.over_devices", "metrics"),
    ("experts", "ExpertBank", "experts"),
    ("layer", "MoELayer", "experts"),
    ("embedding", "Embedding", "embedding"),
    ("embedding", "vocabulary_logits", "logits"),
    ("loss", "", "cross-entropy"),
    ("decoder", "Decoder.nll", "cross-entropy"),
    ("step", "make_train_step", "loss"),
)
"""(file, function, name): a collective is named after the innermost call that is listed here."""


def where(eqn: Any) -> str:
    """What an equation is for: the entry of `NAMES` for the innermost of our calls it stems from.

    Empty where no call is listed, as in functions that JAX traces apart from their callers.
    """
    traceback = eqn.source_info.traceback
    codes, _ = traceback.raw_frames() if traceback else ([], [])
    for code in codes:
        if not code.co_filename.startswith(_ROOTS):
            continue
        file = Path(code.co_filename).stem
        for wanted, function, name in NAMES:
            if file == wanted and code.co_qualname.startswith(function):
                return name
    return ""


def live_jaxpr(jaxpr: Any) -> Any:
    """A jaxpr, open or closed, without equations whose results nobody uses; compilers drop them."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # from 0.11 on there is only one class
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def collectives_of(jaxpr: Any, axis_sizes: Mapping[str, int]) -> list[Crossing]:
    """The collectives of a step, added up by name.

    Args:
        jaxpr: of one step, open or closed.
        axis_sizes: devices along each mesh axis.

    Raises:
        NotImplementedError: a primitive names a mesh axis and is not known here.
    """
    outside = Crossing("", "", "permute", (), 1, 0.0)
    return add_up(_walk(live_jaxpr(jaxpr), axis_sizes, outside, ""))


def add_up(crossings: Iterable[Crossing]) -> list[Crossing]:
    """Joins what differs in times and bytes only; those that move nothing are left out."""
    total: dict[tuple, Crossing] = {}
    for c in crossings:
        if not c.sent:
            continue
        old = total.get(c.key)
        total[c.key] = (
            c if old is None else replace(c, times=old.times + c.times, sent=old.sent + c.sent)
        )
    return list(total.values())


def _walk(jaxpr: Any, sizes: Mapping[str, int], around: Crossing, stack: str) -> Iterator[Crossing]:
    # `around` tells what is known from the equations that hold this jaxpr: name, times, extra.
    for eqn in jaxpr.eqns:
        primitive, inside = eqn.primitive.name, f"{stack}/{eqn.source_info.name_stack}"
        axes, name = _mesh_axes(eqn, sizes), around.name or where(eqn)
        if primitive in KINDS:
            kind, (devices, part) = KINDS[primitive], _group(eqn, axes, sizes)
            operand = sum(v.aval.size * v.aval.dtype.itemsize for v in eqn.invars)
            sent = around.times * sent_bytes(kind, devices, operand)
            yield replace(
                around,
                name=name,
                phase=_phase(inside),
                kind=kind,
                axes=axes,
                sent=sent,
                part=part,
            )
            continue
        if axes and primitive not in LOCAL:
            raise NotImplementedError(f"{primitive} over {axes}: its bytes are not known")
        inner = list(inner_jaxprs(eqn))
        loop = primitive == "while"
        within = replace(
            around,
            # The rules of a custom VJP are traced once and then shared between their callers; what
            # a loop's body stems from is forgotten where the loop is in one.
            name=name if loop or primitive == "custom_vjp_call" else around.name,
            times=around.times * (eqn.params["length"] if primitive == "scan" else 1),
            extra=around.extra or loop,
        )
        # Dead code inside a `while` is not removed with what surrounds it.
        found = [list(_walk(live_jaxpr(j) if loop else j, sizes, within, inside)) for j in inner]
        if primitive == "cond":
            found = [max(found, key=lambda branch: sum(c.sent for c in branch))]
        for crossings in found:
            yield from crossings


def inner_jaxprs(eqn: Any) -> Iterator[Any]:
    """The jaxprs an equation holds: loop bodies, branches, what it calls."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _mesh_axes(eqn: Any, sizes: Mapping[str, int]) -> tuple[str, ...]:
    names = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    names = names if isinstance(names, (tuple, list)) else (names,)
    return tuple(n for n in names if isinstance(n, str) and sizes.get(n, 1) > 1)


def _group(eqn: Any, axes: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[int, Part]:
    """Devices that take part in a collective together, and where they are."""
    groups = eqn.params.get("axis_index_groups")
    if groups is None:
        return math.prod(sizes[a] for a in axes), ""
    first = groups[0]
    near = max(first) - min(first) + 1 == len(first)
    return len(first), "inside hosts" if near else "between hosts"


def _phase(stack: str) -> Phase:
    if "rematted_computation" in stack:
        return "recomputed"
    if "transpose(" in stack:
        return "backward"
    return "forward" if "jvp(" in stack else ""
