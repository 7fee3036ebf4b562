"""Mode `remote` on all GPUs of a host: a ring's bits, whatever the routing, and every time.

Run by `make test-gpu` on at least two GPUs of capability 9.0. Both modes sum a row's places in one
order; where that is XLA's own sum it may join a product and a sum, in one program and not in the
other, so that tests of bits have the kernels sum however few there are.
"""

import os
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
import pytest
from backend_cases import ROUNDING
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from moe_harness import ShardedLayer, random_weights
from test_determinism import bits
from test_layer_oracle import BFLOAT16, bend

from moejax.config import ExchangeConfig, ExpertsConfig, MoEConfig, RouterConfig, WireConfig
from moejax.layer import MoELayer
from pallas_kernels.exchange import push
from pallas_kernels.fused_experts import api
from sharding.mesh import TOKEN_AXES, MeshShape, make_mesh
from sharding.specs import specs_of

pytestmark = pytest.mark.gpu

STEPS = int(os.environ.get("MOEJAX_STEPS", "200"))
BOUND = 1e-2  # of an error in a token's or an expert's row, relative to the largest row


@dataclass(frozen=True)
class Sizes:
    """D, E, K and the tokens of a device; the hidden width of narrow experts and of wide ones."""

    d_model: int = 256
    experts: int = 16
    top_k: int = 4
    tokens: int = 512
    hidden: int = 256
    wide: int = 4096  # whose rows are sent before the first product


@pytest.fixture
def devices():
    reason = push.refusal("mosaic_gpu")
    if reason is not None or jax.device_count() < 2:
        pytest.skip(reason or "one GPU: needs several")
    return jax.device_count()


@pytest.fixture
def sizes():
    return Sizes()


@pytest.fixture
def kernels_sum(monkeypatch):
    monkeypatch.setattr(api, "FEW_COPIES", 0)


def config_of(sizes, mode, *, wide=False, bias=False, **exchange):
    exchange = {"bucket_slack": np.inf} | exchange
    return MoEConfig(
        RouterConfig(sizes.experts, sizes.top_k, bias=True, load_balance_coef=0.1),
        ExpertsConfig(sizes.wide if wide else sizes.hidden, bias=bias),
        ExchangeConfig(mode, **exchange),
    )


def poison():
    """Fills free memory of all devices, of which the next results are made, with nan."""
    nan = np.full(2**24, np.nan, np.float32)
    jax.block_until_ready([jax.device_put(nan, d) for d in jax.devices() for _ in range(4)])


def worst(got, want):
    """The largest norm of a row's error, relative to the largest norm of a row."""
    got, want = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (got, want))
    error = np.max(np.linalg.norm(got - want, axis=1))
    scale = np.max(np.linalg.norm(want, axis=1))
    return error / scale if scale > 0 else error


def runs(rng, devices, sizes, *, data=1, tensor=1, **options):
    """(routing, a ring's run, a remote one's, its again) for several routings."""
    if devices % (data * tensor) or devices == data * tensor:
        pytest.skip(f"{devices} GPUs: data × tensor = {data * tensor} leaves none to exchange with")
    devices //= data * tensor
    mesh = (data, devices, tensor)
    make = partial(ShardedLayer, mesh, d_model=sizes.d_model, tokens=sizes.tokens)
    ring, remote = (
        make(config=config_of(sizes, mode, **options), quick=False) for mode in ("ring", "remote")
    )
    assert remote.layer.budget(sizes.tokens).mode == "remote"
    shape = (ring.num_tokens, sizes.d_model)
    for routing in ("random", "one_device", "masked"):
        weights = random_weights(rng, ring.config, sizes.d_model)
        mask = np.ones(ring.num_tokens, bool)
        bend(routing, weights, mask, rng, devices)
        if routing == "masked":
            mask = rng.random(ring.num_tokens) < 0.6
            mask[: sizes.tokens] = False  # a device without tokens of its own
        x, ct = (rng.normal(size=shape).astype(BFLOAT16) for _ in range(2))
        results = []
        for layer in (ring, remote, remote):
            poison()
            results.append(layer(weights, x, ct, mask))
            if layer is remote:
                layer(weights, -x, ct, mask)  # what ran in between does not matter
        yield routing, *results


@pytest.mark.usefixtures("kernels_sum")
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_the_bits_of_a_ring(rng, devices, sizes, wide):
    """Outputs and the experts' gradients; others are sums over devices in another order."""
    for routing, ring, remote, again in runs(rng, devices, sizes, wide=wide):
        assert np.array_equal(ring[0], remote[0]), routing
        assert np.isfinite(remote[0].astype(np.float32)).all() and remote[0].any()
        assert np.array_equal(ring[2].counts_E, remote[2].counts_E)
        for part, grad in ring[3].items():
            if part in ("w_in", "w_out"):
                assert np.array_equal(grad, remote[3][part]), (routing, part)
            error = worst(remote[3][part], grad)
            assert error <= BOUND, (routing, part, error)
        assert bits(again) == bits(remote), routing


UNLIKE = {  # whose roundings XLA places, or which add up parts
    "int8": {"wire": WireConfig("int8", "int8", "int8", "int8")},
    "biases": {"bias": True},
    "several waves": {"bucket_slack": 0.1},
    "two chunks": {"chunks": 2},
    "sums by XLA": {},
    "over data, too": {"data": 2},
    "over tensor, too": {"tensor": 2},
}


