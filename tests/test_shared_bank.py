"""Experts that share parameters: exact, trained, placed and made independent."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from moe_harness import QUICK, check_report, errors, random_weights, run_oracle, sharded_layer
from oracle import relative_error
from train_support import assert_same_training, batches, initial, make_config, train

from moejax.config import ExpertsConfig, MoEConfig, RouterConfig, SharingConfig
from moejax.errors import UserError
from moejax.experts import ExpertBank
from moejax.model.initializers import INIT_STD
from moejax.placement.arrays import from_slots, home_slots
from moejax.shared_bank import SharedExpertBank, expanded
from moejax.standalone import ShardedMoELayer
from sharding.mesh import DATA, EXPERT, MeshShape, make_mesh
from sharding.specs import axes_of

D, TOKENS, EXPERTS, TOP_K = 12, 8, 5, 2
BFLOAT16 = ml_dtypes.bfloat16
# As in test_layer_oracle: float32 against float64, relative to the norm. A combination of a basis
# is one more product of M terms.
FLOAT32_BOUND = 1.2e-6
KINDS = {"up": SharingConfig("up"), "in": SharingConfig("in"), "basis": SharingConfig("basis", 3)}
PARTS = ("c_in", "c_out", "w_shared", "w_basis_in", "w_basis_out")  # not of an oracle's expert


def config_of(kind, **experts) -> MoEConfig:
    experts = {"hidden": 6, "bias": True, "shared_hidden": 4} | experts
    return MoEConfig(
        RouterConfig(EXPERTS, TOP_K, load_balance_coef=0.1, z_loss_coef=0.05, bias=True),
        ExpertsConfig(sharing=KINDS[kind], **experts),
    )


def draw(rng, config, tokens):
    """Weights by the names of the parameters, tokens, cotangent, mask."""
    weights = random_weights(rng, config, D)
    experts, sharing = config.experts, config.experts.sharing
    sizes = D, experts.num_in, experts.hidden, D
    for name in "w_in", "w_out":
        weights.pop(name)
    parts = {n: (EXPERTS, *s) for n, s in sharing.own(*sizes).items()} | sharing.shared(*sizes)
    for name, shape in parts.items():
        fan_in = {"c": sharing.rank or 1}.get(name[0], experts.hidden if "out" in name else D)
        weights[name] = (rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32)
    x = rng.normal(size=(tokens, D)).astype(np.float32)
    return weights, x, rng.normal(size=x.shape).astype(np.float32), rng.random(tokens) > 0.1


def by_hand(weights):
    """The same with an expert's own matrices, float64."""
    out = {n: v for n, v in weights.items() if n not in PARTS}
    if "c_in" in weights:
        for side in "in", "out":
            c, basis = (weights[f"{n}_{side}"].astype(np.float64) for n in ("c", "w_basis"))
            out[f"w_{side}"] = np.stack(
                [sum(c[e, m] * b for m, b in enumerate(basis)) for e in range(len(c))]
            )
        return out
    common = np.stack([weights["w_shared"]] * EXPERTS)
    out["w_in"] = np.concatenate([weights["w_in"], common], 2) if "w_in" in weights else common
    return out


def gradients(weights, grads):
    """Of the parts, from those of whole experts."""
    out = {n: g for n, g in grads.items() if n == "x" or n in weights}
    if "c_in" in weights:
        for side in "in", "out":
            c, basis = (weights[f"{n}_{side}"].astype(np.float64) for n in ("c", "w_basis"))
            whole = grads[f"w_{side}"]
            out[f"c_{side}"] = np.array([[(g * b).sum() for b in basis] for g in whole])
            out[f"w_basis_{side}"] = np.stack(
                [(c[:, m] * whole.T).T.sum(0) for m in range(len(basis))]
            )
        return out
    own = weights["w_in"].shape[2] if "w_in" in weights else 0
    out["w_shared"] = grads["w_in"][:, :, own:].sum(0)
    if own:
        out["w_in"] = grads["w_in"][:, :, :own]
    return out


