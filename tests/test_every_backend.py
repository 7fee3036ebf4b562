"""Every backend of every operation, by the same cases, against float64 and plain bfloat16.

Kernels are interpreted on a CPU where the interpreter can, and compiled on a GPU of capability 9.0
(`make test-gpu`). What is peculiar to one operation or one kernel has its own tests.
"""

import jax
import numpy as np
import pytest
from backend_cases import fused_problem, grouped_problem, quantized_problem
from jax import numpy as jnp
from kernel_support import ON_GPU, activation64, distinct_ids, needs_transposes
from test_planner import dot_flops

from pallas_kernels.fused_experts import api as fused
from pallas_kernels.fused_experts.activations import ACTIVATIONS
from pallas_kernels.grouped_matmul import api as grouped
from pallas_kernels.quantized_experts import api as quantized

# What is not finite is multiplied, by the interpreter with numpy, and then not stored.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")

TPU = pytest.mark.skipif(ON_GPU, reason="the TPU kernels are interpreted on a CPU")
MARKS = {"mosaic_gpu": needs_transposes, "mosaic_tpu": TPU}
WIDTH = 128  # which all kernels take
SLOTS, TOKENS = 4, 131


def each(backends, *values):
    """Parameters for each backend."""
    return [pytest.param(b, *values, marks=MARKS.get(b, ())) for b in backends]


OPERATIONS = [
    *each(grouped.BACKENDS, "grouped_matmul"),
    *each(fused.BACKENDS, "fused_experts"),
    *each(("grouped", "reference"), "biases"),
    *each(quantized.BACKENDS, "int8"),
    *each(quantized.BACKENDS, "e4m3"),
    *each(quantized.BACKENDS, "float8 rows"),
]
every = pytest.mark.parametrize("backend,operation", OPERATIONS)


def routed(rng, tokens, routing):
    """Two assignments a token to four slots; 4 stands for none."""
    ids = np.full((tokens, 2), SLOTS)
    if routing == "mixed":
        ids = distinct_ids(rng, SLOTS, tokens, 2)
        ids[ids == rng.integers(SLOTS)] = SLOTS  # an empty expert, and rows without any
    elif routing == "all in one":
        ids[:, 1] = rng.integers(SLOTS)
    elif routing == "one row":
        ids[rng.integers(tokens), 0] = rng.integers(SLOTS)
    return ids


def problem(rng, operation, ids, *, slots=SLOTS, width=WIDTH, hidden=WIDTH, out=None):
    shapes = {"slots": slots, "d_model": width, "hidden": hidden, "d_out": out}
    if operation == "grouped_matmul":
        sizes = np.bincount(ids[:, 0], minlength=slots)[:slots]
        return grouped_problem(rng, sizes, rows=len(ids), k=width, n=hidden)
    if operation in ("fused_experts", "biases"):
        return fused_problem(rng, ids, **shapes, biases=operation == "biases")
    dtype = jnp.int8 if operation == "int8" else jnp.float8_e4m3fn
    rows = "float8" if operation == "float8 rows" else "bfloat16"
    return quantized_problem(rng, ids, dtype, rows, **shapes)


@every
def test_routings(rng, operation, backend):
    """An empty expert, all rows in one, one row, none; the same bits twice."""
    for routing in ("mixed", "all in one", "one row", "none"):
        case = problem(rng, operation, routed(rng, TOKENS, routing))
        results = case.run(backend)
        case.check(results)
        if routing == "mixed":
            again = case.run(backend)
            assert all(a.tobytes() == again[name].tobytes() for name, a in results.items())


@pytest.mark.parametrize(
    "backend", [pytest.param("mosaic_gpu", marks=pytest.mark.slow), *each(["mosaic_tpu"])]
)
def test_without_gradient(rng, backend):
    """Few rows a slot: tiles that are nearly empty are not loaded or stored whole."""
    width = 64 if backend == "mosaic_gpu" else WIDTH
    for routing in ("mixed", "all in one", "one row", "none"):
        ids = routed(rng, TOKENS, routing)[:, :1]
        assert ids.size <= fused.FEW_ROWS * SLOTS
        case = problem(rng, "fused_experts", ids, width=width, hidden=width)
        case.check(case.run(backend, gradient=False))


@every
def test_one_expert_and_one_row(rng, operation, backend):
    case = problem(rng, operation, np.zeros((1, 1), int), slots=1)
    case.check(case.run(backend))


@pytest.mark.parametrize(
    "backend,operation", [p for p in OPERATIONS if p.values[1] != "grouped_matmul"]
)
def test_outputs_of_another_width(rng, operation, backend):
    """As in an exchange that sends fewer columns one way."""
    case = problem(rng, operation, routed(rng, 37, "mixed"), width=128, out=256)
    case.check(case.run(backend))


MANY = [
    pytest.param(*p.values, marks=[*p.marks, *([pytest.mark.slow] * (p.values[0] in MARKS))])
    for p in OPERATIONS
]


