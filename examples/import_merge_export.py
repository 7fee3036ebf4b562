"""Reads a folder of Hugging Face transformers, merges its experts, and writes such a folder again.

python examples/import_merge_export.py           a made-up Mixtral: 8 experts, 4 pairs of twins
python examples/import_merge_export.py FOLDER    one that you have, such as Qwen3-30B-A3B
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from moejax.compress.__main__ import main as compress
from moejax.families.__main__ import main as export
from moejax.inference.forward import Forward
from moejax.inference.source import open_model, packaged_model

VOCAB, D, H, EXPERTS, LAYERS = 4096, 64, 48, 8, 2


def write_mixtral(folder: Path) -> Path:
    """Random weights, as transformers names them; experts 4 to 7 are copies of 0 to 3."""
    draw = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (draw.normal(size=(rows, columns)) / columns**0.5).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(VOCAB, D), "lm_head.weight": matrix(VOCAB, D)}
    tensors["model.norm.weight"] = np.ones(D, np.float32)
    for at in (f"model.layers.{layer}" for layer in range(LAYERS)):
        for norm in "input_layernorm", "post_attention_layernorm":
            tensors[f"{at}.{norm}.weight"] = np.ones(D, np.float32)
        for name in "qkvo":
            tensors[f"{at}.self_attn.{name}_proj.weight"] = matrix(D, D)
        at += ".block_sparse_moe"
        tensors[f"{at}.gate.weight"] = matrix(EXPERTS, D)
        for number in range(EXPERTS // 2):
            for name, shape in {"w1": (H, D), "w3": (H, D), "w2": (D, H)}.items():
                weight = matrix(*shape)
                for expert in number, number + EXPERTS // 2:
                    tensors[f"{at}.experts.{expert}.{name}.weight"] = weight.copy()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "mixtral", "torch_dtype": "float32", "vocab_size": VOCAB}
    config |= {"hidden_size": D, "intermediate_size": H, "num_hidden_layers": LAYERS}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
    config |= {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "eos_token_id": VOCAB - 1}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(packaged_model() / "tokenizer" / "tokenizer.json", folder)
    return folder


work = Path(tempfile.mkdtemp())
start = Path(sys.argv[1]) if sys.argv[1:] else write_mixtral(work / "mixtral")
merged, exported = str(work / "merged"), str(work / "exported")
# As `python -m moejax.compress FOLDER OUT`: a sample of text shows which experts do the same.
text = str(Path(json.__file__).parent)  # some Python source; take what your model was made for
flags = ["--data.paths", text, "--data.seq-len", "64", "--tokens", "2048", "--measure-windows", "0"]
flags += [] if sys.argv[1:] else ["--experts", "4"]  # else three quarters of them
if code := compress([str(start), merged, *flags]):
    sys.exit(code)
# transformers knows no merged experts: each is written once for every one that it came from.
if code := export([merged, exported]):
    sys.exit(code)

tokens_BS = open_model(start).need_tokenizer().encode("def main(argv=None):\n    return")[None]
before, after = (Forward(open_model(folder))(tokens_BS) for folder in (start, exported))
apart = np.linalg.norm(after - before) / np.linalg.norm(before)
print(f"logits of {exported} differ by {apart:.1%} from those of {start}")
assert np.isfinite(after).all()
# Twins can be merged without a loss; what is left comes of weights rounded to bfloat16.
assert sys.argv[1:] or apart < 0.02
