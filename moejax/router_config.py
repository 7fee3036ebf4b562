"""Configuration of the router: how tokens choose experts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from moejax.errors import UserError

__all__ = ["GroupScore", "RouterConfig", "ScoreFunction"]

ScoreFunction = Literal["softmax", "topk_softmax", "sigmoid"]
GroupScore = Literal["max", "top2_sum"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts.

    Attributes:
        num_experts: E, routed experts of a layer.
        top_k: K, experts of a token.
        score_function: `softmax`: probabilities over all experts, then the K best (Switch, Qwen3,
            OLMoE); `topk_softmax`: the K best logits, then a softmax over those (Mixtral,
            gpt-oss); `sigmoid`: independent scores (DeepSeek-V3).
        renormalize: divide the K scores of a token by their sum.
        scaling_factor: multiplies the scores after that.
        selection_bias: a per-expert bias added for choosing only (arXiv 2408.15664); its value is
            a `RouterBias` variable that the optimizer does not see.
        bias_update_rate: step of that bias a training step, towards equal loads; 0 freezes it.
        num_groups: experts lie in this many equal groups (DeepSeek-V2 §2.1.3).
        top_groups: groups that a token may use, its best ones.
        group_score: how a group is scored: by its best expert (V2) or its best two (V3).
        load_balance_coef: weight of E·Σ f_e·P_e over global statistics (arXiv 2101.03961 eq. 4).
        z_loss_coef: weight of mean(logsumexp(logits)²) (arXiv 2202.08906 eq. 5).
        forced_balance: ignore the scores when choosing and deal experts round robin; for
            benchmarks.
        bias: logits have a learned bias (gpt-oss).
        merged_from: outputs of the router, where experts have been merged: as many as there were
            before, each with the expert that it became in a table (`RouterTable`). A token whose
            chosen outputs became one expert has it once, with the sum of their scores. Losses,
            groups and selection biases are of outputs. None: an output for each expert.
    """

    num_experts: int = 8
    top_k: int = 2
    score_function: ScoreFunction = "softmax"
    renormalize: bool = True
    scaling_factor: float = 1.0
    selection_bias: bool = False
    bias_update_rate: float = 0.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"
    load_balance_coef: float = 0.01
    z_loss_coef: float = 0.0
    forced_balance: bool = False
    bias: bool = False
    merged_from: int | None = field(default=None, metadata={"may_lack": True})

    def __post_init__(self) -> None:
        _require(self.num_experts >= 1, f"num_experts={self.num_experts}: at least 1 is needed")
        _require(
            1 <= self.top_k <= self.num_experts,
            f"top_k={self.top_k}: must lie between 1 and num_experts={self.num_experts}",
        )
        _require(
            self.merged_from is None or self.merged_from >= self.num_experts,
            f"merged_from={self.merged_from}: merging leaves no more experts than there were; must "
            f"be at least num_experts={self.num_experts}, or None",
        )
        _require(
            self.merged_from is None or self.bias_update_rate == 0.0,
            f"bias_update_rate={self.bias_update_rate} with merged_from={self.merged_from}: loads "
            "are counted by experts, the biases are of outputs; set it to 0",
        )
        counted = "num_experts" if self.merged_from is None else "merged_from"
        _require(
            self.num_groups >= 1 and self.num_outputs % self.num_groups == 0,
            f"num_groups={self.num_groups}: must divide {counted}={self.num_outputs}",
        )
        _require(
            1 <= self.top_groups <= self.num_groups,
            f"top_groups={self.top_groups}: must lie between 1 and num_groups={self.num_groups}",
        )
        reachable = self.top_groups * (self.num_outputs // self.num_groups)
        _require(
            self.top_k <= reachable,
            f"top_k={self.top_k}: the {self.top_groups} chosen groups hold only {reachable} "
            "experts; raise top_groups or lower top_k",
        )
        _require(
            self.bias_update_rate == 0.0 or self.selection_bias,
            f"bias_update_rate={self.bias_update_rate}: needs selection_bias=True",
        )

    @property
    def num_outputs(self) -> int:
        """What the router scores: an output for each expert, or for each before merging."""
        return self.num_experts if self.merged_from is None else self.merged_from

    @property
    def of_outputs(self) -> RouterConfig:
        """The same choice with outputs for experts: what happens before the table is looked at."""
        return replace(self, num_experts=self.num_outputs, merged_from=None)
