"""python -m moejax.families: what train.py made opens in transformers and computes the same."""

import contextlib
import dataclasses
import io
import json
import math

import numpy as np
import pytest
from families_support import draw_tokens, load_hf, run_hf
from inference_support import CONFIG, random_weights
from jax import numpy as jnp
from run_support import kept_programs, run, write_text

from moejax import progress
from moejax.config import AttentionConfig, RouterConfig
from moejax.data.tokenizer import Tokenizer
from moejax.families.__main__ import main
from moejax.families.export import save_hf_folder
from moejax.inference.forward import Forward
from moejax.inference.model_folder import save_model_folder
from moejax.inference.source import open_model
from moejax.training import session
from moejax.training.rundir import RunDir
from moejax.training.state import Blueprint
from sharding.mesh import MeshShape, make_mesh

SHRUNK = [
    *("--model.d-model", 32, "--model.num-layers", 2, "--model.max-context", 32, "--vocab", 300),
    *("--model.vocab-size", 300, "--model.attention.num-heads", 4, "--model.attention.head-dim"),
    *(8, "--model.attention.num-kv-heads", 4, "--model.moe.experts.hidden", 16),
    *("--model.moe.router.num-experts", 8, "--model.moe.router.top-k", 2),
    *("--model.compute-dtype", "float32", "--data.seq-len", 16, "--data.batch-size", 8),
    *("--mesh", "data=2,expert=4", "--devices", 8, "--eval-every", 0, "--steps", 3),
    *("--optimizer.learning-rate", 1e-2, "--optimizer.warmup-steps", 1),
]
LATENT = [
    *("--model.attention.head-dim", 20, "--model.attention.latent.rank", 16),
    *("--model.attention.latent.rope-dim", 8, "--model.attention.latent.value-dim", 12),
    *("--model.attention.yarn.original-context", 8, "--model.dense-hidden", 48),
    *("--model.first-dense-layers", 1, "--model.num-layers", 3),
]
PRESETS = {
    "mixtral-8x7b": ("mixtral", ["--model.attention.num-kv-heads", 2]),
    "qwen3-30b-a3b": ("qwen3_moe", ["--model.attention.head-dim", 12]),
    "olmoe-1b-7b": ("olmoe", []),
    "deepseek-v2-lite": ("deepseek_v2", [*LATENT, "--model.moe.experts.shared-hidden", 32]),
    "deepseek-v3": (
        "deepseek_v3",
        [
            *(*LATENT, "--model.moe.experts.shared-hidden", 16, "--model.moe.router.num-groups"),
            *(4, "--model.moe.router.top-groups", 2, "--model.attention.latent.query-rank", 24),
        ],
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        ["--model.window-by-layer", 4, 0, "--model.attention.yarn.original-context", 8],
    ),
}


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    with kept_programs(tmp_path_factory.mktemp("programs")), pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "SAMPLE_TOKENS", 2)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


