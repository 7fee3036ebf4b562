"""What the model's tests share: a numpy float64 decoder, and running modules on a mesh."""

import dataclasses

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import AttentionConfig, ExpertsConfig, ModelConfig, MoEConfig, RouterConfig
from moejax.model.decoder import Decoder
from sharding.mesh import TOKEN_AXES, MeshShape, make_mesh

S, D, V = 8, 32, 50

# --- oracle, float64, written from the papers -------------------------------------------------


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def swiglu_oai(gate, value):
    gate, value = np.minimum(gate, 7), np.clip(value, -7, 7)
    return gate / (1 + np.exp(-1.702 * gate)) * (value + 1)


ACTIVATIONS = {
    "swiglu": lambda h: silu(h[..., 0, :]) * h[..., 1, :],
    "geglu": lambda h: gelu_tanh(h[..., 0, :]) * h[..., 1, :],
    "swiglu_oai": lambda h: swiglu_oai(h[..., 0, :], h[..., 1, :]),
    "gelu": lambda h: gelu_tanh(h[..., 0, :]),
    "relu2": lambda h: np.maximum(h[..., 0, :], 0) ** 2,
}


def rms(x, scale, eps, axes=(-1,)):
    return x / np.sqrt(np.mean(x**2, axis=axes, keepdims=True) + eps) * scale


def rope(x_BSNh, positions_BS, theta, interleaved=False, yarn=None):
    """Rotation of complex numbers x[i] + i·x[i + h/2], or x[2i] + i·x[2i + 1]."""
    half = x_BSNh.shape[-1] // 2
    frequencies, scale = theta ** (-np.arange(half) / half), 1.0
    if yarn is not None:
        scale = yarn.rotation_scale
        # The pair that makes β turns in the original context: context · θ^(-pair/half) = 2πβ.
        ends = [
            half * np.log(yarn.original_context / (2 * np.pi * beta)) / np.log(theta)
            for beta in (yarn.beta_fast, yarn.beta_slow)
        ]
        if yarn.truncate:
            ends = [np.floor(ends[0]), np.ceil(ends[1])]
        ends = max(ends[0], 0), min(ends[1], 2 * half - 1)
        stretched = np.interp(np.arange(half), ends, [0.0, 1.0])
        frequencies = frequencies * (1 - stretched + stretched / yarn.factor)
    turn = scale * np.exp(1j * positions_BS[..., None, None] * frequencies)
    if interleaved:
        numbers = (x_BSNh[..., ::2] + 1j * x_BSNh[..., 1::2]) * turn
        return np.stack([numbers.real, numbers.imag], axis=-1).reshape(x_BSNh.shape)
    numbers = (x_BSNh[..., :half] + 1j * x_BSNh[..., half:]) * turn
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


