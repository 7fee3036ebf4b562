"""Model folders and their safetensors files: round trips, and every way to be broken."""

import errno
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from draws import draws
from inference_support import CONFIG, PARTS, random_weights
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference import model_folder
from moejax.inference.model_folder import load_model_folder, save_model_folder
from moejax.inference.safetensors_file import open_safetensors, write_safetensors
from moejax.inference.stored import on_devices
from moejax.training.state import Blueprint, logical_targets
from sharding.mesh import MeshShape, make_mesh

INDEX = "model.safetensors.index.json"
LIMIT = 9_000  # bytes; less than an expert bank, so that some are cut


def save(path, flat, **options):
    options = {"record": {"seed": 3}, "max_file_bytes": LIMIT, **options}
    save_model_folder(path, flat, CONFIG, Tokenizer(), **options)


def targets_of(sizes=(1, 1, 1)):
    return logical_targets(Blueprint(CONFIG, make_mesh(MeshShape(*sizes))), PARTS)


@pytest.fixture(scope="module")
def flat():
    return random_weights(CONFIG, draws(__name__))


@pytest.fixture
def folder(tmp_path, flat):
    save(tmp_path / "model", flat)
    return tmp_path / "model"


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 3000
    return str(error.value)


# --- the folder -------------------------------------------------------------------------------


def test_round_trip(folder, flat):
    model = load_model_folder(folder)
    assert (model.config, model.record) == (CONFIG, {"seed": 3})
    assert model.tokenizer.fingerprint == Tokenizer().fingerprint
    weights = model.read(targets_of((2, 2, 2)))
    assert weights.keys() == flat.keys()
    narrow = 0
    for name, array in weights.items():
        kept = name.startswith("bias/") or "router" in name or "norm" in name
        assert array.dtype == (np.float32 if kept else ml_dtypes.bfloat16), name
        np.testing.assert_array_equal(array, flat[name].astype(array.dtype), err_msg=name)
        narrow += not kept
    assert narrow > 10
    assert len(weights["params/layers.0.moe.bank.w_in"].sharding.device_set) == 8


def test_files_are_small_and_large_tensors_are_cut(folder, flat):
    files = sorted(folder.glob("*.safetensors"))
    assert all(file.stat().st_size <= LIMIT for file in files)
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = json.loads((folder / INDEX).read_text())
    cut = [name for name in index["weight_map"] if "bank.w_in[" in name]
    assert len(cut) >= 4  # two layers
    total = sum(a.nbytes for f in files for a in safetensors.numpy.load_file(f).values())
    assert index["metadata"]["total_size"] == total


def test_any_part_of_a_cut_tensor(folder, flat, rng):
    name = "params/layers.0.moe.bank.w_in"
    stored, whole = load_model_folder(folder).arrays[name], flat[name].astype(ml_dtypes.bfloat16)
    assert len(stored.pieces) > 1
    np.testing.assert_array_equal(stored.read(), whole)
    for _ in range(20):
        index = tuple(slice(*sorted(rng.integers(0, size + 1, 2))) for size in whole.shape[:3])
        np.testing.assert_array_equal(stored.read(index), whole[index])


def test_float32_is_exact(tmp_path, flat):
    save(tmp_path / "model", flat, dtype=np.float32, max_file_bytes=16_000_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 1
    for name, array in load_model_folder(tmp_path / "model").read(targets_of()).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, flat[name])


def test_devices_that_hold_the_same_part_share_one_reading(rng):
    whole, asked = rng.normal(size=(6, 4)).astype(np.float32), []

    def read(index):
        asked.append(repr(index))
        return whole[index].astype(np.float16)

    for spec, parts in (P(), 1), (P("data"), 2), (P("data", "expert"), 8):
        asked.clear()
        sharding = NamedSharding(make_mesh(MeshShape(2, 4, 1)), spec)
        target = jax.ShapeDtypeStruct(whole.shape, np.float32, sharding=sharding)
        array = on_devices(target, read)
        assert len(asked) == len(set(asked)) == parts
        assert (array.dtype, array.sharding) == (np.float16, sharding)
        np.testing.assert_array_equal(array, whole.astype(np.float16))


