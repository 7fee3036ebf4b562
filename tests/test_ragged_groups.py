"""Groups of any size and parts of all groups, by every backend, against float64 numpy.

The Hopper kernels are interpreted on a CPU and compiled on a GPU of capability 9.0.
"""

from contextlib import nullcontext
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from kernel_support import BFLOAT16, ON_GPU, needs_transposes
from oracle import relative_error

from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.hopper.compat import interpreted
from pallas_kernels.hopper.ragged import most_tiles, ragged_tile_map

# What is not finite is multiplied, by the interpreter with numpy, and then not stored.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
MOSAIC = pytest.param("mosaic_gpu", marks=needs_transposes)
BACKENDS = ("reference", "blocked", MOSAIC)


@partial(jax.jit, static_argnames=("alignment", "backend"))
def run_and_pull(lhs, rhs, sizes, offset, ct, alignment, backend):
    def product(lhs, rhs):
        return grouped_matmul(
            lhs, rhs, sizes, group_offset=offset, alignment=alignment, backend=backend
        )

    out, pull = jax.vjp(product, lhs, rhs)
    return out, *pull(ct)


def run(lhs, rhs, sizes, offset, ct, backend, alignment=1):
    """Product and gradients; the offset is traced, or None."""
    offset = None if offset is None else np.int32(offset)
    interpret = backend == "mosaic_gpu" and not ON_GPU
    with interpreted() if interpret else nullcontext():
        sizes = np.asarray(sizes, np.int32)
        return jax.tree.map(
            np.asarray, run_and_pull(lhs, rhs, sizes, offset, ct, alignment, backend)
        )


def spans(sizes, offset, own):
    ends = np.cumsum(sizes)
    return list(zip(ends - sizes, ends))[offset or 0 :][:own]


def oracle(lhs, rhs, sizes, offset, ct):
    lhs, rhs, ct = (a.astype(np.float64) for a in (lhs, rhs, ct))
    out, lhs_ct, rhs_ct = np.zeros_like(ct), np.zeros_like(lhs), np.zeros_like(rhs)
    for g, (begin, end) in enumerate(spans(sizes, offset, len(rhs))):
        rows = slice(begin, end)
        out[rows] = lhs[rows] @ rhs[g]
        lhs_ct[rows] = ct[rows] @ rhs[g].T
        rhs_ct[g] = lhs[rows].T @ ct[rows]
    return out, lhs_ct, rhs_ct


def draw(rng, rows, own, k=64, n=64):
    arrays = rng.normal(size=(rows, k)), rng.normal(size=(own, k, n)), rng.normal(size=(rows, n))
    return tuple(a.astype(BFLOAT16) for a in arrays)


def check(rng, rows, sizes, backend, offset=None, own=None, k=64, n=64):
    """Rows that belong to none of the groups hold no numbers: they must not be looked at."""
    sizes = np.asarray(sizes)
    own = len(sizes) if own is None else own
    lhs, rhs, ct = draw(rng, rows, own, k, n)
    wanted = oracle(lhs, rhs, sizes, offset, ct)
    mine = np.zeros(rows, bool)
    for begin, end in spans(sizes, offset, own):
        mine[begin:end] = True
    lhs[~mine], ct[~mine] = np.nan, np.inf
    results = run(lhs, rhs, sizes, offset, ct, backend)
    for name, got, want in zip(("out", "lhs", "rhs"), results, wanted):
        assert got.dtype == BFLOAT16 and np.isfinite(got.astype(np.float32)).all(), name
        if want.any():
            assert relative_error(got, want) < 5e-3, name
    out, lhs_ct, rhs_ct = results
    assert not out[~mine].any() and not lhs_ct[~mine].any()
    assert not rhs_ct[[begin == end for begin, end in spans(sizes, offset, own)]].any()
    # Each group's own, so that a small one's error is not hidden among large ones.
    for g, (begin, end) in enumerate(spans(sizes, offset, own)):
        if end > begin:
            assert relative_error(out[begin:end], wanted[0][begin:end]) < 6e-3, g
            assert relative_error(lhs_ct[begin:end], wanted[1][begin:end]) < 6e-3, g
            assert relative_error(rhs_ct[g], wanted[2][g]) < 6e-3, g


