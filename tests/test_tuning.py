"""Tuning tables: what is refused, that results do not depend on them; the search."""

import copy
import itertools
import json
import re
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest
from oracle import relative_error
from tuning_support import MEASURED, OLD, ON_GPU, PLACE, PRODUCT, ask, small_layer, table_of

from pallas_kernels.fused_experts import api as fused
from pallas_kernels.grouped_matmul import api as products
from pallas_kernels.hopper.compat import H100_SMS, interpreted
from pallas_kernels.hopper.config import RING, choose_config
from pallas_kernels.tuning import Cut, Table, TableError, use_table
from pallas_kernels.tuning.lookup import TABLES, device_kind, package_table
from pallas_kernels.tuning.product import BANDS, bucket, candidates, refusal
from pallas_kernels.tuning.search import asked_by
from pallas_kernels.tuning.table import device_slug, read_table, store_table
from pallas_kernels.tuning.works import Layer, Products


def random_products(rng, count):
    for _ in range(count):
        parts = int(rng.integers(1, 3))
        yield replace(
            PRODUCT,
            kernel=str(rng.choice(["experts_up", "rows_gradient"])),
            contraction=64 * int(rng.integers(1, 400)),
            columns=64 * int(rng.integers(1, 400)),
            groups=int(rng.integers(1, 512)),
            assignments=bucket(int(rng.integers(1, 10**6))),
            parts=parts,
            flags=tuple(f for f in ("few", "gather", "keep") if rng.random() < 0.5),
        )


def test_tables_round_trip(rng, tmp_path):
    heuristic = Cut(64, 2, 1)
    cuts = {p: candidates(p, heuristic, 100)[-1] for p in random_products(rng, 20)}
    path = tmp_path / "folder" / "table.json"
    store_table(table_of(cuts), path)
    assert read_table(path, device_kind()) == table_of(cuts)
    first = path.read_text()
    store_table(table_of(dict(reversed(cuts.items()))), path)
    assert path.read_text() == first  # whatever the order
    assert list(path.parent.iterdir()) == [path]
    with use_table(path):
        for product, cut in cuts.items():
            assert ask(product) == cut
            # any number of rows of the same power of two
            rows = int(rng.integers(product.assignments, 2 * product.assignments))
            assert ask(product, assignments=rows) == cut


