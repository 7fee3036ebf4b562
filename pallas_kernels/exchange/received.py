"""A mark on what came from other devices, by which a remat policy keeps it for the backward."""

from __future__ import annotations

from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

__all__ = ["RECEIVED", "received"]

RECEIVED = "received"

Tree = TypeVar("Tree")


def received(x: Tree) -> Tree:
    """Marks arrays that another device sent, that would have to be sent again with them, or that
    say where they lie.

    `jax.checkpoint_policies.save_only_these_names(RECEIVED)` keeps them; without a policy the mark
    does nothing.
    """
    return jax.tree.map(lambda a: checkpoint_name(a, RECEIVED), x)
