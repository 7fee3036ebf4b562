"""Runs that begin with a model's weights: what they compute, what they refuse, going on."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from draws import draws
from families_support import load_hf, make_hf, save_hf
from flax import nnx
from inference_support import CONFIG, random_weights
from run_support import TINY, kept_programs, refused, run, stop_at, write_text
from test_families_folder import make_tokenizer

import train
from moejax.config import RouterConfig
from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.families.export import save_hf_folder
from moejax.inference.model_folder import save_model_folder
from moejax.inference.source import open_model
from moejax.presets import qwen3_30b_a3b, tiny
from moejax.training import session
from moejax.training.checkpoint import Checkpoints
from moejax.training.config import TrainConfig
from moejax.training.init_from import initial_state
from moejax.training.origin import origin_of
from moejax.training.rundir import RunDir
from moejax.training.state import Blueprint, to_logical
from moejax.training.text import prepare_text
from sharding import zero
from sharding.mesh import MeshShape, make_mesh

RUN = [
    *("--data.seq-len", 16, "--data.batch-size", 8, "--devices", 8, "--eval-every", 0),
    *("--save-every", 2, "--model.compute-dtype", "float32", "--optimizer.warmup-steps", 1),
    *("--optimizer.learning-rate", 1e-3, "--steps", 4),
]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    with kept_programs(tmp_path_factory.mktemp("programs")), pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "SAMPLE_TOKENS", 8)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


def fresh_rng():
    return draws(__name__)


def put_texts(folder):
    (folder / "tokenizer.json").write_text(make_tokenizer())
    settings = {"eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = {"eos_token_id": [257, 258], "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(ids))


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """Folders of transformers' own making, by family."""
    made = {}

    def folder(family):
        if family not in made:
            path = tmp_path_factory.mktemp("hf") / family
            ids = {"vocab_size": 261, "eos_token_id": 257, "bos_token_id": None}
            save_hf(make_hf(family, fresh_rng(), **ids), path)
            put_texts(path)
            made[family] = path
        return made[family]

    return folder


@pytest.fixture
def folders(tmp_path, rng):
    """The same weights as a folder of transformers and as one of ours."""
    router = RouterConfig(num_experts=10, top_k=2, score_function="topk_softmax")
    moe = dataclasses.replace(CONFIG.moe, router=router)
    config = dataclasses.replace(CONFIG, num_layers=11, vocab_size=259, moe=moe)
    flat = random_weights(config, rng)
    flat["params/embedding.w"][259:] = 0
    flat["params/head.w"][:, 259:] = 0
    save_hf_folder(tmp_path / "hf", flat, config, family="mixtral")
    put_texts(tmp_path / "hf")
    tokenizer = open_model(tmp_path / "hf").tokenizer
    save_model_folder(tmp_path / "ours", flat, config, tokenizer, record={}, dtype=np.float32)
    return flat, config, tmp_path


# ── the state ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["hf", "ours"])
@pytest.mark.parametrize(
    ("sizes", "scan"),
    [((2, 4, 1), True), ((1, 8, 1), True), ((2, 2, 2), False), ((1, 8, 1), False)],
)
def test_masters_are_the_weights(folders, monkeypatch, kind, sizes, scan):
    """Ten experts on 4 or 8 devices need empty slots; layer 10 comes behind layer 9."""
    monkeypatch.setattr(zero, "SMALLEST", 2)
    flat, config, folder = folders
    blueprint = Blueprint(
        dataclasses.replace(config, scan_layers=scan), make_mesh(MeshShape(*sizes))
    )
    lines = []
    state = initial_state(blueprint, open_model(folder / kind), lines.append)
    found = to_logical(jax.block_until_ready(state))
    assert int(found.pop("step")) == 0 and not lines
    for name, value in found.items():
        part, _, rest = name.partition("/")
        wanted = (
            flat[name] if part in ("params", "bias") else np.zeros(flat[f"params/{rest}"].shape)
        )
        np.testing.assert_array_equal(np.asarray(value), wanted, err_msg=name)
    assert {n for n in found if n.startswith(("params/", "bias/"))} == flat.keys()
    wanted = blueprint.shardings(blueprint.state_specs())
    for tree, shardings in (
        *((part, wanted.masters) for part in (state.masters, *state.moments)),
        (state.biases, wanted.biases),
    ):
        shardings = dict(nnx.to_flat_state(shardings))
        for path, variable in nnx.to_flat_state(tree):
            array = variable.get_value()
            assert array.dtype == np.float32
            assert array.sharding.is_equivalent_to(shardings[path], array.ndim), path


