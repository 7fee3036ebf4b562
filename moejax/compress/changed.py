"""Which models can be compressed, and what model each becomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moejax.compress.config import CompressConfig, GroupConfig
from moejax.config import LayerConfig, ModelConfig, MoEConfig
from moejax.errors import UserError
from moejax.locality_config import LocalityConfig
from moejax.sharing_config import SharingConfig

__all__ = ["changed_layer", "check", "notes", "smaller_model", "wanted_experts"]


def check(model: ModelConfig, config: CompressConfig) -> None:
    """Refuses what cannot be done, before anything is read.

    Raises:
        UserError: the model has no experts, too few, or is of a kind that cannot be pruned or
            grouped.
    """
    layers = [layer.moe for layer in model.layers() if layer.moe is not None]
    if not layers:
        raise UserError("the model has no layer with experts: there is nothing to compress")
    router, wanted = model.moe.router, wanted_experts(model, config)
    fewest = max(layer.router.top_k for layer in layers)
    if config.method == "group":
        _check_groups(layers, config.group)
        fewest //= config.group.size if config.group.lossy else 1
    if not fewest <= wanted <= router.num_experts:
        raise UserError(
            f"--experts {wanted}: a token chooses {fewest} of {router.num_experts}, so between "
            "these two may be left"
        )
    if model.moe.experts.sharing.active:
        raise UserError(
            f"the model's experts share parameters (sharing.kind={model.moe.experts.sharing.kind}):"
            " name the model that they were made from"
        )
    if config.method in ("prune", "group") and router.merged_from is not None:
        raise UserError(
            f"--method {config.method}: the model's experts are merged, and several outputs of a "
            f"router share one; {config.method} the model that it was made from, or merge further"
        )
    if (
        config.method == "merge"
        and router.merged_from is None
        and len(set(model.expert_numbers)) > 1
    ):
        raise UserError(
            f"--method merge: the layers have {_listed(model.expert_numbers)} experts, so their "
            "routers have outputs of unequal number; name the model that it was made from"
        )
    if model.moe.experts.together > 1:
        raise UserError(
            f"the model's experts are computed together (together={model.moe.experts.together}): "
            "name the model that they were made from"
        )
    wire = model.moe.exchange.wire
    if wire.dispatch_dim is not None or wire.combine_dim is not None:
        raise UserError(
            "the model's rows travel in fewer columns (dispatch_dim, combine_dim), as part of "
            "what its experts compute: name a model without"
        )
    if config.method == "prune" and router.num_groups > 1:
        raise UserError(
            f"--method prune: experts are chosen in {router.num_groups} groups of equal size, "
            "which would not stay equal; use --method merge"
        )
    if config.method == "group" and router.num_groups > 1:
        raise UserError(
            f"--method group: the router chooses among {router.num_groups} groups of its own first "
            "(num_groups), which experts laid side by side would cross; name a model without"
        )
    for layer in model.layers():
        if layer.moe is not None:
            group = config.group if config.method == "group" else None
            count = layer.moe.router.num_experts // _divisor(group)
            changed_layer(layer, count, None, config.sharing, group)


def _check_groups(layers: Sequence[MoEConfig], group: GroupConfig) -> None:
    """Refuses groups that cannot all be of one size, or that tokens cannot choose whole."""
    size = group.size
    for moe in layers:
        for of, count in ("layer", moe.router.num_experts), ("token", moe.router.top_k):
            if count % size and (group.lossy or of == "layer"):
                remedy = f"choose a divisor of {count}" if count > 1 else "use --method merge"
                raise UserError(
                    f"--group.size {size}: {count} experts of a {of} do not form groups of {size}; "
                    f"{remedy}"
                )


def notes(model: ModelConfig, config: CompressConfig) -> list[str]:
    """What a compressed model does not do any more, for people."""
    moe, found = model.moe, []
    if config.method != "merge":
        return []
    if moe.router.bias_update_rate:
        found.append(
            "note: selection biases are not moved by training any more: bias_update_rate=0"
        )
    if moe.locality.active:
        found.append(
            "note: routing looks at distances no more: merged experts have several outputs"
        )
    return found


def wanted_experts(model: ModelConfig, config: CompressConfig) -> int:
    """Experts of a layer afterwards."""
    if config.method == "group" and config.group.lossy:
        return model.moe.router.num_experts // config.group.size
    if config.merge.threshold is not None or config.method in ("share", "group"):
        return model.moe.router.num_experts
    return config.experts or model.moe.router.num_experts * 3 // 4


def changed_layer(
    layer: LayerConfig,
    count: int,
    outputs: int | None,
    sharing: SharingConfig,
    group: GroupConfig | None = None,
) -> LayerConfig:
    """A layer after it has been compressed.

    Args:
        layer: it before.
        count: experts.
        outputs: of the router, where experts were merged; None: it is as it was.
        sharing: what experts share.
        group: how experts were laid side by side; None: each is by itself.
    """
    assert layer.moe is not None
    router, experts = layer.moe.router, layer.moe.experts
    locality = layer.moe.locality
    if outputs is not None:
        # Loads and distances are of experts, which outputs have no longer for themselves.
        router = dataclasses.replace(router, merged_from=outputs, bias_update_rate=0.0)
        locality = LocalityConfig()
    router = dataclasses.replace(router, num_experts=count, top_k=router.top_k // _divisor(group))
    experts = dataclasses.replace(
        experts,
        sharing=sharing,
        hidden=experts.hidden * _divisor(group),
        together=group.size if group and not group.lossy else 1,
    )
    moe = dataclasses.replace(layer.moe, router=router, experts=experts, locality=locality)
    return dataclasses.replace(layer, moe=moe)


def smaller_model(
    model: ModelConfig,
    numbers: Sequence[int],
    outputs: int | None,
    sharing: SharingConfig,
    group: GroupConfig | None = None,
) -> ModelConfig:
    """The model with so many experts in each layer; arguments as of `changed_layer`."""
    different = len({number for number in numbers if number}) > 1
    layer = next(layer for layer in model.layers() if layer.moe is not None)
    moe = changed_layer(layer, max(numbers), outputs, sharing, group).moe
    assert moe is not None
    top_k = max(model.top_k_by_layer[model.first_dense_layers :], default=model.moe.router.top_k)
    router = dataclasses.replace(moe.router, top_k=top_k // _divisor(group))
    return dataclasses.replace(
        model,
        moe=dataclasses.replace(moe, router=router),
        top_k_by_layer=tuple(k // _divisor(group) for k in model.top_k_by_layer),
        num_experts_by_layer=tuple(numbers) if different else (),
    )


def _divisor(group: GroupConfig | None) -> int:
    """Experts that a token chooses by one choice."""
    return group.size if group is not None and group.lossy else 1


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
