"""Top-k and the sorted layout against numpy brute force: reference and Hopper kernels.

The kernels are interpreted on a CPU; on a GPU of capability 9.0 the compiled ones run.
"""

from contextlib import nullcontext
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from kernel_support import OLD, ON_GPU

from pallas_kernels.hopper.compat import interpreted
from pallas_kernels.route import api, grid_layout

BACKENDS = (
    "reference",
    pytest.param(
        "mosaic_gpu",
        marks=pytest.mark.skipif(
            OLD, reason="the interpreter of jax 0.10 cannot load from part of a reference"
        ),
    ),
)


@partial(jax.jit, static_argnames=("k", "backend"))
def _top_k(scores, k, backend):
    return api.top_k(scores, k, backend=backend)[0]


@partial(jax.jit, static_argnames=("groups", "alignment", "places", "backend"))
def _sorted_places(ids, groups, alignment, places, backend):
    return api.sorted_places(
        ids, groups=groups, alignment=alignment, places=places, backend=backend
    )


EMULATED = ("reference", "mosaic_gpu")


def run(function, *inputs, **static):
    """Compiled on a GPU, interpreted elsewhere."""
    with nullcontext() if ON_GPU else interpreted():
        return jax.tree.map(np.asarray, function(*inputs, **static))


def run_top_k(scores, k, backend):
    return run(_top_k, scores, k=k, backend=backend)


def numpy_top_k(scores, k):
    """Best first, the lower id first among equals: a stable sort of what is negated."""
    return np.argsort(-scores.astype(np.float64), axis=1, kind="stable")[:, :k]


def ties(rng, tokens, experts):
    """Few distinct values, both zeros, and a third masked."""
    scores = rng.integers(-2, 3, (tokens, experts)).astype(np.float32)
    scores[(scores == 0) & (rng.random(scores.shape) < 0.5)] = -0.0
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    return scores


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize(
    "tokens,experts,k", [(100, 16, 3), (64, 8, 8), (3, 128, 8), (93, 512, 16), (130, 33, 1)]
)
def test_top_k(rng, tokens, experts, k, backend):
    for scores in (ties(rng, tokens, experts), rng.normal(size=(tokens, experts))):
        scores = scores.astype(np.float32)
        got = run_top_k(scores, k, backend)
        assert got.dtype == np.int32
        assert np.array_equal(got, numpy_top_k(scores, k))


@pytest.mark.parametrize("backend", EMULATED)
def test_top_k_of_extreme_scores(rng, backend):
    """All masked, fewer finite than k, infinities, the smallest and largest floats."""
    info = np.finfo(np.float32)
    scores = rng.choice(
        np.array([-np.inf, np.inf, info.max, info.min, info.tiny, -info.tiny], np.float32), (64, 24)
    )
    scores[0], scores[1, 2:], scores[2] = -np.inf, -np.inf, np.inf
    assert np.array_equal(run_top_k(scores, 6, backend), numpy_top_k(scores, 6))


@pytest.mark.parametrize("backend", EMULATED)
def test_top_k_of_nan(rng, backend):
    """Any ids, but distinct and in range, for every bit pattern of NaN; other rows unaffected."""
    scores = ties(rng, 64, 24)
    nans = np.array([0x7FC00000, 0xFFC00000, 0xFFFFFFFF, 0x7FFFFFFF], np.uint32).view(np.float32)
    scores[::2] = np.where(rng.random((32, 24)) < 0.7, rng.choice(nans, (32, 24)), scores[::2])
    scores[0], scores[2] = nans[2], nans[0]
    got = run_top_k(scores, 24, backend)
    assert np.array_equal(np.sort(got), np.broadcast_to(np.arange(24), (64, 24)))
    assert np.array_equal(got[1::2], numpy_top_k(scores[1::2], 24))


