"""What the system tells of the host's memory."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["meminfo"]


def meminfo(name: str) -> int | None:
    """A line of /proc/meminfo in bytes, such as MemTotal or MemAvailable; None: it is not told."""
    try:
        lines = Path("/proc/meminfo").read_text()
    except (OSError, ValueError):
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB$", lines, re.MULTILINE)
    return None if found is None else 1024 * int(found[1])
