"""Folders of transformers that are damaged, dangerous or unknown: one line that says why."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from inference_support import random_weights

from moejax.config import AttentionConfig, ExpertsConfig, ModelConfig, MoEConfig, RouterConfig
from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.families import export, read_config
from moejax.families.export import save_hf_folder
from moejax.inference.chat import ChatTemplate
from moejax.inference.defaults import GenerationDefaults
from moejax.inference.safetensors_file import open_safetensors, write_safetensors
from moejax.inference.source import open_model
from moejax.training.state import Blueprint
from sharding.mesh import MeshShape, make_mesh

CONFIG = ModelConfig(
    vocab_size=70,
    d_model=32,
    num_layers=1,
    attention=AttentionConfig(2, 2, 16),
    moe=MoEConfig(RouterConfig(num_experts=4, top_k=2), ExpertsConfig(hidden=16)),
    compute_dtype="float32",
)
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
EXPERT = "model.layers.0.block_sparse_moe.experts.2.w1.weight"


@pytest.fixture
def folder(tmp_path, rng):
    save_hf_folder(tmp_path / "hf", random_weights(CONFIG, rng), CONFIG, family="mixtral")
    return tmp_path / "hf"


@pytest.fixture
def cut(tmp_path, rng):
    flat = random_weights(CONFIG, rng)
    save_hf_folder(tmp_path / "cut", flat, CONFIG, family="mixtral", max_file_bytes=20_000)
    return tmp_path / "cut"


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_tensors(folder, change):
    tensors = {name: np.array(a) for name, a in open_safetensors(folder / WEIGHTS).items()}
    change(tensors)
    write_safetensors(folder / WEIGHTS, tensors)


def refusal(folder, config=CONFIG):
    """What opening and reading say, in one line that names the folder."""
    with pytest.raises(UserError) as error:
        open_model(folder).weights(Blueprint(config, make_mesh(MeshShape())))
        GenerationDefaults.read(folder)
        ChatTemplate(folder, Tokenizer())
    message = str(error.value)
    assert "\n" not in message and len(message) < 1500
    assert str(folder) in message
    return message


def test_the_folders_are_sound(folder, cut):
    for path in folder, cut:
        flat = open_model(path).weights(Blueprint(CONFIG, make_mesh(MeshShape())))
        assert len(flat) > 8


# --- files ------------------------------------------------------------------------------------


def test_truncated(folder):
    content = (folder / WEIGHTS).read_bytes()
    for end in 4, 100, len(content) - 3:
        (folder / WEIGHTS).write_bytes(content[:end])
        assert "damaged" in refusal(folder)


def test_offsets_outside(folder):
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for wrong in [0, 1 << 40], [-4, 0], [0, 4]:
        header[EXPERT]["data_offsets"] = wrong
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(
            len(text).to_bytes(8, "little") + text + content[8 + length :]
        )
        assert "damaged" in refusal(folder)


def test_pickled_weights(folder):
    (folder / WEIGHTS).unlink()
    assert "no safetensors files" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickled" in refusal(folder) and "convert" in refusal(folder)


def test_parts_without_an_index(cut):
    (cut / INDEX).unlink()
    assert f"no {INDEX}" in refusal(cut)


def test_index(cut):
    text = (cut / INDEX).read_text()
    files = sorted(path.name for path in cut.glob("*.safetensors"))
    names = json.loads(text)["weight_map"]

    def wrong(change):
        (cut / INDEX).write_text(text)
        edit_json(cut / INDEX, change)
        return refusal(cut)

    assert "no weight_map" in wrong(lambda index: index.pop("weight_map"))
    assert "gone.safetensors" in wrong(lambda i: i["weight_map"].update(x="gone.safetensors"))
    assert "x is in none of them" in wrong(lambda i: i["weight_map"].update(x=files[0]))
    assert "not in the index" in wrong(lambda i: i["weight_map"].pop(EXPERT))
    other = next(file for file in files if file != names[EXPERT])
    assert EXPERT in wrong(lambda i: i["weight_map"].update({EXPERT: other}))
    outside = cut.parent / "outside.safetensors"
    write_safetensors(outside, {"x": np.zeros(2, np.float32)})
    for path in f"../{outside.name}", str(outside):
        message = wrong(lambda i, path=path: i["weight_map"].update(x=path))
        assert "out of the folder" in message
    (cut / INDEX).write_text(text)
    write_safetensors(cut / "model-00009-of-00009.safetensors", {EXPERT: np.zeros(2, np.float32)})
    assert "in another" in wrong(
        lambda i: i["weight_map"].update(x="model-00009-of-00009.safetensors")
    )
    (cut / files[0]).unlink()
    (cut / INDEX).write_text(text)
    assert files[0] in refusal(cut)


OF_TEXTS = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]


@pytest.fixture
def alarm():
    """What waits for a pipe fails instead."""

    def late(*_):
        pytest.fail("waits for ever")  # no OSError, which the program may catch

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, INDEX, *OF_TEXTS])
def test_links_out_of_the_folder(folder, name):
    path, outside = folder / name, folder.parent / "outside"
    outside.write_bytes(path.read_bytes() if path.exists() else b"{}")
    path.unlink(missing_ok=True)
    path.symlink_to(outside)
    assert "out of the folder" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, INDEX, *OF_TEXTS])
def test_pipes_and_devices(folder, name, alarm):
    path = folder / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert f"{name}: is no regular file" in refusal(folder)
    path.unlink()
    path.mkdir()
    assert f"{name}: is no regular file" in refusal(folder)
    path.rmdir()
    path.symlink_to("/dev/null")
    assert name in refusal(folder)
    path.unlink()
    path.symlink_to(path.name)  # a link to itself
    refusal(folder)


@pytest.mark.parametrize("name", ["config.json", INDEX, *OF_TEXTS])
def test_files_that_are_too_large(folder, name):
    megabytes = 256 if name == "tokenizer.json" else 64
    with open(folder / name, "ab") as file:
        file.truncate((megabytes << 20) + 1)  # takes no room on the disk
    message = refusal(folder)
    assert f"{name}: {(megabytes << 20) + 1} bytes, at most {megabytes << 20}" in message


def test_names_that_are_none(cut):
    for name in "a\0b", "x" * 300, "\ud800":
        edit_json(cut / INDEX, lambda index, name=name: index["weight_map"].update(x=name))
        assert "no file's name" in refusal(cut)


def test_links_of_the_cache(folder, tmp_path):
    model = tmp_path / "hub" / "models--a--b"
    snapshot = model / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for file in folder.iterdir():
        os.rename(file, model / "blobs" / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"hash-{file.name}")
    assert open_model(snapshot).weights(Blueprint(CONFIG, make_mesh(MeshShape())))
    (tmp_path / "link").symlink_to(snapshot)
    assert open_model(tmp_path / "link").config.num_layers == 1
    other = tmp_path / "hub" / "models--c--d"
    other.mkdir()
    (other / WEIGHTS).write_bytes((snapshot / WEIGHTS).read_bytes())
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(other / WEIGHTS)
    assert "out of the folder" in refusal(snapshot)


# --- tensors ----------------------------------------------------------------------------------


def test_all_tensors_that_do_not_fit(folder):
    def change(tensors):
        tensors[EXPERT] = tensors[EXPERT].T.copy()
        tensors["model.norm.weight"] = np.ones(32, np.int32)
        tensors["model.extra"] = tensors.pop("lm_head.weight")

    change_tensors(folder, change)
    message = refusal(folder)
    assert f"{EXPERT} has shape (32, 16) and not (16, 32)" in message
    assert "model.norm.weight is int32" in message
    assert "model.extra is unknown" in message and "lm_head.weight is missing" in message


# --- config and tokenizer ---------------------------------------------------------------------


def test_config(folder):
    path = folder / "config.json"
    edit_json(path, lambda c: c.update(hidden_act="relu", residual_scale=2))
    message = refusal(folder)
    assert "hidden_act='relu'" in message and "residual_scale=2" in message
    edit_json(path, lambda c: c.update(model_type="llama"))
    assert "model_type='llama'" in refusal(folder) and "qwen3_moe" in refusal(folder)


def test_layers_that_the_weights_lack(folder, alarm):
    edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=4000))
    with pytest.raises(UserError, match=r"num_hidden_layers=4000 .* no layer 1;"):
        open_model(folder)
    edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=10**9))
    assert "num_hidden_layers=1000000000 (a whole number from 1 to 4096)" in refusal(folder)


@pytest.mark.parametrize(
    "field", ["vocab_size", "rms_norm_eps", "rope_theta", "num_local_experts", "hidden_size"]
)
def test_numbers_that_are_too_large(folder, field):
    config = json.loads((folder / "config.json").read_text())
    for value in 10**400, -(10**400), float("inf"), float("nan"):
        with pytest.raises(UserError, match=f"{field}=") as error:
            read_config({**config, field: value})
        assert len(str(error.value)) < 400
    with pytest.raises(UserError, match=r"vocab_size=10000.* \(a whole number"):
        read_config({**config, "vocab_size": 10**30})


@pytest.mark.parametrize("ids", [70, -1, "2", [1, 99], [True]])
def test_ids_that_are_none(folder, ids):
    edit_json(folder / "generation_config.json", lambda c: c.update(eos_token_id=ids))
    message = refusal(folder)
    assert f"generation_config.json: eos_token_id={ids!r}" in message
    assert "vocab_size=70" in message


def test_tokenizers_that_are_none(folder):
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: not a tokenizer" in refusal(folder)
    (folder / "tokenizer.json").write_bytes(b"\xff")
    assert "tokenizer.json: not a tokenizer" in refusal(folder)


def test_no_tokenizer(folder):
    source = open_model(folder)
    assert source.tokenizer is None
    with pytest.raises(UserError, match="no tokenizer"):
        source.need_tokenizer()


# --- writing ----------------------------------------------------------------------------------


def test_other_folders_are_not_replaced(tmp_path, rng):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    with pytest.raises(UserError, match="is no model of transformers"):
        save_hf_folder(tmp_path / "mine", random_weights(CONFIG, rng), CONFIG, family="mixtral")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes"]


def test_weights_of_another_model(tmp_path, rng):
    flat = random_weights(CONFIG, rng)
    flat["params/final_norm.scale"] = np.ones(33, np.float32)
    flat["params/x"] = flat.pop("params/head.w")
    with pytest.raises(UserError) as error:
        save_hf_folder(tmp_path / "out", flat, CONFIG, family="mixtral")
    for word in "params/head.w is missing", "params/x is unknown", "(33,)":
        assert word in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_folder(folder, rng, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_safetensors", full)
    with pytest.raises(UserError, match="the disk is full"):
        save_hf_folder(folder, random_weights(CONFIG, rng), CONFIG, family="mixtral")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]
