"""A backward that computes the router again, and another way, still finds what was sent."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.config import ExchangeConfig, ExpertsConfig, MoEConfig, RouterConfig
from moejax.layer import MoELayer
from moejax.routing import router
from pallas_kernels.exchange.received import RECEIVED
from sharding.gradients import reduce_gradients
from sharding.mesh import TOKEN_AXES, MeshShape, make_mesh
from sharding.specs import specs_of

D, K, TOKENS, DEVICES = 16, 3, 24, 4
KEEPS = jax.checkpoint_policies.save_only_these_names(RECEIVED)


@pytest.mark.parametrize("experts", [8, 7])
@pytest.mark.parametrize("mode", ["all_to_all", "ring"])
def test_a_choice_made_twice(mode, experts, rng, monkeypatch):
    """Every second time a router's scores are the other way round, as no rounding would have it.

    Whichever time was the forward's, on each device, the gradients are those of its choice.
    """
    config = MoEConfig(
        RouterConfig(experts, K), ExpertsConfig(hidden=8), ExchangeConfig(mode, bucket_rows=TOKENS)
    )
    layer = MoELayer(D, config, expert_devices=DEVICES, rngs=nnx.Rngs(0))
    layer.report_experts(K)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), params)
    specs, rows = specs_of(params), P(TOKEN_AXES)
    plain = router.selection_scores

    def gradients(turned, policy=None):
        """Of the bank, and the experts; `turned`: 0 or 1 of each device, or −1 for both."""

        def body(params, x, ct, turned_1):
            def scores(logits_TE, *args):
                select_TE = plain(logits_TE, *args)
                like = jax.typeof(turned_1)
                turn_1 = jnp.where(
                    turned_1 < 0,
                    jax.pure_callback(
                        lambda _: np.array([next(times) % 2], np.int32), like, turned_1
                    ),
                    turned_1,
                )
                return jnp.where(turn_1 > 0, select_TE[:, ::-1], select_TE)

            def apply(params, x):
                y, aux = nnx.merge(graph, params, rest)(x)
                return y, aux.experts_TK

            def loss(params, x):
                run = apply if policy is None else jax.checkpoint(apply, policy=policy)
                y, experts_TK = run(params, x)
                return jnp.sum(y * ct), experts_TK

            monkeypatch.setattr(router, "selection_scores", scores)
            found, experts_TK = jax.grad(loss, has_aux=True)(params, x)
            return reduce_gradients(found, specs), experts_TK

        times = itertools.count()
        mapped = jax.shard_map(
            body,
            mesh=make_mesh(MeshShape(expert=DEVICES)),
            in_specs=(specs, rows, rows, rows),
            out_specs=(specs, rows),
            check_vma=False,
        )
        turned = np.broadcast_to(np.asarray(turned, np.int32), DEVICES)
        found, chosen = jax.block_until_ready(jax.jit(mapped)(params, x, ct, turned))
        return nnx.to_pure_dict(found)["bank"], np.asarray(chosen).reshape(DEVICES, -1), times

    x, ct = (rng.normal(size=(TOKENS * DEVICES, D)).astype(np.float32) for _ in range(2))
    got, chosen, times = gradients(-1, KEEPS)
    assert next(times) == 2 * DEVICES, "a router was not computed twice"
    other = gradients(1)[1]
    want, expected, _ = gradients((chosen == other).all(1))
    np.testing.assert_array_equal(chosen, expected)
    for name, value in want.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-5 * scale, err_msg=name)
