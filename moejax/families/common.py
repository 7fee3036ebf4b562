"""What the families share: sizes, attention and the names of everything but the experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moejax.config import AttentionConfig, ComputeDtype, ModelConfig
from moejax.families.fields import Fields
from moejax.families.rope import write_rope
from moejax.families.table import Rule

__all__ = [
    "GATE_UP",
    "Sizes",
    "decoder_rules",
    "dense_prefix",
    "experts_rules",
    "head_dim_of",
    "read_sizes",
    "shared_rules",
    "window_of",
    "write_sizes",
    "write_windows",
]

GATE_UP = ("gate_proj", "up_proj")
"""Their names of a gated MLP's input projections, in our order."""

_MOST_LAYERS = 4096  # lists are made of them before the weights are looked at

_DTYPES: dict[Any, ComputeDtype] = {
    "bfloat16": "bfloat16",
    "float16": "bfloat16",  # its range would need a scaled loss, its numbers fit a float32
    "float32": "float32",
}


@dataclass(frozen=True)
class Sizes:
    """Fields that all families have."""

    vocab_size: int
    d_model: int
    num_layers: int
    max_context: int
    num_heads: int
    num_kv_heads: int
    norm_eps: float
    tie_embeddings: bool
    compute_dtype: ComputeDtype

    def attention(self, **fields: Any) -> AttentionConfig:
        """Attention with these heads."""
        return AttentionConfig(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, **fields)

    def model(self, **fields: Any) -> ModelConfig:
        """A model of these sizes, for inference."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            num_layers=self.num_layers,
            max_context=self.max_context,
            norm_eps=self.norm_eps,
            tie_embeddings=self.tie_embeddings,
            compute_dtype=self.compute_dtype,
            # Weights of scanned layers would be copied to be stacked.
            scan_layers=False,
            remat="none",
            **fields,
        )


def read_sizes(fields: Fields, defaults: Mapping[str, Any]) -> Sizes:
    """Reads the fields that all families have.

    Args:
        fields: of the config.json.
        defaults: by the names of the config.json; `num_key_value_heads` None: as many as heads.
    """
    fields.only("hidden_act", ("silu", "swish"), "silu")
    heads = fields.whole("num_attention_heads", defaults["num_attention_heads"])
    # A config.json without a dtype is that of a quantized model, or an old one.
    dtype = fields.raw("dtype") or fields.raw("torch_dtype") or "bfloat16"
    if dtype not in tuple(_DTYPES):
        fields.problems.append(f"dtype={dtype!r} (only {', '.join(_DTYPES)})")
    return Sizes(
        vocab_size=fields.whole("vocab_size", defaults["vocab_size"]),
        d_model=fields.whole("hidden_size", defaults["hidden_size"]),
        num_layers=fields.whole(
            "num_hidden_layers", defaults["num_hidden_layers"], most=_MOST_LAYERS
        ),
        max_context=fields.whole("max_position_embeddings", defaults["max_position_embeddings"]),
        num_heads=heads,
        num_kv_heads=fields.whole("num_key_value_heads", defaults["num_key_value_heads"] or heads),
        norm_eps=fields.number("rms_norm_eps", defaults["rms_norm_eps"]),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        compute_dtype=_DTYPES.get(dtype, "bfloat16") if isinstance(dtype, str) else "bfloat16",
    )


def head_dim_of(fields: Fields, sizes: Sizes, default: int | None = None) -> int:
    """Width of a head: given, or its share of the model's width."""
    share = default or max(sizes.d_model // sizes.num_heads, 1)
    return fields.whole("head_dim", share)


def window_of(
    fields: Fields, window: int | None, kinds: list[Literal["full", "sliding"]]
) -> tuple[int, ...]:
    """The window of each layer, from `layer_types` where it is given.

    Args:
        fields: of the config.json.
        window: of the layers that have one.
        kinds: of the layers where the field is missing.

    Returns:
        `ModelConfig.window_by_layer`: empty if no layer has a window.
    """
    given = fields.raw("layer_types")
    words = [f"{kind}_attention" for kind in kinds] if given is None else given
    allowed = ("full_attention", "sliding_attention")
    if not isinstance(words, list) or any(word not in allowed for word in words):
        fields.problems.append(f"layer_types={words!r} (only {' and '.join(allowed)})")
        return ()
    if len(words) != len(kinds):
        fields.problems.append(f"layer_types of {len(words)} layers (of {len(kinds)})")
        return ()
    sliding = [word == "sliding_attention" for word in words]
    if any(sliding) and not window:
        fields.problems.append(f"sliding_window={window!r} with sliding layers (at least 1)")
        return ()
    return tuple(window if s and window else 0 for s in sliding) if any(sliding) else ()


def dense_prefix(fields: Fields, dense: list[int], num_layers: int, why: str) -> int:
    """Number of dense layers before all others.

    Args:
        fields: gets a problem when a dense layer follows one with experts.
        dense: the dense layers, in order.
        num_layers: of the model.
        why: the fields that say so.
    """
    if dense != list(range(len(dense))):
        fields.problems.append(f"{why}: layers {dense} are dense (only the first ones can be)")
        return 0
    return min(len(dense), num_layers)


def write_sizes(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The fields that all families have, in the spelling that every version reads."""
    attention = config.attention
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "torch_dtype": config.compute_dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        **write_rope(attention.rope_theta, attention.yarn),
    }


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The fields that `window_of` reads: one window, and which layers have it."""
    windows = [layer.attention.window for layer in config.layers()]
    return {
        "sliding_window": max((w for w in windows if w), default=None),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
    }


def decoder_rules(config: ModelConfig) -> list[Rule]:
    """The names of a model, its experts and routers aside."""
    layers, ours, theirs = range(config.num_layers), "params/layers.{l}.", "model.layers.{l}."
    rules = [
        Rule("params/embedding.w", "model.embed_tokens.weight", "V D -> V D"),
        Rule("params/final_norm.scale", "model.norm.weight", "D -> D"),
    ]
    if not config.tie_embeddings:
        rules.append(Rule("params/head.w", "lm_head.weight", "V D -> D V"))
    inside = [
        ("attention_norm.scale", "input_layernorm.weight", "D -> D"),
        ("mlp_norm.scale", "post_attention_layernorm.weight", "D -> D"),
        *_attention_names(config.attention),
    ]
    rules += [Rule(ours + a, theirs + b, axes, layers=layers) for a, b, axes in inside]
    dense = range(config.first_dense_layers)
    rules += [
        Rule(ours + "mlp.w_in", theirs + "mlp.{n}.weight", "H D -> D n H", GATE_UP, dense),
        Rule(ours + "mlp.w_out", theirs + "mlp.down_proj.weight", "D H -> H D", layers=dense),
    ]
    return rules


def experts_rules(
    config: ModelConfig,
    block: str = "mlp",
    words: tuple[str, str, str] = (*GATE_UP, "down_proj"),
) -> list[Rule]:
    """The names of routed experts of which each has tensors of its own, and of their router.

    Args:
        config: the model.
        block: their name of the layer's part.
        words: of gate, up and down projection.
    """
    layers = range(config.first_dense_layers, config.num_layers)
    ours, theirs = "params/layers.{l}.moe.", f"model.layers.{{l}}.{block}."
    expert = theirs + "experts.{e}."
    return [
        Rule(ours + "router.w_DE", theirs + "gate.weight", "E D -> D E", layers=layers),
        Rule(ours + "bank.w_in", expert + "{n}.weight", "H D -> e D n H", words[:2], layers),
        Rule(ours + "bank.w_out", f"{expert}{words[2]}.weight", "D H -> e H D", layers=layers),
    ]


def shared_rules(config: ModelConfig, name: str) -> list[Rule]:
    """The names of the experts that every token uses, one MLP."""
    layers = range(config.first_dense_layers, config.num_layers)
    ours, theirs = "params/layers.{l}.moe.shared.", f"model.layers.{{l}}.mlp.{name}."
    return [
        Rule(ours + "w_in", theirs + "{n}.weight", "H D -> D n H", GATE_UP, layers),
        Rule(ours + "w_out", theirs + "down_proj.weight", "D H -> H D", layers=layers),
    ]


def _attention_names(config: AttentionConfig) -> list[tuple[str, str, str]]:
    if config.latent is not None:
        return _latent_names(config)
    ours, theirs = "attention.", "self_attn."
    names = [
        (f"{ours}w_{x}", f"{theirs}{x}_proj.weight", f"({heads} h) D -> D {heads} h")
        for x, heads in (("q", "N"), ("k", "M"), ("v", "M"))
    ]
    names.append((ours + "w_o", theirs + "o_proj.weight", "D (N h) -> N h D"))
    if config.bias:
        names += [
            (f"{ours}b_{x}", f"{theirs}{x}_proj.bias", f"({heads} h) -> {heads} h")
            for x, heads in (("q", "N"), ("k", "M"), ("v", "M"))
        ]
    if config.output_bias:
        names.append((ours + "b_o", theirs + "o_proj.bias", "D -> D"))
    if config.sinks:
        names.append((ours + "sinks", theirs + "sinks", "N -> N"))
    if config.qk_norm != "none":
        full = config.qk_norm == "full"
        names += [
            (f"{ours}{x}_scale", f"{theirs}{x}_norm.weight", "(N h) -> N h" if full else "h -> h")
            for x in "qk"
        ]
    return names


def _latent_names(config: AttentionConfig) -> list[tuple[str, str, str]]:
    assert config.latent is not None
    ours, theirs = "attention.", "self_attn."
    names = [
        (ours + "w_kv_down", theirs + "kv_a_proj_with_mqa.weight", "R D -> D R"),
        (ours + "kv_scale", theirs + "kv_a_layernorm.weight", "r -> r"),
        (ours + "w_kv_up", theirs + "kv_b_proj.weight", "(N c) r -> r N c"),
        (ours + "w_o", theirs + "o_proj.weight", "D (N c) -> N c D"),
    ]
    if config.latent.query_rank is None:
        return [*names, (ours + "w_q", theirs + "q_proj.weight", "(N h) D -> D N h")]
    return [
        *names,
        (ours + "w_q_down", theirs + "q_a_proj.weight", "r D -> D r"),
        (ours + "q_scale", theirs + "q_a_layernorm.weight", "r -> r"),
        (ours + "w_q_up", theirs + "q_b_proj.weight", "(N h) r -> r N h"),
    ]
