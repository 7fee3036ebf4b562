"""Flags that several modes of `infer.py` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moejax.errors import UserError
from moejax.serving.offload_flags import OffloadFlags
from sharding.join_flags import JoinFlags

if TYPE_CHECKING:
    from moejax.inference.engine import EngineSettings

__all__ = ["EngineFlags", "ModelFlags"]

REBALANCE_EVERY = 1000


@dataclass(frozen=True)
class ModelFlags(JoinFlags):
    """Which model, and where it runs.

    Attributes:
        model: run directory, model folder or folder of transformers; the packaged model if not
            given.
        mesh: such as data=2,expert=4,tensor=1; `auto` lays the experts over all devices.
        devices: number of fake devices on a CPU; 0: as many as the mesh needs.
        dtype: of the computation; `auto` is float32 on a CPU and the model's own elsewhere.
        expert_weights: keep the experts' weights in 8 bits, about half the memory of bfloat16;
            changes the text a little.
        locality: `off`: routing does not look at where experts are, whatever the model's
            configuration says.
        locality_penalty: scales probabilities of experts on other devices by 1 − this for the
            choice: less is sent, and the text changes. None: as the model's configuration says,
            also of the next three.
        locality_host_penalty: likewise of experts on other hosts.
        local_threshold: a token whose K-th best probability on its device is at least this uses
            experts there only.
        max_devices: a token's experts lie on at most this many devices.
    """

    model: str = ""
    mesh: str = "auto"
    devices: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    expert_weights: Literal["none", "int8", "fp8"] = "none"
    locality: Literal["model", "off"] = "model"
    locality_penalty: float | None = None
    locality_host_penalty: float | None = None
    local_threshold: float | None = None
    max_devices: int | None = None

    def __post_init__(self) -> None:
        self.check_joining()
        if self.devices < 0:
            raise UserError(f"--devices {self.devices}: must be 0 (as needed) or more")


@dataclass(frozen=True)
class EngineFlags(OffloadFlags, ModelFlags):
    """How much is continued at once.

    Attributes:
        max_rows: most texts continued at once, of all devices together.
        max_len: most tokens of a text, prompt included; 0: the model's context.
        pages: pages of the key-value cache on each device; 0: as many as are needed or fit.
        page_len: tokens of a page.
        prefill_chunk: most tokens of prompts that a device runs between two steps of decoding.
        max_waiting: most requests that wait; more are refused.
        deterministic: a text's bits do not depend on the other texts (slower).
        decode_exchange: how experts' rows travel between devices when single tokens are decoded;
            `auto` measures, `config` is what the model's configuration says.
        placement: where experts are computed: `home`, in order; `auto`, planned from the traffic
            and followed; or a file of `python -m moejax.placement plan`.
        replicas: slots of each device for copies of experts, with `--placement auto`.
        rebalance_every: steps of the engine between two looks at the traffic, likewise.
        placement_log: folder for what the looks led to, a line each, and a picture at the end.
    """

    max_rows: int = 32
    max_len: int = 0
    pages: int = 0
    page_len: int = 64
    prefill_chunk: int = 512
    max_waiting: int = 1024
    deterministic: bool = False
    decode_exchange: Literal["auto", "config", "ring", "all_to_all", "remote"] = "auto"
    placement: str = "home"
    replicas: int = 0
    rebalance_every: int = REBALANCE_EVERY
    placement_log: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_len", "pages"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be 0 (as needed) "
                    "or more"
                )
        self._check_placement()
        self.check_offload()
        if self.offload and self.placement != "home":
            raise UserError(
                f"--offload with --placement {self.placement}: experts in host memory come to the "
                "slots of one device as they are needed; leave one of them out"
            )
        if self.offload_bonus and self.deterministic:
            raise UserError(
                f"--offload-bonus {self.offload_bonus} with --deterministic: what is chosen would "
                "depend on what other texts have brought to the device; leave one of them out"
            )
        if self.offload_miss_dtype != "none" and self.deterministic:
            raise UserError(
                f"--offload-miss-dtype {self.offload_miss_dtype} with --deterministic: what is "
                "computed would depend on what other texts have brought to the device; leave one "
                "of them out"
            )
        if self.offload and self.distributed:
            raise UserError("--offload with --distributed: is of one device; leave one of them out")
        hold = self.pages * self.page_len
        if 0 < hold < self.max_len:
            raise UserError(
                f"--pages {self.pages} --page-len {self.page_len}: hold {hold} tokens, fewer than "
                f"--max-len {self.max_len}; give more pages or a smaller length"
            )

    def _check_placement(self) -> None:
        if self.placement not in ("home", "auto") and not self.placement.endswith(".npz"):
            raise UserError(f"--placement {self.placement}: must be home, auto or a file .npz")
        if self.replicas < 0 or self.rebalance_every < 1:
            raise UserError(
                f"--replicas {self.replicas} --rebalance-every {self.rebalance_every}: must be at "
                "least 0 and 1"
            )
        every = self.rebalance_every if self.rebalance_every != REBALANCE_EVERY else 0
        only = {
            "--replicas": self.replicas,
            "--rebalance-every": every,
            "--placement-log": self.placement_log,
        }
        for name, value in only.items():
            if value and self.placement != "auto":
                raise UserError(
                    f"{name} {value} with --placement {self.placement}: nothing is planned there; "
                    "choose --placement auto or leave it out"
                )
        if self.placement == "auto" and self.deterministic:
            raise UserError(
                "--placement auto with --deterministic: another placement adds up in another "
                "order, and when it comes depends on the other texts; name a plan's file, or leave "
                "one of them out"
            )

    def engine_settings(self) -> EngineSettings:
        """The settings of the engine.

        Raises:
            UserError: one is out of range.
        """
        from moejax.inference.engine import EngineSettings

        return EngineSettings(
            max_rows=self.max_rows,
            page_len=self.page_len,
            pages=self.pages or None,
            prefill_chunk=self.prefill_chunk,
            max_len=self.max_len or None,
            max_waiting=self.max_waiting,
            deterministic=self.deterministic,
        )
