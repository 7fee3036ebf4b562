"""Checkpoints of Hugging Face transformers: the same numbers come out, there and back."""

import dataclasses
import json
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest
from draws import seed_of
from jax import numpy as jnp

pytest.importorskip("torch")
pytest.importorskip("transformers")

from families_support import (
    CASES,
    COMMON,
    draw_tokens,
    load_hf,
    load_ours,
    logits_cached,
    make_hf,
    run_hf,
    run_ours,
    save_hf,
)

from moejax.families import read_config
from moejax.families.export import save_hf_folder
from moejax.inference.safetensors_file import open_safetensors, write_safetensors
from moejax.inference.source import open_model
from moejax.training.state import Blueprint, load_weights
from sharding.mesh import MeshShape, make_mesh

VOCAB = COMMON["vocab_size"]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@dataclasses.dataclass
class Case:
    name: str
    folder: object
    tokens_BS: np.ndarray
    states: np.ndarray
    routers: np.ndarray
    logits: np.ndarray


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    seed = seed_of(request.node.nodeid)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    model = make_hf(request.param, rng)
    folder = save_hf(model, tmp_path_factory.mktemp(request.param))
    tokens_BS = draw_tokens(model, rng)
    return Case(request.param, folder, tokens_BS, *run_hf(model, tokens_BS))


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), pytest.param((1, 8, 1), marks=pytest.mark.slow)], ids=str
)
def test_every_layer(case, sizes):
    blueprint, weights = load_ours(case.folder, sizes)
    states, routers, logits = run_ours(blueprint, weights, case.tokens_BS)
    np.testing.assert_allclose(states, case.states, **TOLERANCE)
    np.testing.assert_allclose(routers, case.routers, **TOLERANCE)
    np.testing.assert_allclose(logits[..., :VOCAB], case.logits, **TOLERANCE)
    assert (logits[..., VOCAB:] < -1e29).all()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1)], ids=str)
def test_prefill_and_decode(case, sizes):
    check_cached(case, sizes)


@pytest.mark.slow
def test_prefill_and_decode_on_a_mesh_of_three_axes(case):
    if case.name not in ("qwen3_moe", "deepseek_v3"):
        pytest.skip("two families of different attention will do")
    check_cached(case, (2, 2, 2))


def check_cached(case, sizes):
    logits = logits_cached(*load_ours(case.folder, sizes), case.tokens_BS)
    np.testing.assert_allclose(logits[..., :VOCAB], case.logits, **TOLERANCE)


# --- there and back ---------------------------------------------------------------------------


