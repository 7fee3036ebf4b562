"""`ShardedMoELayer`: what a call takes, where the parameters are, what is refused."""

import chex
import jax
import numpy as np
import pytest
from draws import draws
from flax import nnx
from jax import numpy as jnp
from oracle import relative_error
from standalone_support import BOUND, D, data, make, moe

from moejax.config import ExchangeConfig, ExpertsConfig, MoEConfig, RouterConfig
from moejax.errors import UserError
from moejax.layer import MoELayer
from moejax.placement.arrays import contiguous, from_slots
from moejax.standalone import ShardedMoELayer, _apply
from pallas_kernels.tuning.lookup import use_table
from sharding.mesh import MeshShape, make_mesh


@pytest.mark.parametrize(
    "sizes, mode", [((2, 1, 1), "local"), ((1, 2, 1), "all_to_all"), ((1, 2, 1), "ring")]
)
def test_no_tokens(sizes, mode):
    """An empty batch gives an empty output, no loss, and gradients of zero."""
    config = MoEConfig(RouterConfig(4, 2, z_loss_coef=0.1), ExpertsConfig(8), ExchangeConfig(mode))
    layer = ShardedMoELayer(D, config, mesh=make_mesh(MeshShape(*sizes)), rngs=nnx.Rngs(0))

    @nnx.jit
    def run(layer, x):
        def loss(layer, x):
            y, aux_loss, aux = layer(x)
            return jnp.sum(y, dtype=jnp.float32) + aux_loss, (y, aux)

        return nnx.value_and_grad(loss, has_aux=True)(layer, x)

    (value, (y, aux)), grads = run(layer, jnp.zeros((3, 0, D), jnp.bfloat16))
    chex.assert_shape(y, (3, 0, D))
    assert y.dtype == jnp.bfloat16 and float(value) == 0 and int(aux.num_tokens) == 0
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))


@pytest.fixture(scope="module")
def called():
    """A layer on 2 × 2 and its compiled call."""
    rng = draws(__name__)
    mesh = make_mesh(MeshShape(data=2, expert=2))
    layer = make(lambda: ShardedMoELayer(D, moe(), mesh=mesh, rngs=nnx.Rngs(0)), rng)
    return layer, nnx.jit(lambda layer, x, placement, mask: layer(x, placement, mask))


def test_placement(called, rng):
    """Any placement gives the same output: contiguous, permuted, with replicas."""
    layer, call = called
    x, _ = data(rng, 2, 7)
    y, aux_loss, aux = call(layer, x, None, None)
    moved = np.append(rng.permutation(6), rng.permutation(6)[:2]).astype(np.int32)
    for placement in (contiguous(6, 2), from_slots(rng.permutation(6), 6), from_slots(moved, 6)):
        placed, placed_loss, placed_aux = call(layer, x, placement, None)
        assert relative_error(placed, y) < BOUND
        np.testing.assert_allclose(placed_loss, aux_loss, rtol=1e-6)
        chex.assert_trees_all_equal(placed_aux.counts_E, aux.counts_E)


def test_masked_tokens(called, rng):
    """They reach the shared experts only, count nowhere, and change nothing for the others."""
    layer, call = called
    x, _ = data(rng, 2, 7)
    mask = rng.random((2, 7)) < 0.6
    y, aux_loss, aux = call(layer, x, None, mask)
    alone, alone_loss, alone_aux = call(layer, np.where(mask[..., None], x, 1e3), None, mask)
    assert relative_error(np.asarray(alone)[mask], np.asarray(y)[mask]) < BOUND
    np.testing.assert_allclose(alone_loss, aux_loss, rtol=1e-6)
    assert int(aux.num_tokens) == mask.sum() and int(np.sum(aux.counts_E)) == 2 * mask.sum()
    chex.assert_trees_all_equal(alone_aux.counts_E, aux.counts_E)