CASES = [
    ("up", (2, 2, 1), True, {"activation": "swiglu_oai"}),
    ("in", (1, 2, 2), False, {"activation": "gelu", "bias": False, "shared_hidden": 0}),
    ("basis", (1, 2, 2), True, {}),
]
MORE = [
    (kind, shape, copies, {"bias": bias})
    for kind in KINDS
    for shape in ((1, 1, 1), (2, 2, 1), (1, 2, 2))
    for copies in (False, True)
    for bias in (False, True)
    if shape[1] > 1 or not copies
]


@pytest.mark.parametrize(
    ("kind", "shape", "copies", "experts"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_a_layer_is_that_with_an_experts_own_matrices(rng, kind, shape, copies, experts):
    """5 experts on 2 devices, so that one has a slot of padding."""
    config = config_of(kind, **experts)
    sharded = sharded_layer(shape, config, D, TOKENS)
    weights, x, ct, mask = draw(rng, config, sharded.num_tokens)
    want = run_oracle(config, by_hand(weights), x, ct, mask)
    placement = None
    if copies:  # each expert on a device of its own, or on both, and an empty slot
        slots = np.array([0, 1, 2, 3, 4, 0, 4, 3, 2, -1])
        placement = from_slots(slots, EXPERTS, 2)
    found = sharded(weights, x, ct, mask, placement)
    scales = {n: s for n, s in want.scales.items() if n not in ("w_in", "w_out")}
    right = dataclasses.replace(want, grads=gradients(weights, want.grads), scales=scales)
    for name, error in errors(found, right).items():
        assert error <= FLOAT32_BOUND, f"{name} is off by {error:.1e} of its norm"
    if not copies:
        check_report(found, right, sharded)


def test_bfloat16_sums_are_rounded_once(rng):
    """Over the matrices of a basis, and in the backward over 64 slots; summed in bfloat16 they
    would be several roundings off."""
    slots, half = 64, 2.0**-8  # of a rounding to 8 bits, relative

    def draw(*shape):
        return rng.normal(size=shape).astype(BFLOAT16)

    def check(got, want, terms):
        assert got.dtype == BFLOAT16
        # float32 sums of some terms may be off by these's own roundings.
        slack = half * np.abs(want) + 64 * 2.0**-24 * terms
        assert (np.abs(got.astype(np.float64) - want) <= slack).all()

    own = {"c_in": draw(slots, 5), "c_out": draw(slots, 5)}
    shared = {"w_basis_in": draw(5, 4, 2, 3), "w_basis_out": draw(5, 3, 4)}
    c, basis, ct = (
        a.astype(np.float64) for a in (own["c_out"], shared["w_basis_out"], draw(slots, 3, 4))
    )
    made, pull = jax.vjp(lambda s: expanded(own, s).w_out_SHD, shared)
    check(np.asarray(made), np.tensordot(c, basis, 1), np.tensordot(abs(c), abs(basis), 1))
    (grads,) = pull(jnp.asarray(ct, jnp.bfloat16))
    right, terms = (np.tensordot(f(c), f(ct), ([0], [0])) for f in (np.asarray, np.abs))
    check(np.asarray(grads["w_basis_out"]), right, terms)

    own, shared = {"w_out": draw(slots, 3, 4)}, {"w_shared": draw(4, 2, 3)}
    ct = draw(slots, 4, 2, 3)
    made, pull = jax.vjp(lambda s: expanded(own, s).w_in_SDNH, shared)
    assert (np.asarray(made) == shared["w_shared"]).all() and len(made) == slots
    (grads,) = pull(jnp.asarray(ct))
    wide = ct.astype(np.float64)
    check(np.asarray(grads["w_shared"]), wide.sum(0), abs(wide).sum(0))


@pytest.mark.parametrize("kind", KINDS)
def test_they_start_like_independent_experts(kind):
    config = config_of(kind, hidden=64, bias=False).experts

    def values(devices):
        keys = nnx.Rngs(params=7)
        bank = SharedExpertBank(
            48, EXPERTS, config, expert_devices=devices, rngs=keys, output_std=5e-3
        )
        own, shared = bank.parts()
        home = home_slots(EXPERTS, devices)
        for name, value in own.items():
            assert not np.delete(value, home, axis=0).any(), name
        return {n: np.asarray(v)[home] for n, v in own.items()} | {
            n: np.asarray(v) for n, v in shared.items()
        }

    made = values(1)
    jax.tree.map(np.testing.assert_array_equal, made, values(2))
    whole = by_hand(made)
    for name, std in ("w_in", INIT_STD), ("w_out", 5e-3):
        # Of 3,000 numbers and more: four times what chance moves a deviation by.
        each = whole[name].reshape(EXPERTS, -1).std(axis=1)
        assert each == pytest.approx(std, rel=4 / np.sqrt(2 * 48 * 64))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sizes", "scan_layers"),
    [
        ("basis", (2, 2, 1), True),
        *((kind, sizes, False) for kind in KINDS for sizes in ((2, 2, 1), (1, 2, 2))),
    ],
)
def test_training_on_two_meshes(rng, kind, sizes, scan_layers):
    """What is shared is stored in pieces along `data`, and summed over `expert`, too."""
    config = make_config(5, model={"top_k_by_layer": (), "scan_layers": scan_layers})
    experts = ExpertsConfig(hidden=128, shared_hidden=8, bias=True, sharing=KINDS[kind])
    moe = dataclasses.replace(config.model.moe, experts=experts)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    start, tokens = initial(config), batches(rng, 2)
    want, got = (train(config, s, start, tokens) for s in ((1, 1, 1), sizes))
    assert_same_training(got, want)
    flat = {".".join(map(str, p)): v for p, v in nnx.to_flat_state(got.blueprint.storage)}
    shared = {n: how for n, how in flat.items() if ".bank.w_basis" in n or ".bank.w_shared" in n}
    assert shared and all(EXPERT not in axes_of(how.stored) for how in shared.values())
    if kind == "basis" and sizes[0] == 2:
        assert all(DATA in axes_of(how.stored) for n, how in shared.items() if "basis_in" in n)
    for name in start:
        if name.startswith("params/") and ".bank.w" in name:
            assert not np.array_equal(want.last[name], start[name]), name


BANK = MoEConfig(RouterConfig(num_experts=5, top_k=2), ExpertsConfig(hidden=256))


def standalone(kind, sizes=(1, 1, 1)):
    experts = dataclasses.replace(BANK.experts, sharing=KINDS[kind])
    mesh = make_mesh(MeshShape(*sizes))
    return ShardedMoELayer(
        128, dataclasses.replace(BANK, experts=experts), mesh=mesh, rngs=nnx.Rngs(3)
    )


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("up", (1, 2, 1)), *(pytest.param(k, (1, 2, 2), marks=pytest.mark.slow) for k in KINDS)],
)
def test_made_independent_they_compute_the_same(rng, kind, sizes):
    """And can then live in slots or have 8 bits."""
    x = jnp.asarray(rng.normal(size=(24, 128)), jnp.float32)
    moe = standalone(kind, sizes)

    def output(moe):
        return jax.jit(lambda x: moe(x)[0], compiler_options=QUICK)(x)

    want = output(moe)
    with pytest.raises(UserError, match="make_resident with slots=3, of experts that share"):
        moe.layer.bank.make_resident(3)
    moe.layer.expand_experts()
    bank = moe.layer.bank
    assert isinstance(bank, ExpertBank) and not np.asarray(bank.w_in[...])[5].any()
    assert bank.w_in[...].sharding.spec == bank.w_in.get_metadata()["spec"]
    assert relative_error(output(moe), want) < 1e-6
    moe.layer.expand_experts()
    assert moe.layer.bank is bank
    direct = standalone(kind, sizes)
    direct.layer.quantize_experts("int8", tensor=sizes[2])
    moe.layer.quantize_experts("int8", tensor=sizes[2])
    stored = (nnx.to_pure_dict(nnx.state(m.layer.bank)) for m in (direct, moe))
    jax.tree.map(np.testing.assert_array_equal, *stored)
