"""`ShardedMoELayer` in somebody else's Flax model, with `grad` taken outside the shard_map."""

import chex
import jax
import numpy as np
import pytest
from draws import draws
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from oracle import relative_error
from standalone_support import BOUND, D, data, make, moe

from moejax.standalone import ShardedMoELayer
from sharding.gradients import reduce_gradients
from sharding.mesh import TOKEN_AXES, MeshShape, make_mesh
from sharding.specs import specs_of


class Model(nnx.Module):
    """Linear → MoE → linear, as anybody might write it."""

    def __init__(self, mesh, wrap=lambda call: call):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(D, D, rngs=rngs)
        self.moe = ShardedMoELayer(D, moe(), mesh=mesh, rngs=rngs)
        self.down = nnx.Linear(D, 3, rngs=rngs)
        self.wrap = wrap

    def __call__(self, x):
        h = jnp.tanh(self.up(x))
        y, aux_loss, aux = self.wrap(lambda moe, h: moe(h))(self.moe, h)
        return self.down(h + y), aux_loss, aux


def make_layer(rng):
    mesh = make_mesh(MeshShape(data=2))
    return make(lambda: ShardedMoELayer(D, moe(), mesh=mesh, rngs=nnx.Rngs(0)), rng)


@nnx.jit
def loss_outside(model, x, target):
    """Loss, report, and gradients of the model and the input."""

    def loss(model, x):
        out, aux_loss, aux = model(x)
        return jnp.mean(jnp.sin(out) * target) + 3 * aux_loss, aux

    return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, x)


def loss_inside(model, mesh, x, target):
    """The same as train.py would do it: the whole model in one shard_map, grad inside.

    Tokens are padded by hand, to a multiple of the devices.
    """
    devices = mesh.shape["data"] * mesh.shape["expert"]
    tokens = x.reshape(-1, D).shape[0]
    padding = -tokens % devices
    x = jnp.pad(x.reshape(-1, D), ((0, padding), (0, 0)))
    target = jnp.pad(target.reshape(-1, 3), ((0, padding), (0, 0)))
    mask = np.arange(tokens + padding) < tokens
    parts = {"up": model.up, "moe": model.moe.layer, "down": model.down}
    split = {name: nnx.split(part, nnx.Param, ...) for name, part in parts.items()}
    params = {name: s[1] for name, s in split.items()}
    rest = {name: s[2] for name, s in split.items()}
    specs = {"up": P(), "moe": specs_of(params["moe"]), "down": P()}

    def body(params, x, rest, mask, target):
        def share(params, x):
            up, moe, down = (nnx.merge(split[n][0], params[n], rest[n]) for n in parts)
            h = jnp.tanh(up(x))
            y, aux = moe(h, token_mask_T=mask)
            out = down(h + y)
            return jnp.sum(jnp.sin(out) * target) / (tokens * 3) + 3 * aux.losses.total

        value, (grads, x_grad) = jax.value_and_grad(share, (0, 1))(params, x)
        return lax.psum(value, TOKEN_AXES), reduce_gradients(grads, specs), x_grad

    rows = P(TOKEN_AXES)
    run = jax.jit(
        jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(specs, rows, P(), rows, rows),
            out_specs=(P(), specs, rows),
            check_vma=False,
        )
    )
    value, grads, x_grad = run(params, x, rest, mask, target)
    return value, grads, x_grad[:tokens]


def leaves(tree):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def same_gradients(got, want):
    got, want = leaves(got), leaves(want)
    assert len(got) == len(want) > 0
    for (name, a), b in zip(got.items(), want.values()):
        assert np.any(b), f"{name}: the test needs a gradient here"
        assert relative_error(a, b) < BOUND, name


