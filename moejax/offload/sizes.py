"""Numbers of bytes as people write them."""

from __future__ import annotations

import math
import re

from moejax.errors import UserError

__all__ = ["parse_bytes"]

_UNITS = {
    **{"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_bytes(text: str, flag: str) -> int:
    """Reads `20GiB`, `500MB` or a plain number of bytes.

    Args:
        text: what was written.
        flag: for the message.

    Raises:
        UserError: it is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise UserError(f"{flag} {text!r}: is no size; write such as 20GiB, 500MB or 1000000")
    return math.floor(float(match[1]) * _UNITS[match[2].upper()])
