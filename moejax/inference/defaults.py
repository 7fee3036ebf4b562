"""The sampling that a model's makers recommend: generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moejax.errors import UserError
from moejax.inference.folder_files import file_in, read_json
from moejax.inference.params import SamplingParams

__all__ = ["GenerationDefaults"]

# Their names and ours. Others say nothing about sampling, or ask for searches that are not done.
_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What a folder recommends.

    values: fields of `SamplingParams` that the folder sets.
    end_ids: the ids that end a text; none where it does not say.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    end_ids: tuple[int, ...] = ()

    def params(self, **given: Any) -> SamplingParams:
        """Sampling with what a request gives, else what the folder recommends, else vLLM's.

        Raises:
            UserError: a value is refused.
        """
        return SamplingParams(**{**self.values, **given})

    @classmethod
    def read(cls, folder: Path) -> GenerationDefaults:
        """Reads generation_config.json, if there is one.

        `do_sample: false` means temperature 0.

        Raises:
            UserError: the file leads out of the folder, cannot be read, or holds a value out of
                range.
        """
        path = file_in(folder, "generation_config.json")
        data = read_json(path, optional=True)
        values = {ours: data[name] for name, ours in _NAMES.items() if data.get(name) is not None}
        if data.get("do_sample") is False:
            values["temperature"] = 0.0
        ends = data.get("eos_token_id")
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        if not all(type(end) is int and end >= 0 for end in ends):
            raise UserError(f"{path}: eos_token_id={ends!r:.80}: must be token ids; correct it")
        try:
            SamplingParams(**values)
        except UserError as error:
            raise UserError(f"{path}: {error}; correct it") from None
        return cls(values, tuple(ends))