def test_selection_biases_come_along(hf):
    source = open_model(hf("deepseek_v3"))
    config = dataclasses.replace(source.config, compute_dtype="float32", scan_layers=True)
    blueprint = Blueprint(config, make_mesh(MeshShape(2, 4, 1)))
    state = to_logical(jax.block_until_ready(initial_state(blueprint, source, print)))
    theirs = load_hf(source.path).model.layers
    for layer in range(config.first_dense_layers, config.num_layers):
        wanted = theirs[layer].mlp.gate.e_score_correction_bias.numpy()
        found = np.asarray(state[f"bias/layers.{layer}.moe.router.selection_bias_E"])
        assert np.abs(wanted).max() > 0
        np.testing.assert_array_equal(found, wanted)


def test_one_tensor_at_a_time(folders, monkeypatch):
    """No array of the source outlives the one behind it."""
    from moejax.training.streaming import WeightStream

    flat, config, folder = folders
    taken, most = [], []
    take = WeightStream.take

    def watched(self, name):
        array = take(self, name)
        taken.append(name)
        most.append(self._arrays)
        return array

    monkeypatch.setattr(WeightStream, "take", watched)
    blueprint = Blueprint(config, make_mesh(MeshShape(1, 8, 1)))
    initial_state(blueprint, open_model(folder / "hf"), print)
    assert sorted(taken) == sorted(flat) and not any(most)


def test_damaged_weights_are_refused(folders):
    _, config, folder = folders
    other = dataclasses.replace(config, d_model=16)
    blueprint = Blueprint(other, make_mesh(MeshShape()))
    for kind in "hf", "ours":
        with pytest.raises(UserError, match="another model") as error:
            initial_state(blueprint, open_model(folder / kind), print)
        assert "\n" not in str(error.value)


# ── flags ────────────────────────────────────────────────────────────────────


def test_what_flags_start_from(folders):
    _, config, folder = folders
    made = train.read_flags(["--init-from", str(folder / "hf"), "--steps", "7"])
    assert made.steps == 7 and made.init_from == str(folder / "hf")
    assert made.model == dataclasses.replace(config, scan_layers=True, remat="layer")
    assert made.optimizer.learning_rate < tiny().optimizer.learning_rate / 100
    made = train.read_flags(
        ["--init-from", str(folder / "hf"), "--preset", "qwen3-30b-a3b", "--model.no-scan-layers"]
    )
    preset = qwen3_30b_a3b()
    assert made.optimizer == preset.optimizer and made.mesh == preset.mesh
    assert made.model == dataclasses.replace(config, remat="layer")
    assert made.data == dataclasses.replace(preset.data, seq_len=config.max_context)
    free = train.read_flags(
        [
            *("--init-from", str(folder / "ours"), "--model.moe.exchange.mode", "ring"),
            *("--model.moe.router.z-loss-coef", "0.1", "--model.compute-dtype", "bfloat16"),
            *("--model.moe.exchange.wire.dispatch", "int8", "--model.remat", "none"),
            *("--model.max-context", "64", "--model.moe.router.load-balance-coef", "0"),
        ]
    )
    assert (free.model.moe.exchange.mode, free.model.moe.router.z_loss_coef) == ("ring", 0.1)


def test_the_preset_small_trains_no_tokenizer(folders):
    made = train.read_flags(["--preset", "small", "--init-from", str(folders[2] / "hf")])
    assert (made.data.vocab, made.model.vocab_size) == (0, 259)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model.d-model", "64"], ["--model.d-model is 32 there and 64 here", "drop"]),
        (["--model.moe.router.top-k", "3"], ["--model.moe.router.top-k is 2"]),
        (["--model.attention.rope-theta", "5"], ["--model.attention.rope-theta"]),
        (
            ["--model.num-layers", "3", "--model.moe.router.forced-balance"],
            ["--model.num-layers is 11", "--model.moe.router.forced-balance is False"],
        ),
        (["--model.moe.exchange.wire.dispatch-dim", "8"], ["wire.dispatch-dim is None"]),
        (["--vocab", "300"], ["--data.vocab 300", "the tokenizer is that of"]),
        (["--data.tokenizer", "x.json"], ["--data.tokenizer x.json", "drop the flag"]),
        (["--preset", "nope"], ["no such preset"]),
    ],
)
def test_flags_that_the_weights_do_not_allow(folders, monkeypatch, argv, words):
    folder = folders[2]
    monkeypatch.chdir(folder)
    line = refused("--init-from", str(folder / "hf"), *argv)
    assert all(word in line for word in words), line
    assert not (folder / "runs").exists()


def test_folders_that_cannot_be_used(folders):
    folder = folders[2]
    assert "nothing there" in refused("--init-from", folder / "none")
    (folder / "hf" / "tokenizer.json").unlink()
    line = refused("--init-from", folder / "hf")
    assert "no tokenizer.json there" in line and "put the model's tokenizer.json" in line


