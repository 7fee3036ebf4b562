"""A folder of transformers: its tokenizer, ids that begin and end texts, what is passed over."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from inference_support import random_weights
from test_families_refused import CONFIG, INDEX, change_tensors, edit_json

from moejax.config import LatentConfig
from moejax.data.corpus import Document
from moejax.data.tokenizer import Tokenizer, train_bpe
from moejax.errors import UserError
from moejax.families.export import save_hf_folder
from moejax.inference.model_folder import save_model_folder
from moejax.inference.source import open_model
from moejax.training.state import Blueprint
from sharding.mesh import MeshShape, make_mesh

WIDE = dataclasses.replace(CONFIG, vocab_size=300)
TEXT = "one two three, two three four: one two"


def make_tokenizer(special=("<s>", "</s>", "<|end|>"), post=None):
    """A tokenizer.json of bytes with special tokens behind them; their ids are 256, 257, ...."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(list(special))
    if post is not None:
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single=post, special_tokens=[(t, model.token_to_id(t)) for t in special]
        )
    return model.to_str()


@pytest.fixture
def folder(tmp_path, rng):
    save_hf_folder(tmp_path / "hf", random_weights(WIDE, rng), WIDE, family="mixtral")
    return tmp_path / "hf"


def write(folder, name, **content):
    (folder / name).write_text(json.dumps(content))


def put_tokenizer(folder, post=None, **settings):
    (folder / "tokenizer.json").write_text(make_tokenizer(post=post))
    write(folder, "tokenizer_config.json", **settings)


def ids_of(folder):
    source = open_model(folder)
    return source.tokenizer.eos_id, source.end_ids, source.bos_id


def test_ends(folder):
    put_tokenizer(folder)
    edit_json(folder / "config.json", lambda c: c.update(eos_token_id=257))
    assert ids_of(folder) == (257, (257,), None)
    write(folder, "generation_config.json", eos_token_id=[258, 257])
    assert ids_of(folder) == (257, (257, 258), None)
    put_tokenizer(folder, eos_token={"content": "<|end|>"})
    edit_json(folder / "config.json", lambda c: c.pop("eos_token_id"))
    write(folder, "generation_config.json")
    assert ids_of(folder) == (258, (258,), None)
    put_tokenizer(folder)  # none is named anywhere: the usual one
    assert ids_of(folder) == (257, (257,), None)
    source = open_model(folder)
    assert source.path == folder
    ids = source.tokenizer.encode(TEXT)
    assert source.tokenizer.decode(ids) == TEXT


@pytest.mark.parametrize(
    ("post", "settings", "bos"),
    [
        (None, {}, None),
        ("<s> $0", {}, 256),
        ("<s> $0 </s>", {}, 256),
        ("$0 </s>", {}, None),
        ("<s> $0", {"add_bos_token": False, "bos_token": "<s>"}, None),
        (None, {"add_bos_token": True, "bos_token": "<s>"}, 256),
        (None, {"add_bos_token": True, "bos_token": {"content": "<s>"}}, 256),
        (None, {"bos_token": "<s>"}, None),
    ],
)
def test_beginnings(folder, post, settings, bos):
    put_tokenizer(folder, post, **settings)
    edit_json(folder / "config.json", lambda c: c.update(eos_token_id=257))
    assert ids_of(folder) == (257, (257,), bos)


def test_beginnings_without_a_tokenizer(folder):
    edit_json(folder / "config.json", lambda c: c.update(bos_token_id=1, eos_token_id=2))
    source = open_model(folder)
    assert (source.tokenizer, source.end_ids, source.bos_id) == (None, (2,), None)
    write(folder, "tokenizer_config.json", add_bos_token=True)
    assert open_model(folder).bos_id == 1


def test_a_tokenizer_that_is_too_large(tmp_path, rng):
    save_hf_folder(tmp_path / "hf", random_weights(CONFIG, rng), CONFIG, family="mixtral")
    put_tokenizer(tmp_path / "hf")
    with pytest.raises(UserError, match="the tokenizer has 259 ids and the model 70"):
        open_model(tmp_path / "hf")


