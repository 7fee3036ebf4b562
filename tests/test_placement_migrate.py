"""Weights that live in slots: moved with every bit, by one program; the layer computes alike."""

from functools import lru_cache

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_placement_fetch import REPLICAS, home_content, random_slots
from train_support import SEQ, VOCAB, batches, make_config

from moejax.config import ExpertsConfig, MoEConfig, RouterConfig
from moejax.errors import UserError
from moejax.inference.expert_weights import quantized_blueprint, quantizing
from moejax.model.canonical import canonical
from moejax.placement.arrays import from_slots, slots_at_home
from moejax.placement.migrate import Migrator, choose_sources, migrate
from moejax.placement.resident import make_resident, resident_blueprint
from moejax.standalone import ShardedMoELayer
from moejax.training.state import Blueprint, load_weights
from sharding.mesh import EXPERT, TENSOR, TOKEN_AXES, MeshShape, make_mesh
from sharding.specs import specs_of

MESHES = [(1, 8, 1), (2, 4, 1), (1, 4, 2)]
SPECS = {"w": P(EXPERT, None, TENSOR), "b": P(EXPERT)}


@lru_cache
def compiled(sizes):
    mesh = make_mesh(MeshShape(*sizes))
    mapped = jax.shard_map(
        migrate, mesh=mesh, in_specs=(SPECS, P(), P()), out_specs=SPECS, check_vma=False
    )
    return jax.jit(mapped, out_shardings=shardings(sizes))


def shardings(sizes):
    mesh = make_mesh(MeshShape(*sizes))
    return {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}


def filled(experts, content):
    """Slots [P, …] of experts [E, …]; zero where empty."""
    mask = (content >= 0).reshape(-1, *[1] * (experts.ndim - 1))
    return np.where(mask, experts[np.maximum(content, 0)], np.zeros((), experts.dtype))


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_there_and_back(rng, sizes, dtype):
    devices, experts, slots = sizes[1], 2 * sizes[1] + 3, 5
    w = np.asarray(jnp.asarray(100 * rng.normal(size=(experts, 3, 4)), dtype))
    b = rng.normal(size=(experts, 2)).astype(np.float32)
    contents = [random_slots(rng, experts, devices, slots).astype(np.int32) for _ in range(3)]
    contents.append(home_content(experts, devices, slots).astype(np.int32))
    before = compiled(sizes)._cache_size()
    banks = {"w": filled(w, contents[-1]), "b": filled(b, contents[-1])}
    banks = jax.device_put(banks, shardings(sizes))
    # Each from the one before, at last from the last to the first.
    for old, new in zip([contents[-1], *contents], [*contents, contents[0]]):
        banks = compiled(sizes)(banks, old, new)
        for name, values in (("w", w), ("b", b)):
            assert banks[name].dtype == values.dtype
            got, want = np.asarray(banks[name]), filled(values, new)
            assert got.tobytes() == want.tobytes(), name
    assert compiled(sizes)._cache_size() == before + 1


def test_sources(rng):
    """A holder on the device itself; else one whose link is least used; the only one there is."""
    devices, slots, experts = 8, 6, 20
    choose = jax.jit(choose_sources, static_argnums=2)
    fullest, naive = 0, 0
    for _ in range(20):
        old = random_slots(rng, experts, devices, slots).astype(np.int32)
        new = random_slots(rng, experts, devices, slots).astype(np.int32)
        source = np.asarray(choose(old, new, devices))
        assert np.array_equal(source < 0, new < 0)
        assert np.array_equal(old[source[new >= 0]], new[new >= 0])
        pairs, first = np.zeros((2, devices, devices), int)
        open_slots = []
        for p in np.flatnonzero(new >= 0):
            to, holders = p // slots, np.flatnonzero(old == new[p]) // slots
            if to in holders:
                assert source[p] // slots == to
                continue
            first[holders[0], to] += 1
            if len(holders) == 1:
                pairs[holders[0], to] += 1
            else:
                open_slots.append((p, to, holders))
        for p, to, holders in open_slots:
            load = [(pairs[g, to], pairs[g].sum()) for g in holders]
            chosen = source[p] // slots
            assert load[holders.tolist().index(chosen)] == min(load)
            pairs[chosen, to] += 1
        fullest += pairs.max()
        naive += first.max()
    assert fullest < naive, "no better than always the first"


def test_an_expert_that_is_nowhere_and_other_numbers_of_slots(rng):
    """Lost experts are zero; the new placement may have more slots than the old."""
    mesh = make_mesh(MeshShape(1, 4, 1))
    old, new = np.array([0, 1, 2, -1], np.int32), np.array([3, 2, 2, 0, 1, 1, -1, 0], np.int32)
    bank = rng.normal(size=(4, 3)).astype(np.float32)
    run = jax.shard_map(
        migrate, mesh=mesh, in_specs=(P(EXPERT), P(), P()), out_specs=P(EXPERT), check_vma=False
    )
    got = np.asarray(jax.jit(run)(bank, old, new))
    bank[3] = 0
    np.testing.assert_array_equal(got, filled(bank, np.where(new < 0, 3, new)))