def test_saving_replaces_a_model_and_nothing_else(folder, tmp_path, flat):
    save(folder, {**flat, "step": 7, "mu/x": 1}, record={"seed": 4})
    assert load_model_folder(folder).record == {"seed": 4}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("mine")
    for path in (tmp_path / "notes", tmp_path / "notes" / "text"):
        with pytest.raises(UserError, match="choose another path"):
            save(path, flat)
    assert (tmp_path / "notes" / "text").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "notes"]


def test_a_full_disk_leaves_the_old_model(folder, tmp_path, flat, monkeypatch):
    calls = []

    def write(path, tensors):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_safetensors(path, tensors)

    monkeypatch.setattr(model_folder, "write_safetensors", write)
    with pytest.raises(UserError, match="disk is full"):
        save(folder, flat, record={"seed": 9})
    assert load_model_folder(folder).record == {"seed": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_saving_the_weights_of_another_model(tmp_path, flat):
    wrong = {n: a for n, a in flat.items() if n != "params/head.w"}
    wrong["params/more"] = np.zeros(3, np.float32)
    wrong["params/embedding.w"] = flat["params/embedding.w"].T
    wrong["params/final_norm.scale"] = np.zeros(32, np.int32)
    with pytest.raises(UserError) as error:
        save(tmp_path / "model", wrong)
    for words in (
        "params/head.w is missing",
        "params/more is unknown",
        "params/embedding.w has shape (32, 320) and not (320, 32)",
        "params/final_norm.scale is int32",
    ):
        assert words in one_line(error)
    with pytest.raises(UserError, match=r"max_file_bytes=1500: a row of .* allow larger files"):
        save(tmp_path / "model", flat, max_file_bytes=1500)
    assert not list(tmp_path.iterdir())


def test_names_and_shapes_of_another_model(folder):
    model, targets = load_model_folder(folder), targets_of()
    model.arrays["params/new"] = model.arrays.pop("params/head.w")
    targets["params/embedding.w"] = targets["params/final_norm.scale"]
    with pytest.raises(UserError) as error:
        model.read(targets)
    for words in ("params/new is unknown", "params/head.w is missing", "embedding.w has shape"):
        assert words in one_line(error)


def _damage(folder):
    """Ways to break a folder: name → (do it, what is told)."""
    first = min(folder.glob("*.safetensors"))
    config, index = folder / "config.json", folder / INDEX
    data = first.read_bytes()

    def rename_pieces():
        def change(content):
            moved = {k: v for k, v in content["weight_map"].items() if "w_in[0:" not in k}
            content["weight_map"] = moved

        edit_json(index, change)

    return {
        "no config": (config.unlink, "config.json: cannot be read"),
        "config no JSON": (lambda: config.write_text("{"), "config.json: damaged"),
        "config a list": (lambda: config.write_text("[]"), "config.json: damaged"),
        "format": (lambda: edit_json(config, lambda c: c.update(format="x")), "format 'x'"),
        "version": (
            lambda: edit_json(config, lambda c: c.update(version=2)),
            "version 2, and this program reads 1",
        ),
        "setting": (
            lambda: edit_json(config, lambda c: c["model"].update(layers=3)),
            "unknown key layers",
        ),
        "no tokenizer": (
            (folder / "tokenizer" / "tokenizer_meta.json").unlink,
            "tokenizer_meta.json: cannot be read",
        ),
        "no index": (index.unlink, f"{INDEX}: cannot be read"),
        "empty index": (lambda: index.write_text("{}"), f"{INDEX}: damaged"),
        "file outside": (
            lambda: edit_json(index, lambda c: c["files"].update({"../x": {}})),
            "'../x', which is outside",
        ),
        "no weights": (first.unlink, f"{first.name}: cannot be read"),
        "truncated": (lambda: first.write_bytes(data[:-1]), "truncated"),
        "header cut": (lambda: first.write_bytes(data[:20]), "a header of"),
        "nothing": (lambda: first.write_bytes(b""), "a header of"),
        "longer": (lambda: first.write_bytes(data + b"\0"), "something follows"),
        "one bit": (
            lambda: first.write_bytes(data[:-1] + bytes([data[-1] ^ 1])),
            "its content has changed",
        ),
        "index and files": (rename_pieces, "differ in"),
    }


def test_every_damage_is_told(tmp_path, flat):
    save(tmp_path / "model", flat)
    for name in _damage(tmp_path / "model"):
        folder = tmp_path / name
        save(folder, flat)
        break_it, told = _damage(folder)[name]
        break_it()
        with pytest.raises(UserError) as error:
            load_model_folder(folder)
        assert told in one_line(error), name
        assert str(folder) in str(error.value), name


def test_pieces_that_do_not_fit_together(folder):
    """As of a program that cuts otherwise: files and index agree."""
    file = next(f for f in folder.glob("*.safetensors") if b"w_in[0:" in f.read_bytes())
    tensors = dict(open_safetensors(file))
    (key,) = [k for k in tensors if "w_in[0:" in k]
    tensors = {k: np.array(v) for k, v in tensors.items()}
    tensors[key.replace("[0:", "[1:")] = tensors.pop(key)
    write_safetensors(file, tensors)

    def change(content):
        content["weight_map"] = {
            k.replace("[0:", "[1:") if k == key else k: v for k, v in content["weight_map"].items()
        }
        content["files"][file.name] = model_folder.describe_file(file)

    edit_json(folder / INDEX, change)
    with pytest.raises(UserError, match=r"the pieces of params/layers.*w_in do not fit"):
        load_model_folder(folder)


# --- one file ---------------------------------------------------------------------------------

TENSORS = {
    "bf16": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "f64": np.linspace(0, 1, 7),
    "odd": np.arange(3, dtype=np.uint8),
    "f32 unaligned": np.arange(4, dtype=np.float32).reshape(2, 2),
    "scalar": np.array(5, np.int64),
    "empty": np.zeros((0, 4), np.float16),
    "bool é": np.array([True, False]),
}


def test_the_format_is_that_of_the_safetensors_package(tmp_path):
    write_safetensors(tmp_path / "ours", TENSORS)
    theirs = safetensors.numpy.load_file(tmp_path / "ours")
    safetensors.numpy.save_file(TENSORS, tmp_path / "theirs")
    for found in (
        theirs,
        open_safetensors(tmp_path / "theirs"),
        open_safetensors(tmp_path / "ours"),
    ):
        assert found.keys() == TENSORS.keys()
        for name, array in TENSORS.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(found[name], array)
    assert not open_safetensors(tmp_path / "ours")["f64"].flags.writeable
    with pytest.raises(TypeError, match="x: safetensors files cannot hold complex64"):
        write_safetensors(tmp_path / "no", {"x": np.zeros(1, np.complex64)})


def test_float8(tmp_path):
    array = np.arange(5).astype(ml_dtypes.float8_e4m3fn)
    write_safetensors(tmp_path / "f8", {"x": array})
    np.testing.assert_array_equal(open_safetensors(tmp_path / "f8")["x"], array)


@pytest.mark.parametrize(
    "header, told",
    [
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]}}', "a has shape [2]"),
        ('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}', "begins at byte 8"),
        ('{"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}', "truncated"),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "something follows"),
        ('{"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}', "a has shape [-4]"),
        ('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}', "bytes -16 to 0"),
        ('{"a": {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]}}', "a has shape ['4']"),
        ('{"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]}}', "entry of a"),
        ('{"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}', "entry of a"),
        ('{"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}}', "entry of a"),
        ('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}', "entry of a"),
        ('{"a": {"shape": [4], "data_offsets": [0, 16]}}', "entry of a"),
        ('{"a": 3}', "entry of a"),
        *(
            (f'{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, {end}]}}}}', "a has")
            for shape, end in [
                ([0, 10**30], 0),
                ([0, 2**63], 0),
                ([0, 2**40, 2**40], 0),
                ([1] * 65 + [4], 16),
                ([1] * 99_999, 4),
                ([0], 10**4000),
                ([10**4000], 16),
            ]
        ),
        (
            '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},'
            ' "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
            "begins at byte 0 of the data and not at 16",
        ),
        ("[1]", "no object"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_headers_that_lie(header, told, tmp_path):
    text = header.encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(UserError) as error:
        open_safetensors(path)
    assert told in one_line(error) and str(path) in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_header_longer_than_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="a header of 4611686018427387904 bytes in a file of 10"):
        open_safetensors(path)
