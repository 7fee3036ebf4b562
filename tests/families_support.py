"""Small random models of Hugging Face transformers, and what they compute, beside ours."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.inference.source import open_model
from moejax.model.cache import cache_specs, init_cache
from moejax.training.state import Blueprint, load_weights
from pallas_kernels.route.router_product import router_product
from sharding.collectives import all_gather
from sharding.mesh import TENSOR, TOKEN_AXES, MeshShape, make_mesh
from sharding.specs import specs_of

ROWS, LENGTH, STEPS = 8, 13, 3

COMMON = {
    "vocab_size": 99,  # padded to 128 by ours
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
LATENT = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}
CASES = {
    "mixtral": {
        "head_dim": 24,
        "intermediate_size": 48,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "qwen2_moe": {
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "mlp_only_layers": [0],
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 2,
    },
    "qwen3_moe": {
        "head_dim": 24,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {**YARN, "rope_theta": 10000.0, "mscale_all_dim": 0.7},
    },
    "olmoe": {
        "num_key_value_heads": 4,
        "intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "deepseek_v2": {
        **LATENT,
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "topk_method": "group_limited_greedy",
        "rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 0.9},
    },
    "deepseek_v3": {
        **LATENT,
        "q_lora_rank": 27,
        "n_shared_experts": 1,
        "rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "gpt_oss": {
        "head_dim": 16,
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "rope_parameters": {**YARN, "rope_theta": 150000.0, "truncate": False},
    },
}


def make_hf(model_type, rng, **changes):
    """A random model of transformers, every weight drawn anew so that all of them matter."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    arguments = {**COMMON, **CASES[model_type], **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.CONFIG_MAPPING[model_type](**arguments)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.eval().float()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            normal = torch.from_numpy(rng.normal(size=tuple(value.shape)) * 0.15)
            value.copy_(1 + normal if "norm" in name else normal)
    return model


def save_hf(model, folder, **options):
    """Saves it as transformers does, and gives the folder back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def load_hf(folder):
    """Opens a folder with transformers, in float32; nothing may be missing or left over."""
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="float32", attn_implementation="eager", output_loading_info=True
        )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def draw_tokens(model, rng):
    """Tokens whose experts rounding does not change: no two scores at the border are that close."""
    for _ in range(20):
        tokens_BS = rng.integers(0, COMMON["vocab_size"], (ROWS, LENGTH), dtype=np.int32)
        if keeps_experts(model, tokens_BS, rng):
            return tokens_BS
    raise AssertionError("every draw changes its experts with the rounding")


def keeps_experts(model, tokens_BS, rng):
    """Whether noise larger than rounding leaves every token its experts."""
    import torch

    table = model.get_input_embeddings().weight
    noise = torch.from_numpy(rng.normal(size=tuple(table.shape)) * 2e-5).float()

    def logits(tokens_BS, change):
        with torch.no_grad():
            table.add_(change)
            found = run_hf(model, tokens_BS)[2]
            table.sub_(change)
        return found

    kept = table.detach().clone()
    first, second = (logits(tokens_BS, sign * noise) for sign in (1, -1))
    with torch.no_grad():
        table.copy_(kept)
    return np.abs(first - second).max() < 1e-2


def run_hf(model, tokens_BS):
    """Hidden states [L + 1, B, S, D], router logits of the layers that have one, logits."""
    import torch

    routers = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: routers.append(out[0].numpy()))
        for module in model.modules()
        if type(module).__name__.lower().endswith("topkrouter")
    ]
    with torch.no_grad():
        out = model(torch.from_numpy(tokens_BS).long(), output_hidden_states=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    return (
        np.stack([state.numpy() for state in out.hidden_states]),
        np.stack(routers),
        out.logits.numpy(),
    )


def load_ours(folder, sizes=(1, 1, 1)):
    """Our model of a folder on a mesh, in float32."""
    source = open_model(folder)
    blueprint = Blueprint(_float32(source.config), make_mesh(MeshShape(*sizes)))
    return blueprint, load_weights(source.weights(blueprint), blueprint, jnp.float32)


def run_ours(blueprint, weights, tokens_BS):
    """The same as `run_hf` by ours; the rows may be split over devices, the widths may not."""

    def run(weights, tokens_BS):
        model = blueprint.merge(*weights)
        positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
        x_BSD = model.embedding(tokens_BS, jnp.float32)
        states, routers = [x_BSD], []
        for group in model.groups:
            block = model.layers[group.name]
            if block.moe is not None:
                y_BSD, _ = block.attention(block.attention_norm(x_BSD), positions_BS)
                y_TD = block.mlp_norm(x_BSD + y_BSD).reshape(-1, x_BSD.shape[-1])
                logits_TE = router_product(y_TD, block.moe.router.w_DE[...])
                if block.moe.router.b_E is not None:
                    logits_TE = logits_TE + block.moe.router.b_E[...]
                routers.append(logits_TE)
            x_BSD, _, _ = block(x_BSD, positions_BS)
            states.append(x_BSD)
        states[-1] = model.final_norm(x_BSD)
        return jnp.stack(states), jnp.stack(routers), model.logits(states[-1])

    specs = (specs_of(blueprint.params), blueprint.bias_specs)
    stacked = P(None, TOKEN_AXES)
    run = jax.shard_map(
        run,
        mesh=blueprint.mesh,
        in_specs=(specs, P(TOKEN_AXES)),
        out_specs=(stacked, stacked, P(TOKEN_AXES)),
        check_vma=False,
    )
    return tuple(np.asarray(a) for a in jax.jit(run)(weights, tokens_BS))


def logits_cached(blueprint, weights, tokens_BS):
    """Logits [B, S, V] with a cache: all but `STEPS` tokens at once, then one by one."""
    config, mesh = blueprint.config, blueprint.mesh

    def run(weights, cache, tokens_BS):
        def step(cache, tokens_BS):
            model = blueprint.merge(*weights)
            mask_BS = jnp.ones(tokens_BS.shape, bool)
            out = model(tokens_BS, token_mask_BS=mask_BS, cache=cache, inference=True)
            return out.cache, all_gather(model.logits(out.hidden_BSD), TENSOR, 2)

        start = tokens_BS.shape[1] - STEPS
        cache, first = step(cache, tokens_BS[:, :start])
        _, rest = lax.scan(step, cache, tokens_BS[:, start:].T[..., None])
        return jnp.concatenate([first, jnp.moveaxis(rest[:, :, 0], 0, 1)], axis=1)

    specs = (specs_of(blueprint.params), blueprint.bias_specs)
    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(specs, cache_specs(config), P(TOKEN_AXES)),
        out_specs=P(TOKEN_AXES),
        check_vma=False,
    )

    def whole(weights, tokens_BS):
        cache = init_cache(config, len(tokens_BS), 16, jnp.float32, mesh)
        return mapped(weights, cache, tokens_BS)

    return np.asarray(jax.jit(whole)(weights, tokens_BS))


def _float32(config):
    return dataclasses.replace(config, compute_dtype="float32")
