"""Rows of fewer columns: the layer against the dense float64 oracle with projected weights.

x·U·Uᵀ·w_in is what an expert makes of a projected token, and what it makes of a whole one with the
weights U·Uᵀ·w_in; likewise w_out·V·Vᵀ on the way home. So the oracle runs with those weights, and
the chain rule through U·Uᵀ is written by hand.
"""

import math
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from moe_harness import QUICK, check_report, error_norms, relative, run_oracle, sharded_layer
from oracle import relative_error
from planner_support import run_config
from standalone_support import make
from test_layer_oracle import FULL, D, draw, moe
from train_support import make_config

from moejax.config import EXACT_WIRE, ExpertsConfig, MoEConfig, RouterConfig, WireConfig
from moejax.errors import UserError
from moejax.exchange.reduced import principal_components
from moejax.inference.row_projections import add_projections, measure_rows
from moejax.standalone import ShardedMoELayer
from moejax.training.state import Blueprint, load_weights, logical_targets
from moejax.training.step import make_eval_step
from sharding.costs import count_parameters
from sharding.mesh import MeshShape, make_mesh
from sharding.planner import plan

BOUND = 3e-6  # norm-relative, float32, over all outputs and gradients; worst of 50 draws: 7.4e-7


def with_wire(config, **wire):
    exchange = replace(config.exchange, wire=WireConfig(**wire))
    return replace(config, exchange=exchange)


def orthonormal(rng, columns, d_model=D):
    return np.linalg.qr(rng.normal(size=(d_model, columns)))[0].astype(np.float32)


def projected_oracle(config, weights, x, ct, mask):
    """The oracle with U·Uᵀ·w_in, w_out·V·Vᵀ and b_out·V·Vᵀ; gradients of all that was given."""
    given = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    u, v = (given.pop(name, np.eye(D)) for name in ("u", "v"))
    p, q = u @ u.T, v @ v.T
    changed = given | {
        "w_in": np.einsum("de,senh->sdnh", p, given["w_in"]),
        "w_out": given["w_out"] @ q,
    }
    if "b_out" in given:
        changed["b_out"] = given["b_out"] @ q
    result = run_oracle(config, changed, x, ct, mask)
    grads = dict(result.grads)
    p_ct = np.einsum("sdnh,senh->de", grads["w_in"], given["w_in"])
    q_ct = np.einsum("shd,she->ed", grads["w_out"], given["w_out"])
    grads["w_in"] = np.einsum("de,senh->sdnh", p, grads["w_in"])
    grads["w_out"] = grads["w_out"] @ q
    if "b_out" in given:
        q_ct += given["b_out"].T @ grads["b_out"]
        grads["b_out"] = grads["b_out"] @ q
    if "u" in weights:
        grads["u"] = (p_ct + p_ct.T) @ u
    if "v" in weights:
        grads["v"] = (q_ct + q_ct.T) @ v
    return replace(result, grads=grads)


def draw_projected(rng, config, tokens, routing, devices):
    """As `draw`, with projections that are no longer orthonormal, as after some training."""
    weights, x, ct, mask, _ = draw(rng, config, tokens, routing, devices)
    wire = config.exchange.wire
    for name, columns in ("u", wire.dispatch_dim), ("v", wire.combine_dim):
        if columns is not None:
            noise = 0.2 * rng.normal(size=(D, columns)).astype(np.float32)
            weights[name] = orthonormal(rng, columns) + noise
    return weights, x, ct, mask


