"""Experts fetched from their homes: the right bits in every slot, gradients summed at home."""

from collections import Counter
from functools import lru_cache, partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import relative_error

from moejax.placement.arrays import Placement, from_slots, gather_bank, home_slots
from moejax.placement.fetch import fetch, fetch_moves, fetch_traffic
from moejax.placement.moves import bucket_size
from sharding.mesh import AXES, EXPERT, TENSOR, MeshShape, make_mesh
from sharding.traffic import collectives_of

MESHES = [(1, 8, 1), (2, 4, 1), (1, 4, 2)]
REPLICAS = 4


def random_slots(rng, experts, devices, slots):
    """Each expert at least once and at most REPLICAS times, now and then twice on a device."""
    content = np.full(devices * slots, -1)
    content[:experts] = np.arange(experts)
    left = rng.permutation(np.repeat(np.arange(experts), REPLICAS - 1))
    more = rng.integers(len(content) - experts + 1)
    content[experts : experts + more] = left[:more]
    return rng.permutation(content)


def home_content(experts, devices, slots):
    """Every expert at home, in the first slots of its device."""
    rows, home = -(-experts // devices), home_slots(experts, devices)
    content = np.full(devices * slots, -1)
    content[home // rows * slots + home % rows] = np.arange(experts)
    return content


def crowded(experts, devices, slots):
    """Every expert one device further, and device 1 full of device 0's: the fullest pair."""
    rows = -(-experts // devices)
    content = np.roll(home_content(experts, devices, slots).reshape(devices, slots), 1, axis=0)
    content[1 % devices, rows:] = np.arange(slots - rows) % rows
    return content.ravel()


def homes(rng, shape, experts, devices, dtype=np.float32):
    """Global home bank [G·S_home, …] with padding slots that hold something, too."""
    padded = devices * -(-experts // devices)
    return jnp.asarray(rng.normal(size=(padded, *shape)), dtype)


def brute(bank, content, experts, devices):
    """What each slot is to hold, by a loop; zero where empty."""
    home = home_slots(experts, devices)
    out = np.zeros((len(content), *bank.shape[1:]), bank.dtype)
    for p, e in enumerate(content):
        if e >= 0:
            out[p] = bank[home[e]]
    return out


def brute_mask(content, dims):
    return (content >= 0).astype(np.float32).reshape(-1, *[1] * (dims - 1))


# The shapes of two parameters of a bank, and how they are split.
SHAPES = ((6, 2, 4), (4,))
SPECS = (P(EXPERT, None, None, TENSOR), P(EXPERT, None))


@lru_cache
def compiled(sizes, experts, how):
    """(banks, placement, cotangents of slots) → slots, gradients at home [data·…], waves."""
    mesh = make_mesh(MeshShape(*sizes))

    def body(banks, placement, cts):
        if how == "fetch":
            fill = partial(fetch, placement=placement, num_experts=experts)
        else:
            fill = partial(
                jax.tree.map, partial(gather_bank, placement=placement, num_experts=experts)
            )
        slots, pull = jax.vjp(fill, banks)
        waves = fetch_moves(placement.slot_expert_P, experts).num_waves
        return slots, pull(cts)[0], waves[None]

    return jax.jit(
        jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(SPECS, P(), SPECS),
            out_specs=(SPECS, SPECS, P(AXES)),
            check_vma=False,
        )
    )


@pytest.mark.parametrize("sizes", MESHES)
def test_slots_and_gradients(rng, sizes):
    """Bits of every slot, and sums at home, under one program; empty slots have no gradient."""
    devices = sizes[1]
    experts, slots = 2 * devices + 3, 5  # 3 at home, on some devices 2
    contents = [random_slots(rng, experts, devices, slots) for _ in range(4)]
    contents += [home_content(experts, devices, slots), crowded(experts, devices, slots)]
    seen = set()
    for content in contents:
        placement = from_slots(content, experts, experts * slots)
        banks = tuple(homes(rng, shape, experts, devices) for shape in SHAPES)
        cts = tuple(
            jnp.asarray(rng.normal(size=(devices * slots, *shape)), jnp.float32) for shape in SHAPES
        )
        got, grads, waves = compiled(sizes, experts, "fetch")(banks, placement, cts)
        used = tuple(jnp.asarray(np.asarray(ct) * brute_mask(content, ct.ndim)) for ct in cts)
        gathered, want_grads, _ = compiled(sizes, experts, "gather")(banks, placement, used)
        seen.add(int(waves[0]))
        assert (np.asarray(waves) == fetch_traffic(content, devices).waves).all()
        for i, bank in enumerate(banks):
            want = brute(np.asarray(bank), content, experts, devices)
            np.testing.assert_array_equal(got[i], want)
            filled = content >= 0
            np.testing.assert_array_equal(got[i][filled], gathered[i][filled])
            oracle = np.zeros(bank.shape)
            home, ct = home_slots(experts, devices), np.asarray(cts[i], np.float64)
            for p in np.flatnonzero(filled):
                oracle[home[content[p]]] += ct[p]
            assert relative_error(grads[i], oracle) < 1e-7
            assert relative_error(grads[i], np.asarray(want_grads[i])) < 1e-7
            unused = np.setdiff1d(np.arange(len(oracle)), home)
            assert not np.asarray(grads[i])[unused].any()
    assert 0 in seen and max(seen) > 1
    assert compiled(sizes, experts, "fetch")._cache_size() == 1


def test_bfloat16_is_rounded_once(rng):
    """Seven replicas that cancel but for little: terms are summed before they are rounded."""
    experts, devices, slots = 8, 8, 3
    content = np.full((devices, slots), -1)
    content[:, 0] = np.arange(devices)[::-1]
    content[1:, 1] = 0
    terms = np.zeros((devices * slots, *SHAPES[1]), np.float32)
    holders = np.flatnonzero(content.ravel() == 0)
    terms[holders] = np.array([256, -256, 1, 128, -128, 0.5, 0.25, 0.125])[:, None]
    terms = np.asarray(jnp.asarray(terms, jnp.bfloat16))
    placement = from_slots(content.ravel(), experts, 8)

    def body(bank, ct):
        _, pull = jax.vjp(lambda b: fetch(b, placement, experts), bank)
        return pull(ct)[0]

    mesh, spec = make_mesh(MeshShape(1, 8, 1)), SPECS[1]
    run = jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    )
    got = run(homes(rng, SHAPES[1], experts, devices, jnp.bfloat16), terms)
    assert got.dtype == jnp.bfloat16
    assert (np.asarray(got[0], np.float32) == 1.875).all()
    assert np.array_equal(got, run(homes(rng, SHAPES[1], experts, devices, jnp.bfloat16), terms))


def test_weights_of_8_bits(rng):
    """Values and scales side by side: bits as at home, no gradient asked for."""
    experts, devices, slots = 10, 8, 3
    mesh = make_mesh(MeshShape(1, 8, 1))
    banks = {
        "int8": jnp.asarray(rng.integers(-127, 128, (16, 4, 2)), jnp.int8),
        "float8": jnp.asarray(rng.normal(size=(16, 4)), jnp.float8_e4m3fn),
        "scales": homes(rng, (3,), experts, devices),
    }

    def body(banks, placement):
        return fetch(banks, placement, experts)

    run = jax.jit(
        jax.shard_map(
            body, mesh=mesh, in_specs=(P(EXPERT), P()), out_specs=P(EXPERT), check_vma=False
        )
    )
    for _ in range(3):
        content = random_slots(rng, experts, devices, slots)
        got = run(banks, from_slots(content, experts, REPLICAS))
        for name, bank in banks.items():
            want = brute(np.asarray(bank), content, experts, devices)
            assert got[name].dtype == bank.dtype
            np.testing.assert_array_equal(
                np.asarray(got[name]).view(np.uint8), want.view(np.uint8), err_msg=name
            )


def test_integers_beside_floats_have_no_gradient(rng):
    mesh = make_mesh(MeshShape(1, 4, 1))
    content = np.array([3, 2, 1, 0, 3, 2, 1, 0])

    def body(weights, numbers):
        def loss(weights):
            slots = fetch((weights, numbers), from_slots(content, 4), 4)
            return jnp.sum(slots[0]) + jnp.sum(slots[1]).astype(jnp.float32)

        return jax.grad(loss)(weights)

    run = jax.shard_map(body, mesh=mesh, in_specs=P(EXPERT), out_specs=P(EXPERT), check_vma=False)
    grads = jax.jit(run)(homes(rng, (3,), 4, 4), jnp.arange(4, dtype=jnp.int8))
    np.testing.assert_array_equal(grads, np.full((4, 3), 2.0))


def test_one_device(rng):
    """Nothing travels: replicas and empty slots on the only device there is."""
    content = np.array([2, -1, 0, 1, 2])
    bank, ct = homes(rng, (4,), 3, 1), rng.normal(size=(5, 4)).astype(np.float32)

    def body(bank, ct):
        slots, pull = jax.vjp(lambda b: fetch(b, from_slots(content, 3), 3), bank)
        return slots, pull(ct)[0]

    mesh = make_mesh(MeshShape())
    run = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    slots, grad = jax.jit(run)(bank, ct)
    np.testing.assert_array_equal(slots, brute(np.asarray(bank), content, 3, 1))
    np.testing.assert_allclose(grad, np.stack([ct[2], ct[3], ct[0] + ct[4]]), rtol=1e-6)
    assert fetch_traffic(content, 1).on_wire == 0


@pytest.mark.parametrize("experts,devices,slots", [(11, 4, 5), (8, 8, 2), (64, 8, 10), (6, 1, 8)])
def test_traffic(rng, experts, devices, slots):
    """Counted from the placement against walking from slot to slot."""
    for content in (
        random_slots(rng, experts, devices, slots),
        home_content(experts, devices, slots),
        crowded(experts, devices, slots),
    ):
        home = np.array_split(np.arange(experts), devices)
        pairs = Counter()
        for p, e in enumerate(content):
            (source,) = (g for g in range(devices) if e in home[g]) if e >= 0 else (p // slots,)
            pairs[source, p // slots] += source != p // slots
        found, bucket = fetch_traffic(content, devices), -(-slots // devices)
        assert found.sent == sum(pairs.values())
        fullest = max(pairs.values())
        assert found.waves * bucket >= fullest > (found.waves - 1) * bucket
        assert found.on_wire == found.waves * bucket * devices * (devices - 1)
    assert fetch_traffic(home_content(experts, devices, slots), devices).waves == 0


@pytest.mark.parametrize("backward", [False, True])
def test_bytes_of_a_wave(backward):
    """The traced program sends B experts to each other device in a wave, and nothing outside."""
    experts, slots, sizes = 12, 6, {"data": 2, "expert": 4, "tensor": 1}
    mesh = make_mesh(MeshShape(**sizes))
    bank = jnp.zeros((12, 5, 3), jnp.bfloat16)
    placement = from_slots(np.arange(24) % experts, experts)

    def body(bank, placement):
        def loss(bank):
            return jnp.sum(fetch(bank, placement, experts).astype(jnp.float32))

        return jax.grad(loss)(bank) if backward else fetch(bank, placement, experts)

    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(P(EXPERT), P()), out_specs=P(EXPERT), check_vma=False
    )
    found = collectives_of(jax.make_jaxpr(mapped)(bank, placement), sizes)
    (crossing,) = found if not backward else [c for c in found if c.phase == "backward"]
    assert (crossing.kind, crossing.axes, crossing.extra) == ("all-to-all", (EXPERT,), True)
    assert crossing.name == "replica fetch"
    assert crossing.sent == bucket_size(slots, 4) * 3 * 5 * 3 * 2


def test_a_placement_of_arrays_on_the_devices(rng):
    """Placements come as replicated arrays, too, stacked for scanned layers."""
    mesh, experts, devices, slots, layers = make_mesh(MeshShape(1, 8, 1)), 10, 8, 2, 3
    contents = [random_slots(rng, experts, devices, slots) for _ in range(layers)]
    placements = [from_slots(content, experts, REPLICAS) for content in contents]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *placements)
    stacked = jax.device_put(stacked, NamedSharding(mesh, P()))
    banks = jnp.stack([homes(rng, (4,), experts, devices) for _ in range(layers)])

    def body(banks, placement):
        def layer(total, xs):
            bank, arrays = xs
            slots = jax.checkpoint(partial(fetch, num_experts=experts))(bank, arrays)
            return total + jnp.sum(slots * slots), slots

        def loss(banks):
            return jax.lax.scan(layer, jnp.zeros(()), (banks, placement))

        return jax.grad(loss, has_aux=True)(banks)

    spec = P(None, EXPERT)
    run = jax.jit(
        jax.shard_map(
            body, mesh=mesh, in_specs=(spec, P()), out_specs=(spec, spec), check_vma=False
        )
    )
    grads, got = run(banks, Placement(*jax.tree.leaves(stacked)))
    home = home_slots(experts, devices)
    for i, content in enumerate(contents):
        bank = np.asarray(banks[i])
        np.testing.assert_array_equal(got[i], brute(bank, content, experts, devices))
        counts = np.zeros(len(bank), np.float32)
        np.add.at(counts, home[content[content >= 0]], 1)
        np.testing.assert_allclose(grads[i], 2 * counts[:, None] * bank, rtol=1e-6)
