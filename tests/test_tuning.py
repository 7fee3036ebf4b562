"""What a table decides, that results do not depend on it, and multiprocessors left free."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from kernel_support import OLD, ON_GPU, needs_transposes
from oracle import relative_error
from tuning_support import PLACE, PRODUCT, ask, random_products, small_layer, table_of

from pallas_kernels.fused_experts import api as fused
from pallas_kernels.grouped_matmul import api as products
from pallas_kernels.hopper.compat import H100_SMS, interpreted
from pallas_kernels.hopper.config import RING, choose_config
from pallas_kernels.tuning import Cut, Table, use_table
from pallas_kernels.tuning.lookup import cut_for, device_kind
from pallas_kernels.tuning.product import BANDS, DTYPES, FLAGS, KERNELS, candidates, refusal
from pallas_kernels.tuning.search import asked_by
from pallas_kernels.tuning.works import Layer, Products


def test_which_table_a_jitted_function_keeps():
    """The two sides of staleness that the documentation tells, and its remedy."""

    def width(x):
        return x + ask(PRODUCT).tile_n

    def fresh():
        return int(jax.jit(lambda *a: width(*a))(0))

    def again(x):
        return width(x)

    before, inside = jax.jit(width), jax.jit(again)
    assert before(0) == 256
    with use_table(table_of({PRODUCT: Cut(128, 6, 4)})):
        assert (before(0), inside(0), fresh()) == (256, 128, 128)
    assert (before(0), inside(0), fresh()) == (256, 128, 256)


def test_what_a_table_does_not_have_is_the_heuristics():
    heuristic = ask(PRODUCT)
    assert heuristic == Cut(256, 4, 4)
    others = {
        "kernel": "experts_down",
        "contraction": 4160,
        "groups": 9,
        "assignments": 65536,
        "parts": 1,
        "widest": 128,
        "ring": RING * 3 // 4,
        "flags": ("keep",),
        "dtype": "int8",
    }
    with use_table(table_of({PRODUCT: Cut(128, 5, 8)})):
        assert ask(PRODUCT) == Cut(128, 5, 8)
        for name, value in others.items():
            changed = {name: value}
            with use_table(None):
                expected = ask(PRODUCT, **changed)
            assert ask(PRODUCT, **changed) == expected != Cut(128, 5, 8), name
        assert cut_for(replace(PRODUCT, tile_k=128), heuristic) == heuristic
        assert ask(PRODUCT, columns=14336 * 2).band == 4
        assert ask(PRODUCT, kernel="") == heuristic  # no kernel, no table
    assert ask(PRODUCT) == heuristic


@pytest.mark.parametrize(
    "columns,options,expected",
    [
        (14336, dict(parts=2), Cut(256, 4, 4)),
        (768, dict(ring=RING * 3 // 4), Cut(256, 3, 4)),
        (320, {}, Cut(64, 8, 4)),
        (2048, dict(widest=128, rows=256, band=32), Cut(128, 4, 32)),
        (4096, dict(tiles=2), Cut(64, 8, 4)),
    ],
)
def test_the_heuristic(columns, options, expected):
    found = choose_config(columns, **options)
    assert Cut(found.tile_n, found.stages, found.band) == expected
    assert found.tile_k == 64 and found.sms == (H100_SMS if not ON_GPU else found.sms)


def test_candidates_are_possible_and_distinct(rng):
    for product in random_products(rng, 30):
        heuristic = ask(product)
        found = candidates(product, heuristic, 1000)
        assert heuristic not in found and len(set(found)) == len(found)
        assert not [cut for cut in found if refusal(product, cut)]
        assert found[:5] == candidates(product, heuristic, 5)
        # All of them: counted here by brute force.
        expected = {
            Cut(tile_n, stages, band, cluster)
            for tile_n, stages, band in itertools.product(range(1, 257), range(1, 9), BANDS)
            for cluster in ((1,) if "few" in product.flags else (1, 2))
            if tile_n % (64 * product.parts) == 0
            and product.columns % (tile_n // product.parts) == 0
            and stages >= 2
            and stages * (128 + tile_n) * 128 + 32768 <= 227 * 1024
        }
        assert set(found) == expected - {heuristic}


@pytest.mark.parametrize(
    "flags,sizes,paired",
    [
        ((), {}, True),
        (("few",), {}, False),
        (("ragged",), {}, False),
        (("weights",), dict(contraction=512), True),
        (("weights",), dict(contraction=384), False),  # three tiles of rows
        (("ragged", "weights"), dict(contraction=512), False),
        (("gather_rhs", "weights"), dict(contraction=384, columns=512), True),
        (("gather_rhs", "weights"), dict(contraction=512, columns=384), False),
    ],
)
def test_pairs_of_blocks_have_tiles_beside_each_other(flags, sizes, paired):
    product = replace(PRODUCT, parts=1, flags=flags, widest=128, **sizes)
    found = candidates(product, Cut(128, 4, 32), 1000)
    assert {cut.cluster for cut in found if cut.tile_n == 128} == ({1, 2} if paired else {1})
    reason = refusal(product, Cut(128, 4, 8, 2))
    assert reason is None if paired else "pairs of blocks" in reason


def test_pairs_are_the_heuristics_where_nothing_is_gathered():
    assert ask(PRODUCT, flags=("keep",)).cluster == 2
    assert ask(PRODUCT, flags=("few",)).cluster == ask(PRODUCT, flags=("gather",)).cluster == 1
    assert ask(PRODUCT, flags=("keep",), kernel="experts_down_backward").cluster == 1


def test_bands_beyond_the_rows_of_a_matrix_are_one():
    product = replace(PRODUCT, contraction=384, parts=1, flags=("weights",))
    found = candidates(product, Cut(256, 4, 32), 1000)
    assert {cut.band for cut in found} == {2, 3} and Cut(256, 4, 3) not in found


# Results


def small_products(backward):
    return Products(rows=256, contraction=64, columns=128, groups=2, backward=backward)


def outputs_of(work, inputs):
    return [np.asarray(out) for out in jax.jit(lambda *a: work.function(*a))(*inputs)]


class Noting(dict):
    """Entries that note which of them were taken."""

    def __init__(self, entries):
        super().__init__(entries)
        self.taken = set()

    def get(self, product):
        if product in self:
            self.taken.add(product)
        return super().get(product)


def unlike(asked):
    """Other cuts than the heuristic's, in as many respects as there are."""
    return {
        product: max(
            candidates(product, cut, 1000),
            key=lambda c: ((c.tile_n != cut.tile_n) + (c.stages != cut.stages), c.band != cut.band),
        )
        for product, cut in asked.items()
    }


