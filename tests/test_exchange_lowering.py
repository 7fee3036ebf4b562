"""The exchange as programs for TPUs, made on a machine without one.

Where the TPU compiler is installed (the package libtpu) it compiles them too.
"""

import re
from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest
from exchange_kernel_support import pull_through, sharded
from jax import numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.exchange import api

DTYPES = (np.uint8, ml_dtypes.bfloat16, np.float32)


def shapes_for(devices, groups, capacity, dtype, **sharding):
    """Of rows, counts and a cotangent, in the layout of `sharded`."""
    shape = partial(jax.ShapeDtypeStruct, **sharding)
    rows = shape((devices * groups, capacity, 2112), dtype)
    return rows, shape((devices * groups,), jnp.int32), rows


def forward_and_back(backend, rows, counts, ct):
    exchange = partial(api.exchange_buckets, axis="expert", backend=backend)
    if rows.dtype == jnp.uint8:
        return exchange(rows, counts)
    return pull_through(exchange, rows, counts, ct)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "backend,operation",
    [("mosaic_tpu", "tpu_custom_call"), ("ragged", "@ragged_all_to_all(")],
)
def test_lowering(backend, operation, dtype):
    """On a machine without a TPU, for 16 of them."""
    body = partial(forward_and_back, backend)
    function = sharded(body, abstract=True, data=2, expert=8)
    allowed = [jax.export.DisabledSafetyCheck.custom_call("ragged_all_to_all")]
    export = jax.export.export(function, platforms=["tpu"], disabled_checks=allowed)
    exported = export(*shapes_for(16, 8, 96, dtype))
    text = exported.mlir_module()
    assert text.count(operation) == (1 if dtype == np.uint8 else 2)


def test_axes_have_barriers_of_their_own():
    """A signal along one axis must not be taken for one along another."""

    def body(rows, counts, _):
        for axis in ("data", "expert", "data"):
            rows, counts = api.exchange_buckets(rows, counts, axis, backend="mosaic_tpu")
        return rows

    function = sharded(body, abstract=True, data=8, expert=8)
    shapes = shapes_for(64, 8, 96, jnp.float32)
    text = jax.export.export(function, platforms=["tpu"])(*shapes).mlir_module()
    assert re.findall(r"collective_id\\22: (\d+)", text) == ["0", "1", "0"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["mosaic_tpu", "ragged"])
def test_compiling(backend, dtype, monkeypatch):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask about
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    names, types = ("expert", "data"), (AxisType.Auto,) * 2
    mesh = Mesh(np.array(topology.devices).reshape(2, 2), names, axis_types=types)
    body, spec = partial(forward_and_back, backend), P(names)
    program = jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    shapes = shapes_for(4, 2, 100, dtype, sharding=NamedSharding(mesh, spec))
    text = program.lower(*shapes).compile().as_text()
    assert ("tpu_custom_call" if backend == "mosaic_tpu" else "ragged-all-to-all") in text
