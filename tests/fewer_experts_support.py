"""Tiny models whose experts are fewer than a router's outputs, unequal by layer, or share."""

import dataclasses

import numpy as np
from inference_support import CONFIG, random_weights

from moejax.config import SharingConfig
from moejax.data.tokenizer import Tokenizer
from moejax.inference.model_folder import save_model_folder

OUTPUTS = 12


def model_of(kind, *, base=CONFIG, **fields):
    """The model of a kind: words of `merged`, `unequal`, and a sharing's, joined by +."""
    words = kind.split("+")
    router = dataclasses.replace(base.moe.router, num_experts=9, top_k=3)
    if "merged" in words:
        router = dataclasses.replace(router, merged_from=OUTPUTS)
    experts = base.moe.experts
    for sharing in {"up", "in", "basis"} & set(words):
        shared = SharingConfig(sharing, 4 if sharing == "basis" else None)
        experts = dataclasses.replace(experts, sharing=shared)
    if "unequal" in words:
        # On two devices the first divides evenly and the second does not.
        numbers = [9] * fields.get("num_layers", base.num_layers)
        numbers[:-1] = [6] * (len(numbers) - 1)
        fields["num_experts_by_layer"] = tuple(numbers)
    moe = dataclasses.replace(base.moe, router=router, experts=experts)
    return dataclasses.replace(base, moe=moe, **fields)


def draw(rng, config):
    """Weights by name, with tables in which every expert is some output's.

    Two outputs of one expert are alike, so that many tokens choose both.
    """
    flat = random_weights(config, rng)
    for name in flat:
        if name.endswith("selection_bias_E"):  # a larger one alone would choose
            flat[name] *= 0.05
    for index, layer in enumerate(config.layers()):
        name = f"bias/layers.{index}.moe.router.table_R"
        if name in flat:
            count, outputs = layer.moe.router.num_experts, layer.moe.router.num_outputs
            more = rng.integers(0, count, outputs - count)
            table = rng.permutation([*range(count), *more]).astype(np.int32)
            first, second = np.flatnonzero(table == more[0])[:2]
            flat[name] = table
            router = name.removeprefix("bias/").removesuffix("table_R")
            flat[f"params/{router}w_DE"][:, second] = flat[f"params/{router}w_DE"][:, first]
    return flat


def save(folder, rng, config):
    """A model folder in float32; its weights."""
    flat = draw(rng, config)
    save_model_folder(folder, flat, config, Tokenizer(), record={}, dtype=np.float32)
    return flat