def test_a_trained_tokenizer_comes_back(tmp_path, rng):
    tokenizer = train_bpe([Document("a", TEXT * 9)], 270)
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    save_hf_folder(
        tmp_path / "hf",
        random_weights(config, rng),
        config,
        family="mixtral",
        tokenizer=tokenizer,
        files=[tmp_path / "chat_template.jinja"],
    )
    source = open_model(tmp_path / "hf")
    assert source.tokenizer.fingerprint == tokenizer.fingerprint
    assert (source.end_ids, source.bos_id) == ((tokenizer.eos_id,), None)
    assert (source.path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == {
        "eos_token_id": tokenizer.eos_id
    }
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(TEXT)["input_ids"] == tokenizer.encode(TEXT).tolist()


def test_a_tokenizer_of_bytes_is_left_out(tmp_path, rng):
    flat = random_weights(WIDE, rng)
    save_hf_folder(tmp_path / "hf", flat, WIDE, family="mixtral", tokenizer=Tokenizer())
    source = open_model(tmp_path / "hf")
    assert (source.tokenizer, source.end_ids) == (None, (256,))


def test_folders_of_ours(tmp_path, rng):
    save_model_folder(tmp_path / "ours", random_weights(WIDE, rng), WIDE, Tokenizer(), record={})
    source = open_model(tmp_path / "ours")
    assert (source.end_ids, source.bos_id, source.path) == ((256,), None, tmp_path / "ours")


# --- weights ----------------------------------------------------------------------------------


def read(folder, config, **options):
    blueprint = Blueprint(config, make_mesh(MeshShape()))
    return open_model(folder, **options).weights(blueprint)


def test_tied_heads_and_buffers_are_passed_over(tmp_path, rng):
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    flat = random_weights(tied, rng)
    save_hf_folder(tmp_path / "hf", flat, tied, family="mixtral")
    extra = {
        "lm_head.weight": np.ones((70, 32), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    change_tensors(tmp_path / "hf", lambda tensors: tensors.update(extra))
    assert read(tmp_path / "hf", tied).keys() == flat.keys()


def test_layers_for_further_tokens_are_passed_over(tmp_path, rng):
    attention = dataclasses.replace(CONFIG.attention, head_dim=24, latent=LatentConfig(16, 8, 12))
    router = dataclasses.replace(CONFIG.moe.router, score_function="sigmoid", selection_bias=True)
    experts = dataclasses.replace(CONFIG.moe.experts, shared_hidden=16)
    moe = dataclasses.replace(CONFIG.moe, router=router, experts=experts)
    attention = dataclasses.replace(attention, rope_interleaved=True)
    config = dataclasses.replace(CONFIG, attention=attention, moe=moe, norm_eps=1e-6)
    flat = random_weights(config, rng)
    save_hf_folder(tmp_path / "hf", flat, config, family="deepseek_v3")
    further = {"model.layers.1.eh_proj.weight": np.ones((32, 64), np.float32)}
    change_tensors(tmp_path / "hf", lambda tensors: tensors.update(further))
    with pytest.raises(UserError, match="eh_proj"):
        read(tmp_path / "hf", config)
    path = tmp_path / "hf" / "config.json"
    edit_json(path, lambda c: c.update(num_nextn_predict_layers=1))
    weights = read(tmp_path / "hf", config)
    assert weights.keys() == flat.keys()
    for name, array in weights.items():
        known = flat[name].copy()
        if name == "params/embedding.w":
            known[70:] = 0
        elif name == "params/head.w":
            known[:, 70:] = 0
        np.testing.assert_array_equal(array, known, err_msg=name)


def test_progress(folder):
    told = []
    read(folder, WIDE, progress=lambda done, total: told.append((done, total)))
    total = told[0][1]
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (total, total)


def test_an_index_does_not_make_a_folder_ours(tmp_path, rng):
    flat = random_weights(CONFIG, rng)
    save_hf_folder(tmp_path / "hf", flat, CONFIG, family="mixtral", max_file_bytes=20_000)
    assert (tmp_path / "hf" / INDEX).exists()
    assert open_model(tmp_path / "hf").config.vocab_size == 70
    with pytest.raises(UserError, match="is there and is no model folder"):
        save_model_folder(tmp_path / "hf", flat, CONFIG, Tokenizer(), record={})
    assert open_model(tmp_path / "hf").config.vocab_size == 70
