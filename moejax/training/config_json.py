"""Nested frozen dataclasses to plain JSON and back, checked key by key."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from moejax.errors import UserError

__all__ = ["config_differences", "config_from_json", "config_to_json", "with_new_fields"]

Config = TypeVar("Config")

_TAG = "type"  # names the class where a field may hold one of several dataclasses
_WRONG = object()


def config_to_json(config: Any) -> dict[str, Any]:
    """The configuration as dictionaries, lists, numbers, text and None.

    Infinite and undefined floats become the texts `inf`, `-inf`, `nan`, which JSON lacks. Where a
    field may hold one of several dataclasses, the dictionary names its class under `type`.

    Args:
        config: an instance of a dataclass whose fields are dataclasses, `Literal`, bool, int,
            float, str, `Path`, None, tuples of these, or unions of these.

    Raises:
        TypeError: a field is of another type (a mistake in the program).
    """
    return _encode(config, type(config))


def config_from_json(cls: type[Config], data: Any, source: str = "configuration") -> Config:
    """Rebuilds what `config_to_json` wrote.

    A field with `may_lack` in its metadata takes its default where it is missing.

    Args:
        cls: the dataclass.
        data: parsed JSON.
        source: where the data come from, for messages.

    Raises:
        UserError: keys are unknown or missing, or values do not fit; all are named. Also whatever
            the dataclasses themselves refuse.
    """
    problems: list[str] = []
    config = _decode(data, cls, "", problems)
    if problems:
        raise UserError(
            f"{source}: {'; '.join(problems)}: it was written by another version or edited by "
            "hand; mend it or start anew"
        )
    return config


def with_new_fields(old: Any, config: Any) -> Any:
    """The JSON form `old`, with the defaults of fields of `config` that it `may_lack`."""
    if not isinstance(old, dict) or not dataclasses.is_dataclass(config):
        return old
    filled = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in old:
            filled[field.name] = with_new_fields(old[field.name], value)
        elif field.metadata.get("may_lack"):
            make: Any = field.default_factory
            default: Any = field.default if make is dataclasses.MISSING else make()
            filled[field.name] = _encode(default, type(default))
    return {**old, **filled}


def config_differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Where two configurations in JSON form differ.

    Returns:
        (dotted path, value in `old`, value in `new`) in the order of `old`; None stands for a
        value that is not there.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            difference
            for key in keys
            for difference in config_differences(old.get(key), new.get(key), _join(path, key))
        ]
    same = old == new and isinstance(old, bool) == isinstance(new, bool)
    return [] if same else [(path, old, new)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _may_lack(cls: Any) -> set[str]:
    """Fields that came later: what was written without them means their defaults."""
    return {field.name for field in dataclasses.fields(cls) if field.metadata.get("may_lack")}


def _fields(cls: Any) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.init:
            yield field.name, hints[field.name]


def _members(declared: Any) -> tuple[Any, ...]:
    """The types a declared type stands for: the members of a union, or itself."""
    if typing.get_origin(declared) in (typing.Union, types.UnionType):
        return tuple(m for arg in typing.get_args(declared) for m in _members(arg))
    return (declared,)


def _is_config(declared: Any) -> bool:
    return isinstance(declared, type) and dataclasses.is_dataclass(declared)


def _needs_tag(declared: Any) -> bool:
    return sum(map(_is_config, _members(declared))) > 1


def _item_types(declared: Any, count: int) -> tuple[Any, ...] | None:
    """The types of a tuple's items; None if the declaration holds another number."""
    args = typing.get_args(declared)
    if len(args) == 2 and args[1] is Ellipsis:
        return (args[0],) * count
    return args if len(args) == count else None


def _encode(value: Any, declared: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tag = {_TAG: type(value).__name__} if _needs_tag(declared) else {}
        return tag | {name: _encode(getattr(value, name), t) for name, t in _fields(type(value))}
    if isinstance(value, tuple):
        tuples = [m for m in _members(declared) if typing.get_origin(m) is tuple]
        item_types = _item_types(tuples[0], len(value)) if tuples else None
        return [_encode(v, t) for v, t in zip(value, item_types or (Any,) * len(value))]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a configuration cannot hold {type(value).__name__}: {value!r}")


def _decode(value: Any, declared: Any, path: str, problems: list[str]) -> Any:
    members = _members(declared)
    if len(members) > 1:
        return _decode_union(value, declared, members, path, problems)
    if _is_config(declared):
        return _decode_config(value, declared, path, problems)
    origin = typing.get_origin(declared)
    if origin is Literal:
        choices = typing.get_args(declared)
        # `1 == True` in Python, so the types are compared as well.
        if any(value == c and type(value) is type(c) for c in choices):
            return value
        problems.append(f"{path} is {value!r} and must be one of {', '.join(map(repr, choices))}")
        return _WRONG
    if origin is tuple:
        item_types = _item_types(declared, len(value)) if isinstance(value, list) else None
        if item_types is not None:
            items = zip(value, item_types)
            return tuple(_decode(v, t, f"{path}[{i}]", problems) for i, (v, t) in enumerate(items))
    elif declared is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if value in ("inf", "-inf", "nan"):
            return float(value)
    elif declared in (None, type(None)):
        if value is None:
            return None
    elif declared is Path:
        if isinstance(value, str):
            return Path(value)
    elif declared in (bool, int, str):
        if type(value) is declared:
            return value
    else:
        raise TypeError(f"{path}: a configuration cannot hold the type {declared}")
    name = getattr(declared, "__name__", str(declared)) if origin is None else str(declared)
    problems.append(f"{path} is {value!r} and must be of type {name}")
    return _WRONG


def _decode_union(value: Any, declared: Any, members: Any, path: str, problems: list[str]) -> Any:
    if _needs_tag(declared) and isinstance(value, dict):
        name = value.get(_TAG)
        for member in filter(_is_config, members):
            if member.__name__ == name:
                rest = {key: v for key, v in value.items() if key != _TAG}
                return _decode_config(rest, member, path, problems)
        problems.append(f"{_join(path, _TAG)} is {name!r} and names no known class")
        return _WRONG
    if isinstance(value, dict):
        for member in filter(_is_config, members):
            return _decode_config(value, member, path, problems)
    # An int is also a valid float: the exact type goes first.
    for member in sorted(members, key=lambda member: member is not type(value)):
        attempt: list[str] = []
        if not _is_config(member):
            result = _decode(value, member, path, attempt)
            if not attempt:
                return result
    problems.append(f"{path} is {value!r} and fits none of {declared}")
    return _WRONG


def _decode_config(value: Any, cls: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{path or cls.__name__} is {value!r} and must be a dictionary")
        return _WRONG
    count = len(problems)
    expected = dict(_fields(cls))
    problems += [f"unknown key {_join(path, key)}" for key in value if key not in expected]
    lacking = [key for key in expected if key not in value and key not in _may_lack(cls)]
    problems += [f"missing key {_join(path, key)}" for key in lacking]
    arguments = {
        name: _decode(value[name], declared, _join(path, name), problems)
        for name, declared in expected.items()
        if name in value
    }
    return cls(**arguments) if len(problems) == count else _WRONG