# ---- a layer in somebody else's model ----------------------------------------------------------


def test_a_resident_layer(rng):
    """Without an exchange of weights a resident layer computes what the same layer does at home."""
    config = MoEConfig(RouterConfig(num_experts=6, top_k=2), ExpertsConfig(hidden=8, bias=True))
    mesh, slots, devices = make_mesh(MeshShape(1, 4, 2)), 3, 4
    moe = ShardedMoELayer(16, config, mesh=mesh, rngs=nnx.Rngs(1))
    bank = moe.layer.bank
    for b in (bank.b_in, bank.b_out):
        b.set_value(jnp.asarray(rng.normal(size=b.shape), jnp.float32))
    x = jnp.asarray(rng.normal(size=(24, 16)), jnp.float32)
    plain = np.asarray(jax.jit(lambda x: moe(x)[0])(x))

    moe.layer.bank.make_resident(slots)
    present = slots_at_home(6, devices, slots)
    assert np.array_equal(present, home_content(6, devices, slots))
    run = nnx.jit(lambda moe, x, placement: moe(x, placement)[0])
    at_home = np.asarray(run(moe, x, from_slots(present, 6, 4)))
    np.testing.assert_allclose(at_home, plain, rtol=1e-6, atol=1e-6)

    new = random_slots(rng, 6, devices, slots)
    names = ("w_in", "w_out", "b_in", "b_out")
    banks = {name: getattr(bank, name)[...] for name in names}
    specs = {name: getattr(bank, name).get_metadata()["spec"] for name in names}
    step = jax.shard_map(
        migrate, mesh=mesh, in_specs=(specs, P(), P()), out_specs=specs, check_vma=False
    )
    for name, value in jax.jit(step)(banks, present, new.astype(np.int32)).items():
        getattr(bank, name).set_value(value)
    moved = np.asarray(run(moe, x, from_slots(new, 6, 4)))
    np.testing.assert_allclose(moved, plain, rtol=1e-6, atol=1e-6)

    with pytest.raises(UserError, match="resident experts without a placement: pass the one"):
        moe(x)
    with pytest.raises(UserError, match=r"placement of 2 slots a device with resident .* in 3"):
        moe(x, from_slots(home_content(6, 4, 2), 6))
    with pytest.raises(UserError, match=r"make_resident called again: .*; leave it out"):
        moe.layer.bank.make_resident(slots)
    with pytest.raises(UserError, match=r"quantize_experts after make_resident: quantize .* first"):
        moe.layer.quantize_experts("int8")
    with pytest.raises(UserError, match="slots=1: a device needs at least the 2 of its home"):
        ShardedMoELayer(16, config, mesh=mesh, rngs=nnx.Rngs(1)).layer.bank.make_resident(1)


# ---- a whole model -----------------------------------------------------------------------------

EXPERTS, LAYERS = 10, 3


