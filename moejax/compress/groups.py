"""A layer's experts laid side by side in groups that tokens choose whole, and fitted.

Shape letters as in `moejax.compress.experts`; G groups of M members each.
"""

from __future__ import annotations

import numpy as np

from moejax.compress.config import GroupConfig
from moejax.compress.experts import Sample
from moejax.compress.group_router import group_router, rerouted
from moejax.compress.joint_fit import fit_sum
from moejax.compress.layers import Weights, bank_of, experts_of, replaced, router_of
from moejax.compress.outputs import weighted_outputs
from moejax.compress.similarity import output_agreement
from moejax.compress.wide import chosen_together, equal_groups, share_of_scores, side_by_side
from moejax.config import LayerConfig

__all__ = ["grouped"]


def grouped(
    weights: Weights, before: LayerConfig, after: LayerConfig, sample: Sample, config: GroupConfig
) -> dict[str, np.ndarray]:
    """A layer's weights with a wide expert for each group of experts.

    Where tokens choose groups, one that chose K of E experts chooses K/M of E/M groups, and all
    members of a group count by one score: as many parameters as before, and as many that a token
    uses, in fewer and larger products. What is lost is the choice of each expert by itself. Where
    they choose experts as before, these and the router's columns only have another order.

    Args:
        weights: of the layer.
        before: it as it was.
        after: it as it becomes.
        sample: tokens of the calibration text.
        config: how.
    """
    assert before.moe is not None and after.moe is not None
    experts, router = experts_of(weights, before), router_of(weights)
    if config.by == "chosen":
        affinity_EE = chosen_together(sample, experts.num_experts)
    else:
        affinity_EE = output_agreement(experts, sample)
    groups_GM = equal_groups(affinity_EE, config.size)
    if not config.lossy:
        ones_E = np.ones(experts.num_experts)
        wide = side_by_side(experts, groups_GM, ones_E)
        return replaced(weights, bank_of(wide), router.take(groups_GM.ravel()))
    router = group_router(router, groups_GM, sample, before.moe.router, config.router)
    weights_TE = sample.weights(experts.num_experts)
    now = rerouted(router, sample.x_TD, after.moe.router).weights(len(groups_GM))
    wide = side_by_side(experts, groups_GM, share_of_scores(weights_TE, now, groups_GM))
    if config.fit:
        target_TD = weighted_outputs(experts, sample.x_TD, weights_TE)
        wide = fit_sum(
            *(wide, sample.x_TD, now.astype(np.float64), target_TD),
            sweeps=config.sweeps,
            ridge=config.ridge,
        )
    return replaced(weights, bank_of(wide), router)
