"""What `python -m moejax.compress` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from moejax.errors import UserError
from moejax.sharing_config import SharingConfig
from moejax.training.config import DataConfig

__all__ = ["CompressConfig", "GroupConfig", "MergeConfig", "PruneConfig"]


@dataclass(frozen=True)
class MergeConfig:
    """How experts are merged, see `moejax.compress.merge`.

    Attributes:
        similarity: what makes experts one: `agreement`, how little their outputs for the
            calibration text differ, weighted by how often they are chosen; `outputs`, the cosine of
            these; `parameters`, that of their parameters with hidden units put in the same order.
        threshold: merge as long as groups are at least this similar in the mean over their members,
            1 for twins, instead of to a number of experts; layers then keep different numbers, at
            least as many as a token chooses.
        weights: members count by how often they are chosen, or by the scores they are given.
        fit: how output projections are fitted after averaging: `each` merged expert to what its
            members returned; then all of a layer `together` to what the layer returned; or `none`.
        sweeps: of the fit together, over all experts.
        ridge: how strongly fits are held to what was there before, greater than 0; 30 to 100 for
            fewer than some 50 000 tokens.
    """

    similarity: Literal["agreement", "outputs", "parameters"] = "agreement"
    threshold: float | None = None
    weights: Literal["frequency", "score"] = "frequency"
    fit: Literal["none", "each", "together"] = "together"
    sweeps: int = 3
    ridge: float = 10.0


@dataclass(frozen=True)
class PruneConfig:
    """How the experts to keep are chosen, see `moejax.compress.prune`.

    Attributes:
        saliency: `reap`: score times norm of the output; `frequency`; `score`.
    """

    saliency: Literal["reap", "frequency", "score"] = "reap"


@dataclass(frozen=True)
class GroupConfig:
    """How experts are laid side by side, see `moejax.compress.wide`.

    Attributes:
        routing: tokens choose `groups`: an ordinary model with fewer and wider experts, lossy; or
            `experts`, as they did: exact, groups are only computed together
            (`ExpertsConfig.together`), and what chooses and fits below is not looked at.
        size: experts of a group, a divisor of the experts of a layer; where tokens choose groups
            also of those of a token.
        by: what belongs together: `chosen`, experts that are often chosen for one token; `alike`,
            those whose outputs for the calibration text differ little.
        router: its columns for groups: a `fit` to the sums of the members' probabilities, or the
            `mean` of the members'.
        fit: whether output projections are fitted together to what the layer returned.
        sweeps: of the fit, over all groups.
        ridge: how strongly the fit is held to what was there before, greater than 0.
    """

    routing: Literal["groups", "experts"] = "groups"
    size: int = 2
    by: Literal["chosen", "alike"] = "chosen"
    router: Literal["mean", "fit"] = "fit"
    fit: bool = True
    sweeps: int = 3
    ridge: float = 10.0

    @property
    def lossy(self) -> bool:
        """Whether tokens choose groups."""
        return self.routing == "groups"


@dataclass(frozen=True)
class CompressConfig:
    """Makes a model with fewer or smaller experts.

    Attributes:
        model: run directory, model folder, or folder of transformers.
        out: the model folder to write; one that is there is replaced.
        method: `merge` makes one expert of several, `prune` leaves some out, `share` keeps all and
            makes them share parameters, `group` lays several side by side as one wide expert that
            is chosen whole.
        experts: of a layer afterwards; with `by_layer` in the mean. 0: three quarters.
        by_layer: layers keep different numbers of experts, more where they matter more.
        merge: how experts are merged.
        prune: how the experts to keep are chosen.
        sharing: what experts share, see `moejax.compress.sharing`.
        group: how experts are grouped.
        data: text to calibrate on, its held-out part to measure on.
        tokens: of the calibration text.
        measure_windows: of the held-out text, to measure the model on before and after; 0: not at
            all.
        seed: of the choice of calibration text.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    method: Literal["merge", "prune", "share", "group"] = "merge"
    experts: int = 0
    by_layer: bool = False
    merge: MergeConfig = field(default_factory=MergeConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    sharing: SharingConfig = field(default_factory=SharingConfig)
    group: GroupConfig = field(default_factory=GroupConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokens: int = 65536
    measure_windows: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.experts < 0 or self.tokens < 1 or self.measure_windows < 0:
            raise UserError(
                f"--experts {self.experts} --tokens {self.tokens} --measure-windows "
                f"{self.measure_windows}: experts and windows must be 0 or more, tokens 1 or more"
            )
        if self.merge.ridge <= 0 or self.merge.sweeps < 1:
            raise UserError(
                f"--merge.ridge {self.merge.ridge} --merge.sweeps {self.merge.sweeps}: must be "
                "greater than 0"
            )
        if self.merge.threshold is not None and (
            self.method != "merge" or self.experts or self.by_layer
        ):
            raise UserError(
                f"--merge.threshold {self.merge.threshold}: takes the place of --experts and "
                "--by-layer, and is of --method merge; leave the others out"
            )
        for method, said, plain in (
            ("merge", self.merge, MergeConfig()),
            ("prune", self.prune, PruneConfig()),
            ("group", self.group, GroupConfig()),
        ):
            if method != self.method and said != plain:
                raise UserError(
                    f"--{method}.* with --method {self.method}: nothing reads it; leave it out, or "
                    f"choose --method {method}"
                )
        if self.sharing.active != (self.method == "share"):
            raise UserError(
                f"--method {self.method} --sharing.kind {self.sharing.kind}: sharing needs a kind, "
                "and a kind needs --method share"
            )
        if self.method == "share" and (self.experts or self.by_layer):
            raise UserError(
                f"--method share --experts {self.experts}: all are kept; leave --experts and "
                "--by-layer out"
            )
        if self.method == "group" and (self.experts or self.by_layer):
            raise UserError(
                f"--method group --experts {self.experts}: their number follows from --group.size; "
                "leave --experts and --by-layer out"
            )
        if self.group.size < 2 or self.group.sweeps < 1 or self.group.ridge <= 0:
            raise UserError(
                f"--group.size {self.group.size} --group.sweeps {self.group.sweeps} --group.ridge "
                f"{self.group.ridge}: a group has at least 2 experts, and the others must be "
                "greater than 0"
            )
