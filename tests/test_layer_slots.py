"""What a layer reports of where its tokens are served."""

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.config import ExpertsConfig, LocalityConfig, MoEConfig, RouterConfig
from moejax.layer import MoELayer
from moejax.placement.arrays import from_slots
from sharding.mesh import TOKEN_AXES, MeshShape, make_mesh
from sharding.specs import specs_of

D, E, K, G, T = 8, 8, 3, 4, 12
COLUMNS = K + 1


def test_slots_of_few_devices_of_copies(rng):
    """A limit with copies: where tokens go is known from the report alone."""
    moe = MoEConfig(
        RouterConfig(num_experts=E, top_k=K),
        ExpertsConfig(hidden=4),
        locality=LocalityConfig(device_penalty=0.2, max_devices=2),
    )
    layer = MoELayer(D, moe, expert_devices=G, rngs=nnx.Rngs(int(rng.integers(1 << 30))))
    graph, params = nnx.split(layer)
    # Each expert once, and four of them twice; some slots stay empty.
    slots_P = np.full((G, 4), -1, np.int32)
    slots_P[:, :2] = rng.permutation(E).reshape(G, 2)
    slots_P[:, 2] = slots_P[[1, 2, 3, 0], 0]
    placement = from_slots(slots_P.reshape(-1), E, 2)
    mask = rng.random(G * T) > 0.2

    def run(params, x_TD, mask_T):
        layer = nnx.merge(graph, params)
        _, plain = layer(x_TD, placement, token_mask_T=mask_T)
        assert plain.slots_TK is None and plain.experts_TK is None
        layer.report_experts(COLUMNS)
        layer.report_slots(COLUMNS)
        _, aux = layer(x_TD, placement, token_mask_T=mask_T)
        total = aux.over_devices()
        assert total.slots_TK is aux.slots_TK
        # Three microbatches of one layer.
        many = jax.tree.map(lambda a: jnp.stack([a[None]] * 3), aux).summed()
        return aux.experts_TK, aux.slots_TK, total.counters, many.slots_TK

    rows = P(TOKEN_AXES, None)
    mapped = jax.shard_map(
        run,
        mesh=make_mesh(MeshShape(expert=G)),
        in_specs=(specs_of(params), rows, P(TOKEN_AXES)),
        out_specs=(rows, rows, P(), P(None, TOKEN_AXES, None)),
        check_vma=False,
    )
    x = rng.normal(size=(G * T, D)).astype(np.float32)
    experts, slots, counters, many = jax.device_get(jax.jit(mapped)(params, x, mask))
    assert slots.shape == (G * T, COLUMNS) and slots.dtype == np.int32
    assert (slots[:, K:] == -1).all() and (slots[~mask] == -1).all()
    assert (slots[mask, :K] >= 0).all()
    np.testing.assert_array_equal(
        np.where(slots >= 0, slots_P.reshape(-1)[np.maximum(slots, 0)], -1), experts
    )
    devices = [set(row[:K] // 4) for row in slots[mask]]
    own = np.repeat(np.arange(G), T)[mask]
    assert max(map(len, devices)) <= 2
    assert int(counters.rows_host) == sum(len(d - {o}) for d, o in zip(devices, own))
    assert int(counters.rows_self) == sum(o in d for d, o in zip(devices, own))
    # Those of a device behind each other, its microbatches in order.
    parts = slots.reshape(G, 1, T, COLUMNS)
    np.testing.assert_array_equal(many[0], np.tile(parts, (1, 3, 1, 1)).reshape(-1, COLUMNS))