def attention(p, x_BSD, positions_BS, config, eps):
    """Loops over heads and queries; p from parameter name to float64 array."""
    q, k, v = (np.einsum("bsd,dnh->bsnh", x_BSD, p[f"w_{n}"]) + p.get(f"b_{n}", 0.0) for n in "qkv")
    if config.qk_norm != "none":
        axes = (-1,) if config.qk_norm == "head" else (-2, -1)
        q, k = rms(q, p["q_scale"], eps, axes), rms(k, p["k_scale"], eps, axes)
    settings = config.rope_theta, config.rope_interleaved, config.yarn
    q, k = rope(q, positions_BS, *settings), rope(k, positions_BS, *settings)
    scale = 1 / np.sqrt(config.head_dim) * (config.yarn.logit_scale if config.yarn else 1.0)
    out = np.zeros_like(q)
    share = config.num_heads // config.num_kv_heads
    for n in range(config.num_heads):
        for s in range(x_BSD.shape[1]):
            first = max(0, s + 1 - (config.window or s + 1))
            keys, values = k[:, first : s + 1, n // share], v[:, first : s + 1, n // share]
            score = np.exp(np.einsum("bh,bth->bt", q[:, s, n], keys) * scale)
            sink = np.exp(p["sinks"][n]) if "sinks" in p else 0.0
            share_of = score / (score.sum(-1, keepdims=True) + sink)
            out[:, s, n] = np.einsum("bt,bth->bh", share_of, values)
    return np.einsum("bsnh,nhd->bsd", out, p["w_o"]) + p.get("b_o", 0.0)


def mlp(p, x_TD, activation):
    h = np.einsum("...d,dnh->...nh", x_TD, p["w_in"]) + p.get("b_in", 0.0)
    return ACTIVATIONS[activation](h) @ p["w_out"] + p.get("b_out", 0.0)


def decoder_nll(p, tokens_BS, targets_BS, config):
    """Mean loss of a dense decoder; p from canonical name to float64 array."""

    def part(prefix):
        return {k[len(prefix) :]: v for k, v in p.items() if k.startswith(prefix)}

    positions = np.broadcast_to(np.arange(tokens_BS.shape[1]), tokens_BS.shape)
    x = p["embedding.w"][tokens_BS]
    for i, layer in enumerate(config.layers()):
        q = part(f"layers.{i}.")
        y = rms(x, q["attention_norm.scale"], layer.norm_eps)
        weights = part(f"layers.{i}.attention.")
        x = x + attention(weights, y, positions, layer.attention, layer.norm_eps)
        y = rms(x, q["mlp_norm.scale"], layer.norm_eps)
        x = x + mlp(part(f"layers.{i}.mlp."), y, layer.dense.activation)
    x = rms(x, p["final_norm.scale"], config.norm_eps)
    logits = x @ (p["embedding.w"].T if config.tie_embeddings else p["head.w"])
    logits = logits[..., : config.vocab_size]
    top = logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    return np.mean(lse - np.take_along_axis(logits, targets_BS[..., None], -1)[..., 0])


def directional(loss, params, direction, step=1e-5):
    """Central difference of a float64 loss along a direction of all parameters together."""
    up = loss({k: v + step * direction[k] for k, v in params.items()})
    down = loss({k: v - step * direction[k] for k, v in params.items()})
    return (up - down) / (2 * step)


# --- small models -----------------------------------------------------------------------------


class RouterBias(nnx.Variable):
    """A variable that is no parameter: the optimizer does not see it, checkpoints do."""


class TinyMoE(nnx.Module):
    """Stands in for the MoE layer: token-wise, top-k dependent, takes a placement and a mask."""

    def __init__(self, d_model, config, *, expert_devices, output_std, hosts=None, rngs):
        self.top_k = config.router.top_k
        value = jax.random.normal(rngs.params(), (config.router.num_experts, d_model))
        self.w = nnx.Param(value, spec=P(None, None), float32=True)
        self.bias = RouterBias(jnp.zeros(d_model), spec=P(None), float32=True)

    def __call__(self, x_TD, placement=None, *, token_mask_T=None):
        w_ED = self.w[...]
        scores_TE = jax.nn.softmax(x_TD.astype(jnp.float32) @ w_ED.T)
        best = jax.lax.top_k(scores_TE, self.top_k)[0][:, -1:]
        y_TD = jnp.where(scores_TE >= best, scores_TE, 0.0) @ w_ED + self.bias[...]
        if placement is not None:
            y_TD = y_TD * placement["gain"]
        seen = jnp.ones(x_TD.shape[0], bool) if token_mask_T is None else token_mask_T
        aux = {"tokens": jnp.sum(seen, dtype=jnp.int32), "output": jnp.sum(jnp.square(y_TD))}
        return y_TD.astype(x_TD.dtype), aux


def dense_config(**changes):
    experts = ExpertsConfig(activation=changes.pop("activation", "swiglu"), bias=True)
    config = ModelConfig(
        vocab_size=V,
        d_model=D,
        num_layers=2,
        max_context=16,
        attention=AttentionConfig(4, 4, 8, qk_norm="head"),
        moe=MoEConfig(experts=experts),
        dense_hidden=16,
        first_dense_layers=2,
        compute_dtype="float32",
    )
    return dataclasses.replace(config, **changes)


def mixed_config(**changes):
    """One dense layer, two MoE layers with k=2, one with k=1."""
    config = dense_config(
        num_layers=4,
        first_dense_layers=1,
        top_k_by_layer=(2, 2, 2, 1),
        moe=MoEConfig(router=RouterConfig(num_experts=4, top_k=2)),
    )
    return dataclasses.replace(config, **changes)


def split(config):
    return nnx.split(Decoder(config, MeshShape(), nnx.Rngs(7)))


def shapes(config, mesh_shape=None):
    """The same without values, for tests that draw their own."""
    return nnx.split(
        nnx.eval_shape(lambda: Decoder(config, mesh_shape or MeshShape(), nnx.Rngs(7)))
    )


def tokens_and_targets(rng, batch=2):
    return tuple(rng.integers(0, V, size=(batch, S)).astype(np.int32) for _ in range(2))


# --- running on a mesh ------------------------------------------------------------------------


def mesh_of(data=1, expert=1, tensor=1):
    return make_mesh(MeshShape(data, expert, tensor))


def randomize(state, rng, scale=0.3):
    """Fresh values everywhere, so that scales of one and biases of zero hide nothing."""

    def fresh(variable):
        value = rng.normal(size=variable.shape) * scale
        value = value + 1.0 if variable.get_metadata()["float32"] else value
        return variable.replace(np.asarray(value, np.float32))

    return nnx.from_flat_state([(p, fresh(v)) for p, v in nnx.to_flat_state(state)])


def specs_of(state):
    return jax.tree.map(
        lambda v: v.get_metadata()["spec"], state, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )


def shard_map(function, mesh, in_specs, out_specs):
    """Compiled, fully manual."""
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    )


