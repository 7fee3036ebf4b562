"""Rotary positions in a config.json, in the spelling of old and of new versions of transformers.

Old: `rope_theta` and `rope_scaling`, a dictionary or null. New (from 5.0 on): `rope_parameters`, a
dictionary with the base in it. Of both, `rope_scaling` is the one that transformers takes.
"""

from __future__ import annotations

from typing import Any

from moejax.attention_config import YarnConfig
from moejax.errors import UserError
from moejax.families.fields import Fields, is_number, short

__all__ = ["read_rope", "write_rope"]

_SPELLING = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_YARN_NUMBERS = (
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
)


def read_rope(
    fields: Fields,
    theta: float,
    max_context: int,
    *,
    default: dict[str, Any] | None = None,
    scales_logits: bool = False,
) -> tuple[float, YarnConfig | None]:
    """Reads the base and YaRN's settings.

    Args:
        fields: of the config.json.
        theta: the base where none is given.
        max_context: the model's longest context, in tokens.
        default: parameters where none are given.
        scales_logits: `mscale_all_dim` scales attention's logits, as DeepSeek's models do; of
            others it only enters the scale of the rotation.
    """
    rope = fields.raw("rope_scaling") or fields.raw("rope_parameters") or default or {}
    fields.ignore("rope_parameters")
    theta = fields.number("rope_theta", theta)
    fields.only("partial_rotary_factor", (1.0, 1), 1.0)
    if not isinstance(rope, dict):
        fields.problems.append(f"rope_scaling={short(rope)} (a dictionary)")
        return theta, None
    problems = []
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = _SPELLING | ({*_YARN_NUMBERS, "truncate"} if kind == "yarn" else set())
    if kind not in ("default", "yarn"):
        problems.append(f"rope_type={short(kind)} (only 'default' or 'yarn')")
    else:
        problems += [
            f"{name}={short(value)} (unknown with rope_type {kind!r})"
            for name, value in rope.items()
            if name not in known and value is not None
        ]
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        problems.append(f"partial_rotary_factor={rope['partial_rotary_factor']!r} (only 1)")
    if rope.get("rope_theta") is not None:
        theta = rope["rope_theta"]
    if not is_number(theta) or theta <= 1:
        problems.append(f"rope_theta={short(theta)} (a number above 1)")
    yarn = None
    if kind == "yarn":
        yarn = _read_yarn(fields, rope, max_context, scales_logits, problems)
    fields.problems += [f"rope parameters: {problem}" for problem in problems]
    return float(theta) if is_number(theta) else 1e4, yarn


def _read_yarn(
    fields: Fields, rope: dict[str, Any], max_context: int, scales_logits: bool, problems: list[str]
) -> YarnConfig | None:
    values = {name: rope[name] for name in _YARN_NUMBERS if rope.get(name) is not None}
    wrong = [f"{name}={short(v)} (a number)" for name, v in values.items() if not is_number(v)]
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        wrong.append(f"truncate={short(truncate)} (true or false)")
    # Written outside of the dictionary it prevails, as in transformers.
    outside = fields.whole("original_max_position_embeddings", 0)
    original = outside or values.pop("original_max_position_embeddings", max_context)
    values.pop("original_max_position_embeddings", None)
    if wrong or original < 1:
        problems += wrong or [f"original_max_position_embeddings={original!r} (at least 1)"]
        return None
    factor = float(values.pop("factor", max_context / original))
    # A zero stands for "not given".
    numbers = {name: float(value) for name, value in values.items() if value}
    try:
        yarn = YarnConfig(factor, int(original), truncate=truncate, **numbers)
    except UserError as error:
        problems.append(str(error))
        return None
    if scales_logits or not yarn.mscale_all_dim:
        return yarn
    # What the rotation is scaled with, and nothing that would scale the logits.
    numbers = {k: v for k, v in numbers.items() if k in ("beta_fast", "beta_slow")}
    return YarnConfig(
        factor, int(original), truncate=truncate, attention_factor=yarn.rotation_scale, **numbers
    )


def write_rope(theta: float, yarn: YarnConfig | None) -> dict[str, Any]:
    """The fields in the old spelling, which every version of transformers reads."""
    if yarn is None:
        return {"rope_theta": theta, "rope_scaling": None}
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_context,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "truncate": yarn.truncate,
    }
    for name in "mscale", "mscale_all_dim", "attention_factor":
        if getattr(yarn, name) is not None:
            scaling[name] = getattr(yarn, name)
    return {"rope_theta": theta, "rope_scaling": scaling}
