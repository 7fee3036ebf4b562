"""One MoE layer inside a shard_map with its gradients, fed and read in the oracle's terms."""

from __future__ import annotations

from functools import cache

import jax
import numpy as np
from brute_counters import brute_counters
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from oracle import Dense, Result, dense_moe, relative_error

from moejax.config import MoEConfig
from moejax.layer import MoELayer
from moejax.placement.arrays import home_slots
from sharding.gradients import reduce_gradients
from sharding.mesh import TOKEN_AXES, MeshShape, make_mesh
from sharding.specs import specs_of

# The same program, its machine code less polished: compiling takes most of these tests' time.
QUICK = {"xla_backend_optimization_level": 0}

PATHS = {
    "router": ("router", "w_DE"),
    "router_b": ("router", "b_E"),
    "w_in": ("bank", "w_in"),
    "w_out": ("bank", "w_out"),
    "b_in": ("bank", "b_in"),
    "b_out": ("bank", "b_out"),
    "shared_w_in": ("shared", "w_in"),
    "shared_w_out": ("shared", "w_out"),
    "shared_b_in": ("shared", "b_in"),
    "shared_b_out": ("shared", "b_out"),
    "shared_gate": ("shared_gate",),
    "u": ("projections", "u_DR"),
    "v": ("projections", "v_DR"),
    **{name: ("bank", name) for name in ("w_shared", "w_basis_in", "w_basis_out", "c_in", "c_out")},
}
AT_HOME = ("w_in", "w_out", "b_in", "b_out", "c_in", "c_out")


def random_weights(rng: np.random.Generator, config: MoEConfig, d_model: int) -> dict:
    """Float32 weights of every kind the configuration has, large enough to matter."""
    experts, num_experts = config.experts, config.router.num_experts
    hidden, shared, num_in = experts.hidden, experts.shared_hidden, experts.num_in

    def normal(*shape, fan_in):
        return (rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32)

    w = {
        "router": normal(d_model, num_experts, fan_in=d_model),
        "w_in": normal(num_experts, d_model, num_in, hidden, fan_in=d_model),
        "w_out": normal(num_experts, hidden, d_model, fan_in=hidden),
    }
    if config.router.bias:
        w["router_b"] = normal(num_experts, fan_in=100)
    if experts.bias:
        w["b_in"] = normal(num_experts, num_in, hidden, fan_in=4)
        w["b_out"] = normal(num_experts, d_model, fan_in=4)
    if shared:
        w["shared_w_in"] = normal(d_model, num_in, shared, fan_in=d_model)
        w["shared_w_out"] = normal(shared, d_model, fan_in=shared)
        if experts.bias:
            w["shared_b_in"] = normal(num_in, shared, fan_in=4)
            w["shared_b_out"] = normal(d_model, fan_in=4)
    if experts.shared_gate:
        w["shared_gate"] = normal(d_model, fan_in=d_model)
    return w


def dense_spec(config: MoEConfig) -> Dense:
    router = config.router
    return Dense(
        router.top_k,
        config.experts.activation,
        router.renormalize,
        router.load_balance_coef,
        router.z_loss_coef,
    )


def get(tree, path):
    for key in path:
        tree = tree[key]
    return tree