CASES = {
    "buckets": (
        (1, 4, 1),
        moe(10, 3, "all_to_all", 3, **FULL),
        {"dispatch_dim": 5, "combine_dim": 11},
    ),
    "ring": ((1, 4, 1), moe(16, 3, "ring", slack=0.5, activation="gelu"), {"dispatch_dim": 9}),
    "tensor": (
        (2, 2, 2),
        moe(8, 2, "all_to_all", 3, **FULL),
        {"dispatch_dim": 12, "combine_dim": 3},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_the_projected_oracle(rng, name):
    """Output and all gradients, the projections' too; routing and counters as with whole rows."""
    shape, config, wire = CASES[name]
    config = with_wire(config, **wire)
    sharded = sharded_layer(shape, config, D, 8)
    waves = []
    for routing in ("random", "one_device"):
        weights, x, ct, mask = draw_projected(rng, config, sharded.num_tokens, routing, shape[1])
        want = projected_oracle(config, weights, x, ct, mask)
        run = sharded(weights, x, ct, mask)
        for part, pair in error_norms(run, want).items():
            assert relative(*pair) <= BOUND, f"{routing}: {part}: {relative(*pair):.1e}"
        waves.append(check_report(run, want, sharded))
    assert max(waves) > 1


def test_as_many_columns_change_nothing(rng):
    """Square orthonormal projections rotate, and the folded weights rotate back."""
    config = moe(6, 2, **FULL)
    weights, x, ct, mask, want = draw(rng, config, 8, "random", 1)
    rotations = {"u": orthonormal(rng, D), "v": orthonormal(rng, D)}
    sharded = sharded_layer((1, 1, 1), with_wire(config, dispatch_dim=D, combine_dim=D), D, 8)
    y, loss, _, grads, _ = sharded(weights | rotations, x, ct, mask)
    assert relative_error(y, want.y) < 1e-6
    assert abs(loss - want.loss) < 3e-7 * np.abs(want.y * ct).sum()  # a sum whose terms cancel
    for name, value in want.grads.items():
        assert relative_error(grads[name], value, want.scales.get(name)) < BOUND, name
    x = x.astype(ml_dtypes.bfloat16)  # rounded for the oracle too: other tokens, other experts
    want = run_oracle(config, weights, x, ct, mask)
    y, *_ = sharded(weights | rotations, x, ct, mask)
    assert y.dtype == ml_dtypes.bfloat16 and 1e-3 < relative_error(y, want.y) < 2e-2


def test_narrow_rows_are_rounded(rng):
    """int8 on top: narrow rows are what is rounded, so the error is int8's and no more."""
    wire = {"dispatch_dim": 12, "combine_dim": 12}
    config = moe(8, 2, "all_to_all")
    weights, x, ct, mask = draw_projected(rng, with_wire(config, **wire), 32, "random", 4)
    want = projected_oracle(with_wire(config, **wire), weights, x, ct, mask)
    eight = dict.fromkeys(("dispatch", "combine", "dispatch_grad", "combine_grad"), "int8")
    run = sharded_layer((1, 4, 1), with_wire(config, **wire, **eight), D, 8)(weights, x, ct, mask)
    found = {part: relative(*pair) for part, pair in error_norms(run, want).items()}
    exact = ("loss", "router", "router_b")  # errors cancel; also by the losses of whole tokens
    # Worst of 3,776 draws 1.8e-2, least of what is not exact 2.8e-3.
    assert all(error < 3e-2 and (error > 1e-4 or part in exact) for part, error in found.items())


def test_bytes_of_the_traced_program():
    """Each way by its own width, counted in a traced training step with narrow rounded rows."""
    wire = WireConfig("int8", "compute", "compute", "float8", dispatch_dim=48, combine_dim=96)
    config = run_config(
        exchange={"mode": "all_to_all", "bucket_slack": math.inf, "wire": wire},
        model={"num_layers": 1, "compute_dtype": "bfloat16"},
    )
    made = plan(config, MeshShape(1, 4, 2))
    assert made.formulas_agree
    sent = {
        (c.name, c.phase): c.sent for c in made.collectives if c.name in ("dispatch", "combine")
    }
    rows, copies = 3 * 16 * 16 // 4, 2  # to the three others; experts of a token on a device
    assert sent == {
        ("dispatch", "forward"): rows * (48 + 4 + 8 * copies),
        ("dispatch", "backward"): rows * (2 * 48 + 4 * copies),
        ("combine", "forward"): rows * 2 * 96,
        ("combine", "backward"): rows * (96 + 4),
    }
    exact = replace(config.model.moe.exchange, wire=EXACT_WIRE)
    whole = replace(config.model, moe=replace(config.model.moe, exchange=exact))
    more = count_parameters(config.model).total - count_parameters(whole).total
    assert more == 128 * (48 + 96)


def test_principal_components(rng):
    """What is left out of rows is the least that any projection of the rank leaves out."""
    rows = rng.normal(size=(200, D)) @ np.diag(np.geomspace(1, 0.01, D)) @ orthonormal(rng, D) + 0.3
    u = np.asarray(principal_components(jnp.asarray(rows.T @ rows, jnp.float32), 5), np.float64)
    np.testing.assert_allclose(u.T @ u, np.eye(5), atol=1e-5)
    left = np.linalg.norm(rows - rows @ u @ u.T) ** 2
    np.testing.assert_allclose(left, (np.linalg.svd(rows)[1][5:] ** 2).sum(), rtol=1e-4)


def test_moments_of_a_layer(rng):
    """Tokens that are routed, and the routed experts' outputs alone, over all devices."""
    config = replace(moe(6, 2, bias=True), router=RouterConfig(num_experts=6, top_k=2))
    mesh = make_mesh(MeshShape(2, 2, 2))
    layer = make(lambda: ShardedMoELayer(D, config, mesh=mesh, rngs=nnx.Rngs(0)), rng)
    x, mask = rng.normal(size=(16, D)).astype(np.float32), rng.random(16) < 0.8
    layer.layer.measure_rows = True
    y, _, aux = jax.jit(lambda x: layer(x, token_mask=mask))(x)
    for found, rows in (aux.moments.inputs_DD, x[mask]), (aux.moments.outputs_DD, y):
        rows = np.asarray(rows, np.float64)
        np.testing.assert_allclose(found, rows.T @ rows, rtol=1e-5, atol=1e-4)


def test_components_of_a_model(rng):
    """All components of every layer's rows leave the loss; fewer are what training goes on from."""
    config = make_config(model={"scan_layers": True}).model
    config = replace(config, top_k_by_layer=(), num_layers=3)
    mesh, tokens = make_mesh(MeshShape(expert=2)), rng.integers(0, 50, (4, 9)).astype(np.int32)
    mask = np.ones((4, 8), bool)

    def model(**wire):
        narrow = replace(config, moe=with_wire(config.moe, **wire))
        return narrow, Blueprint(narrow, mesh)

    def nll(blueprint, *weights):
        return make_eval_step(blueprint, compiler_options=QUICK)(*weights, tokens, mask)

    _, whole = model()
    flat = {
        name: (0.2 * rng.normal(size=like.shape)).astype(np.float32)
        for name, like in logical_targets(whole, ("params", "bias")).items()
    }
    weights = load_weights(flat, whole, np.float32)
    with pytest.raises(UserError, match="measure_rows with no batch"):
        measure_rows(whole, *weights, [])
    moments = measure_rows(whole, *weights, [tokens] * 2)
    assert moments.inputs_DD.shape == (2, 32, 32)
    rotated, blueprint = model(dispatch_dim=32, combine_dim=32)
    projected = load_weights(add_projections(flat, rotated, moments), blueprint, np.float32)
    np.testing.assert_allclose(nll(blueprint, *projected), nll(whole, *weights), 1e-5)
    narrow, blueprint = model(combine_dim=3)
    projected = add_projections(flat, narrow, moments)
    wanted = logical_targets(blueprint, ("params", "bias"))
    assert {n: v.shape for n, v in wanted.items()} == {n: v.shape for n, v in projected.items()}
    v = np.asarray(projected["params/layers.2.moe.projections.v_DR"], np.float64)
    moment = np.asarray(moments.outputs_DD[1], np.float64)
    kept = np.linalg.eigvalsh(moment)[-3:].sum()
    np.testing.assert_allclose(np.trace(v.T @ moment @ v), kept, rtol=1e-4)


BANK = MoEConfig(RouterConfig(num_experts=6, top_k=2), ExpertsConfig(hidden=128))


def standalone(**wire):
    return ShardedMoELayer(
        128, with_wire(BANK, **wire), mesh=make_mesh(MeshShape()), rngs=nnx.Rngs(3)
    )


def output(moe, x):
    return jax.jit(lambda x: moe(x)[0])(x)


def test_folding_once(rng):
    """Folded once the layer says the same; quantized it is as far off as 8 bits are."""
    x = jnp.asarray(rng.normal(size=(24, 128)), jnp.float32)
    moe = standalone(dispatch_dim=96, combine_dim=40)
    want = output(moe, x)
    moe.layer.fold_projections()
    assert moe.layer.bank.w_in.shape[1] == 96 and moe.layer.bank.w_out.shape[2] == 40
    assert relative_error(output(moe, x), want) < 1e-6
    with pytest.raises(UserError, match="fold_projections called again"):
        moe.layer.fold_projections()
    moe.layer.quantize_experts("int8")
    assert moe.layer.bank.w_in_values.shape[3] == 96
    assert 1e-4 < relative_error(output(moe, x), want) < 2e-2
    direct = standalone(dispatch_dim=96, combine_dim=40)
    with pytest.raises(UserError, match="float8 rows need"):
        direct.layer.quantize_experts("int8", rows="float8")
    assert not direct.layer.folded and direct.layer.bank.w_in.shape[1] != 96
    direct.layer.quantize_experts("int8")
    stored = (nnx.to_pure_dict(nnx.state(m.layer.bank)) for m in (direct, moe))
    jax.tree.map(np.testing.assert_array_equal, *stored)
    with pytest.raises(UserError, match="quantize_experts does it"):
        direct.layer.fold_projections()


def test_what_is_refused():
    with pytest.raises(UserError, match="dispatch_dim=0: a row needs at least 1 column"):
        WireConfig(dispatch_dim=0)
    with pytest.raises(UserError, match="combine_dim=129 with d_model=128: rows cannot get wider"):
        standalone(combine_dim=129)
    with pytest.raises(UserError, match="rows of 96 columns with rotate=True"):
        standalone(dispatch="int8", rotate=True, dispatch_dim=96)


def test_folded_weights_are_not_kept_for_the_backward():
    """By remat="dots", which keeps products: these would be a second copy of all experts."""
    kept = []
    for wire in WireConfig(), WireConfig(dispatch_dim=96, combine_dim=96):
        config = run_config(
            experts={"hidden": 1024},
            exchange={"mode": "ring", "wire": wire},
            model={"remat": "dots"},
        )
        kept.append(plan(config, MeshShape(1, 4, 1)).memory.kept)
    assert kept[1] < 2 * kept[0]