@pytest.mark.parametrize("name", UNLIKE)
def test_close_to_a_ring(rng, devices, sizes, name, monkeypatch):
    """Rows sent by themselves, through the wire; the experts' kernels in waves and in chunks."""
    if name != "sums by XLA":
        monkeypatch.setattr(api, "FEW_COPIES", 0)
    for routing, ring, remote, again in runs(rng, devices, sizes, **UNLIKE[name]):
        for part, value in {"y": ring[0], **ring[3]}.items():
            error = worst({"y": remote[0], **remote[3]}[part], value)
            assert error <= BOUND, (routing, part, error)
        waves = int(remote[2].counters.waves)
        assert waves == int(ring[2].counters.waves)
        assert waves > 1 or name != "several waves" or routing != "one_device"
        assert bits(again) == bits(remote), routing


class Layers:
    """Three layers in a row as one program, and what they are fed; everything stays on devices."""

    def __init__(self, devices, sizes, mode, *, gradient):
        config = config_of(sizes, mode)
        layers = [
            MoELayer(sizes.d_model, config, expert_devices=devices, rngs=nnx.Rngs(seed))
            for seed in range(3)
        ]
        graphs, states, rests = zip(*(nnx.split(layer, nnx.Param, ...) for layer in layers))
        specs, rows = specs_of(states), P(TOKEN_AXES)
        self.mesh = make_mesh(MeshShape(expert=devices))
        place = jax.tree.map(lambda spec: jax.sharding.NamedSharding(self.mesh, spec), specs)
        self.params = jax.device_put(states, place)

        def forward(params, x_TD, mask_T):
            outputs = []
            for graph, state, rest in zip(graphs, params, rests, strict=True):
                y_TD, _ = nnx.merge(graph, state, rest)(x_TD, token_mask_T=mask_T)
                x_TD = x_TD + y_TD
                outputs.append(y_TD)
            return outputs

        def body(params, x_TD, ct_TD, mask_T):
            if not gradient:
                return forward(params, x_TD, mask_T), ()

            def loss(params, x_TD):
                outputs = forward(params, x_TD, mask_T)
                return sum(jnp.sum(y.astype(jnp.float32) * ct_TD) for y in outputs), outputs

            (_, outputs), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x_TD)
            # Of the router each device's own share.
            return outputs, [leaf[None] for leaf in jax.tree.leaves(grads)]

        self.run = partial(self._mapped(body, specs, rows, rows, rows, out=rows), self.params)

    def _mapped(self, body, *specs, out):
        mapped = jax.shard_map(body, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)
        return jax.jit(mapped, **ROUNDING)

    def draws(self, sizes):
        """A function of the step's number, [1]: tokens, their cotangents and mask.

        Tokens have more in common in some steps, up to nearly everything, so that they go to few
        experts; none of them is masked in some, and nearly all are in others.
        """

        def body(step):
            shared = jax.random.fold_in(jax.random.key(0), step[0])
            own = jax.random.fold_in(shared, lax.axis_index(TOKEN_AXES))
            common, alike, masked = jax.random.split(shared, 3)
            shape = (sizes.tokens, sizes.d_model)
            x, ct, mask = jax.random.split(own, 3)
            amount = 4 * jax.random.uniform(alike) ** 2
            x_TD = jax.random.normal(x, shape) + amount * jax.random.normal(common, shape[1:])
            kept = 1.5 * jax.random.uniform(masked)
            mask_T = jax.random.uniform(mask, shape[:1]) < kept
            return x_TD.astype(jnp.bfloat16), jax.random.normal(ct, shape), mask_T

        return self._mapped(body, P(), out=P(TOKEN_AXES))


@jax.jit
def differences(a, b):
    """How many values of two trees differ in a bit or are not finite."""

    def count(a, b):
        number = jnp.uint16 if a.dtype == jnp.bfloat16 else jnp.uint32
        same = lax.bitcast_convert_type(a, number) == lax.bitcast_convert_type(b, number)
        return jnp.sum(~(same & jnp.isfinite(a)), dtype=jnp.int32)

    return sum(jax.tree.leaves(jax.tree.map(count, a, b)))


@pytest.mark.slow
@pytest.mark.usefixtures("kernels_sum")
@pytest.mark.parametrize("gradient", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("tokens", [None, 8], ids=["many", "few"])
def test_many_steps(devices, sizes, gradient, tokens):
    """MOEJAX_STEPS steps, another routing in each: a ring's outputs, and the same bits twice."""
    sizes = sizes if tokens is None else replace(sizes, tokens=tokens)
    ring, remote = (Layers(devices, sizes, mode, gradient=gradient) for mode in ("ring", "remote"))
    draw = ring.draws(sizes)
    unlike_ring = unlike_itself = jnp.zeros((), jnp.int32)
    for step in range(STEPS):
        fed = draw(jnp.array([step], jnp.int32))
        outputs, grads = remote.run(*fed)
        unlike_ring += differences(outputs, ring.run(*fed)[0])
        unlike_itself += differences((outputs, grads), remote.run(*fed))
    assert int(unlike_ring) == 0, f"{int(unlike_ring)} values that a ring gives otherwise"
    assert int(unlike_itself) == 0, f"{int(unlike_itself)} values another time otherwise"
