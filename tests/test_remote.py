"""Mode `remote`: rows by themselves to their places, a ring's bits, and no row read but those."""

from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from moe_harness import random_weights, sharded_layer
from test_hierarchy import hierarchical
from test_layer_oracle import BFLOAT16, FULL, D, bend, moe, run_case
from test_reduced_rows import orthonormal, with_wire
from test_wire_formats import WIRE, through
from wire_support import large_rows_alone, run_sharded  # noqa: F401 (a fixture)

from moejax.config import ExchangeConfig
from moejax.errors import UserError
from moejax.exchange import choose
from moejax.exchange.budget import probability_of_device
from moejax.exchange.remote import collect_rows, make_routes, spread_rows
from moejax.layer import MoELayer
from pallas_kernels.exchange.push import push_rows
from sharding.mesh import EXPERT

G, T = 4, 5
R = G * T


# ---- the primitive ----------------------------------------------------------------------------


def pushed(x_GNW, entries_GM, unsent):
    """By walking the entries; what nobody sends is `unsent`."""
    received = np.full((G, R, x_GNW.shape[2]), unsent, x_GNW.dtype)
    for me, entries_M in enumerate(entries_GM):
        for entry in entries_M:
            if 0 <= entry < R:
                row = x_GNW[me, entry % x_GNW.shape[1]]
                received[entry // T, me * T + entry % T] = row
    return received


@pytest.mark.parametrize("rows", [T, R])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.uint8])
def test_push_rows(rng, rows, dtype):
    """Random entries in any order, those of another device all or none, and some to be skipped."""
    x_GNW = rng.integers(0, 200, (G, rows, 3)).astype(dtype)
    entries_GM = np.full((G, R + 3), R, np.int32)
    for me, count in enumerate((R, 0, R // 2, 1)):
        entries = rng.permutation(R)[:count]
        skipped = rng.choice([-1, -R, R, R + 1, 2**31 - 1], R + 3 - count)
        entries_GM[me] = rng.permutation(np.concatenate([entries, skipped]))

    def body(x_NW, entries_M):
        return (push_rows(x_NW, entries_M, EXPERT, T),)

    (got,) = run_sharded(body, x_GNW.reshape(-1, 3), entries_GM.reshape(-1))
    want = pushed(x_GNW, entries_GM, 255 if dtype == np.uint8 else np.nan)
    assert got.dtype == dtype
    np.testing.assert_array_equal(
        got.reshape(want.shape).astype(np.float32), want.astype(np.float32)
    )


@pytest.mark.parametrize(
    "x, entries, message",
    [
        (
            (6, 3),
            np.zeros(4, np.int32),
            r"rows \[6, 3\] of 5 tokens along 'expert': must be \[5, W",
        ),
        ((5, 3), np.zeros(4, np.int16), r"entries \[4\] of int16: must be \[M\] of int32"),
    ],
)
def test_push_rows_of_another_shape(x, entries, message):
    def body(x_NW):
        return (push_rows(x_NW, jnp.asarray(entries), EXPERT, T),)

    with pytest.raises(ValueError, match=message):
        run_sharded(body, np.zeros((G * x[0], x[1]), np.float32))


# ---- routes, and rows on them -----------------------------------------------------------------


def draw_targets(rng, slots=2, copies=3):
    """Physical slots, some of no token; a token at times with two on a device."""
    target = rng.integers(0, G * slots, (G, T, copies)).astype(np.int32)
    return np.where(rng.random(target.shape) < 0.4, -1, target)


def slots_of(target_GTK, slots=2):
    """Of every device: slots there of all assignments; `slots` for none."""
    target_RK = target_GTK.reshape(R, -1)
    return np.stack([np.where(target_RK // slots == g, target_RK % slots, slots) for g in range(G)])


def test_routes(rng):
    target_GTK = draw_targets(rng)
    ids_RK = slots_of(target_GTK)

    def body(target_TK, ids_RK):
        routes = make_routes(target_TK, ids_RK, 2, EXPERT)
        return routes.out_M, routes.back_M, routes.goes_GT

    out, back, goes = run_sharded(body, target_GTK.reshape(-1, 3), ids_RK.reshape(-1, 3))
    needs = np.array(
        [[[g in t[t >= 0] // 2 for t in mine] for g in range(G)] for mine in target_GTK]
    )  # [me, g, t]
    assert np.array_equal(goes.reshape(G, G, T), needs)
    for me in range(G):
        for entries, wanted in (out, needs[me]), (back, needs[:, me]):
            entries = entries.reshape(G, T, G)[me]
            assert set(entries[entries < R]) == set(np.flatnonzero(wanted.reshape(-1)))
            assert (entries == R).sum() == R - wanted.sum()
            # A token's rows side by side, the own device's last.
            t, i = np.nonzero(entries < R)
            assert np.array_equal(entries[t, i] % T, t)
            assert np.array_equal(entries[t, i] // T, (me + 1 + i) % G)


@pytest.mark.usefixtures("large_rows_alone")
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_each_way_has_its_format(rng, dtype):
    """Rounded as by the codec alone, backwards too; sums in float32; what was not sent is NaN."""
    target_GTK = draw_targets(rng)
    x, ct_y = (rng.normal(size=(G, T, 130)).astype(d) for d in (dtype, np.float32))
    y, ct_x = (rng.normal(size=(G, G, T, 130)).astype(dtype) for _ in range(2))

    def body(x_TD, y_RD, ct_RD, ct_TD, target_TK, ids_RK):
        routes = make_routes(target_TK, ids_RK, 2, EXPERT)
        out, pull = jax.vjp(lambda x: spread_rows(x, routes, EXPERT, WIRE), x_TD)
        home, pull_home = jax.vjp(lambda y: collect_rows(y, routes, EXPERT, WIRE), y_RD)
        return out, *pull(ct_RD), home, *pull_home(ct_TD)

    flat = [a.reshape(-1, 130) for a in (x, y, ct_x, ct_y)]
    got = run_sharded(body, *flat, target_GTK.reshape(-1, 3), slots_of(target_GTK).reshape(-1, 3))
    here = np.array([[[g in t[t >= 0] // 2 for t in s] for s in target_GTK] for g in range(G)])

    def rounded(a, form):
        return through(a.reshape(-1, 130), form).reshape(a.shape)

    def there(x, form):
        sent = np.broadcast_to(rounded(x, form), (G, G, T, 130)).astype(dtype)
        return np.where(here[..., None], sent, np.asarray(np.nan, dtype))

    def home(y, form):
        back = np.where(here[..., None], rounded(y.astype(np.float32), form), 0)
        return np.sum(back, axis=0, dtype=np.float32)

    want = [
        there(x, "int8"),
        home(ct_x, "int4").astype(dtype),
        home(y, "float8"),
        there(ct_y, "int8"),
    ]
    for value, expected in zip(got, want, strict=True):
        assert value.dtype == expected.dtype
        value, expected = (a.reshape(-1, 130).astype(np.float32) for a in (value, expected))
        np.testing.assert_allclose(value, expected, rtol=8e-3 * (dtype != np.float32), atol=1e-6)


# ---- layers -----------------------------------------------------------------------------------


def both(rng, shape, tokens, routing, dtype, build):
    """The runs of a ring's layer and a remote one's on the same weights, tokens and cotangents."""
    runs = []
    for mode in ("ring", "remote"):
        config = build(mode=mode)
        sharded = sharded_layer(shape, config, D, tokens)
        if not runs:
            weights, mask = random_weights(rng, config, D), np.ones(sharded.num_tokens, bool)
            wire = config.exchange.wire
            for name, columns in ("u", wire.dispatch_dim), ("v", wire.combine_dim):
                if columns is not None:
                    weights[name] = orthonormal(rng, columns)
            bend(routing, weights, mask, rng, shape[1])
            mask[2] = False
            x, ct = (rng.normal(size=(sharded.num_tokens, D)).astype(dtype) for _ in range(2))
        runs.append(sharded(weights, x, ct, mask))
    return runs, sharded.layer.budget(tokens)


CASES = {
    "several waves": ((1, 4, 1), 16, partial(moe, 16, 3, slack=0.5)),
    "two chunks, data": ((2, 4, 1), 8, partial(moe, 10, 3, chunks=2, **FULL)),
    "tensor, chunks in waves": ((2, 2, 2), 16, partial(moe, 8, 3, chunks=2, slack=0.1, **FULL)),
}


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_as_a_ring(rng, name, dtype):
    shape, tokens, build = CASES[name]
    for routing in ("random", "one_device", "no_token"):
        (ring, remote), budget = both(rng, shape, tokens, routing, dtype, build)
        assert budget.mode == "remote"
        assert np.array_equal(ring[0], remote[0]) and ring[1] == remote[1]
        for part, grad in ring[3].items():
            assert np.array_equal(grad, remote[3][part]), part
            assert np.isfinite(grad.astype(np.float32)).all(), part
        waves = int(remote[2].counters.waves)
        assert waves == int(ring[2].counters.waves)
        assert routing != "one_device" or "waves" not in name or waves > 1, waves
        assert int(remote[2].counters.rows_padding) == 0


def test_fewer_columns(rng):
    """Narrow rows both ways: the same bits, too."""

    def build(mode):
        return with_wire(moe(10, 3, mode, bias=True), dispatch_dim=5, combine_dim=11)

    (ring, remote), _ = both(rng, (1, 4, 1), 8, "random", np.float32, build)
    assert np.array_equal(ring[0], remote[0]) and ring[0].any()
    assert {"u", "v"} < set(ring[3])
    assert all(np.array_equal(grad, remote[3][part]) for part, grad in ring[3].items())


def test_against_the_oracle(rng):
    waves, budget = run_case(rng, (1, 8, 1), moe(10, 3, "remote", slack=0.2, bias=True), 16)
    assert budget.mode == "remote" and waves["one_device"] > 1


# ---- the budget -------------------------------------------------------------------------------

SIZES = {"tokens": 64, "top_k": 8, "num_experts": 128, "slots": 16, "devices": 8}


def test_budget():
    ring, remote = (choose(ExchangeConfig(mode), **SIZES) for mode in ("ring", "remote"))
    assert (remote.rows, remote.quota, remote.carried) == (ring.rows, ring.quota, 8)
    assert remote.moved_rows == 7 * round(64 * probability_of_device(128, 16, 8)) < ring.moved_rows
    assert choose(ExchangeConfig("remote"), **(SIZES | {"devices": 1})).mode == "local"


def test_between_hosts_is_refused():
    message = "exchange mode 'remote' with host_devices=2 and expert=4 devices: .* use 'auto'"
    with pytest.raises(UserError, match=message):
        config = hierarchical(2, 10, 3, "remote")
        MoELayer(D, config, expert_devices=4, rngs=nnx.Rngs(0)).budget(8)
    # All in one host, or no two in one: there is one level.
    for together in (1, 8):
        config = ExchangeConfig("remote", host_devices=together)
        assert choose(config, **SIZES).inside is None
