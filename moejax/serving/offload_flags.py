"""Flags of models whose experts do not fit the device."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from moejax.errors import UserError
from moejax.offload.config import FITTED, GuessesName, MissDtype, PredictorOfRuntime, StoreName
from moejax.offload.policies import PolicyName
from moejax.offload.sizes import parse_bytes

if TYPE_CHECKING:
    from moejax.offload.config import OffloadConfig

__all__ = ["OffloadFlags"]

Size = Annotated[str, tyro.conf.arg(metavar="SIZE")]
File = Annotated[str, tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True)
class OffloadFlags:
    """Where experts are kept, and which come early.

    Attributes:
        offload: keep the experts in host memory, or in the model's files, and on the one device as
            many as fit.
        device_memory: of the device, for all that is on it, such as 20GiB; what is free if not
            given.
        offload_store: `pinned`: all experts lie in host memory; `mapped`: each is read from the
            model's files when it is needed.
        offload_policy: which expert gives up its slot: the one used longest ago, least often, or
            least expected.
        offload_predictor: how experts are guessed that the next layer will need: `routers` applies
            its router early, `linear`, `coactivation`, `history` and `combined` need
            --offload-fits, the others go by what was chosen before.
        offload_guesses: `paying`: those that are expected to save time, by how often they were
            right and how long experts travel and layers compute; `all`: every one.
        offload_fits: file of `python -m moejax.offload`, of this model.
        prefetch_bytes: the most that guesses for one layer take, such as 1GB; as many experts as a
            token chooses if not given.
        offload_bonus: added to the selection scores of experts on the device, a probability or
            what the router compares: fewer transfers, and the text changes.
        offload_miss_dtype: `int8`: an expert that is lacking, and was not guessed, comes as a copy
            of 8 bits, half of bfloat16's transfer; the text changes, and the host keeps both.
    """

    offload: bool = False
    device_memory: Size = ""
    offload_store: StoreName = "pinned"
    offload_policy: PolicyName = "lfu"
    offload_predictor: PredictorOfRuntime = "routers"
    offload_guesses: GuessesName = "paying"
    offload_fits: File = ""
    prefetch_bytes: Size = ""
    offload_bonus: float = 0.0
    offload_miss_dtype: MissDtype = "none"

    def check_offload(self) -> None:
        """Refuses flags that do not go together.

        Raises:
            UserError: see above.
        """
        if not self.offload:
            for field in dataclasses.fields(OffloadFlags):
                value = getattr(self, field.name)
                if value != field.default:
                    flag = field.name.replace("_", "-")
                    raise UserError(f"--{flag} {value}: only with --offload; add it")
            return
        for name in "device_memory", "prefetch_bytes":
            if getattr(self, name):
                parse_bytes(getattr(self, name), f"--{name.replace('_', '-')}")
        if self.offload_predictor in FITTED and not self.offload_fits:
            raise UserError(
                f"--offload-predictor {self.offload_predictor}: needs --offload-fits FILE.npz, "
                "which python -m moejax.offload MODEL FILE.npz writes; or choose routers"
            )
        if self.offload_guesses != "paying" and self.offload_predictor == "none":
            raise UserError(
                f"--offload-guesses {self.offload_guesses} with --offload-predictor none: nothing "
                "is guessed there; leave one of them out"
            )
        if not self.offload_bonus >= 0:
            raise UserError(f"--offload-bonus {self.offload_bonus}: must be at least 0, exact")
        if self.offload_miss_dtype != "none" and self.offload_store == "mapped":
            raise UserError(
                f"--offload-miss-dtype {self.offload_miss_dtype} with --offload-store mapped: an "
                "expert would be read whole before it is sent in part; leave one of them out"
            )
        if self.prefetch_bytes and self.offload_predictor == "none":
            raise UserError(
                f"--prefetch-bytes {self.prefetch_bytes} with --offload-predictor none: nothing is "
                "guessed there; leave one of them out"
            )

    def offload_config(self) -> OffloadConfig:
        """What these flags say.

        Raises:
            UserError: the file of fits cannot be read.
        """
        from moejax.offload.config import OffloadConfig
        from moejax.offload.fits import load_fits

        prefetch = self.prefetch_bytes
        return OffloadConfig(
            store=self.offload_store,
            policy=self.offload_policy,
            predictor=self.offload_predictor,
            guesses=self.offload_guesses,
            fits=load_fits(self.offload_fits) if self.offload_fits else None,
            prefetch_bytes=parse_bytes(prefetch, "--prefetch-bytes") if prefetch else None,
            bonus=self.offload_bonus,
            miss_dtype=self.offload_miss_dtype,
        )
