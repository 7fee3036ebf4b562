"""Keeping freed host memory, so that fake devices do not fault it in anew every step."""

from __future__ import annotations

import ctypes
import importlib.util
import sys

__all__ = ["keep_freed_memory"]

_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Tells glibc to reuse large blocks instead of returning them to the system.

    XLA:CPU allocates the temporaries of every execution anew. By default glibc maps and unmaps
    them, and the kernel clears each page again: a tenth of a million page faults a step on eight
    fake devices, a third of its time. Threads that run already keep their own way, so this comes
    before jax starts its devices, and it leaves a host with an accelerator's plugin alone.

    Returns:
        False where nothing has changed: an accelerator may be there, or another C library.

    Source: mallopt(3).
    """
    if not sys.platform.startswith("linux") or any(map(importlib.util.find_spec, _PLUGINS)):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return True