class ShardedLayer:
    """A compiled function of weights, tokens, mask and cotangent; all routings come as data."""

    def __init__(
        self, shape, config: MoEConfig, d_model: int, tokens: int, hosts=None, quick=True
    ) -> None:
        self.config, self.tokens = config, tokens
        self.data, self.expert, _ = shape
        self.devices = self.data * self.expert
        layer = MoELayer(d_model, config, expert_devices=self.expert, rngs=nnx.Rngs(0), hosts=hosts)
        self.layer = layer
        self.home = home_slots(config.router.num_experts, self.expert)
        graph, self.state, rest = nnx.split(layer, nnx.Param, ...)
        specs, rows = specs_of(self.state), P(TOKEN_AXES)

        def body(params, x, mask, ct, placement):
            def loss(params, x):
                y, aux = nnx.merge(graph, params, rest)(x, placement, token_mask_T=mask)
                share = jnp.sum(y.astype(jnp.float32) * ct) + aux.losses.total
                return share, (y, aux)

            (share, (y, aux)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
            waves = aux.counters.waves[None]
            return (
                y,
                lax.psum(share, TOKEN_AXES),
                aux.over_devices(),
                (reduce_gradients(grads[0], specs), grads[1]),
                waves,
            )

        self.jitted = jax.jit(
            jax.shard_map(
                body,
                mesh=make_mesh(MeshShape(*shape)),
                in_specs=(specs, rows, rows, rows, P()),
                out_specs=(rows, P(), P(), (specs, rows), rows),
                check_vma=False,
            ),
            compiler_options=QUICK if quick else {},
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all devices together."""
        return self.tokens * self.devices

    def params(self, weights: dict):
        """Weights in logical order → the layer's parameters at home."""
        pure = nnx.to_pure_dict(self.state)
        for name, path in PATHS.items():
            if name in weights:
                leaf = get(pure, path)
                value = weights[name]
                if name in AT_HOME:
                    value = np.zeros(leaf.shape, np.float32)
                    value[self.home] = weights[name]
                get(pure, path[:-1])[path[-1]] = jnp.asarray(value)
        state = jax.tree.map(lambda leaf: leaf, self.state)
        nnx.replace_by_pure_dict(state, pure)
        return state

    def logical(self, grads, names) -> dict:
        """The layer's gradients → logical order; padding slots must have none."""
        pure, out = nnx.to_pure_dict(grads), {}
        for name in names:
            value = np.asarray(get(pure, PATHS[name]))
            if name in AT_HOME:
                assert not np.delete(value, self.home, axis=0).any(), f"{name}: padding slots"
                value = value[self.home]
            out[name] = value
        return out

    def __call__(self, weights, x, ct, mask=None, placement=None):
        """y, loss, report summed over the mesh, gradients with `x` among them, waves by device."""
        mask = np.ones(self.num_tokens, bool) if mask is None else mask
        y, loss, aux, (grads, x_grad), waves = self.jitted(
            self.params(weights), x, mask, ct.astype(np.float32), placement
        )
        named = self.logical(grads, weights)
        named["x"] = np.asarray(x_grad)
        return np.asarray(y), float(loss), aux, named, np.asarray(waves)


@cache
def sharded_layer(shape, config, d_model, tokens, hosts=None, quick=True) -> ShardedLayer:
    """Compiled once for all tests that ask for the same."""
    return ShardedLayer(shape, config, d_model, tokens, hosts, quick)


def errors(run, want: Result) -> dict[str, float]:
    """Norm-relative error of everything a run returned."""
    return {name: relative(*pair) for name, pair in error_norms(run, want).items()}


def error_norms(run, want: Result) -> dict[str, tuple[float, float]]:
    """Norm of the error of everything a run returned, and the norm which that is relative to."""
    y, loss, _, grads, _ = run
    assert set(grads) == set(want.grads)
    right = {"y": want.y, "loss": want.loss, **want.grads}
    found = {}
    for name, value in {"y": y, "loss": loss, **grads}.items():
        scale = want.scales.get(name, np.linalg.norm(right[name]))
        found[name] = relative_error(value, right[name], 1.0), float(scale)
    return found


def relative(error: float, scale: float) -> float:
    """The quotient; where nothing is right but zero, the error as it is."""
    return error / scale if scale > 0 else error


def check_report(
    run, want: Result, sharded: ShardedLayer, hosts=None, slots=None, dropped=0, placement=None
) -> int:
    """Statistics and counters of a run against loops over the oracle's choice; returns waves.

    `slots` [tokens, K]: where assignments went, if not home.
    """
    aux = run[2]
    assert np.array_equal(aux.counts_E, want.counts)
    assert int(aux.num_tokens) == (want.experts[:, 0] >= 0).sum()
    np.testing.assert_allclose(float(aux.entropy_sum), want.entropy_sum, rtol=1e-5, atol=1e-5)
    slots = np.where(want.experts >= 0, sharded.home[want.experts], -1) if slots is None else slots
    slots = slots.reshape(sharded.devices, sharded.tokens, -1)
    budget = sharded.layer.budget(sharded.tokens, placement)
    expected = brute_counters(slots, budget, hosts) | {"dropped": dropped}
    found = {k: int(getattr(aux.counters, k)) for k in expected}
    assert found == expected
    assert (run[4] == expected["waves"]).all(), "devices disagree on the number of waves"
    return expected["waves"]


def run_oracle(config: MoEConfig, weights, x, ct, mask=None, kept=None, **routing) -> Result:
    """The oracle for a layer's configuration."""
    return dense_moe(dense_spec(config), weights, x, ct, mask, kept, **routing)