def test_a_failed_write_leaves_the_table(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    store_table(table_of({PRODUCT: Cut(128, 6, 4)}), path)
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        store_table(table_of({PRODUCT: Cut(256, 4, 8)}), path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_no_impossible_cut_is_stored(tmp_path):
    with pytest.raises(ValueError, match="bytes of shared memory"):
        store_table(table_of({PRODUCT: Cut(256, 5, 4)}), tmp_path / "table.json")
    assert not list(tmp_path.iterdir())


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


def test_the_librarys_tables():
    paths = list(TABLES.glob("*.json"))
    assert paths
    for path in paths:
        table = read_table(path)
        assert path == package_table(table.device)
    assert device_slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"


def valid():
    entry = {
        "product": asdict(PRODUCT),
        "cut": asdict(Cut(256, 4, 8)),
        "measured": asdict(MEASURED),
    }
    return json.loads(json.dumps({"format": 1, "device": device_kind(), "entries": [entry] * 1}))


def broken(*path_and_value):
    *path, last, value = path_and_value
    content = found = valid()
    for step in path:
        found = found[step]
    if value is KeyError:
        del found[last]
    else:
        found[last] = value
    return json.dumps(content)


CUT, KEY, NUMBERS = (("entries", 0, name) for name in ("cut", "product", "measured"))
HOSTILE = {
    "tile does not divide": (broken(*KEY, "columns", 14400), "tiles of 128 do not divide 14400"),
    "no multiple": (broken(*CUT, "tile_n", 250), "tile_n=250 is not 2 times a multiple of 64"),
    "too wide": (broken(*CUT, "tile_n", 512), "tile_n=512 is more than the 256 columns"),
    "shared memory": (broken(*CUT, "stages", 5), "245760 bytes of shared memory, and 196608"),
    "one stage": (broken(*CUT, "stages", 1), "stages=1: a stage is released a step late"),
    "unknown field": (broken(*CUT, "tile_k", 128), "cut has an unknown field 'tile_k'"),
    "missing field": (broken(*CUT, "band", KeyError), "cut has no field 'band'"),
    "float": (broken(*CUT, "band", 4.0), "band is 4.0, not a positive integer"),
    "bool": (broken(*CUT, "band", True), "band is True, not a positive integer"),
    "negative": (broken(*CUT, "band", -4), "band is -4, not a positive integer"),
    "huge": (broken(*CUT, "band", 10**30), "not a positive integer"),
    "text": (broken(*CUT, "tile_n", "256\n"), r"tile_n is '256\n', not a positive integer"),
    "cut is a list": (broken(*CUT[:-1], "cut", [256, 4, 4]), "cut is [256, 4, 4], not an object"),
    "no product": (broken(*KEY[:-1], "product", KeyError), "it has no field 'product'"),
    "bucket": (broken(*KEY, "assignments", 1000), "assignments are 1000, no power of two"),
    "flags": (broken(*KEY, "flags", ["keep", "gather"]), "not sorted or not distinct"),
    "flags are text": (broken(*KEY, "flags", "keep"), "flags are 'keep', not a list of names"),
    "a flag is a number": (broken(*KEY, "flags", [1]), "flags are [1], not a list of names"),
    "NaN": (broken(*NUMBERS, "ms", float("nan")), "ms is nan, not a positive number"),
    "infinite": (broken(*NUMBERS, "ms", float("inf")), "ms is inf, not a positive number"),
    "twice": (broken("entries", valid()["entries"] * 2), "entry 1: its product has an entry"),
}
HOSTILE_FILES = {
    "newer": (broken("format", 2), "format 2 is newer than 1, the newest that this version reads"),
    "format": (broken("format", "1"), "format is '1', not a positive integer"),
    "other device": (broken("device", "NVIDIA H200"), "a table for 'NVIDIA H200'"),
    "entries": (broken("entries", {}), "'device' must be a name and 'entries' a list"),
    "unknown": (broken("version", 3), "the table has an unknown field 'version'"),
    "no object": ("[1]", "a JSON object with 'format' is expected"),
    "cut short": (broken("format", 1)[:-9], ""),
    "no JSON": ("tile_n = 256", "Expecting value"),
    "empty": ("", "Expecting value"),
    "field twice": ('{"format": 1, "format": 1}', "a field twice"),
    "nested": ("[" * 100_000, "nested"),
    "digits": ('{"format": ' + "9" * 5000 + "}", ""),
    "no text": (b"\xff\xfe\x00", "can't decode"),
}


@pytest.mark.parametrize("case", [*HOSTILE, *HOSTILE_FILES])
def test_hostile_tables_are_refused_in_one_line(case, tmp_path):
    content, reason = (HOSTILE | HOSTILE_FILES)[case]
    path = tmp_path / "table.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TableError) as caught, use_table(path):
        pass
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 500
    assert reason in message
    assert case not in HOSTILE or re.search(r"entry \d: ", message)


def test_valid_means_valid(tmp_path):
    """The tables above are broken by what they change alone."""
    path = tmp_path / "table.json"
    path.write_text(json.dumps(valid()))
    assert read_table(path).entries[PRODUCT].cut == Cut(256, 4, 8)
    assert json.loads(broken(*CUT, "band", 8)) == valid() == copy.deepcopy(valid())


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(TableError, match=re.escape(f"{path}: ")), use_table(path):
            pass


def test_a_broken_table_of_the_library_is_no_silent_heuristic(tmp_path, monkeypatch):
    monkeypatch.setattr("pallas_kernels.tuning.lookup.TABLES", tmp_path)
    monkeypatch.setattr("pallas_kernels.tuning.lookup.device_kind", lambda: "made up")
    (tmp_path / "made_up.json").write_text('{"format": 7}')
    with pytest.raises(TableError, match="format 7 is newer"):
        ask(PRODUCT)
    (tmp_path / "other.json").write_text('{"format": 7}')
    monkeypatch.setattr("pallas_kernels.tuning.lookup.device_kind", lambda: "Other one")
    assert ask(PRODUCT) == Cut(256, 4, 4)


def test_candidates_are_possible_and_distinct(rng):
    for product in random_products(rng, 30):
        heuristic = ask(product)
        found = candidates(product, heuristic, 1000)
        assert heuristic not in found and len(set(found)) == len(found)
        assert not [cut for cut in found if refusal(product, cut)]
        assert found[:5] == candidates(product, heuristic, 5)
        # All of them: counted here by brute force.
        expected = {
            Cut(tile_n, stages, band)
            for tile_n, stages, band in itertools.product(range(1, 257), range(1, 9), BANDS)
            if tile_n % (64 * product.parts) == 0
            and product.columns % (tile_n // product.parts) == 0
            and stages >= 2
            and stages * (128 + tile_n) * 128 + 32768 <= 227 * 1024
        }
        assert set(found) == expected - {heuristic}


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


@pytest.mark.parametrize("work", [small_layer(False), small_products(False)], ids=["layer", "rows"])
def test_results_do_not_depend_on_the_table(work):
    compare_with_and_without(work)


@pytest.mark.skipif(OLD, reason="jax 0.10 cannot interpret transposed operands")
@pytest.mark.slow
@pytest.mark.parametrize("work", [small_layer(True), small_products(True)], ids=["layer", "rows"])
def test_gradients_do_not_depend_on_the_table(work):
    compare_with_and_without(work)


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
    grids = re.findall(r"Mesh\(grid=\((\d+),\)", str(traced.jaxpr))
    there = jax.devices()[0].core_count if ON_GPU else H100_SMS
    assert len(grids) == kernels and set(map(int, grids)) == {there - reserve}
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
