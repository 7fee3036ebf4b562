"""What the tests of kernels share: where they run, and an expert layer with its float64 oracle."""

import dataclasses
from contextlib import nullcontext

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.presets import small
from moejax.training.state import Blueprint
from pallas_kernels.hopper.compat import interpreted
from sharding.mesh import abstract_mesh
from sharding.planner import trace_step

BFLOAT16 = ml_dtypes.bfloat16
ON_GPU = jax.default_backend() == "gpu"
# The interpreter of 0.10 does not know transposed views of shared memory.
OLD = jax.__version_info__ < (0, 11) and not ON_GPU
needs_transposes = pytest.mark.skipif(OLD, reason="jax 0.10 cannot interpret transposed operands")


def run(function, *inputs):
    """Compiled on a GPU, interpreted elsewhere."""
    with nullcontext() if ON_GPU else interpreted():
        return jax.tree.map(np.asarray, jax.jit(function)(*inputs))


def draw(rng, *shape, scale=1.0, dtype=BFLOAT16):
    return (scale * rng.normal(size=shape)).astype(dtype)


def wide(*arrays):
    return tuple(np.asarray(a, np.float64) for a in arrays)


def distinct_ids(rng, slots, tokens, copies):
    """A token's slots are distinct; a slot more than there are stands for none."""
    return np.stack([rng.permutation(slots + 1)[:copies] for _ in range(tokens)])


def padded_layout(ids, slots, alignment, spare):
    """(place, copy, sizes): assignments sorted by slot, in padded groups, and spare places."""
    sizes = np.array(
        [-(-np.sum(ids == s) // alignment) * alignment for s in range(slots)], np.int32
    )
    total = int(sizes.sum()) + spare
    place, copy = np.full(ids.shape, total, np.int32), np.full(total, ids.size, np.int32)
    for s, start in enumerate(np.cumsum(sizes) - sizes):
        rows, js = np.nonzero(ids == s)
        place[rows, js] = start + np.arange(rows.size)
        copy[place[rows, js]] = rows * ids.shape[1] + js
    return place, copy, sizes


def layer(rng, *, slots, tokens, copies, d_model, hidden, parts, ids=None):
    """Random experts and assignments, for the Hopper kernels."""
    if ids is None:
        ids = distinct_ids(rng, slots, tokens, copies)
    place, copy, sizes = padded_layout(ids, slots, 128, spare=128)  # a tile that no group has
    return {
        "x": draw(rng, tokens, d_model),
        "w_in": draw(rng, slots, d_model, parts, hidden, scale=d_model**-0.5),
        "w_out": draw(rng, slots, hidden, d_model, scale=hidden**-0.5),
        "scores": rng.random(ids.shape).astype(np.float32) * (ids < slots),
        "place": place,
        "copy": copy,
        "sizes": sizes,
        "ids": ids,
    }


def _swiglu_oai(h):
    gate, value = jnp.minimum(h[0], 7.0), jnp.clip(h[1], -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (value + 1.0)


def activation64(name, h):
    """Value [H] and derivatives [N, H] of the projections, by JAX in float64."""
    function = {
        "swiglu": lambda h: jax.nn.silu(h[0]) * h[1],
        "geglu": lambda h: jax.nn.gelu(h[0], approximate=True) * h[1],
        "swiglu_oai": _swiglu_oai,
        "gelu": lambda h: jax.nn.gelu(h[0], approximate=True),
        "relu2": lambda h: jax.nn.relu(h[0]) ** 2,
    }[name]
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        value, pull = jax.vjp(function, jnp.asarray(h))
        return np.asarray(value), np.asarray(pull(jnp.ones_like(value))[0])


def oracle(inputs, ct, name):
    """The layer and all its gradients, one assignment at a time."""
    x, w_in, w_out, scores, ct = wide(*(inputs[k] for k in ("x", "w_in", "w_out", "scores")), ct)
    out, x_ct, w_in_ct, w_out_ct, scores_ct = map(np.zeros_like, (x, x, w_in, w_out, scores))
    for (r, j), s in np.ndenumerate(inputs["ids"]):
        if s >= len(w_in):
            continue
        a, slope = activation64(name, np.einsum("d,dnh->nh", x[r], w_in[s]))
        out[r] += scores[r, j] * (a @ w_out[s])
        a_ct = w_out[s] @ ct[r]
        scores_ct[r, j] = a @ a_ct
        h_ct = slope * (scores[r, j] * a_ct)
        x_ct[r] += np.einsum("nh,dnh->d", h_ct, w_in[s])
        w_in_ct[s] += np.einsum("d,nh->dnh", x[r], h_ct)
        w_out_ct[s] += np.outer(scores[r, j] * a, ct[r])
    return out, (x_ct, w_in_ct, w_out_ct, scores_ct)


def lowered_train_step(mesh, platform):
    """Scanned, recomputed layers inside the shard_map, as the presets have them; as text."""
    config = small()
    model = dataclasses.replace(config.model, num_layers=2)
    config = dataclasses.replace(config, model=model)
    traced = trace_step(Blueprint(model, abstract_mesh(mesh)), config)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own lowering of attention mixes dtypes
        return traced.lower(lowering_platforms=(platform,)).as_text()