@pytest.mark.parametrize("backend,operation", MANY)
def test_512_experts(rng, operation, backend):
    """More experts than rows, as narrow as the backend takes them."""
    width = {"mosaic_gpu": 64, "mosaic_tpu": WIDTH}.get(backend, 16)
    if backend == "mosaic_gpu" and operation in ("int8", "e4m3", "float8 rows"):
        width = WIDTH
    ids = np.stack([rng.permutation(513)[:2] for _ in range(11)])
    case = problem(rng, operation, ids, slots=512, width=width, hidden=width)
    case.check(case.run(backend))


@pytest.mark.parametrize("width,hidden", [(160, 128), (128, 160)])
@pytest.mark.parametrize("operation", dict.fromkeys(p.values[1] for p in OPERATIONS))
def test_widths_that_kernels_refuse(rng, operation, width, hidden):
    """The automatic choice serves them."""
    ids = routed(rng, 37, "mixed")
    case = problem(rng, operation, ids, width=width, hidden=hidden)
    case.check(case.run(None))
    with pytest.raises(NotImplementedError, match=r"160 is no multiple of|biases"):
        case.run("mosaic_gpu")


@pytest.mark.parametrize("activation", ["geglu", "swiglu_oai", "gelu", "relu2"])
@pytest.mark.parametrize("backend", each(fused.BACKENDS))
def test_activations(rng, activation, backend):
    wide, narrow = (384, 128) if backend == "mosaic_tpu" else (192, 64)
    d_model, hidden = (wide, narrow) if activation == "geglu" else (narrow, wide)
    ids = distinct_ids(rng, 2, 9, 1)
    shapes = {"slots": 2, "d_model": d_model, "hidden": hidden}
    case = fused_problem(rng, ids, activation=activation, **shapes)
    case.check(case.run(backend))
    if activation == "swiglu_oai":
        # Many values beyond the limits. Not the gradients: where a value is kept in bfloat16 its
        # rounding decides on which side of the limit it is.
        case = fused_problem(rng, ids, activation=activation, rows=6.0, **shapes)
        case.check(case.run(backend, gradient=False))


@pytest.mark.parametrize("rows", ["bfloat16", "float8"])
@pytest.mark.parametrize("backend", each(quantized.BACKENDS))
def test_clamped_activation_of_quantized_experts(rng, backend, rows):
    ids = distinct_ids(rng, 2, 9, 1)
    settings = {"slots": 2, "activation": "swiglu_oai", "d_model": WIDTH, "hidden": WIDTH}
    case = quantized_problem(rng, ids, jnp.float8_e4m3fn, rows, **settings)
    case.check(case.run(backend))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_activations_in_closed_form(rng, name):
    act = ACTIVATIONS[name]
    h = (6.0 * rng.normal(size=(act.parts, 400))).astype(np.float32)
    h[:, :4] = [-300.0, -90.0, 90.0, 300.0]
    h[0, 4:8] = -20.0
    ct = rng.normal(size=400).astype(np.float32)
    value, slopes = activation64(name, h.astype(np.float64))
    parts = tuple(jnp.asarray(part) for part in h)
    got, gradients = act.gradients(parts, jnp.asarray(ct))
    np.testing.assert_array_equal(got, act.value(parts))
    np.testing.assert_allclose(got, value, rtol=2e-5, atol=1e-6)
    for gradient, slope in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(gradient, slope * ct, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operation", ["grouped_matmul", "fused_experts", "int8", "float8 rows"])
@pytest.mark.parametrize("tokens,slots", [(256, 8), (16, 64)])
def test_work_is_that_of_the_assignments(rng, operation, tokens, slots):
    """Counted in the traced program: no more rows than the assignments and half-filled blocks."""
    if ON_GPU and operation == "fused_experts":
        pytest.skip("its products are kernels here, which are not counted")
    ids = distinct_ids(rng, slots - 1, tokens, 1 if operation == "grouped_matmul" else 2)
    case = problem(rng, operation, ids, slots=slots, width=64, hidden=32)
    backend = "grouped" if operation == "fused_experts" else "blocked"

    def flops(backend, gradient):
        options = {**case.options, "backend": backend}
        arrays, maps, ct = jax.tree.map(jnp.asarray, (case.arrays, case.maps, case.ct))

        def forward(arrays):
            return case.function(arrays, maps, **options)

        def both(arrays):
            return jax.vjp(forward, arrays)[1](ct)

        return dot_flops(jax.make_jaxpr(both if gradient else forward)(arrays).jaxpr)

    columns = 32 if operation == "grouped_matmul" else 3 * 32
    own = 2 * ids.size * 64 * columns
    assert own <= flops(backend, False) <= 2 * own
    assert flops("reference", False) > 2 * flops(backend, False)
    if case.ct is not None:  # the loop of the weights' gradient counts one turn here
        assert flops(backend, True) <= 3 * 2 * own + 2 * ids.size * 64