def value_and_grads(mesh, graphdef, state, loss, inputs, input_specs, *, wrt_input=False):
    """Loss and its gradients, taken inside the shard_map, summed over `data` and `expert`.

    Args:
        loss: (module, *inputs) → this device's share.
        wrt_input: the gradient of the first input too, left where it is.

    Returns:
        loss, state of gradients[, gradient of the first input].
    """
    specs = specs_of(state)

    def reduce(path, grad):  # what is split over `expert` has its whole gradient already
        axes = tuple(a for a in TOKEN_AXES if a not in grad.get_metadata()["spec"])
        return path, grad.replace(jax.lax.psum(grad.get_value(), axes))

    def local(state, *inputs):
        def share(state, first):
            return loss(nnx.merge(graphdef, state), first, *inputs[1:])

        if wrt_input:
            value, (grads, dx) = jax.value_and_grad(share, (0, 1))(state, inputs[0])
        else:
            value, grads = jax.value_and_grad(share)(state, inputs[0])
        value = jax.lax.psum(value, TOKEN_AXES)
        grads = nnx.from_flat_state([reduce(p, v) for p, v in nnx.to_flat_state(grads)])
        return (value, grads, dx) if wrt_input else (value, grads)

    out = (P(), specs, input_specs[0]) if wrt_input else (P(), specs)
    run = shard_map(local, mesh, (specs, *input_specs), out)
    return run(state, *inputs)


def check_replicas(tree):
    """Devices that should hold the same numbers hold the same bits."""
    for path, array in jax.tree_util.tree_flatten_with_path(tree)[0]:
        seen = {}
        for shard in array.addressable_shards:
            data = np.asarray(shard.data)
            first = seen.setdefault(str(shard.index), data)
            np.testing.assert_array_equal(data, first, err_msg=jax.tree_util.keystr(path))


def named(state):
    """Canonical name to numpy array."""
    return {
        ".".join(map(str, path)): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(state)
    }


def place(state, mesh):
    """Lays a state over the mesh as its parameters' specs say."""
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs_of(state))
    return jax.device_put(state, shardings)
