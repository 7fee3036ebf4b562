"""The state of a run: made sharded, saved in logical order, restored onto any mesh."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.model.attention import Implementation
from moejax.model.canonical import canonical, from_canonical
from moejax.model.decoder import Decoder
from moejax.model.groups import layer_groups
from moejax.placement.counting import Counts
from moejax.routing.bias import RouterState
from moejax.training.anomaly import History
from moejax.training.optimizer import init_moments
from sharding.mesh import AXES, MeshShape
from sharding.specs import axes_of, specs_of
from sharding.zero import storage_tree

__all__ = [
    "Blueprint",
    "TrainState",
    "fitting_spec",
    "from_logical",
    "from_logical_part",
    "in_logical_order",
    "init_state",
    "load_weights",
    "logical_targets",
    "to_logical",
    "weight_targets",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step changes.

    step: int32 [], optimizer steps taken.
    masters: float32 weights, stored as `Blueprint.storage` says.
    moments: Adam's first and second moments, stored alike.
    biases: the routers' selection biases, replicated.
    counts: each device's counters of the experts that are chosen together, `COUNTERS_SPEC`; None
        where nobody counts. They are in no checkpoint.
    residuals: what compressed gradients have left to send, see `sharding.compression.reduction`;
        None where the method keeps nothing.
    history: of the last steps, by which unusual ones are known; None where nobody looks.
    """

    step: jax.Array
    masters: nnx.State
    moments: tuple[nnx.State, nnx.State]
    biases: nnx.State
    counts: Counts | None = None
    residuals: dict[str, dict[str, jax.Array]] | None = None
    history: History | None = None


class Blueprint:
    """A model on a mesh, without its weights: structure, specs and how things are stored.

    Args:
        config: the model.
        mesh: a mesh, or an abstract one of which only shapes are asked.
        hosts: the host of each device along `expert`, for the counters.
        attention: implementation of `jax.nn.dot_product_attention`; None lets it choose.

    Raises:
        UserError: the model does not fit the mesh.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Any,
        hosts: tuple[int, ...] | None = None,
        attention: Implementation = None,
    ):
        self.config = config
        self.mesh = mesh
        self.shape = MeshShape(*(mesh.shape[a] for a in AXES))
        self.hosts = hosts
        self.groups = layer_groups(config)

        def make(key: jax.Array) -> tuple[nnx.State, nnx.State]:
            model = Decoder(
                config, self.shape, nnx.Rngs(params=key), hosts=hosts, implementation=attention
            )
            self.graph: Any
            self.graph, params, biases = nnx.split(model, nnx.Param, RouterState)  # type: ignore[misc]
            return params, biases

        self._make = make
        self.params, self.biases = jax.eval_shape(make, jax.random.key(0))
        self.storage = storage_tree(self.params, dict(zip(AXES, self.shape.sizes)))
        self.stored_specs = jax.tree.map(lambda s: s.stored, self.storage)
        self.bias_specs = specs_of(self.biases)

    def state_specs(self) -> TrainState:
        """PartitionSpecs of the whole state, for shard_map."""
        stored: Any = self.stored_specs
        return TrainState(P(), stored, (stored, stored), self.bias_specs)  # type: ignore[arg-type]

    def shardings(self, specs: Any) -> Any:
        """NamedShardings on this mesh for a tree of PartitionSpecs."""
        return jax.tree.map(
            lambda s: NamedSharding(self.mesh, s), specs, is_leaf=lambda x: isinstance(x, P)
        )

    def merge(self, params: Any, biases: Any) -> Decoder:
        """The model around (local) weights."""
        return nnx.merge(self.graph, params, biases)

    def around(self, model: Decoder) -> Blueprint:
        """The same blueprint for another model, of shapes; for inference, it has no `storage`."""
        other = copy.copy(self)
        # Whatever it holds beside biases is a parameter, 8-bit values like others.
        other.graph, other.biases, other.params = nnx.split(model, RouterState, ...)  # type: ignore[misc]
        return other

    def make(self, key: jax.Array) -> tuple[nnx.State, nnx.State]:
        """Fresh global weights and biases from a key."""
        return self._make(key)


def init_state(blueprint: Blueprint, seed: int) -> TrainState:
    """A fresh state, every piece made on its own devices."""

    def make(key: jax.Array) -> TrainState:
        params, biases = blueprint.make(key)
        return TrainState(jnp.zeros((), jnp.int32), params, init_moments(params), biases)

    shardings = blueprint.shardings(blueprint.state_specs())
    return jax.jit(make, out_shardings=shardings)(jax.random.key(seed))


def in_logical_order(variable: nnx.Variable) -> Any:
    """A stored value in logical order: padding slots of expert banks left out."""
    value, home = variable.get_value(), variable.get_metadata().get("home")
    if home is None or len(home) == value.shape[0]:
        return value
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(home), *value.shape[1:]), value.dtype)
    return value[jnp.asarray(home, jnp.int32)]


def _parts(state: TrainState) -> dict[str, nnx.State]:
    return {
        "params": state.masters,
        "mu": state.moments[0],
        "nu": state.moments[1],
        "bias": state.biases,
    }


def _to_logical(state: TrainState) -> dict[str, Any]:
    flat: dict[str, Any] = {"step": state.step}
    for part, tree in _parts(state).items():
        for name, variable in canonical(tree).items():
            flat[f"{part}/{name}"] = in_logical_order(variable)
    return flat


def to_logical(state: TrainState) -> dict[str, jax.Array]:
    """The state as a flat dict in logical order, independent of mesh, scan and placement."""
    return jax.jit(_to_logical)(state)


def logical_targets(blueprint: Blueprint, parts: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Shapes, dtypes and shardings in which a saved state is to be read for this mesh.

    Args:
        blueprint: model and mesh.
        parts: of `params`, `mu`, `nu`, `bias`; None: all, and the step.
    """
    mesh = blueprint.mesh
    targets: dict[str, Any] = {}
    specs = {"params": blueprint.stored_specs, "bias": blueprint.bias_specs}
    specs["mu"] = specs["nu"] = blueprint.stored_specs
    trees = {"params": blueprint.params, "bias": blueprint.biases}
    trees["mu"] = trees["nu"] = blueprint.params
    for part in parts or tuple(trees):
        stored = jax.tree.map(lambda spec, v: v.replace(spec=spec), specs[part], trees[part])
        for name, variable in canonical(stored).items():
            value = in_logical_order(variable)
            spec = fitting_spec(variable.get_metadata()["spec"], value.shape, mesh)
            targets[f"{part}/{name}"] = jax.ShapeDtypeStruct(
                value.shape, value.dtype, sharding=NamedSharding(mesh, spec)
            )
    if parts is None:
        targets["step"] = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    return targets