@pytest.mark.parametrize(
    "work",
    [pytest.param(small_layer(False), marks=pytest.mark.slow), small_products(False)],
    ids=["layer", "rows"],
)
def test_results_do_not_depend_on_the_table(work):
    compare_with_and_without(work)


@needs_transposes
@pytest.mark.slow
@pytest.mark.parametrize("work", [small_layer(True), small_products(True)], ids=["layer", "rows"])
def test_gradients_do_not_depend_on_the_table(work):
    compare_with_and_without(work)


def test_the_names_of_what_is_asked_are_known():
    """What a table may have is what the operations ask for."""
    asked = {}
    few = replace(small_layer(False), hidden=4096)
    for layer in (small_layer(True), replace(few, tokens=256), few):
        asked |= asked_by(layer)
    for alignment in (1, 128):
        asked |= asked_by(replace(small_products(True), alignment=alignment))
    assert {p.kernel for p in asked} == set(KERNELS)
    assert {p.dtype for p in asked} == set(DTYPES)
    assert {flag for p in asked for flag in p.flags} <= set(FLAGS)
    text = (Path(__file__).parents[1] / "docs" / "tuning.md").read_text()
    assert all(f"`{name}`" in text for name in (*KERNELS, *FLAGS, *DTYPES))


def compare_with_and_without(work):
    with PLACE():
        asked = asked_by(work)
        entries = Noting(table_of(unlike(asked)).entries)
        table = Table(device_kind(), entries)
        inputs = work.inputs()
        want = outputs_of(work, inputs)
        with use_table(table):
            got = outputs_of(work, inputs)
        errors = work.errors(inputs, tuple(got))
        assert max(errors.values()) < 6e-3, errors
    count = {Layer: (2, 6), Products: (1, 3)}[type(work)][work.backward]
    assert len(entries.taken) == count and not entries.taken - asked.keys()
    for a, b in zip(got, want, strict=True):
        assert relative_error(np.float64(a), np.float64(b)) < 1e-3


