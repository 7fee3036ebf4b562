"""The same model with an expert of its own for each output of the router: what families can say.

Experts that were merged (`RouterConfig.merged_from`) are written once for each output that became
them: the router stays, the sums of scores are the same, and layers that kept unequal numbers have
equal ones again. Experts that share parameters (`ExpertsConfig.sharing`) are written whole. Both
are exact; what merging and sharing saved is not saved there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.sharing_config import SharingConfig

__all__ = ["expanded_config", "expanded_weights", "expansion_note"]


def expanded_config(config: ModelConfig) -> ModelConfig:
    """The model that is written; where there is nothing to expand, what was given.

    Args:
        config: the model.

    Raises:
        UserError: its layers have unequal numbers of experts that were not merged, or experts are
            computed together.
    """
    router, experts = config.moe.router, config.moe.experts
    if experts.together > 1:
        raise UserError(
            f"together={experts.together}: models of transformers have single experts; write the "
            "model that was laid side by side (python -m moejax.compress)"
        )
    if router.merged_from is None and len(set(config.expert_numbers)) > 1:
        raise UserError(
            f"num_experts_by_layer={config.num_experts_by_layer}: models of transformers have the "
            "same number of experts in every layer, and tokens would choose those that a layer "
            "were filled up with; prune without --by-layer (python -m moejax.compress MODEL OUT "
            "--method prune), or merge, which keeps every output of the router"
        )
    if router.merged_from is None and not experts.sharing.active:
        return config
    moe = dataclasses.replace(
        config.moe,
        router=router.of_outputs,
        experts=dataclasses.replace(experts, sharing=SharingConfig()),
    )
    return dataclasses.replace(config, moe=moe, num_experts_by_layer=())


def expanded_weights(weights: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The weights of `expanded_config`, each made when numpy asks for its numbers.

    Args:
        weights: of `config`, `params/…` and `bias/…` in logical order; anything with `shape` and
            `dtype` that numpy reads.
        config: the model.

    Returns:
        By name: what stays as it was given, and experts' matrices. Making one of these holds it and
        what it is made of, nothing else.
    """
    expanded = dict(weights)
    if expanded_config(config) is config:
        return expanded
    experts = config.moe.experts
    of_one = {
        "w_in": (config.d_model, experts.num_in, experts.hidden),
        "w_out": (experts.hidden, config.d_model),
    }
    if experts.bias:
        of_one |= {"b_in": (experts.num_in, experts.hidden), "b_out": (config.d_model,)}
    for index, layer in enumerate(config.layers()):
        if layer.moe is None:
            continue
        bank = f"params/layers.{index}.moe.bank."
        parts = {n.removeprefix(bank): expanded.pop(n) for n in weights if n.startswith(bank)}
        table = expanded.pop(f"bias/layers.{index}.moe.router.table_R", None)
        count = layer.moe.router.num_outputs
        for name, shape in of_one.items():
            make = partial(_made, name, parts, table, count)
            expanded[bank + name] = _Experts(make, (count, *shape))
    return expanded


def expansion_note(config: ModelConfig) -> str:
    """What becomes of a model's experts, for whoever has it written; empty: nothing does."""
    if expanded_config(config) is config or not config.expert_numbers:
        return ""
    router, sharing = config.moe.router, config.moe.experts.sharing
    few, many = config.fewest_experts, max(config.expert_numbers)
    told = f"{few} to {many} experts of a layer" if few != many else f"{many} experts of a layer"
    if sharing.active:
        told += f", which share parameters (sharing kind={sharing.kind!r}),"
    if router.merged_from is None:
        return f"{told} are written as independent ones: the folder is as large as without sharing"
    return (
        f"{told} are written as {router.merged_from}, a copy for each of the router's outputs: the "
        "folder is as large as before merging"
    )


class _Experts:
    """Matrices, or biases, of all experts of a layer, made when numpy asks for their numbers.

    Args:
        make: makes them, float32.
        shape: of what it makes.
    """

    def __init__(self, make: Callable[[], np.ndarray], shape: tuple[int, ...]):
        self._make, self.shape, self.dtype = make, shape, np.dtype(np.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self._make()
        return array if dtype is None else array.astype(dtype)


def _made(name: str, parts: Mapping[str, Any], table: Any, count: int) -> np.ndarray:
    """One array of all experts of a layer, float32; see `moejax.shared_bank.expanded`.

    Args:
        name: w_in, w_out, b_in or b_out.
        parts: of the layer's bank, by their names in it.
        table: int32 [R], the expert of each output; None: they are in order.
        count: R, or E.
    """
    order_R: Any = slice(None) if table is None else np.asarray(table)
    side = name.removeprefix("w_")
    if f"c_{side}" in parts:
        return np.tensordot(_read(parts[f"c_{side}"])[order_R], _read(parts[f"w_basis_{side}"]), 1)
    if name != "w_in" or "w_shared" not in parts:
        return _read(parts[name])[order_R]
    shared_DnH = _read(parts["w_shared"])
    shared_RDnH = np.broadcast_to(shared_DnH, (count, *shared_DnH.shape))
    if "w_in" not in parts:
        return shared_RDnH
    return np.concatenate([_read(parts["w_in"])[order_R], shared_RDnH], axis=2)  # the gate is first


def _read(weight: Any) -> np.ndarray:
    return np.asarray(weight).astype(np.float32, copy=False)
