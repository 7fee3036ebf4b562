"""Meshes, named collectives, stored pieces, and the cost of it all.

Names are imported when they are first used, so that `import sharding` does not import JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharding.mesh import MeshShape, make_mesh

__all__ = ["MeshShape", "make_mesh"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("sharding.mesh"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
