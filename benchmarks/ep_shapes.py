"""What `ep_layer.py` measures: shapes, variants, inputs, and the prediction of each; numpy alone.

Shape letters as in `layer_shapes`; T is tokens of one device, G devices.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from common import RESULTS
from layer_shapes import SHAPES as ONE_DEVICE
from layer_shapes import Shape, zipf_bias

PEER = "xla_all_to_all"
IMPLS = ("moejax", PEER)
SHAPES = {
    "qwen3_30b_a3b": replace(ONE_DEVICE["qwen3_30b_a3b"], tokens=8192),
    "mixtral_8x7b": replace(ONE_DEVICE["mixtral_8x7b"], tokens=8192),
    "dsv3": Shape(4096, 7168, 2048, 256, 8),
}
ROUTINGS = ("balanced", "zipf")
PASSES = ("fwd", "fwdbwd")
MODES = ("auto", "all_to_all", "ring", "remote")
WIRES = ("exact", "int8", "float8")
LIKE = {"dsv3": "sonic_fine"}
"""Shapes that were not measured on one device, and the closest that was."""
PEAK_TFLOPS, LINK_GBS = 600.0, 300.0  # where nothing was measured


@dataclass(frozen=True)
class Variant:
    """One way to compute a layer.

    impl: `moejax` or the peer; the latter has mode `all_to_all`, one chunk, an exact wire.
    which: `fwd` or `fwdbwd`.
    options: name of a set of compiler options (`ep_options.OPTIONS`).
    slack: of the buckets (`ExchangeConfig.bucket_slack`); with `inf` no routing needs a further
        wave, and the program has no loop.
    reserve_sms: multiprocessors that the expert kernels leave to transfers.
    """

    impl: str
    shape: str
    which: str
    mode: str
    chunks: int
    wire: str
    options: str
    slack: float
    reserve_sms: int

    @property
    def backward(self) -> bool:
        """Whether gradients are computed."""
        return self.which == "fwdbwd"

    @property
    def key(self) -> dict[str, Any]:
        """What identifies its rows, beside the routing."""
        return {
            "impl": self.impl,
            "shape": self.shape,
            "wire": self.wire,
            "pass": self.which,
            "mode": self.mode,
            "chunks": self.chunks,
            "options": self.options,
            "slack": self.slack if math.isfinite(self.slack) else "inf",
            "reserve_sms": self.reserve_sms,
        }


def variants(args: argparse.Namespace, shape: str, which: str) -> Iterator[Variant]:
    """All that the flags ask for; of the peer one for each set of options."""
    for options in args.options:
        if PEER in args.impls:
            yield Variant(PEER, shape, which, "all_to_all", 1, "exact", options, 1.0, 0)
    if "moejax" in args.impls:
        lists = args.modes, args.chunks, args.wires, args.options, args.slacks, args.reserve_sms
        for how in itertools.product(*lists):
            yield Variant("moejax", shape, which, *how)


def find_shape(name: str, tiny: bool) -> Shape:
    """The shape, or a toy of the same kind to rehearse with."""
    shape = SHAPES[name]
    if not tiny:
        return shape
    experts, top_k = min(shape.experts, 16), min(shape.top_k, 4)
    return Shape(32, 128, 64, experts, top_k)


@dataclass(frozen=True)
class Inputs:
    """Of all devices together, the first device's tokens first.

    x_TD, ct_TD: float32 [G·T, D], standard normal, to be rounded to bf16.
    router_DE: float32, normal / √D, so that logits are standard normal.
    bias_E: float32, added to the logits: zero for uniformly random routing, `zipf_bias` for Zipf.
    ids_TK, scores_TK: the peer's: every expert gets as many tokens from every device.
    """

    x_TD: np.ndarray
    ct_TD: np.ndarray
    router_DE: np.ndarray
    bias_E: dict[str, np.ndarray]
    ids_TK: np.ndarray
    scores_TK: np.ndarray


def make_inputs(shape: Shape, devices: int, seed: int = 0) -> Inputs:
    """The same numbers every time."""
    rng = np.random.default_rng(seed)
    tokens, experts, top_k = shape.tokens * devices, shape.experts, shape.top_k
    if shape.tokens * top_k % experts:
        raise ValueError(f"{shape.tokens} × {top_k} assignments over {experts} experts: not even")

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size, np.float32)

    # Round robin over the experts, tokens in random order: distinct within a token, even in all.
    turn_T = np.concatenate([rng.permutation(shape.tokens) for _ in range(devices)])
    ids_TK = (turn_T[:, None] * top_k + np.arange(top_k)) % experts
    scores_TK = rng.random((tokens, top_k), np.float32) + np.float32(0.1)
    return Inputs(
        normal(tokens, shape.d_model),
        normal(tokens, shape.d_model),
        normal(shape.d_model, experts) / np.float32(np.sqrt(shape.d_model)),
        {"balanced": np.zeros(experts, np.float32), "zipf": zipf_bias(experts, top_k)},
        ids_TK.astype(np.int32),
        scores_TK / scores_TK.sum(axis=1, keepdims=True),
    )


def one_device_tflops(shape: str, which: str) -> float:
    """What the layer reaches alone (`expert_layer.py`, uniform routing)."""
    path = RESULTS / "expert_layer_h100.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    wanted = ("moejax", LIKE.get(shape, shape), which, "uniform")
    for row in rows:
        if tuple(row[k] for k in ("impl", "shape", "pass", "routing")) == wanted:
            return row.get("tflops", PEAK_TFLOPS)
    return PEAK_TFLOPS


def link_gbs() -> float:
    """The best all_to_all of `links.py`, GB/s sent by a device."""
    path = RESULTS / "links_h200x4.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    found = [row["gbs"] for row in rows if row["collective"] == "all_to_all" and row.get("gbs")]
    return max(found, default=LINK_GBS)


def predicted_ms(
    flops: float, sent: float, chunks: int, load: float, tflops: float, gbs: float
) -> float:
    """A floor: of two parts that run in `chunks` steps, the longer, and one step of the shorter.

    Args:
        flops: of a device's share.
        sent: bytes a device sends.
        chunks: 1 is one after the other.
        load: assignments of the busiest device over the mean.
        tflops: what one device computes alone.
        gbs: what a link carries.
    """
    compute, travel = flops * load / tflops / 1e9, sent / gbs / 1e6
    return max(compute, travel) + min(compute, travel) / chunks