def command(*argv):
    """Exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


def refusal(*argv):
    code, _, err = command(*argv)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_trained_models_open_in_transformers(text, tmp_path, rng, preset):
    family, flags = PRESETS[preset]
    path, out = tmp_path / "run", tmp_path / "out"
    flags = ["--preset", preset, *SHRUNK, *flags, "--data", text, "--run", path]
    code, _, err = run(*flags)
    assert code == 0, err
    code, told, err = command(path, out, "--dtype", "float32")
    assert code == 0, err
    assert f"wrote {out}: {family}, float32" in told
    model = load_hf(out)
    assert model.config.model_type == family
    tokens_BS = draw_tokens(model, rng)
    wanted = run_hf(model, tokens_BS)[2]
    found = Forward(open_model(path))(tokens_BS)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    tokenizer = RunDir(path).load_tokenizer()
    assert json.loads((out / "generation_config.json").read_text()) == {
        "eos_token_id": tokenizer.eos_id
    }
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs("def x(self)")["input_ids"] == tokenizer.encode("def x(self)").tolist()


# ── folders ──────────────────────────────────────────────────────────────────

MIXTRAL = dataclasses.replace(
    CONFIG,
    moe=dataclasses.replace(CONFIG.moe, router=RouterConfig(num_experts=8, top_k=2)),
)


def save_ours(folder, rng, config):
    flat = random_weights(config, rng)
    save_model_folder(folder, flat, config, Tokenizer(), record={}, dtype=np.float32)
    return flat


def test_folders_of_ours(tmp_path, rng):
    """Numbers are rounded to bfloat16 once; bytes have no tokenizer there, and that is told."""
    flat = save_ours(tmp_path / "ours", rng, MIXTRAL)
    code, told, err = command(tmp_path / "ours", tmp_path / "out")
    assert code == 0, err
    assert "mixtral, bfloat16" in told and "without a tokenizer" in told
    blueprint = Blueprint(MIXTRAL, make_mesh(MeshShape()))
    found = open_model(tmp_path / "out").weights(blueprint)
    name = "params/layers.1.moe.bank.w_in"
    wanted = np.asarray(jnp.asarray(flat[name]).astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(np.asarray(found[name]), wanted)
    assert open_model(tmp_path / "out").end_ids == (256,)


def test_folders_of_transformers_keep_what_they_say(tmp_path, rng):
    from test_init_from import TEMPLATE, put_texts

    config = dataclasses.replace(MIXTRAL, vocab_size=259)
    save_hf_folder(tmp_path / "hf", random_weights(config, rng), config, family="mixtral")
    put_texts(tmp_path / "hf")
    code, _, err = command(tmp_path / "hf", tmp_path / "out", "--dtype", "float32")
    assert code == 0, err
    first, second = open_model(tmp_path / "hf"), open_model(tmp_path / "out")
    assert second.end_ids == first.end_ids == (257, 258)
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == TEMPLATE
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"]
    blueprint = Blueprint(config, make_mesh(MeshShape()))
    again = second.weights(blueprint)
    for name, array in first.weights(blueprint).items():
        np.testing.assert_array_equal(np.asarray(again[name]), np.asarray(array), err_msg=name)


def test_one_weight_at_a_time(tmp_path, rng, monkeypatch):
    from moejax.training.streaming import WeightStream

    flat = save_ours(tmp_path / "ours", rng, MIXTRAL)
    read = []
    real = WeightStream.read
    monkeypatch.setattr(WeightStream, "read", lambda self, n: read.append(n) or real(self, n))
    assert command(tmp_path / "ours", tmp_path / "out")[0] == 0
    assert sorted(read) == sorted(flat)


def test_progress_is_told(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", -math.inf)
    save_ours(tmp_path / "ours", rng, MIXTRAL)
    _, _, err = command(tmp_path / "ours", tmp_path / "out")
    assert err.splitlines()[-1] == "100% of the weights" and len(err.splitlines()) > 8


def test_what_cannot_be_written(tmp_path, rng):
    ours, out = tmp_path / "ours", tmp_path / "out"
    save_ours(ours, rng, MIXTRAL)
    line = refusal(ours, out, "--family", "qwen3_moe")
    assert "a qwen3_moe model cannot be like this one" in line and "qk_norm='none'" in line
    assert "model_type='llama'" in refusal(ours, out, "--family", "llama")
    assert "nothing there" in refusal(tmp_path / "no", out)
    assert "OUT" in refusal(ours)
    assert "no such flag" in refusal(ours, out, "--famly", "mixtral")
    out.mkdir()
    (out / "mine.txt").write_text("")
    assert "is no model of transformers: choose another path" in refusal(ours, out)
    odd = dataclasses.replace(CONFIG, attention=AttentionConfig(4, 2, 8, sinks=True))
    save_ours(tmp_path / "odd", rng, odd)
    line = refusal(tmp_path / "odd", tmp_path / "new")
    assert "no family of mixtral" in line and "--family NAME" in line
    assert not (tmp_path / "new").exists()


def test_several_families(tmp_path, rng, monkeypatch):
    import moejax.families.__main__ as module

    save_ours(tmp_path / "ours", rng, MIXTRAL)
    monkeypatch.setattr(module, "MODEL_TYPES", ("mixtral", "mixtral"))
    line = refusal(tmp_path / "ours", tmp_path / "out")
    assert "mixtral and mixtral can both say this model: pass --family mixtral" in line
