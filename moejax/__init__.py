"""Expert-parallel Mixture-of-Experts language models, exact on any mesh.

Names are imported when they are first used, so that `import moejax` does not import JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moejax.config import ExchangeConfig, ExpertsConfig, ModelConfig, MoEConfig, RouterConfig
    from moejax.errors import UserError
    from moejax.layer import MoELayer
    from moejax.model.decoder import Decoder
    from moejax.standalone import ShardedMoELayer

__all__ = [
    "Decoder",
    "ExchangeConfig",
    "ExpertsConfig",
    "MoEConfig",
    "MoELayer",
    "ModelConfig",
    "RouterConfig",
    "ShardedMoELayer",
    "UserError",
]

_MODULES = {
    "Decoder": "moejax.model.decoder",
    "ExchangeConfig": "moejax.config",
    "ExpertsConfig": "moejax.config",
    "MoEConfig": "moejax.config",
    "MoELayer": "moejax.layer",
    "ModelConfig": "moejax.config",
    "RouterConfig": "moejax.config",
    "ShardedMoELayer": "moejax.standalone",
    "UserError": "moejax.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
