"""A run that begins with the weights of a model: `train.py --init-from DIR`."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.errors import UserError
from moejax.progress import NowAndThen
from moejax.training.config import DataConfig, OptimizerConfig, TrainConfig
from moejax.training.config_json import config_differences, config_to_json

if TYPE_CHECKING:
    from collections.abc import Callable

    import jax
    from flax import nnx

    from moejax.data.tokenizer import Tokenizer
    from moejax.inference.source import ModelSource
    from moejax.training.state import Blueprint, TrainState
    from moejax.training.streaming import WeightStream

__all__ = ["check_initialised", "initial_state", "starting_config", "tokenizer_of_weights"]

# Neither a weight's shape nor its meaning depends on these.
_FREE = {
    "model.max_context",
    "model.scan_layers",
    "model.remat",
    "model.compute_dtype",
    "model.moe.router.load_balance_coef",
    "model.moe.router.z_loss_coef",
    "model.moe.router.bias_update_rate",
}
_EXCHANGE = "model.moe.exchange."
_LOCALITY = "model.moe.locality."  # learned under it or not, the weights are of one kind
_PROJECTIONS = (f"{_EXCHANGE}wire.dispatch_dim", f"{_EXCHANGE}wire.combine_dim")


def starting_config(folder: str, preset: TrainConfig | None) -> TrainConfig:
    """What the flags of a run that begins with a model's weights change.

    Args:
        folder: of the model.
        preset: says all that is not of the model; None takes a small learning rate, which changes
            a trained model slowly.

    Raises:
        UserError: there is no model, or it has no tokenizer.
    """
    from moejax.inference.source import open_model

    source = open_model(folder)
    source.need_tokenizer()
    model = source.config
    if preset is None:
        preset = TrainConfig(
            model=dataclasses.replace(model, scan_layers=True, remat="layer"),
            data=DataConfig(seq_len=min(1024, model.max_context)),
            optimizer=OptimizerConfig(learning_rate=2e-5),
            loss_chunk=4096,
        )
    how = preset.model
    return dataclasses.replace(
        preset,
        model=dataclasses.replace(model, scan_layers=how.scan_layers, remat=how.remat),
        data=dataclasses.replace(
            preset.data, vocab=0, tokenizer="", seq_len=min(preset.data.seq_len, model.max_context)
        ),
        init_from=str(Path(folder).absolute()),
    )


def check_initialised(config: TrainConfig, start: TrainConfig) -> None:
    """Refuses flags that the weights do not allow.

    Args:
        config: the run.
        start: what its flags changed, from `starting_config`.

    Raises:
        UserError: such flags are given; all are named.
    """
    there, here = ({"model": config_to_json(c.model)} for c in (start, config))
    wrong = [
        f"{_flag(name)} is {a!r} there and {b!r} here"
        for name, a, b in config_differences(there, here)
        if name not in _FREE
        and not name.startswith(_LOCALITY)
        and (not name.startswith(_EXCHANGE) or name in _PROJECTIONS)
    ]
    if wrong:
        raise UserError(
            f"--init-from {start.init_from}: {', '.join(wrong)}: the weights would not fit, or "
            "mean something else; drop these flags"
        )
    for name in "vocab", "tokenizer":
        if value := getattr(config.data, name):
            raise UserError(
                f"--data.{name} {value} with --init-from: the tokenizer is that of "
                f"{start.init_from}; drop the flag"
            )


def tokenizer_of_weights(config: TrainConfig) -> Tokenizer | None:
    """The tokenizer of the model that a run begins with; None where it begins with none."""
    from moejax.inference.source import open_model

    return open_model(config.init_from).need_tokenizer() if config.init_from else None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def initial_state(
    blueprint: Blueprint, source: ModelSource, report: Callable[[str], None]
) -> TrainState:
    """The state of step 0 with a model's weights, every device reading its own part.

    Args:
        blueprint: the model as it is trained.
        source: the model that is stored.
        report: gets a line now and then.

    Raises:
        UserError: the weights are damaged or of another model.
    """
    import jax
    import numpy as np
    from jax.sharding import PartitionSpec as P

    from moejax.training.optimizer import init_moments
    from moejax.training.state import TrainState
    from moejax.training.streaming import WeightStream
    from sharding.arrays import put

    stream = WeightStream(source, blueprint)
    loader = _Loader(blueprint, stream, report)
    masters = loader.load("params", blueprint.params, blueprint.stored_specs)
    biases = loader.load("bias", blueprint.biases, blueprint.bias_specs)
    shardings = blueprint.shardings(blueprint.state_specs().moments)
    moments = jax.jit(init_moments, out_shardings=shardings)(masters)
    step = put(np.zeros((), np.int32), blueprint.shardings(P()))
    return TrainState(step, masters, moments, biases)


class _Loader:
    """Puts weights where a step takes them from; beside them there is one tensor of a layer."""

    def __init__(self, blueprint: Blueprint, stream: WeightStream, report: Callable[[str], None]):
        self._blueprint, self._stream, self._tell = blueprint, stream, NowAndThen(report)
        self._done = 0
        self._total = sum(map(stream.num_bytes, stream.targets))

    def load(self, part: str, like: nnx.State, specs: Any) -> nnx.State:
        """A state like `like`, its values stored as `specs` say."""
        from flax import nnx

        from moejax.model.canonical import canonical

        shardings = dict(nnx.to_flat_state(self._blueprint.shardings(specs)))
        loaded = []
        for path, variable in nnx.to_flat_state(like):
            names = canonical(nnx.from_flat_state([(path, variable)]))
            layers = sorted(names, key=_numbers)
            value = self._value(variable, [f"{part}/{n}" for n in layers], shardings[path])
            loaded.append((path, variable.replace(value)))
        return nnx.from_flat_state(loaded)

    def _value(self, variable: nnx.Variable, names: list[str], sharding: Any) -> jax.Array:
        import jax

        shape, home = variable.get_value().shape, variable.get_metadata().get("home")
        scanned = len(names) > 1
        slots = shape[1 if scanned else 0] if home is not None else 0
        home = None if home is None or len(home) == slots else tuple(home)
        if not scanned:
            array = self._take(names[0])
            if home is None:
                return jax.device_put(array, sharding)
            return jax.block_until_ready(_pad_program(shape, sharding, home)(array))
        make, put = _stack_programs(shape, variable.get_value().dtype, sharding, home)
        value = make()
        for layer, name in enumerate(names):
            value = jax.block_until_ready(put(value, self._take(name), layer))
        return value

    def _take(self, name: str) -> jax.Array:
        array = self._stream.take(name)
        self._done += self._stream.num_bytes(name)
        self._tell(f"read {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB of weights")
        return array


def _numbers(name: str) -> list[int]:
    """The numbers in a name, so that layer 10 comes behind layer 9."""
    return [int(word) for word in name.split(".") if word.isdigit()]


def _padded(piece: jax.Array, shape: tuple[int, ...], home: tuple[int, ...] | None) -> jax.Array:
    """A bank with its empty slots."""
    from jax import numpy as jnp

    if home is None:
        return piece
    return jnp.zeros(shape, piece.dtype).at[jnp.asarray(home, jnp.int32)].set(piece)


@functools.cache
def _pad_program(shape: tuple[int, ...], sharding: Any, home: tuple[int, ...]) -> Any:
    import jax

    return jax.jit(lambda piece: _padded(piece, shape, home), out_shardings=sharding)


@functools.cache
def _stack_programs(
    shape: tuple[int, ...], dtype: Any, sharding: Any, home: tuple[int, ...] | None
) -> tuple[Any, Any]:
    """Makes the stacked weights of layers, and puts those of one layer into them, in place."""
    import jax
    from jax import lax
    from jax import numpy as jnp

    def put(value: jax.Array, piece: jax.Array, layer: int) -> jax.Array:
        return lax.dynamic_update_index_in_dim(value, _padded(piece, shape[1:], home), layer, 0)

    return (
        jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding),
        jax.jit(put, donate_argnums=0, out_shardings=sharding),
    )
