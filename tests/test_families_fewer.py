"""Experts that are fewer than a family's, written for transformers: exact, lazy, told, refused."""

import dataclasses

import numpy as np
import pytest
from families_support import draw_tokens, load_hf, run_hf
from fewer_experts_support import OUTPUTS, draw, model_of, save
from inference_support import CONFIG
from test_families_command import command, refusal

from moejax.compress.sharing import expand_model
from moejax.config import AttentionConfig
from moejax.families import write_config
from moejax.families.expanded import expanded_config, expanded_weights
from moejax.inference.forward import Forward
from moejax.inference.source import open_model

# A model that only qwen3_moe can say.
QWEN = dataclasses.replace(
    CONFIG,
    vocab_size=259,
    attention=AttentionConfig(4, 2, 8, qk_norm="head"),
    moe=dataclasses.replace(
        CONFIG.moe, router=dataclasses.replace(CONFIG.moe.router, selection_bias=False)
    ),
)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sharing", ["", "up", "in", "basis"])
@pytest.mark.parametrize("merged", ["", "merged", "merged+unequal"])
def test_experts_of_outputs(rng, merged, sharing, bias):
    """Whole experts, each as often as the table says; all else as it was."""
    config = model_of(f"{merged}+{sharing}")
    experts = dataclasses.replace(config.moe.experts, bias=bias)
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, experts=experts))
    flat = draw(rng, config)
    whole, _ = expand_model(flat, config)
    found, written = expanded_weights(flat, config), expanded_config(config)
    assert (written is config) == (not merged and not sharing)
    assert written.moe.router.num_experts == (OUTPUTS if merged else 9)
    assert written.moe.router.merged_from is None and not written.moe.experts.sharing.active
    tables = {n for n in whole if n.endswith("table_R")}
    assert found.keys() == whole.keys() - tables and len(tables) == 2 * bool(merged)
    for name, array in found.items():
        right = whole[name]
        if merged and ".bank." in name:
            layer = name.split(".")[1]
            right = right[flat[f"bias/layers.{layer}.moe.router.table_R"]]
        assert (array.shape, array.dtype) == (right.shape, np.float32), name
        assert np.asarray(array, np.float64).dtype == np.float64
        np.testing.assert_allclose(np.asarray(array), right, rtol=1e-5, atol=1e-6, err_msg=name)


def test_only_what_is_asked_for_is_read(rng):
    class Watched:
        def __init__(self, name, array):
            self.name, self.array = name, array
            self.shape, self.dtype = array.shape, array.dtype

        def __array__(self, dtype=None, copy=None):
            read.append(self.name)
            return self.array

        def __len__(self):
            raise AssertionError("nothing but its shape is known")

    read = []
    config = model_of("merged+basis")
    flat = {name: Watched(name, array) for name, array in draw(rng, config).items()}
    found = expanded_weights(flat, config)
    assert not read
    np.asarray(found["params/layers.1.moe.bank.w_out"])
    bank = "params/layers.1.moe.bank."
    wanted = {f"{bank}c_out", f"{bank}w_basis_out", "bias/layers.1.moe.router.table_R"}
    assert set(read) == wanted and len(read) == 3


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("merged+unequal", "6 to 9 experts of a layer are written as 12, a copy for each of the"),
        pytest.param("merged", "9 experts of a layer are written as 12", marks=pytest.mark.slow),
        pytest.param("up", "(sharing kind='up'), are written as ind", marks=pytest.mark.slow),
        pytest.param("in", "as large as without sharing", marks=pytest.mark.slow),
        pytest.param("merged+unequal+basis", "kind='basis'), are wr", marks=pytest.mark.slow),
    ],
)
def test_they_open_in_transformers(rng, tmp_path, kind, words):
    config = model_of(kind, base=QWEN)
    save(tmp_path / "ours", rng, config)
    code, told, err = command(tmp_path / "ours", tmp_path / "out", "--dtype", "float32")
    assert code == 0, err
    assert f"{tmp_path / 'ours'}: " in told and words in told
    assert "qwen3_moe, float32" in told and told.count("are written as") == 1
    theirs = load_hf(tmp_path / "out")
    assert theirs.config.num_experts == (OUTPUTS if "merged" in kind else 9)
    tokens_BS = draw_tokens(theirs, rng)
    wanted, found = run_hf(theirs, tokens_BS)[2], Forward(open_model(tmp_path / "ours"))(tokens_BS)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    again = open_model(tmp_path / "out").config.moe.router
    assert again.merged_from is None and again.num_experts == theirs.config.num_experts


def test_what_no_family_can_say(rng, tmp_path):
    config = model_of("unequal", base=QWEN)
    save(tmp_path / "ours", rng, config)
    line = refusal(tmp_path / "ours", tmp_path / "out", "--family", "qwen3_moe")
    assert "num_experts_by_layer=(6, 9): models of transformers have the same number" in line
    assert "prune without --by-layer" in line and not (tmp_path / "out").exists()
    # A family's own refusal stays, of the model that would be written.
    save(tmp_path / "merged", rng, model_of("merged", base=QWEN))
    line = refusal(tmp_path / "merged", tmp_path / "out", "--family", "mixtral")
    assert "qk_norm='head'" in line and "merged_from" not in line and "num_experts" not in line


def test_equal_numbers_are_none():
    """Numbers of layers that are all the same say nothing; those of dense layers do not count."""
    config = dataclasses.replace(
        model_of("", base=QWEN), num_experts_by_layer=(3, 9), first_dense_layers=1, dense_hidden=24
    )
    hf = write_config(expanded_config(config), "qwen3_moe")
    assert (hf["num_experts"], hf["mlp_only_layers"]) == (9, [0])
