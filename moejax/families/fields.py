"""Reading a config.json of transformers: each field is mapped, known not to matter, or refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from moejax.errors import UserError

__all__ = ["Fields", "UnknownModelError", "is_number", "short"]

T = TypeVar("T")

_MOST = 2**31 - 1  # of a whole number: sizes and ids are int32

_OF_FILES = """
    _attn_implementation _attn_implementation_internal _commit_hash _name_or_path architectures
    auto_map dtype model_type quantization_config task_specific_params tokenizer_class torch_dtype
    torchscript transformers_version
"""
_OF_TOKENS = """
    bad_words_ids begin_suppress_tokens bos_token_id cls_token_id decoder_start_token_id
    eos_token_id forced_bos_token_id forced_eos_token_id mask_token_id pad_token_id prefix
    sep_token_id suppress_tokens
"""
_OF_GENERATION = """
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate temperature top_k
    top_p typical_p use_cache
"""
_OF_TRAINING = """
    attention_dropout embd_pdrop ep_size initializer_range pretraining_tp resid_pdrop
    router_jitter_noise seq_aux tf_legacy_loss use_bfloat16
"""
_OF_OTHER_TASKS = """
    chunk_size_feed_forward finetuning_task id2label label2id num_labels problem_type
    pruned_heads
"""
_IRRELEVANT = frozenset(
    " ".join([_OF_FILES, _OF_TOKENS, _OF_GENERATION, _OF_TRAINING, _OF_OTHER_TASKS]).split()
)
"""Fields that change nothing in what a forward pass computes, or that others read."""

_OFF = {
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
}
"""Fields of every config of transformers, with the only value that a decoder of ours can have."""


class UnknownModelError(UserError):
    """A config.json of a model that this program does not know.

    problems: its fields that say so, each with its value.
    """

    def __init__(self, model_type: Any, problems: list[str]):
        super().__init__(
            f"model_type={model_type!r} with {'; '.join(problems)}: this program cannot compute "
            "that model; take another, or mend the config if it is not the model's"
        )
        self.problems = problems


class Fields:
    """The fields of a config.json. What is wrong is collected, and told by `build` at once.

    A field that is missing, or null, has the default that transformers gives it.
    """

    def __init__(self, data: Mapping[str, Any]):
        self.data = data
        self.problems: list[str] = []
        self._seen = set(_IRRELEVANT)
        for name, value in _OFF.items():
            self.only(name, (value, None), value)

    def ignore(self, *names: str) -> None:
        """Fields that do not matter to this model."""
        self._seen.update(names)

    def raw(self, name: str) -> Any:
        """A field as it is; None where it is missing."""
        self._seen.add(name)
        return self.data.get(name)

    def whole(
        self, name: str, default: int, *aliases: str, least: int = 1, most: int = _MOST
    ) -> int:
        """A whole number.

        Args:
            name: of the field.
            default: where it is missing or null.
            aliases: other names of it; of several that are there all must agree.
            least: the smallest that makes sense.
            most: the largest.
        """
        names = (name, *aliases)
        found = {n: value for n in names if (value := self.raw(n)) is not None}
        if len(set(map(repr, found.values()))) > 1:
            said = ", ".join(f"{n}={short(v)}" for n, v in found.items())
            self.problems.append(f"{said} (they must be the same)")
        for n, value in found.items():
            if type(value) is not int or not least <= value <= most:
                self.problems.append(f"{n}={short(value)} (a whole number from {least} to {most})")
                return default
            return value
        return default

    def whole_or_none(self, name: str, default: int | None = None) -> int | None:
        """A whole number of at least 1, or null, which is not the same as missing."""
        if name in self.data and self.data[name] is None:
            self._seen.add(name)
            return None
        return self.whole(name, 0) or default

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self.raw(name)
        if value is None:
            return default
        if not is_number(value):
            self.problems.append(f"{name}={short(value)} (a number)")
            return default
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problems.append(f"{name}={short(value)} (true or false)")
            return default
        return value

    def wholes(self, name: str) -> tuple[int, ...] | None:
        """A list of whole numbers of at least 0, or None."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, list) or any(
            type(i) is not int or not 0 <= i <= _MOST for i in value
        ):
            self.problems.append(
                f"{name}={short(value)} (a list of whole numbers from 0 to {_MOST})"
            )
            return None
        return tuple(value)

    def only(self, name: str, allowed: Collection[Any], default: Any) -> Any:
        """A field of which the model knows some values only."""
        value = self.raw(name)
        if value is None:
            value = default
        # 1 == True, so types are compared as well.
        if not any(type(value) is type(a) and value == a for a in allowed):
            words = " or ".join(short(a) for a in allowed if a is not None)
            self.problems.append(f"{name}={short(value)} (only {words})")
            return default
        return value

    def build(self, make: Callable[[], T]) -> T:
        """Makes the config when every field is settled.

        Raises:
            UnknownModelError: fields are unknown or have values that this program does not know;
                all are told, in one line.
        """
        unknown = [
            f"{name}={short(value)} (unknown)"
            for name, value in self.data.items()
            if name not in self._seen and value is not None
        ]
        problems = [*self.problems, *unknown]
        if not problems:
            try:
                return make()
            except UserError as error:
                problems = [str(error)]
        raise UnknownModelError(self.data.get("model_type"), problems)


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number that fits a float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