class Model:
    """A model's weights at home and resident, and its logits with any placement."""

    def __init__(self, rng, sizes, scan_layers=False, dtype="float32", weights=None):
        config = make_config(
            EXPERTS,
            model={
                "num_layers": LAYERS + 1,
                "top_k_by_layer": () if scan_layers else (1, 2, 3, 2),
                "scan_layers": scan_layers,
                "compute_dtype": dtype,
            },
        )
        self.blueprint = Blueprint(config.model, make_mesh(MeshShape(*sizes)))
        self.devices, self.slots = sizes[1], -(-EXPERTS // sizes[1]) + 1
        flat = random_weights(rng, self.blueprint)
        if weights is not None:
            self.blueprint = quantized_blueprint(self.blueprint, weights)
            keep = quantizing(self.blueprint, weights)
            flat = {n: v for name, array in flat.items() for n, v in keep(name, array).items()}
        self.params, self.biases = load_weights(flat, self.blueprint, jnp.dtype(dtype))
        self.wide = resident_blueprint(self.blueprint, self.slots)
        self.tokens = batches(rng, 1)[0][: max(8, sizes[0] * sizes[1]), :SEQ]
        self.at_home = np.stack([slots_at_home(EXPERTS, self.devices, self.slots)] * LAYERS)
        self.step, self.resident_step = map(self._step, (self.blueprint, self.wide))

    def _step(self, blueprint):
        def body(params, biases, tokens, placement):
            model = blueprint.merge(params, biases)
            out = model(tokens, placement=placement, inference=True)
            return model.logits(out.hidden_BSD)

        specs = specs_of(blueprint.params), specs_of(blueprint.biases)
        mapped = jax.shard_map(
            body,
            mesh=blueprint.mesh,
            in_specs=(*specs, P(TOKEN_AXES), P()),
            out_specs=P(TOKEN_AXES, None, TENSOR),
            check_vma=False,
        )
        return jax.jit(mapped)

    def random(self, rng):
        drawn = [random_slots(rng, EXPERTS, self.devices, self.slots) for _ in range(LAYERS)]
        return np.stack(drawn).astype(np.int32)

    def logits(self, params, slots_LP=None):
        run, placement = self.step, None
        if slots_LP is not None:
            run = self.resident_step
            layers = [from_slots(slots, EXPERTS, REPLICAS) for slots in slots_LP]
            placement = jax.tree.map(lambda *a: np.stack(a), *layers)
        with jax.numpy_dtype_promotion("standard"):  # JAX's attention mixes dtypes
            logits = run(params, self.biases, self.tokens, placement)
            return np.asarray(jax.block_until_ready(logits))[..., :VOCAB]

    def bits(self, params):
        return {name: np.array(v.get_value()) for name, v in canonical(params).items()}


def random_weights(rng, blueprint):
    """All weights and biases in logical order, by name; vectors near one."""
    flat = {}
    for part, tree in (("params", blueprint.params), ("bias", blueprint.biases)):
        for name, variable in canonical(tree).items():
            shape, home = variable.get_value().shape, variable.get_metadata().get("home")
            shape = shape if home is None else (len(home), *shape[1:])
            values = 0.2 * rng.normal(size=shape) + (len(shape) == 1)
            flat[f"{part}/{name}"] = jnp.asarray(values, jnp.float32)
    return flat


def check_bits(model, params, slots_LP, home_bits):
    """Every slot of every layer holds its expert's bits; replicas are alike, empty slots zero."""
    shapes = canonical(model.blueprint.params)
    variables = {name: v for name, v in shapes.items() if ".bank." in name}
    home = {name: variable.get_metadata()["home"] for name, variable in variables.items()}
    found, layers = model.bits(params), set()
    for name, positions in home.items():
        layer = int(name.split(".")[1]) - 1
        layers.add(layer)
        experts = home_bits[name][np.asarray(positions)]
        want = filled(experts, slots_LP[layer])
        assert found[name].tobytes() == want.tobytes(), name
    assert layers == set(range(LAYERS))


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "sizes, scan_layers, dtype, weights",
    [
        ((1, 8, 1), False, "float32", None),
        slow((2, 4, 1), True, "float32", None),
        slow((1, 4, 2), True, "bfloat16", None),
        ((2, 2, 1), True, "float32", "int8"),
        slow((1, 4, 1), False, "float32", "fp8"),
    ],
)
def test_a_model_whose_experts_move(rng, sizes, scan_layers, dtype, weights):
    model = Model(rng, sizes, scan_layers, dtype, weights)
    home_bits = model.bits(model.params)
    plain = model.logits(model.params)
    assert np.isfinite(plain).all() and np.std(plain) > 0.01
    narrow = [v.get_value() for path, v in nnx.to_flat_state(model.params) if "bank" in path]
    params = make_resident(model.params, model.blueprint, model.wide)
    assert all(bank.is_deleted() for bank in narrow) and len(narrow) > 1
    migrator = Migrator(model.wide)

    def check(slots_LP):
        check_bits(model, params, slots_LP, home_bits)
        wrong = np.abs(model.logits(params, slots_LP) - plain) / np.abs(plain).max()
        if dtype == "float32":
            assert wrong.max() < 2e-6
        else:  # roundings of the sums decide some tokens' experts
            assert np.median(wrong) < 2e-2

    present = model.at_home
    check(present)
    for layers in ([0, 2], [1], None):
        planned = model.random(rng)
        if layers is not None:
            rest = np.setdiff1d(np.arange(LAYERS), layers)
            planned[rest] = present[rest]
        params = migrator.move(params, present, planned, layers)
        present = planned
        check(present)
    planned = model.random(rng)
    unseen = migrator.move(params, present, planned)
    params = migrator.move(unseen, planned, model.at_home)
    # Buffers are given up, but for those that the host has looked at.
    banks = [v.get_value() for path, v in nnx.to_flat_state(unseen) if "bank" in path]
    assert all(bank.is_deleted() for bank in banks) and len(banks) > 1
    check(model.at_home)
    assert migrator.compiled() == 1 and model.resident_step._cache_size() == 1


def test_refusals(rng):
    model = Model(rng, (1, 4, 1))
    with pytest.raises(UserError, match="Migrator of a model whose experts are at home: make them"):
        Migrator(model.blueprint)
    migrator, params = Migrator(model.wide), model.params
    good = model.at_home
    with pytest.raises(UserError, match=r"new slots of shape \(2, 16\): must be \(3, 16\)"):
        migrator.move(params, good, good[:2])
    with pytest.raises(UserError, match="layer 3: must lie between 0 and 2"):
        migrator.move(params, good, good, [3])
    lost, strange = good.copy(), good.copy()
    lost[1][lost[1] == 7] = 0
    strange[2, 3] = 10
    with pytest.raises(UserError, match="no expert 7 in the old slots of layer 1"):
        migrator.move(params, lost, good)
    with pytest.raises(UserError, match="with expert 10 in the new slots of layer 2"):
        migrator.move(params, good, strange)
    dense = make_config(EXPERTS, model={"first_dense_layers": 3})
    with pytest.raises(UserError, match="slots=4: the model has no experts; leave it out"):
        resident_blueprint(Blueprint(dense.model, make_mesh(MeshShape())), 4)
