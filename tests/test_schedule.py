"""Reading a schedule, and making one in which chunks travel behind experts (that on GPUs)."""

import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.config import ExchangeConfig, ExpertsConfig, MoEConfig, RouterConfig
from moejax.layer import MoELayer
from sharding.mesh import TOKEN_AXES, MeshShape, make_mesh
from sharding.schedule import Transfer, compile_overlapped, kernels_of, profile, transfers
from sharding.specs import specs_of

TEXT = """HloModule jit_body, is_scheduled=true, entry_computation_layout={()->f32[2]{0}}

%inner (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %add.1 = f32[4]{0} add(%p, %p), metadata={op_name="jit(body)/add"}
}

ENTRY %main (x: bf16[2,8], w: bf16[8,8]) -> bf16[4,8] {
  %x = bf16[2,8]{1,0} parameter(0)
  %gather-start = ((bf16[2,8]{1,0}), bf16[4,8]{1,0}) all-gather-start(%x), dimensions={0}
  %call.1 = bf16[2,8]{1,0} custom-call(%x), metadata={op_name="jit(body)/shard_map/first/mpmd_map"}
  %all-gather-done.3 = bf16[4,8]{1,0} all-gather-done(%gather-start), metadata={op_name="a/b"}
  %all-to-all-start = ((bf16[2,8]{1,0}), bf16[2,8]{1,0}) all-to-all-start(%call.1), dimensions={0}
  %all-gather-start.2 = ((u8[3]{0}), u8[6]{0}) all-gather-start(%x), dimensions={0}
  %call.2 = bf16[2,8]{1,0} custom-call(%x), metadata={op_name="jit(body)/shard_map/second/mpmd_map"}
  %call.3 = (bf16[2,8]{1,0}, pred[3]{0}) custom-call(%x), custom_call_target="Unnamed"
  %all-gather-done.2 = u8[6]{0} all-gather-done(%all-gather-start.2)
  %fusion = bf16[2,8]{1,0} fusion(%call.2), kind=kLoop, calls=%inner
  %all-to-all-done = bf16[2,8]{1,0} all-to-all-done((bf16[2,8], u8[]) %all-to-all-start)
  %sum = (f32[2]{0}, s32[]) all-reduce(%fusion, %x), to_apply=%inner
  ROOT %again = bf16[2,8]{1,0} all-to-all(%all-to-all-done), dimensions={0}
}
"""


def test_transfers_of_a_program():
    assert transfers(TEXT) == [
        Transfer("gather-start", "all-gather", 64, ("first",)),
        Transfer("all-gather-start.2", "all-gather", 6, ("second", "call.3")),
        Transfer("all-to-all-start", "all-to-all", 32, ("second", "call.3")),
        Transfer("sum", "all-reduce", 12, ()),
        Transfer("again", "all-to-all", 32, ()),
    ]
    assert kernels_of(TEXT) == {"call.1": "first", "call.2": "second", "call.3": "call.3"}
    with pytest.raises(ValueError, match="without a schedule"):
        transfers(TEXT.replace("is_scheduled=true", ""))


def test_profile():
    """Every kernel and every collective has a cost; a pair's is that of its start."""
    text = profile(TEXT, {"first": 5.0, "second": 250.0, "call.3": 1.0}.__getitem__, 64e6)
    costs = {n: float(us) for n, us in re.findall(r'costs { name: "(.*)" cost_us: (.*) }\n', text)}
    assert costs == {
        "call.1": 5.0,
        "call.2": 250.0,
        "call.3": 1.0,
        "gather-start": 1.0,
        "all-gather-start.2": 0.094,
        "all-to-all-start": 0.5,
        "sum": 0.188,
        "again": 0.5,
    }


@pytest.mark.gpu
def test_chunks_travel_behind_the_experts():
    """On GPUs: all but the first dispatch and the last combine have experts beside them."""
    if jax.default_backend() != "gpu" or jax.device_count() < 2:
        pytest.skip("needs several GPUs")
    devices, d_model, tokens, chunks = jax.device_count(), 512, 4096, 4
    mesh = make_mesh(MeshShape(expert=devices))
    config = MoEConfig(
        RouterConfig(num_experts=8 * devices, top_k=4),
        ExpertsConfig(hidden=512),
        ExchangeConfig(mode="ring", chunks=chunks, bucket_slack=np.inf),
    )
    layer = MoELayer(d_model, config, expert_devices=devices, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def body(params, x):
        return nnx.merge(graph, params, rest)(x)[0]

    rows = P(TOKEN_AXES)
    run = jax.shard_map(
        body, mesh=mesh, in_specs=(specs_of(params), rows), out_specs=rows, check_vma=False
    )
    x = jnp.ones((devices * tokens, d_model), jnp.bfloat16)
    compiled = compile_overlapped(jax.jit(run).lower(params, x), lambda name: 200.0, 100e9)
    wide = tokens // chunks * devices * d_model * 2
    moved = [t for t in transfers(compiled.as_text()) if t.bytes >= wide]
    assert len(moved) == 2 * chunks
    behind = [t for t in moved if any("experts" in kernel for kernel in t.kernels)]
    assert len(behind) == 2 * chunks - 2
