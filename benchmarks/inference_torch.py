"""The peer of `inference.py`: the same shapes in transformers, bfloat16, on one GPU.

Run by `inference.py`; prints a row for each measurement. The experts are transformers' own
`grouped_mm`, attention is PyTorch's `scaled_dot_product_attention`; weights are random, and the
cache grows as transformers lets it by default. Decoding is eager, as `generate` is by default.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
import transformers

# The published config.json of each; what is not named here is the library's default.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe_1b_7b": (
        "Olmoe",
        {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
    ),
    "qwen3_30b_a3b": (
        "Qwen3Moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
    ),
}


def make(name: str, tiny: bool, device: torch.device) -> Any:
    """The model with random weights, drawn on the device."""
    family, fields = SHAPES[name]
    if tiny:
        fields = fields | {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2}
        fields = fields | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = getattr(transformers, f"{family}Config")(**fields, max_position_embeddings=4096)
    cls = getattr(transformers, f"{family}ForCausalLM")
    with torch.device("meta"):
        model = cls._from_config(
            config, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.ndim == 1:
                value.fill_(1.0)
            else:
                value.normal_(0.0, value.shape[-1] ** -0.5 if "embed" not in key else 1.0)
    # Buffers have no values after `to_empty`: the frequencies of the rotation.
    rotary = model.model.rotary_emb
    fresh = type(rotary)(config).to(device)
    rotary.inv_freq = fresh.inv_freq
    return model


@torch.inference_mode()
def measure(model: Any, batch: int, prompt: int, steps: int) -> tuple[float, list[float]]:
    """Seconds of the prompts, and of each decoding step."""
    device = next(model.parameters()).device
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=device)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = wait()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    first = wait() - start
    times = []
    for _ in range(steps):
        start = wait()
        probs = torch.softmax(out.logits[:, -1].float(), dim=-1)
        token = torch.multinomial(probs, 1)
        out = model(
            input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1
        )
        times.append(wait() - start)
    return first, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), required=True)
    parser.add_argument("--batches", nargs="+", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in args.models:
        model = make(name, args.tiny, device)
        for batch in args.batches:
            measure(model, batch, args.prompt, 4)
            first, times = measure(model, batch, args.prompt, args.steps)
            step = sorted(times)[len(times) // 2]
            head = {"impl": "transformers", "model": name, "weights": "bf16", "batch": batch}
            head["version"] = transformers.__version__
            for phase, seconds, tokens in (
                ("prefill", first, batch * args.prompt),
                ("decode", step, batch),
            ):
                row = head | {
                    "phase": phase,
                    "tokens_per_s": round(tokens / seconds, 1),
                    "ms_per_step": round(1e3 * seconds, 3),
                    "roofline_fraction": None,
                }
                print(json.dumps(row), flush=True)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