# ── training ─────────────────────────────────────────────────────────────────


def nll_of(model, config, tokenizer):
    """The mean loss of the first batch, by transformers."""
    import torch

    rows = prepare_text(config, tokenizer).dataset.batch(0, config.data.batch_size)
    rows = torch.from_numpy(np.asarray(rows)).long()
    with torch.no_grad():
        logits = model(rows[:, :-1], use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mesh"),
    [("qwen3_moe", "data=2,expert=4"), ("deepseek_v3", "expert=8"), ("gpt_oss", "data=2,expert=4")],
)
def test_the_first_loss_is_that_of_transformers(hf, text, tmp_path, family, mesh):
    folder, path = hf(family), tmp_path / "run"
    flags = ["--init-from", folder, "--data", text, "--mesh", mesh, "--run", path, *RUN]
    code, out, err = run(*flags)
    assert code == 0, err
    assert f"begins with the weights of {folder}" in out
    config = RunDir(path).read_config(TrainConfig)
    assert config.init_from == str(folder)
    metrics = RunDir(path).metrics()
    wanted = nll_of(load_hf(folder), config, open_model(folder).tokenizer)
    assert metrics[0]["loss"] == pytest.approx(wanted, rel=2e-5)
    # Every kind of weight has moved.
    start = initial_state(
        Blueprint(config.model, make_mesh(MeshShape())), open_model(folder), print
    )
    start = to_logical(jax.block_until_ready(start))
    end = open_model(path).weights(Blueprint(config.model, make_mesh(MeshShape())))
    moved = [n for n in end if (np.asarray(end[n]) != np.asarray(start[n])).any()]
    assert set(moved) == {n for n in end if n.startswith("params/")}
    origin = origin_of(open_model(path))
    assert (origin.family, origin.end_ids) == (family, (257, 258))
    assert json.loads((path / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE


@pytest.mark.slow
def test_going_on_needs_no_folder(hf, text, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(hf("qwen3_moe"), folder)
    flags = ["--init-from", folder, "--data", text, "--mesh", "data=2,expert=4", *RUN]
    code, _, err = run(*flags, "--run", tmp_path / "whole")
    assert code == 0, err
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run(*flags, "--run", path)[0] == 0
    assert Checkpoints(path / "checkpoints").latest_step() == 2
    shutil.rmtree(folder)
    line = refused("--run", path, "--init-from", tmp_path / "another")
    assert f"init_from is '{folder}' there and '{tmp_path / 'another'}' here" in line
    assert "model.num_layers is 2 there" in refused("--run", path, "--model.num-layers", 3)
    code, out, err = run(*flags, "--run", path)  # the same command
    assert code == 0 and "resuming after step 2" in out, err
    losses = [[row["loss"] for row in RunDir(p).metrics()] for p in (path, tmp_path / "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.slow
def test_a_run_that_has_saved_nothing_yet_begins_again(hf, text, tmp_path):
    path = tmp_path / "run"
    flags = ["--init-from", hf("qwen3_moe"), "--data", text, "--mesh", "data=2,expert=4", *RUN]
    assert run(*flags, "--run", path)[0] == 0
    first = RunDir(path).metrics()
    shutil.rmtree(path / "checkpoints")
    code, out, err = run("--run", path)
    assert code == 0 and "begins with the weights" in out, err
    assert [r["loss"] for r in RunDir(path).metrics()] == [r["loss"] for r in first]


@pytest.mark.slow
def test_a_run_from_a_run(text, tmp_path, monkeypatch):
    """A run's weights go onto another mesh; its tokenizer of bytes comes along."""
    first = tmp_path / "first"
    code, _, err = run(*TINY, "--data", text, "--steps", 2, "--run", first)
    assert code == 0, err
    monkeypatch.chdir(tmp_path)
    config = train.read_flags(["--init-from", "first", "--mesh", "expert=8"])
    assert config.init_from == str(first) and config.data.seq_len == 32
    assert train.tokenizer_of_weights(config).fingerprint == Tokenizer().fingerprint
    assert origin_of(open_model(first)).family is None
    blueprint = Blueprint(config.model, make_mesh(MeshShape(1, 8, 1)))
    state = to_logical(jax.block_until_ready(initial_state(blueprint, open_model(first), print)))
    flat = open_model(first).weights(Blueprint(open_model(first).config, make_mesh(MeshShape())))
    for name, array in flat.items():
        np.testing.assert_array_equal(np.asarray(state[name]), np.asarray(array), err_msg=name)
    assert int(state["step"]) == 0