def fitting_spec(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The spec without the axes that do not divide their dimension."""
    entries: list[Any] = []
    for size, entry in zip(shape, list(spec) + [None] * len(shape)):
        devices = 1
        for axis in axes_of(P(entry)):
            devices *= mesh.shape[axis]
        entries.append(entry if size % devices == 0 else None)
    return P(*entries)


def from_logical_part(flat: Mapping[str, Any], part: str, like: nnx.State) -> nnx.State:
    """The variables of `like` with the values of one part of a flat dict in logical order."""
    values = {}
    for name, variable in canonical(like).items():
        value, home = flat[f"{part}/{name}"], variable.get_metadata().get("home")
        padded = variable.get_value().shape
        if home is not None and padded[0] != len(home):
            value = jnp.zeros(padded, value.dtype).at[jnp.asarray(home, jnp.int32)].set(value)
        values[name] = value
    return from_canonical(values, like)


def _check(flat: Mapping[str, Any], targets: Mapping[str, Any]) -> None:
    """Raises UserError unless the parts that are asked for are there, in these shapes."""
    parts = {name.partition("/")[0] for name in targets}
    for name in [*targets, *(n for n in flat if n.partition("/")[0] in parts)]:
        wanted = str(targets[name].shape) if name in targets else "nothing"
        found = str(flat[name].shape) if name in flat else "nothing"
        if wanted != found:
            raise UserError(
                f"checkpoint: {name} should be {wanted} and is {found}: it belongs to "
                "another model; use the config it was made with"
            )


def from_logical(flat: Mapping[str, jax.Array], blueprint: Blueprint) -> TrainState:
    """The inverse of `to_logical`, onto the blueprint's mesh.

    Raises:
        UserError: names or shapes are of another model.
    """
    targets = logical_targets(blueprint)
    _check(flat, targets)

    def build(flat: Mapping[str, jax.Array]) -> TrainState:
        masters, mu, nu = (
            from_logical_part(flat, p, blueprint.params) for p in ("params", "mu", "nu")
        )
        return TrainState(
            flat["step"], masters, (mu, nu), from_logical_part(flat, "bias", blueprint.biases)
        )

    shardings = blueprint.shardings(blueprint.state_specs())
    return jax.jit(build, out_shardings=shardings)({name: flat[name] for name in targets})


def weight_targets(blueprint: Blueprint, dtype: Any) -> dict[str, Any]:
    """Shapes, dtypes and shardings of weights that `load_weights` takes as they are.

    Args:
        blueprint: model and mesh. Banks with padding and scanned layers are changed all the same.
        dtype: dtype of weights that need not stay float32.

    Returns:
        `jax.ShapeDtypeStruct` by name, `params/…` and `bias/…`.
    """
    targets = {}
    for part, tree in (("params", blueprint.params), ("bias", blueprint.biases)):
        for name, variable in canonical(tree).items():
            shape = in_logical_order(variable).shape
            spec = fitting_spec(variable.get_metadata()["spec"], shape, blueprint.mesh)
            targets[f"{part}/{name}"] = jax.ShapeDtypeStruct(
                shape, _dtype_in_use(variable, dtype), sharding=NamedSharding(blueprint.mesh, spec)
            )
    return targets


def load_weights(
    flat: Mapping[str, jax.Array], blueprint: Blueprint, dtype: Any
) -> tuple[nnx.State, nnx.State]:
    """Weights for inference from a flat logical dict: (params, biases), split by their use.

    Arrays that are already as `weight_targets` says become part of the result; others are copied.

    Args:
        flat: `params/…` and `bias/…`.
        blueprint: model and mesh.
        dtype: dtype of weights that need not stay float32.

    Raises:
        UserError: names or shapes are of another model.
    """
    _check(flat, weight_targets(blueprint, dtype))

    def load(part: str, like: nnx.State) -> nnx.State:
        variables = nnx.to_flat_state(like)
        ready, rest = {}, []
        for path, variable in variables:
            array = flat.get(f"{part}/{'.'.join(map(str, path))}")  # None for scanned layers
            if _is_ready(array, variable, blueprint.mesh, dtype):
                ready[path] = variable.replace(array)
            else:
                rest.append((path, variable))
        if rest:
            others = nnx.from_flat_state(rest)
            ready |= dict(nnx.to_flat_state(_place(flat, part, others, blueprint, dtype)))
        return nnx.from_flat_state([(path, ready[path]) for path, _ in variables])

    return load("params", blueprint.params), load("bias", blueprint.biases)


def _is_ready(array: Any, variable: nnx.Variable, mesh: Any, dtype: Any) -> bool:
    """Whether an array can be a variable's value as it is."""
    if not isinstance(array, jax.Array) or array.shape != variable.get_value().shape:
        return False
    if array.dtype != _dtype_in_use(variable, dtype):
        return False
    spec = variable.get_metadata()["spec"]
    return array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim)


def _dtype_in_use(variable: nnx.Variable, dtype: Any) -> Any:
    """Of a weight of inference; what is no parameter, such as 8-bit values, keeps its own."""
    if not isinstance(variable, nnx.Param):
        return variable.get_value().dtype
    return jnp.float32 if variable.get_metadata()["float32"] else dtype


def _place(
    flat: Mapping[str, jax.Array], part: str, like: nnx.State, blueprint: Blueprint, dtype: Any
) -> nnx.State:
    """Weights in the shapes, dtypes and shardings of their use."""

    def build(flat: Mapping[str, jax.Array]) -> nnx.State:
        def cast(variable: nnx.Variable) -> nnx.Variable:
            return variable.replace(variable.get_value().astype(_dtype_in_use(variable, dtype)))

        values = from_logical_part(flat, part, like)
        return jax.tree.map(cast, values, is_leaf=lambda x: isinstance(x, nnx.Variable))

    names = [f"{part}/{name}" for name in canonical(like)]
    shardings = blueprint.shardings(specs_of(like))
    return jax.jit(build, out_shardings=shardings)({name: flat[name] for name in names})
