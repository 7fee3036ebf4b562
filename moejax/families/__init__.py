"""Models of Hugging Face transformers: their config.json and the names of their tensors.

A family's module (`mixtral.py`, `qwen_moe.py`, `olmoe.py`, `deepseek.py`, `gpt_oss.py`) has
`read_config`, `write_config` and `rules`. `table.py` says what a rule means, in both directions;
`fields.py` reads a config.json field by field, `rope.py` and `common.py` parts of it. `tensors.py`
opens the tensors of a folder, `quantized.py` those in few bits; `folder.py` reads a whole folder,
`export.py` writes one, `expanded.py` what it writes of experts that are fewer than a family's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from moejax.errors import UserError

if TYPE_CHECKING:
    from moejax.config import ModelConfig
    from moejax.families.table import Binding

__all__ = ["MODEL_TYPES", "bindings", "read_config", "write_config"]

_MODULES = {
    "mixtral": "mixtral",
    "qwen2_moe": "qwen_moe",
    "qwen3_moe": "qwen_moe",
    "olmoe": "olmoe",
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
    "gpt_oss": "gpt_oss",
}
MODEL_TYPES = tuple(_MODULES)
"""The values of `model_type` that are known."""

# What a forward pass computes does not depend on these; the loss, or the speed, may.
_OF_TRAINING = {
    "scan_layers",
    "remat",
    "compute_dtype",
    "moe.router.load_balance_coef",
    "moe.router.z_loss_coef",
    "moe.router.bias_update_rate",
}
_OF_EXCHANGE = ("capacity_factor", "wire.dispatch_dim", "wire.combine_dim")


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json.

    Fields that are missing have the values that transformers 5 gives them. The model is made for
    inference: layers are not scanned, nothing is recomputed. float16 becomes bfloat16.

    Args:
        hf: the parsed config.json, in the spelling of transformers 4 or 5.

    Raises:
        UserError: the model type is unknown, or fields have values that this program does not
            know; all are told.
    """
    return _module(hf.get("model_type")).read_config(hf)


def write_config(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        config: the model.
        model_type: the family, such as `qwen3_moe`.

    Raises:
        UserError: models of that family cannot be like this one; all fields that differ are told.
    """
    from moejax.families.fields import UnknownModelError

    hf = _module(model_type).write_config(config, model_type)
    try:
        again = read_config(hf)
    except UnknownModelError as error:
        differ = error.problems
    else:
        said, wanted = dict(_leaves(_normal(again))), dict(_leaves(_normal(config)))
        differ = [
            f"{name}={wanted.get(name)!r} (there {said.get(name)!r})"
            for name in sorted(said.keys() | wanted.keys())
            if said.get(name) != wanted.get(name)
        ]
    if differ:
        raise UserError(
            f"a {model_type} model cannot be like this one: {'; '.join(differ)}: choose another "
            f"family of {', '.join(MODEL_TYPES)}, or a model that one of them can say"
        )
    return hf


def bindings(config: ModelConfig, model_type: str) -> dict[str, Binding]:
    """Where each of our tensors lies in a checkpoint, by our names.

    Args:
        config: the model.
        model_type: its family.
    """
    from moejax.families.table import bind

    return bind(_module(model_type).rules(config), {"V": config.vocab_size})


def _module(model_type: Any) -> Any:
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"model_type={model_type!r}: this program knows {', '.join(MODEL_TYPES)}; take a "
            "model of one of these families"
        )
    return import_module(f"moejax.families.{_MODULES[model_type]}")


def _normal(config: ModelConfig) -> ModelConfig:
    """The config, with one spelling where several mean the same."""
    router, replace = config.moe.router, dataclasses.replace
    if router.score_function == "softmax" and router.renormalize:
        router = replace(router, score_function="topk_softmax")
    if router.score_function == "topk_softmax":
        router = replace(router, renormalize=True)
    if router.top_groups == router.num_groups:
        router = replace(router, num_groups=1, top_groups=1, group_score="max")
    same = all(k == router.top_k for k in config.top_k_by_layer)
    numbers = config.num_experts_by_layer[config.first_dense_layers :]
    equal = all(number == router.num_experts for number in numbers)
    windows = tuple(layer.attention.window or 0 for layer in config.layers())
    return replace(
        config,
        attention=replace(config.attention, window=None),
        moe=replace(config.moe, router=router),
        top_k_by_layer=() if same else config.top_k_by_layer,
        num_experts_by_layer=() if equal else config.num_experts_by_layer,
        window_by_layer=windows,
        dense_hidden=config.dense_hidden if config.first_dense_layers else 0,
    )


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields that a forward pass depends on, by their dotted names."""
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        of_exchange = name.startswith("moe.exchange.") and not name.endswith(_OF_EXCHANGE)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{name}.")
        elif name not in _OF_TRAINING and not of_exchange:
            yield name, value