def test_outside_equals_inside(rng):
    """3 × 5 tokens on 4 devices: leading dimensions, and padding that must not count."""
    mesh = make_mesh(MeshShape(data=2, expert=2, tensor=2))
    model = make(lambda: Model(mesh), rng)
    x, target = data(rng, 3, 5)
    (value, aux), (grads, x_grad) = loss_outside(model, x, target)
    want_value, want_grads, want_x = loss_inside(model, mesh, x, target)
    assert relative_error(value, want_value) < BOUND
    chex.assert_equal_shape([x_grad, x])
    chex.assert_tree_all_finite((value, grads, x_grad))
    assert relative_error(x_grad.reshape(-1, D), want_x) < BOUND
    grads = nnx.to_pure_dict(grads)
    grads["moe"] = grads["moe"]["layer"]
    same_gradients(grads, {name: nnx.to_pure_dict(g) for name, g in want_grads.items()})
    assert int(aux.num_tokens) == 15 and int(np.sum(aux.counts_E)) == 30
    assert int(aux.counters.assignments) == 30 and int(aux.counters.waves) > 1


def test_auxiliary_loss_alone_has_a_gradient(rng):
    """Without the output's cotangent only the router and the input learn."""
    layer = make_layer(rng)
    x, _ = data(rng, 8)

    @nnx.jit
    def run(layer, x):
        return nnx.grad(lambda layer, x: layer(x)[1], argnums=(0, 1))(layer, x)

    grads, x_grad = run(layer, x)
    grads = nnx.to_pure_dict(grads)["layer"]
    assert np.any(grads["router"]["w_DE"]) and np.any(x_grad)
    assert not any(np.any(g) for g in jax.tree.leaves((grads["bank"], grads["shared"])))


# ---- under other transforms -------------------------------------------------------------------


def checkpointed(call):
    """`jax.checkpoint` on the pure function of the layer's state."""

    def run(moe, h):
        graph, state = nnx.split(moe)
        return jax.checkpoint(lambda state, h: call(nnx.merge(graph, state), h))(state, h)

    return run


@pytest.fixture(scope="module")
def plain():
    """A model on two devices, its inputs, and what it gives without a wrapper."""
    rng = draws(__name__)
    mesh, seed = make_mesh(MeshShape(data=2)), int(rng.integers(2**32))
    x, target = data(rng, 7)
    model = make(lambda: Model(mesh), np.random.default_rng(seed))
    return mesh, seed, x, target, loss_outside(model, x, target)


@pytest.mark.parametrize("wrap", [nnx.remat, checkpointed])
def test_recomputed(plain, wrap):
    mesh, seed, x, target, ((value, _), (grads, x_grad)) = plain
    model = make(lambda: Model(mesh, wrap), np.random.default_rng(seed))
    (again, _), (again_grads, again_x) = loss_outside(model, x, target)
    assert relative_error(again, value) < BOUND
    assert relative_error(again_x, x_grad) < BOUND
    same_gradients(nnx.to_pure_dict(again_grads), nnx.to_pure_dict(grads))


def test_scanned(rng):
    """The layer as the body of `lax.scan`, against the same steps one by one."""
    layer = make_layer(rng)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    x, _ = data(rng, 8)

    def step(params, x):
        y, aux_loss, _ = nnx.merge(graph, params, rest)(x)
        return jnp.tanh(x + y), aux_loss

    def scanned(params, x):
        x, losses = lax.scan(lambda x, _: step(params, x), x, length=2)
        return jnp.sum(x**2) + jnp.sum(losses)

    value, (grads, x_grad) = jax.jit(jax.value_and_grad(scanned, argnums=(0, 1)))(params, x)

    @jax.jit
    def compiled(params, x, cts):
        out, pull = jax.vjp(step, params, x)
        return out, *pull(cts)

    def step_and_pull(x, x_ct):  # from host memory, so that one program serves all calls
        return jax.device_get(compiled(params, np.asarray(x), (np.asarray(x_ct), np.float32(1))))

    (middle, first), *_ = step_and_pull(x, x)
    (last, second), *_ = step_and_pull(middle, x)
    assert relative_error(value, np.sum(last**2) + first + second) < BOUND
    _, second_grads, middle_ct = step_and_pull(middle, 2 * last)
    _, first_grads, want_x = step_and_pull(x, middle_ct)
    assert relative_error(x_grad, want_x) < BOUND
    same_gradients(grads, jax.tree.map(np.add, first_grads, second_grads))