@pytest.mark.parametrize("backend", EMULATED)
def test_values_of_the_chosen_and_their_gradient(rng, backend):
    """To the values, none through the choice."""
    scores, values, ct = (
        rng.normal(size=s).astype(np.float32) for s in ((70, 8),) * 2 + ((70, 2),)
    )

    def chosen(scores, values):
        ids, chosen = api.top_k(scores, 2, values_TE=values, backend=backend)
        return chosen, ids

    def function(scores, values, ct):
        out, pull, ids = jax.vjp(chosen, scores, values, has_aux=True)
        return out, ids, *pull(ct)

    out, ids, scores_ct, values_ct = run(jax.jit(function), scores, values, ct)
    want, rows = np.zeros_like(values), np.arange(70)[:, None]
    want[rows, ids] = ct
    assert np.array_equal(ids, numpy_top_k(scores, 2))
    assert np.array_equal(out, values[rows, ids])
    tangents = run(
        jax.jit(lambda s, v, t: jax.jvp(lambda v: chosen(s, v)[0], (v,), (t,))[1]),
        scores,
        values,
        scores,
    )
    assert np.array_equal(tangents, scores[rows, ids])
    assert np.array_equal(values_ct, want) and not scores_ct.any()


def numpy_sorted_places(ids, groups, alignment, places):
    place, copy = np.full(ids.shape, places), np.full(places, ids.size)
    sizes, start = np.zeros(groups, np.int64), 0
    for g in range(groups):
        rows, js = np.nonzero(ids == g)  # in the order of r·J + j
        place[rows, js] = start + np.arange(rows.size)
        copy[place[rows, js]] = rows * ids.shape[1] + js
        sizes[g] = -(-rows.size // alignment) * alignment
        start += sizes[g]
    return place, sizes, copy


def distinct_ids(rng, rows, copies, groups, none=0.2):
    """Distinct groups in a row, some of them replaced by different ways to say none."""
    pool = max(groups, copies)
    ids = np.argsort(rng.random((rows, pool)), axis=1)[:, :copies].astype(np.int32)
    nothing = rng.choice(np.array([groups, groups + 7, 2**31 - 1], np.int32), ids.shape)
    return np.where((rng.random(ids.shape) < none) | (ids >= groups), nothing, ids)


def room(ids, groups, alignment):
    return -(-(ids.size + min(groups, ids.size) * (alignment - 1)) // alignment) * alignment


def check_places(ids, groups, alignment, backend):
    sizes = {"groups": groups, "alignment": alignment, "places": room(ids, groups, alignment)}
    got = run(_sorted_places, ids, backend=backend, **sizes)
    for name, value, want in zip(
        ("place", "sizes", "copy"), got, numpy_sorted_places(ids, **sizes)
    ):
        assert value.dtype == np.int32
        assert np.array_equal(value, want), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rows,copies,groups,alignment",
    [(100, 3, 10, 8), (64, 8, 128, 128), (1, 1, 1, 1), (200, 2, 1, 16), (70, 10, 512, 4)],
)
def test_sorted_places(rng, rows, copies, groups, alignment, backend):
    check_places(distinct_ids(rng, rows, copies, groups), groups, alignment, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lopsided_places(rng, backend):
    """All rows in the first group, in the last, and none anywhere: one shape, one program."""
    for value in (0, 6, 7):
        ids = np.full((150, 2), 7, np.int32)
        ids[:, rng.integers(2)] = value
        check_places(ids, 7, 128, backend)


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize(
    "rows,copies,groups", [(1, 2, 8), (16, 8, 128), (300, 8, 70), (4096, 1, 3), (77, 6, 512)]
)
def test_sorted_tiles(rng, rows, copies, groups, backend):
    """The layout of `sorted_places` and its tiles; negative ids are none too."""
    ids = distinct_ids(rng, rows, copies, groups)
    ids = np.where(rng.random(ids.shape) < 0.1, -rng.integers(1, 9, ids.shape), ids)
    ids = ids.astype(np.int32)
    places = room(ids, groups, 128)
    function = partial(api.sorted_tiles, groups=groups, places=places, backend=backend)
    *layout, tiles = run(jax.jit(function), ids)
    wanted = numpy_sorted_places(ids, groups, 128, places)
    for value, want in zip(layout, wanted):
        assert np.array_equal(value, want)
    group, in_tile = [], []
    for g in range(groups):
        count = np.sum(ids == g)
        group += [g] * -(-count // 128)
        in_tile += [min(128, count - first) for first in range(0, count, 128)]
    rest = places // 128 - len(group)
    assert tiles.count == [len(group)]
    assert np.array_equal(tiles.group, group + [groups - 1] * rest)
    assert np.array_equal(tiles.rows, in_tile + [0] * rest)


def test_many_small_places(rng):
    """One compiled function; with every share of assignments to none."""
    for none in np.linspace(0, 1, 40):
        check_places(distinct_ids(rng, 9, 3, 5, none), 5, 4, "reference")


@pytest.mark.parametrize("tiles", [1, 2, 3, 7, 8])
def test_sums_before(rng, tiles, monkeypatch):
    """In one product and in several."""
    monkeypatch.setattr(grid_layout, "SPAN", 3)
    counts = rng.integers(0, 65, (tiles, 5)).astype(np.float32)
    before, total = grid_layout._sums_before(jnp.asarray(counts))
    assert np.array_equal(before, np.cumsum(counts, axis=0) - counts)
    assert np.array_equal(total, counts.sum(axis=0))


@pytest.mark.parametrize("tokens,experts,k", [(1000, 128, 8), (64, 8, 2), (300, 256, 16)])
def test_lowering_for_cuda(tokens, experts, k):
    """Both kernels become CUDA programs on a machine without a GPU."""

    def route(scores):
        ids = api.top_k(scores, k, backend="mosaic_gpu")[0]
        return api.sorted_places(
            ids, groups=experts, alignment=128, places=2**16, backend="mosaic_gpu"
        )

    scores = jax.ShapeDtypeStruct((tokens, experts), jnp.float32)
    text = jax.export.export(jax.jit(route), platforms=["cuda"])(scores).mlir_module()
    assert text.count("mosaic_gpu") >= 2
    assert "multimem" not in text and "stablehlo.sort" not in text


def test_lowering_of_many_groups():
    places = partial(
        api.sorted_places, groups=512, alignment=128, places=2**16, backend="mosaic_gpu"
    )
    ids = jax.ShapeDtypeStruct((128, 8), jnp.int32)
    assert "mosaic_gpu" in jax.export.export(jax.jit(places), platforms=["cuda"])(ids).mlir_module()


def test_refusals(rng):
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu: 2000 experts; the kernel takes"):
        api.top_k(jnp.zeros((4, 2000)), 2, backend="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=r"9000 assignments; the kernel takes"):
        ids = jnp.zeros((4500, 2), jnp.int32)
        api.sorted_tiles(ids, groups=4, places=9600, backend="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=r"scores are bfloat16"):
        api.top_k(jnp.zeros((4, 8), jnp.bfloat16), 2, backend="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=r"values are bfloat16"):
        api.top_k(
            jnp.zeros((4, 8)), 2, values_TE=jnp.zeros((4, 8), jnp.bfloat16), backend="mosaic_gpu"
        )
    with pytest.raises(NotImplementedError, match=r"40 assignments a row"):
        api.sorted_places(
            jnp.zeros((4, 40), jnp.int32), groups=64, alignment=8, places=8, backend="mosaic_gpu"
        )
    with pytest.raises(NotImplementedError, match=r"unknown backend 'thrust'; there are mosaic"):
        api.top_k(jnp.zeros((4, 8)), 2, backend="thrust")
    with pytest.raises(ValueError, match=r"k=9 must lie between 1 and the 8 experts"):
        api.top_k(jnp.zeros((4, 8)), 9)
    scores = rng.normal(size=(4, 12)).astype(np.float32)  # falls through to the reference
    assert np.array_equal(api.top_k(jnp.asarray(scores), 2)[0], numpy_top_k(scores, 2))


def test_explanation():
    assert api.explain_top_k(64, 512, 40) == (
        "top_k: reference; not mosaic_gpu: the 40 best; the kernel takes up to 32"
    )
    assert api.explain_sorted_places(0, 2, 8) == (
        "sorted_places: reference; not mosaic_gpu: no rows, no assignments or no groups"
    )
    if not ON_GPU:
        assert api.explain_top_k(64, 8, 2).startswith(
            "top_k: reference; not mosaic_gpu: the device"
        )