# Multiprocessors left free


def fused_call(reserve, backward, inputs):
    x, ct, w_in, w_out, scores, *maps = inputs

    def forward(x, w_in, w_out, scores):
        options = dict(activation="swiglu", backend="mosaic_gpu", reserve_sms=reserve)
        return fused.fused_experts(x, w_in, w_out, scores, *maps, **options)

    if not backward:
        return [forward(x, w_in, w_out, scores)]
    out, pull = jax.vjp(forward, x, w_in, w_out, scores)
    return [out, *pull(ct)]


def products_call(reserve, backward, inputs):
    lhs, rhs, ct, sizes = inputs

    def forward(lhs, rhs):
        options = dict(alignment=128, backend="mosaic_gpu", reserve_sms=reserve)
        return products.grouped_matmul(lhs, rhs, sizes, **options)

    if not backward:
        return [forward(lhs, rhs)]
    out, pull = jax.vjp(forward, lhs, rhs)
    return [out, *pull(ct)]


CALLS = {"layer": (fused_call, small_layer, 6), "rows": (products_call, small_products, 3)}


@pytest.mark.parametrize("operation", CALLS)
@pytest.mark.parametrize("reserve", [0, 32, H100_SMS - 1])
def test_the_grids_leave_multiprocessors_free(operation, reserve):
    """Every kernel of forward and backward, in a program that lowers for CUDA."""
    call, work, kernels = CALLS[operation]
    traced = jax.jit(lambda *inputs: call(reserve, True, inputs)).trace(*work(True).shapes())
    meshes = re.findall(r"Mesh\(grid=\((\d+),\).*?cluster=\((\d*)", str(traced.jaxpr))
    blocks = {int(grid) * int(cluster or 1) for grid, cluster in meshes}
    there = jax.devices()[0].core_count if ON_GPU else H100_SMS
    assert len(meshes) == kernels and blocks == {there - reserve}
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu") >= kernels


@pytest.mark.parametrize(
    "backward", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forward", "backward"]
)
@pytest.mark.parametrize("operation", CALLS)
def test_the_same_bits_with_fewer_multiprocessors(operation, backward):
    if backward and OLD:
        pytest.skip("jax 0.10 cannot interpret transposed operands")
    call, work, _ = CALLS[operation]
    with PLACE():
        inputs = work(backward).inputs()
        runs = [
            jax.jit(lambda *inputs, reserve=reserve: call(reserve, backward, inputs))(*inputs)
            for reserve in (0, 1)
        ]
    for a, b in zip(*runs, strict=True):
        assert np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("operation", CALLS)
def test_impossible_reserves(operation):
    call, work, _ = CALLS[operation]
    shapes = work(False).shapes()
    for reserve in (-1, 1.0, True, "all"):
        with pytest.raises(ValueError, match=f"reserve_sms={reserve!r} must be a number"):
            jax.eval_shape(lambda *inputs, r=reserve: call(r, False, inputs), *shapes)
    if not ON_GPU:
        with interpreted(), pytest.raises(ValueError, match="leaves none of the device's 2 multi"):
            jax.eval_shape(lambda *inputs: call(2, False, inputs), *shapes)
    with pytest.raises(ValueError, match=r"it can be \d+ at most"):
        jax.eval_shape(lambda *inputs: call(10_000, False, inputs), *shapes)


def test_other_backends_take_any_reserve(rng):
    lhs, rhs = rng.normal(size=(8, 4)).astype(np.float32), np.ones((1, 4, 4), np.float32)
    out = products.grouped_matmul(
        lhs, rhs, np.array([8], np.int32), backend="reference", reserve_sms=10_000
    )
    assert relative_error(np.asarray(out), lhs @ rhs[0]) < 1e-5
