"""How experts are kept in host memory: what the flags of `infer.py --offload` say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from moejax.errors import UserError
from moejax.offload.fits import Fits
from moejax.offload.policies import POLICIES, PolicyName
from moejax.offload.predictors import PredictorName

__all__ = [
    "FITTED",
    "GUESSES",
    "MISS_DTYPES",
    "PREDICTORS_OF_RUNTIME",
    "STORES",
    "GuessesName",
    "MissDtype",
    "OffloadConfig",
    "PredictorOfRuntime",
    "StoreName",
]

PredictorOfRuntime = Literal["none", "routers", "linear", PredictorName]
PREDICTORS_OF_RUNTIME: tuple[PredictorOfRuntime, ...] = get_args(PredictorOfRuntime)
FITTED = ("linear", "coactivation", "history", "combined")
"""Those that need fits of the model."""
StoreName = Literal["pinned", "mapped"]
STORES: tuple[StoreName, ...] = get_args(StoreName)
GuessesName = Literal["paying", "all"]
GUESSES: tuple[GuessesName, ...] = get_args(GuessesName)
MissDtype = Literal["none", "int8"]
MISS_DTYPES: tuple[MissDtype, ...] = get_args(MissDtype)


@dataclass(frozen=True)
class OffloadConfig:
    """Which experts stay on the device, and which come early.

    Attributes:
        store: `pinned` keeps all experts in host memory that devices copy from; `mapped` reads each
            from the model's files when it is needed.
        policy: what a slot's expert is given up by, see `make_policy`.
        predictor: `none` guesses nothing; `routers` applies the next layer's norm and router to the
            residual after this layer's attention; `linear` a fitted map to the residual before it;
            others see `make_predictor`.
        guesses: `paying` sends those that are expected to save time, see `Worth`; `all` sends every
            one. Of experts in files, all are read.
        fits: of this model, for predictors that need them, and for what the slots hold at first.
        prefetch_bytes: the most that guesses for one layer take, twice that at once; None: as many
            experts as a token chooses.
        wave: experts that are streamed together; None: an eighth of a layer's.
        bonus: added to the selection scores of experts on the device: fewer misses, and another
            text. 0 is exact.
        miss_dtype: `int8`: an expert that a layer lacks, and that nobody has guessed, comes as a
            copy of 8 bits. Lossy; `none` is exact.

    Raises:
        UserError: a value is out of range, fits are missing, or values do not go together.
    """

    store: StoreName = "pinned"
    policy: PolicyName = "lfu"
    predictor: PredictorOfRuntime = "routers"
    guesses: GuessesName = "paying"
    fits: Fits | None = None
    prefetch_bytes: int | None = None
    wave: int | None = None
    bonus: float = 0.0
    miss_dtype: MissDtype = "none"

    def __post_init__(self) -> None:
        if self.store not in STORES:
            raise UserError(f"store {self.store!r}: must be one of {', '.join(STORES)}")
        if self.policy not in POLICIES:
            raise UserError(f"policy {self.policy!r}: must be one of {', '.join(POLICIES)}")
        if self.predictor not in PREDICTORS_OF_RUNTIME:
            raise UserError(
                f"predictor {self.predictor!r}: must be one of {', '.join(PREDICTORS_OF_RUNTIME)}"
            )
        if self.guesses not in GUESSES:
            raise UserError(f"guesses {self.guesses!r}: must be one of {', '.join(GUESSES)}")
        if self.predictor in FITTED and self.fits is None:
            raise UserError(
                f"predictor {self.predictor!r}: needs what python -m moejax.offload MODEL FITS.npz "
                "writes for this model; name that file, or choose routers or previous"
            )
        if self.prefetch_bytes is not None and self.prefetch_bytes < 0:
            raise UserError(f"prefetch_bytes={self.prefetch_bytes}: must be at least 0")
        if self.wave is not None and self.wave < 1:
            raise UserError(f"wave={self.wave}: at least 1 expert is streamed at once")
        if not self.bonus >= 0:
            raise UserError(f"bonus={self.bonus}: must be at least 0; 0 is exact")
        if self.miss_dtype not in MISS_DTYPES:
            raise UserError(
                f"miss_dtype {self.miss_dtype!r}: must be one of {', '.join(MISS_DTYPES)}"
            )
        if self.miss_dtype != "none" and self.store == "mapped":
            raise UserError(
                f"miss_dtype {self.miss_dtype!r} with store 'mapped': an expert would be read "
                "whole before it is sent in part; keep the experts pinned, or choose none"
            )

    @property
    def low(self) -> bool:
        """Whether what is missing comes in fewer bits."""
        return self.miss_dtype != "none"

    def check_deterministic(self) -> None:
        """Refuses what makes a text depend on what others have brought to the device.

        Raises:
            UserError: it is asked for.
        """
        for name, value, off in ("bonus", self.bonus, 0.0), ("miss_dtype", self.miss_dtype, "none"):
            if value != off:
                raise UserError(
                    f"{name}={value} with deterministic settings: what is computed would depend on "
                    "what other texts have brought to the device; leave one of them out"
                )