def stored(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= open_safetensors(file)
    return tensors


def flat_of(folder, sizes=(1, 1, 1), dtype="float32"):
    source = open_model(folder)
    config = dataclasses.replace(source.config, compute_dtype=dtype)
    return source, source.weights(Blueprint(config, make_mesh(MeshShape(*sizes))))


def test_export_is_what_was_read(case, tmp_path):
    source, flat = flat_of(case.folder, (2, 2, 2))
    save_hf_folder(
        tmp_path / "out",
        {**flat, "mu/x": 1, "step": 7},
        source.config,
        family=case.name,
        end_ids=source.end_ids,
        bos_id=1,
        max_file_bytes=200_000,
        dtype=np.float32,
    )
    sizes = [f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 1 and max(sizes) < 220_000
    before, after = stored(case.folder), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype
        np.testing.assert_array_equal(array, after[name], err_msg=name)
    _, _, logits = run_hf(load_hf(tmp_path / "out"), case.tokens_BS)
    np.testing.assert_array_equal(logits, case.logits)
    again = open_model(tmp_path / "out")
    config = dataclasses.replace(again.config, compute_dtype=source.config.compute_dtype)
    assert (config, again.end_ids) == (source.config, source.end_ids)


@pytest.mark.slow
def test_export_in_bfloat16(case, tmp_path):
    source, flat = flat_of(case.folder, dtype="bfloat16")
    save_hf_folder(
        tmp_path / "out", flat, source.config, family=case.name, dtype=ml_dtypes.bfloat16
    )
    before = stored(case.folder)
    for name, array in stored(tmp_path / "out").items():
        wide = name.endswith("e_score_correction_bias")
        assert array.dtype == (np.float32 if wide else ml_dtypes.bfloat16)
        np.testing.assert_array_equal(array, before[name].astype(array.dtype), err_msg=name)
    load_hf(tmp_path / "out")
    # Also behind a vector of odd length.
    assert all(array.flags.aligned for array in stored(tmp_path / "out").values())
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}  # transformers 4 asks for it


def test_weights_are_ready_to_use(case):
    source = open_model(case.folder)
    for sizes in (1, 1, 1), (2, 2, 2):
        config = dataclasses.replace(source.config, compute_dtype="bfloat16")
        blueprint = Blueprint(config, make_mesh(MeshShape(*sizes)))
        flat = source.weights(blueprint)
        weights = load_weights(flat, blueprint, jnp.bfloat16)
        loaded = {id(array) for array in jax.tree.leaves(weights)}
        assert loaded == {id(array) for array in flat.values()}  # nothing was copied
        assert {a.dtype.name for a in flat.values()} == {"bfloat16", "float32"}


def test_sharded_files_and_the_old_spelling(case, tmp_path):
    model = load_hf(case.folder)
    save_hf(model, tmp_path / "cut", max_shard_size="60KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    path = tmp_path / "cut" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    # Those of the cases are the default ones.
    config.pop("layer_types", None)
    config |= {
        "rope_theta": theta,
        "rope_scaling": None if rope == {"type": "default"} else rope,
        "torch_dtype": config.pop("dtype"),
    }
    path.write_text(json.dumps(config))
    (source, whole), (cut, parts) = flat_of(case.folder), flat_of(tmp_path / "cut")
    assert cut.config == source.config
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[name], array, err_msg=name)


# --- stored in few bits -----------------------------------------------------------------------


def rewrite(folder, out, tensors, scheme):
    out.mkdir()
    config = json.loads((folder / "config.json").read_text())
    if scheme is not None:
        config["quantization_config"] = scheme
    (out / "config.json").write_text(json.dumps(config))
    write_safetensors(out / "model.safetensors", dict(sorted(tensors.items())))


def check_equal(full, few, dtype):
    _, expected = flat_of(full, dtype=dtype)
    for sizes in (1, 1, 1), (2, 2, 2):
        _, found = flat_of(few, sizes, dtype)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize(
    "block,sizes",
    [
        ((24, 40), {}),
        ((128, 128), {"hidden_size": 160, "moe_intermediate_size": 144}),  # as published
    ],
)
def test_float8(tmp_path, rng, block, sizes):
    folder = save_hf(make_hf("deepseek_v3", rng, **sizes), tmp_path / "plain")
    full, few = dict(stored(folder)), dict(stored(folder))
    for name, array in stored(folder).items():
        if "_proj" not in name:
            continue
        count = [-(-n // b) for n, b in zip(array.shape, block)]
        scales = np.exp(rng.normal(size=count)).astype(np.float32)
        spread = np.kron(scales, np.ones(block, np.float32))[: len(array), : array.shape[1]]
        few[name] = (array / spread).astype(ml_dtypes.float8_e4m3fn)
        few[name + "_scale_inv"] = scales
        full[name] = few[name].astype(np.float32) * spread
    assert len(full) + 50 < len(few)
    # Of modules for further tokens the model has no use.
    further = "model.layers.3.eh_proj.weight"
    few[further] = np.zeros((64, 128), ml_dtypes.float8_e4m3fn)
    few[further + "_scale_inv"] = np.zeros((-(-64 // block[0]), -(-128 // block[1])), np.float32)
    scheme = {"quant_method": "fp8", "weight_block_size": list(block), "fmt": "e4m3"}
    rewrite(folder, tmp_path / "full", full, None)
    rewrite(folder, tmp_path / "few", few, scheme)
    for dtype in "float32", "bfloat16":
        check_equal(tmp_path / "full", tmp_path / "few", dtype)


def test_four_bits(tmp_path, rng):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = save_hf(make_hf("gpt_oss", rng), tmp_path / "plain")
    full, few = dict(stored(folder)), dict(stored(folder))
    for name in [n for n in full if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, outputs = few.pop(name).shape
        shape = (experts, outputs, width // 32)
        blocks = rng.integers(0, 256, (*shape, 16), dtype=np.uint8)
        scales = rng.integers(120, 128, shape, dtype=np.uint8)
        few |= {name + "_blocks": blocks, name + "_scales": scales}
        pair = torch.from_numpy(blocks), torch.from_numpy(scales)
        full[name] = convert_moe_packed_tensors(*pair, dtype=torch.float32).contiguous().numpy()
    rewrite(folder, tmp_path / "full", full, None)
    rewrite(folder, tmp_path / "few", few, {"quant_method": "mxfp4"})
    for dtype in "float32", "bfloat16":
        check_equal(tmp_path / "full", tmp_path / "few", dtype)


# --- defaults ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_missing_fields_have_the_defaults_of_transformers(name, tmp_path):
    from transformers import CONFIG_MAPPING

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        needed = {"num_experts_per_tok": 6} if name == "deepseek_v2" else {}
        config = CONFIG_MAPPING[name](**needed)
        config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    bare = read_config({"model_type": name, **needed})
    assert read_config(written) == bare
    assert read_config(config.to_dict()) == bare
