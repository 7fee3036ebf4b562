"""How much of the host's memory may be pinned for copies to a device."""

from __future__ import annotations

import os

from moejax.errors import UserError
from moejax.meminfo import meminfo

__all__ = ["allow_pinned_memory", "check_host_memory"]

LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_SHARE = 0.9  # of the host's memory


def allow_pinned_memory() -> None:
    """Lets XLA pin most of the host's memory; before the devices start.

    Its pool ends at 64 GB otherwise, which it reads from the environment alone (openxla/xla,
    xla/pjrt/gpu). Who has set the variable knows better.
    """
    total = meminfo("MemTotal")
    if total is not None:
        os.environ.setdefault(LIMIT, str(max(int(_SHARE * total / 2**30), 1)))


def check_host_memory(needed: int) -> None:
    """Refuses experts that the host has no room for.

    Args:
        needed: bytes of all experts.

    Raises:
        UserError: it has less; nothing is said where the system does not tell.
    """
    left = meminfo("MemAvailable")
    if left is not None and needed > left:
        raise UserError(
            f"--offload: experts of {needed / 2**30:.1f} GiB on a host with {left / 2**30:.1f} GiB "
            "of free memory: give it more, or use --expert-weights int8"
        )
