"""The table of techniques: gain and cost of each as measured, for `docs/figures.py`.

A row of `TECHNIQUES` names a section of docs/techniques.md, the result files that it reads, and a
function of these that gives gain, cost and where both were measured. A file or a row that is not
there makes the row say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]
Told = tuple[str, str, str]
Table = tuple[Sequence[str], list[list[str]]]

NOT_MEASURED = "not measured"
CPU, H100 = "packaged model, CPU", "H100"


@dataclass(frozen=True)
class Technique:
    """A row of the table.

    name: heading of its section.
    kind: `exact`: results stay the same up to rounding; `lossy`; or `model`: part of what is
        trained.
    files: results that it reads, without `.json`.
    tell: gain, cost and place from the files' contents; None where nothing was measured.
    """

    name: str
    kind: str
    files: tuple[str, ...] = ()
    tell: Callable[..., Told] | None = None


def one(result: Result, **like: Any) -> dict[str, Any]:
    """The first row with these values.

    Raises:
        LookupError: there is none.
    """
    for row in result["rows"]:
        if all(row.get(name) == value for name, value in like.items()):
            return row
    raise LookupError(like)


def _layer_of_4(result: Result, mode: str, which: str, chunks: int = 1) -> float:
    like = {"impl": "moejax", "shape": "qwen3_30b_a3b", "routing": "balanced", "mode": mode}
    return one(result, **like, options="default", chunks=chunks, **{"pass": which})["ms"]


def _remote(layers: Result) -> Told:
    ways = [
        f"{word} {_layer_of_4(layers, 'ring', which):.2f} → "
        f"{_layer_of_4(layers, 'remote', which):.2f} ms"
        for word, which in (("forward", "fwd"), ("with backward", "fwdbwd"))
    ]
    return f"Qwen3-30B's layer, from `ring`: {', '.join(ways)}", "–", "4 H200"


def _chunks(layers: Result) -> Told:
    # `auto` takes a ring for this shape.
    ways = (("ring", 1), ("auto", 2))
    whole, cut = (_layer_of_4(layers, mode, "fwd", count) for mode, count in ways)
    told = f"none: Qwen3-30B's layer as a ring, 2 chunks: {whole:.2f} → {cut:.2f} ms"
    return told, f"{cut / whole - 1:+.0%} time", "4 H200"


def _wire(wires: Result) -> Told:
    forms = {"`int8`": ("int8", False), "`int4`, rotated": ("int4", True)}
    rows = {n: one(wires, wire=w, rotate=r, windows=64) for n, (w, r) in forms.items()}
    fewer = ", ".join(f"{name} {row['fewer_bytes']:.2f} ×" for name, row in rows.items())
    cost = ", ".join(f"{name} {row['change']:+.2%}" for name, row in rows.items())
    return f"fewer bytes: {fewer}; time {NOT_MEASURED}", f"bits/byte: {cost}", CPU


def _columns(wires: Result) -> Told:
    found = [one(wires, wire="compute", columns=list(c)) for c in ((256, 192), (128, 128))]
    names = ("¾ home", "½ both ways")
    fewer = ", ".join(f"{n} {row['fewer_bytes']:.2f} ×" for n, row in zip(names, found))
    cost = ", ".join(f"{n} {row['change']:+.1%}" for n, row in zip(names, found))
    return f"fewer bytes: {fewer}; time {NOT_MEASURED}", f"bits/byte, untrained: {cost}", CPU


def _sends(locality: Result, placement: str, **like: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {"penalty": 0.0, "max_devices": None, "local_threshold": None}
    wanted = plain | {"weights": "plain", "training": "none", "placement": placement} | like
    return one(locality, **wanted)


def _placed(placement: str) -> Callable[[Result, Result], Told]:
    def tell(locality: Result, layers: Result) -> Told:
        fewer = _sends(locality, placement)["remote_sends_ratio"] - 1
        like = {"trace": "routes", "shape": "olmoe", "what": "forward"}
        home = one(layers, **like, placement="home")["ms"]
        there = one(layers, **like, placement=placement, weights="slots")["ms"]
        told = f"{fewer:+.0%} rows to other devices (of 8); on 2 H200 a layer {home:.2f} → "
        more = " more memory for copies;" if placement == "copies" else ""
        cost = f"{more} in training experts are sent in every step".strip()
        return f"{told}{there:.2f} ms", cost, f"{CPU}; 2 H200"

    return tell


def _near(locality: Result) -> Told:
    rows = {
        "3 devices, penalty 0.3": _sends(locality, "copies", max_devices=3, penalty=0.3),
        "2 devices": _sends(locality, "copies", max_devices=2),
    }
    gain = ", ".join(f"{n} {row['remote_sends_ratio'] - 1:+.0%}" for n, row in rows.items())
    cost = ", ".join(f"{n} {row['loss_increase']:+.1%}" for n, row in rows.items())
    return f"rows to other devices: {gain}; time {NOT_MEASURED}", f"bits/byte: {cost}", CPU


def _gradients(quality: Result) -> Told:
    names = {"int8": "`int8`", "int4_rotated": "`int4`, rotated", "low_rank_at_once": "`low_rank`"}
    rows = {name: one(quality, method=method) for method, name in names.items()}
    gain = ", ".join(f"{name} {row['bytes_ratio']:.2f} ×" for name, row in rows.items())
    cost = ", ".join(
        f"{name} {row['final_loss_delta_pct']:+.1f} ± {row['standard_error']:.1f} %"
        for name, row in rows.items()
    )
    return f"fewer bytes: {gain}; time {NOT_MEASURED}", f"loss: {cost}", "simulated ranks, H100"


def _step(steps: Result, before: str, after: str) -> tuple[str, str]:
    first, then = (one(steps, case=case) for case in (before, after))
    gb = [row["memory_bytes"] / 1e9 for row in (first, then)]
    return (
        f"`small`: {gb[0]:.1f} → {gb[1]:.1f} GB",
        f"step {first['step_ms']:.0f} → {then['step_ms']:.0f} ms",
    )


def _recomputed(steps: Result) -> Told:
    return *_step(steps, "small", "small:remat=local"), H100


def _unrolled(steps: Result) -> Told:
    cases = "small:scan=1,stream=1", "small"
    memory, time = _step(steps, *cases)
    seconds = [one(steps, case=case)["compile_seconds"] for case in cases]
    return f"{memory}, {time}", "compiling {:.0f} → {:.0f} s".format(*seconds), H100


def _layer_of_1(layers: Result, impl: str, shape: str, which: str, key: str) -> float:
    like = {"impl": impl, "shape": shape, "routing": "uniform", "pass": which}
    return one(layers, **like)[key]


def _kernels(layers: Result) -> Told:
    rates = [
        "{:.0f} / {:.0f}".format(
            *(_layer_of_1(layers, impl, "qwen3_30b_a3b", p, "tflops") for p in ("fwd", "fwdbwd"))
        )
        for impl in ("torch_grouped_mm", "moejax")
    ]
    told = f"Qwen3-30B's layer, TFLOP/s forward / with backward: torch {rates[0]}, ours {rates[1]}"
    return told, "–", H100


def _largest_first(groups: Result) -> Told:
    row = one(groups, shape="small", kernel="w_out_gradient", skew=1.0)
    return f"`w_out_gradient` {row['ms_in_order']:.3f} → {row['ms']:.3f} ms", "–", H100


def _eight_bits(layers: Result, quality: Result) -> Told:
    before, after = (
        _layer_of_1(layers, impl, "qwen3_b16", "fwd", "ms") for impl in ("moejax", "moejax_int8")
    )
    row = one(quality, weights="int8")
    told = (
        f"{row['fewer_bytes']:.2f} × fewer bytes; decoding, a layer {before:.3f} → {after:.3f} ms"
    )
    return told, f"bits/byte {row['change']:+.3%}", f"H100; {CPU}"


def _float8_rows(layers: Result) -> Told:
    before, after = (
        _layer_of_1(layers, impl, "mixtral_8x7b", "fwd", "tflops")
        for impl in ("moejax", "moejax_fp8")
    )
    told = f"Mixtral's layer, forward: {before:.0f} → {after:.0f} TFLOP/s"
    return told, f"quality {NOT_MEASURED}", H100


def _fewer(method: str) -> Callable[[Result], Told]:
    def tell(cases: Result) -> Told:
        row = one(cases, method=method)
        cost = f"bits/byte {row['delta_pct']:+.1f} %, trained {row['finetuned_delta_pct']:+.1f} %"
        gain = f"{row['size_fraction']:.0%} of the parameters; time {NOT_MEASURED}"
        return gain, cost, "packaged model, H100"

    return tell


def _engine(inference: Result) -> Told:
    like = {"model": "qwen3_30b_a3b", "batch": 16, "phase": "decode"}
    theirs, ours = (
        one(inference, **like, impl=i)["ms_per_step"] for i in ("transformers", "moejax")
    )
    told = f"Qwen3-30B, 16 texts: a step {theirs:.1f} (transformers) → {ours:.1f} ms"
    return told, "–", H100


def _decode(exchange: Result) -> Told:
    before, after = (one(exchange, batch=256, mode=m)["ms_per_step"] for m in ("config", "ring"))
    return (
        f"256 texts: a step {before:.2f} → {after:.2f} ms",
        "measured at the start, at most about 10 s",
        "2 H200",
    )


def _norms(steps: Result, kernels: Result) -> Told:
    before, after = (one(steps, case=case)["step_ms"] for case in ("small:stream=0", "small"))
    told = [
        f"{program} {one(kernels, shape='small', program=program)['xla_over_ours']:.1f} ×"
        for program in ("norm", "heads")
    ]
    return f"`small`: step {before:.0f} → {after:.0f} ms; alone {', '.join(told)}", "–", H100


def _offload(traces: Result, speeds: Result) -> Told:
    like = {"cache_fraction": 0.25}
    plain = one(traces, **like, policy="lfu", predictor="none", prefetch_experts=0)["hit_rate"]
    best = one(traces, **like, policy="predicted", predictor="linear", prefetch_experts=8)
    told = f"a quarter in slots: {plain:.0%} of the uses there, {best['hit_rate']:.0%} with guesses"
    like |= {"policy": "lfu", "predictor": "none", "model": "mixtral_8x7b"}
    row = one(speeds, **like)
    cost = f"Mixtral: {row['resident_tokens_per_s']:.0f} → {row['tokens_per_s']:.1f} tokens/s"
    return told, cost, f"{CPU}; H200"


LAYERS, STEPS = ("ep_layer_h200x4",), ("train_step_h100",)
PLACED = ("locality", "placement_layers_h200x2")
TECHNIQUES = (
    Technique("Rows written by kernels", "exact", LAYERS, _remote),
    Technique("Chunks", "exact", LAYERS, _chunks),
    Technique("Once a host", "exact"),
    Technique("Rounding on the wire", "lossy", ("wire_quality",), _wire),
    Technique("Fewer columns on the wire", "lossy", ("wire_quality",), _columns),
    Technique("Planned placement", "exact", PLACED, _placed("planned")),
    Technique("Copies of experts", "exact", PLACED, _placed("copies")),
    Technique("Routing by distance", "lossy", ("locality",), _near),
    Technique("Capacity", "lossy"),
    Technique("Stored pieces", "exact"),
    Technique("Compressed gradients", "lossy", ("compression_quality",), _gradients),
    Technique("Weights gathered in 8 bits", "lossy"),
    Technique("Recomputing layers", "exact", STEPS, _recomputed),
    Technique("Layers one by one", "exact", STEPS, _unrolled),
    Technique("Even loads", "model"),
    Technique("Steps that are skipped", "exact"),
    Technique("Expert kernels", "exact", ("expert_layer_h100",), _kernels),
    Technique("Norms and heads in one pass", "exact", (*STEPS, "stream_kernels"), _norms),
    Technique("The largest group first", "exact", ("unequal_groups",), _largest_first),
    Technique("Tuned tiles", "exact"),
    Technique(
        "Experts of 8 bits", "lossy", ("expert_layer_h100", "expert_weights_quality"), _eight_bits
    ),
    Technique("Rows of 8 bits", "lossy", ("expert_layer_h100",), _float8_rows),
    Technique("Merged experts", "lossy", ("compress_1000_steps",), _fewer("merge:48")),
    Technique("Pruned experts", "lossy", ("compress_1000_steps",), _fewer("prune:48")),
    Technique("Experts that share", "model"),
    Technique("Experts side by side", "lossy"),
    Technique("One engine for all texts", "exact", ("inference_h100",), _engine),
    Technique("Measured exchange of single tokens", "exact", ("decode_exchange",), _decode),
    Technique("Experts in host memory", "exact", ("offload_traces", "offload_h200"), _offload),
    Technique("Copies of 8 bits for what is missing", "lossy"),
)


def techniques(load: Callable[[str], Result | None]) -> Table:
    """What each technique gains and costs.

    Args:
        load: a result by its name; None where it is not there.
    """
    body = []
    for technique in TECHNIQUES:
        told = (NOT_MEASURED, NOT_MEASURED, "")
        results = [load(name) for name in technique.files]
        if technique.tell is not None and None not in results:
            try:
                told = technique.tell(*results)
            except LookupError:
                told = (f"{NOT_MEASURED}: a row lacks in {', '.join(technique.files)}", "", "")
        anchor = technique.name.lower().replace(" ", "-")
        body.append([f"[{technique.name}](#{anchor})", technique.kind, *told])
    return ["technique", "", "gain", "cost", "measured on"], body
