"""JSON as it comes from strangers and goes to them."""

from __future__ import annotations

import json
from typing import Any

from moejax.serving.errors import ApiError

__all__ = ["parse_json", "to_json"]

_MAX_DEPTH = 64


def to_json(value: Any) -> bytes:
    """JSON in ASCII, which holds half surrogate pairs, too."""
    return json.dumps(value, separators=(",", ":")).encode()


def parse_json(data: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN, no deep nesting.

    Raises:
        ApiError: 400, it is something else.
    """
    try:
        value = json.loads(data.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ApiError(400, f"the body is nested more than {_MAX_DEPTH} deep") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error!s:.200}") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise ApiError(400, f"the body is nested more than {_MAX_DEPTH} deep")
        members = (x.values() if isinstance(x, dict) else x for x in level if _holds(x))
        level = [x for inside in members for x in inside if _holds(x)]
    return value


def _holds(value: Any) -> bool:
    return isinstance(value, (dict, list))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