def test_selection_bias_is_balanced(called, rng):
    layer, call = called
    config = RouterConfig(6, 2, selection_bias=True, bias_update_rate=0.25)
    mesh = layer.mesh
    balanced = ShardedMoELayer(D, MoEConfig(config), mesh=mesh, rngs=nnx.Rngs(0))
    _, _, aux = call(layer, data(rng, 9)[0], None, None)
    balanced.update_bias(aux)
    moved = 0.25 * np.sign(3 - np.asarray(aux.counts_E))  # 9 tokens, 2 of 6 experts: 3 on average
    np.testing.assert_array_equal(balanced.layer.router.selection_bias_E.get_value(), moved)
    plain = ShardedMoELayer(D, MoEConfig(), mesh=mesh, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"selection_bias=False: .* set RouterConfig\("):
        plain.update_bias(aux)


# ---- where its parameters are -----------------------------------------------------------------


def test_parameters_are_made_on_their_devices():
    """Eagerly and inside jit each device holds its part; the values are those of a plain layer."""
    mesh = make_mesh(MeshShape(data=2, expert=2, tensor=2))

    def build():
        return ShardedMoELayer(D, moe(), mesh=mesh, rngs=nnx.Rngs(3))

    plain = MoELayer(D, moe(), expert_devices=2, rngs=nnx.Rngs(params=nnx.Rngs(3).params()))
    for layer in (build(), nnx.jit(build)()):
        chex.assert_trees_all_close(
            nnx.to_pure_dict(nnx.state(layer.layer)), nnx.to_pure_dict(nnx.state(plain)), rtol=1e-6
        )
        bank = layer.layer.bank
        chex.assert_shape([s.data for s in bank.w_in.addressable_shards], (3, D, 2, 4))
        chex.assert_shape([s.data for s in bank.w_out.addressable_shards], (3, 4, D))
        assert layer.layer.router.w_DE.sharding.is_fully_replicated


# ---- refusals ---------------------------------------------------------------------------------


def test_too_few_experts_is_refused():
    mesh = make_mesh(MeshShape(expert=8))
    with pytest.raises(UserError, match=r"num_experts=6 on expert=8 devices"):
        ShardedMoELayer(D, moe(), mesh=mesh, rngs=nnx.Rngs(0))


def test_another_mesh_is_refused():
    with pytest.raises(UserError, match=r"axes x: must have exactly data, expert, tensor; .*make_"):
        ShardedMoELayer(D, moe(), mesh=jax.make_mesh((2,), ("x",)), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "x, how, message",
    [
        ((3, D + 1), {}, r"shape \(3, 17\): its last dimension must be d_model=16"),
        ((), {}, r"shape \(\): its last dimension must be d_model=16"),
        ((3, D), {"dtype": np.int32}, r"dtype int32: .* cast it first"),
        ((3, D), {"mask": np.ones(4, bool)}, r"token_mask bool\[4\]: must be bool\[3\]"),
        ((3, D), {"mask": np.ones(3, np.int32)}, r"token_mask int32\[3\]: must be bool\[3\]"),
        ((3, D), {"experts": 5}, r"placement of 5 experts in 6 slots: must have num_experts=6"),
        ((3, D), {"devices": 3}, r"in 9 slots: must have .* multiple of expert=2 devices"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(called, x, how, message):
    placement = None
    if "experts" in how or "devices" in how:
        placement = contiguous(how.get("experts", 6), 2)
        if "devices" in how:
            placement = from_slots(np.array([*range(6), 0, 1, 2]), 6)
    with pytest.raises(UserError, match=message) as error:
        called[0](np.zeros(x, how.get("dtype", np.float32)), placement, how.get("mask"))
    assert "\n" not in str(error.value)


def test_the_bare_layer_points_here():
    layer = MoELayer(D, moe(), expert_devices=1, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"outside of a shard_map .*standalone\.ShardedMoELayer"):
        layer(jnp.zeros((4, D), jnp.float32))


def test_a_trace_is_kept_for_its_table_alone(called, rng):
    """Called again it is not traced again; under another table of tile sizes it is, once."""
    layer, _ = called
    x, _ = data(rng, 2, 7)
    layer(x)
    before = _apply._cache_size()
    layer(x)
    assert _apply._cache_size() == before
    for _ in range(2):
        with use_table(None):
            layer(x)
    assert _apply._cache_size() == before + 1