ROWS, GROUPS, OWN = 331, 6, 4
CASES = {  # sizes of all groups, the first whose matrix is there: one compiled function
    "one row": ((0, 0, 1, 0, 0, 0), 1),
    "no row in any group": ((0,) * 6, 0),
    "no row in the own groups": ((20, 0, 0, 0, 0, 311), 1),
    "all rows in one group": ((0, 0, 331, 0, 0, 0), 2),
    "all rows in the last group": ((0, 0, 0, 0, 0, 331), 2),
    "around the tiles' edges": ((127, 129, 1, 63, 0, 11), 0),
    "more around the tiles' edges": ((65, 63, 128, 64, 2, 8), 1),
    "around the eights": ((7, 9, 16, 15, 1, 8), 0),
    "within one tile": ((1, 2, 0, 1, 3, 0), 2),
    "rows of no group": ((5, 0, 77, 100, 0, 0), 0),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_against_numpy(rng, case, backend):
    sizes, offset = CASES[case]
    check(rng, ROWS, sizes, backend, offset, OWN)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows,sizes", [(130, (130,)), (5, (0, 3, 1))])
def test_few_groups(rng, rows, sizes, backend):
    """Without an offset; fewer rows than a tile has."""
    check(rng, rows, sizes, backend)


def random_sizes(rng, rows, groups):
    """Some are empty, and some rows may belong to none."""
    share = rng.dirichlet(np.full(groups, 0.5)) * (rng.random(groups) < 0.8)
    return np.floor(share * rows).astype(np.int64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_sizes(rng, backend):
    """Several tiles of columns and strips of a tile."""
    sizes = random_sizes(rng, 443, GROUPS)
    check(rng, 443, sizes, backend, int(rng.integers(3)), OWN, k=192, n=256)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_do_not_touch(rng, backend):
    """What is not finite in one group stays there, though it shares tiles with its neighbours."""
    sizes, own = np.array([13, 21, 100, 197, 0, 0]), [slice(0, 13), slice(34, 331)]
    lhs, rhs, ct = draw(rng, ROWS, OWN)
    clean = run(lhs, rhs, sizes, 0, ct, backend)
    lhs[13:34], ct[13:34], rhs[1] = np.nan, np.inf, np.nan
    dirty = run(lhs, rhs, sizes, 0, ct, backend)
    for a, b in zip(clean[:2], dirty[:2]):
        assert all(a[rows].tobytes() == b[rows].tobytes() for rows in own)
        assert not np.isfinite(b[13:34].astype(np.float32)).any()
    for g in (0, 2, 3):
        assert clean[2][g].tobytes() == dirty[2][g].tobytes()


@needs_transposes
def test_aligned_groups_have_the_same_bits(rng):
    """Groups of whole tiles by the kernels for any size and by those for whole tiles."""
    sizes = np.array([128, 0, 256])
    lhs, rhs, ct = draw(rng, 512, 3)
    ragged = run(lhs, rhs, sizes, None, ct, "mosaic_gpu", alignment=1)
    aligned = run(lhs, rhs, sizes, None, ct, "mosaic_gpu", alignment=128)
    for a, b in zip(ragged, aligned):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("alignment", [8, 32])
def test_blocks_in_place_with_an_offset(rng, alignment):
    sizes = np.array([2, 0, 3, 1, 4]) * alignment
    lhs, rhs, ct = draw(rng, 12 * alignment, 3)
    got = run(lhs, rhs, sizes, 1, ct, "blocked", alignment)
    for a, b in zip(got, oracle(lhs, rhs, sizes, 1, ct)):
        assert relative_error(a, b) < 5e-3
        assert not a[np.asarray(b == 0)].any()


def test_tile_list(rng):
    """Every row is stored once, by a tile of its group; no list is longer than its bound."""
    rows, own = 648, 5
    make = jax.jit(partial(ragged_tile_map, rows=rows))
    for _ in range(50):
        offset, sizes = int(rng.integers(4)), random_sizes(rng, rows, 8)
        if rng.random() < 0.3:  # every group ends within a tile and begins within the same
            sizes = np.maximum(sizes // 8 * 8 - 1, 0)
        mine = spans(sizes, offset, own)
        tiles = make(jnp.asarray(np.array(mine).T, jnp.int32))
        count = int(tiles.count[0])
        assert count <= most_tiles(rows, own) == len(tiles.group)
        stored, group_of, want = np.zeros(rows, int), np.full(rows, -2), np.full(rows, -1)
        for group, (eighth, begin, end) in zip(tiles.group[:count], np.asarray(tiles.rows)):
            owned = slice(max(begin, 8 * eighth), min(end, 8 * eighth + 128))
            stored[owned] += 1
            group_of[owned] = group
        for g, (begin, end) in enumerate(mine):
            want[begin:end] = g
        assert (stored == 1).all() and np.array_equal(group_of, want)


def test_no_rows_at_all():
    lhs, rhs = jnp.zeros((0, 64), jnp.bfloat16), jnp.ones((2, 64, 128), jnp.bfloat16)
    sizes = jnp.zeros((2,), jnp.int32)
    out, pull = jax.vjp(lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes), lhs, rhs)
    assert out.shape == (0, 128) and out.dtype == jnp.bfloat16
    assert not np.asarray(pull(out)[1]).any()


def test_groups_that_do_not_match_are_refused():
    lhs, rhs = jnp.zeros((4, 8)), jnp.zeros((2, 8, 8))
    with pytest.raises(ValueError, match="2 matrices for 3 groups; give a group_offset"):
        grouped_matmul(lhs, rhs, jnp.zeros((3,), jnp.int32))
    for offset in (-1, 2):
        with pytest.raises(ValueError, match=rf"group_offset {offset} with 2 .* 0 to 1"):
            grouped_matmul(lhs, rhs, jnp.zeros((3,), jnp.int32), group_offset=offset)


def test_lowering_for_cuda():
    """Ragged kernels of all three products become CUDA programs on a machine without a GPU."""
    shape, bf16 = jax.ShapeDtypeStruct, jnp.bfloat16

    def loss(lhs, rhs, sizes, offset):
        out = grouped_matmul(lhs, rhs, sizes, group_offset=offset, backend="mosaic_gpu")
        return jnp.sum(out.astype(jnp.float32))

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    for rows, k, n in ((999, 2048, 1536), (40, 192, 320)):
        args = (
            shape((rows, k), bf16),
            shape((16, k, n), bf16),
            shape((128,), jnp.int32),
            shape((), jnp.int32),
        )
        text = jax.export.export(gradient, platforms=["cuda"])(*args).mlir_module()
        assert text.count("mosaic_gpu") >= 3
