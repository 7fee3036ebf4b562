"""The script: what it prints, exit codes, and one line for every mistake."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from draws import draws
from inference_support import CONFIG, make_generator, random_weights
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import infer
from moejax.data.corpus import Document
from moejax.data.tokenizer import Tokenizer, train_bpe
from moejax.errors import UserError
from moejax.inference import console, source
from moejax.inference.model_folder import save_model_folder
from moejax.inference.sampling import SamplingConfig
from moejax.inference.source import open_model
from moejax.inference.text import Completion, complete
from moejax.serving import start
from moejax.training.checkpoint import Checkpoints
from moejax.training.config import DataConfig, TrainConfig
from moejax.training.rundir import RunDir
from moejax.training.state import Blueprint, load_weights
from sharding.mesh import MeshShape, make_mesh

GREEDY = SamplingConfig()
ROOT = Path(__file__).parent.parent
SPEED = r"\[\d+ tokens in [\d.]+ s, [\d.]+ tokens/s; first text after [\d.]+ s.*\]"


@pytest.fixture(scope="module")
def flat():
    weights = random_weights(CONFIG, draws(__name__))
    weights["params/head.w"][:, Tokenizer().eos_id] = 0  # others are likelier: no text ends early
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory, flat):
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model_folder(path, flat, CONFIG, Tokenizer(), record={}, dtype=np.float32)
    return path


@pytest.fixture(scope="module")
def generator(flat):
    return make_generator(CONFIG, flat)


@pytest.fixture(scope="module")
def loop(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "keep_compiled_programs", lambda: None)
        with infer.load(open_model(folder), infer.InferConfig(mesh="1x1x1"), 3) as loop:
            yield loop


@pytest.fixture
def script(monkeypatch, loop, capsys):
    """Runs the script on a model loaded once: flags → exit code, stdout, lines of stderr."""
    monkeypatch.setattr(infer, "load", lambda *_: contextlib.nullcontext(loop))

    def run(*argv, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = infer.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


def expected(generator, prompts, sampling=GREEDY, max_tokens=6, stop=()):
    results = complete(
        generator, Tokenizer(), prompts, sampling=sampling, max_tokens=max_tokens, stop=stop
    )
    return [prompt + result.text for prompt, result in zip(prompts, results)]


def write_run(path, steps, tokenizer=True, config=CONFIG):
    """A run directory with a checkpoint for each step; step → flat dict."""
    with RunDir.create_or_open(path) as run:
        run.bind_config(TrainConfig(model=config, data=DataConfig(seq_len=32)))
    if tokenizer:
        (path / "tokenizer").mkdir()
        Tokenizer().save(path / "tokenizer")
    everywhere = NamedSharding(make_mesh(MeshShape(8)), P())
    with Checkpoints(path / "checkpoints", keep=9) as checkpoints:
        for step, flat in steps.items():
            arrays = {**flat, "step": np.int32(step), "mu/other": np.ones(3, np.float32)}
            arrays = {n: jax.device_put(a, everywhere) for n, a in arrays.items()}
            checkpoints.save(step, arrays, {})


# --- what it prints ---------------------------------------------------------------------------


def test_one_prompt(script, folder, generator):
    code, out, err = script("--model", folder, "-p", "def ", "--max-tokens", 6)
    assert (code, out) == (0, expected(generator, ["def "])[0] + "\n")
    assert len(err) == 1 and re.fullmatch(SPEED, err[0])


def test_a_batch_with_sampling_and_stop(script, folder, generator):
    prompts = ["a b", "-x", "é"]
    for seed in range(11, 99):  # of random weights: one of whose texts there is something to cut
        sampling = SamplingConfig(0.9, 20, 0.95, 0.001, seed)
        text = expected(generator, prompts, sampling)[1]
        if len(text) > len(prompts[1]) + 2 and text[-2:].strip("\r\n\0") == text[-2:]:
            break
    stop = text[-2:]
    code, out, err = script(
        *("--model", folder, "-p", "a b", "-p=-x", "--prompt", "-", "--max-tokens", 6),
        *("--temperature", 0.9, "--top-k", 20, "--top-p", 0.95, "--min-p", 0.001, "--seed", seed),
        *(f"--stop={stop}", "--stop", "never this"),
        stdin="é".encode(),
    )
    texts = expected(generator, prompts, sampling, stop=[stop])
    blocks = [f"=== {i} of 3 ===\n{text}\n" for i, text in enumerate(texts, 1)]
    assert (code, out) == (0, "".join(blocks))
    assert len(err) == 1


def test_lines_of_a_pipe_are_continued_one_by_one(script, folder, generator):
    code, out, _ = script("--model", folder, "--max-tokens", 6, stdin=b"def \r\n\nx")
    texts = [expected(generator, [line])[0] for line in ("def ", "", "x")]
    assert (code, out) == (0, "".join(text + "\n" for text in texts))
    assert script("--model", folder, stdin=b"") == (0, "", [])


def test_a_full_context_is_told(script, folder):
    code, _, err = script("--model", folder, "-p", "x" * 40, "--max-tokens", 100)
    assert code == 0 and "the context is full" in err[0]


def test_an_output_that_knows_few_characters(script, folder, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert script("--model", folder, "-p", "é", "--max-tokens", 6)[0] == 0
    out.flush()
    assert out.buffer.getvalue().startswith(b"?")


def test_a_person_at_a_terminal(monkeypatch, capsys):
    events = iter(["one", KeyboardInterrupt, "slow", "bad", "two", EOFError])

    def typed(_):
        event = next(events)
        if isinstance(event, str):
            return event
        raise event

    def continue_texts(prompts):
        if prompts == ["slow"]:
            raise KeyboardInterrupt
        if prompts == ["bad"]:
            raise UserError("no such text")
        print(prompts)

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    console.interact(continue_texts)
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line] == ["['one']", "['two']"]
    assert err.splitlines()[1:] == ["error: no such text"]


def test_texts_of_a_batch_come_in_order(capsys):
    printer = console.Printer(["a", "b"])
    assert capsys.readouterr().out == "=== 1 of 2 ===\na"
    for index, text, shown in [(1, "y", ""), (0, "p", "p"), (1, "z", ""), (0, "q", "q")]:
        printer.on_text(index, text)
        assert capsys.readouterr().out == shown
    printer.finish([Completion("pq", 2, "end"), Completion("yz", 2, "end")])
    assert capsys.readouterr().out == "\n=== 2 of 2 ===\nbyz\n"


# --- where the model comes from ---------------------------------------------------------------


def test_the_newest_checkpoint_of_a_run(tmp_path, rng, capsys, monkeypatch):
    """Saved on eight devices with optimizer state, read on one without; torn files passed over."""
    monkeypatch.setattr(start, "keep_compiled_programs", lambda: None)
    steps = {step: random_weights(CONFIG, rng) for step in (5, 10, 15)}
    write_run(tmp_path / "run", steps)
    blueprint = Blueprint(CONFIG, make_mesh(MeshShape(2, 2, 2)))
    torn = max((tmp_path / "run/checkpoints/step_00000015").rglob("*"), key=os.path.getsize)
    os.truncate(torn, 10)
    weights = open_model(tmp_path / "run").weights(blueprint)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "step_00000015" in err and "damaged" in err
    assert weights.keys() == steps[10].keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(array, steps[10][name])

    code = infer.main(["--model", str(tmp_path / "run"), "-p", "x", "--max-tokens", "3"])
    direct = make_generator(CONFIG, steps[10])
    assert code == 0
    assert capsys.readouterr().out == expected(direct, ["x"], max_tokens=3)[0] + "\n"


def test_runs_that_cannot_be_used(tmp_path, flat, rng):
    blueprint = Blueprint(CONFIG, make_mesh(MeshShape()))
    write_run(tmp_path / "none", {})
    with pytest.raises(UserError, match="no complete checkpoint there yet"):
        open_model(tmp_path / "none").weights(blueprint)
    other = {n: a for n, a in flat.items() if "head" not in n}
    other["params/final_norm.scale"] = np.ones(31, np.float32)
    write_run(tmp_path / "other", {1: other})
    with pytest.raises(UserError, match=r"of another model: .*final_norm.*head\.w is missing"):
        open_model(tmp_path / "other").weights(blueprint)
    write_run(tmp_path / "bare", {}, tokenizer=False)
    with pytest.raises(UserError, match=r"tokenizer_meta\.json: cannot be read"):
        open_model(tmp_path / "bare")
    for text, told in [
        ("{", "holds no model"),
        ("[]", "holds no model"),
        ('{"model": 1}', "must be a dictionary"),
    ]:
        (tmp_path / "none" / "config.json").write_text(text)
        with pytest.raises(UserError, match=rf"config\.json: .*{told}"):
            open_model(tmp_path / "none")


def test_a_tokenizer_of_another_model(tmp_path, flat):
    tokenizer = train_bpe([Document("a", "some words and some more words " * 9)], 270)
    save_model_folder(tmp_path / "m", flat, CONFIG, tokenizer, record={})
    with pytest.raises(UserError, match=r"tokenizer has 270 ids and the model 257"):
        open_model(tmp_path / "m")


def test_the_packaged_model_is_the_default(folder, monkeypatch, tmp_path, script, generator):
    monkeypatch.setattr(source, "packaged_model", lambda: folder)
    assert script("-p", "x", "--max-tokens", 6)[1] == expected(generator, ["x"])[0] + "\n"
    monkeypatch.setattr(source, "packaged_model", lambda: tmp_path / "no")
    code, out, err = script("-p", "x")
    assert (code, out, len(err)) == (2, "", 1) and "--model" in err[0]


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--temprature", "1"], "--temprature: no such flag; the closest is --temperature"),
        (["--top-k", "x"], "--top-k"),
        (["--top-k", "-2"], "top_k=-2"),
        (["--top-p", "2"], "top_p=2.0"),
        (["--min-p", "-1"], "min_p=-1.0"),
        (["--seed", str(2**64)], f"seed={2**64}"),
        (["--temperature", "nan"], "temperature=nan"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--devices", "-2"], "--devices -2"),
        (["--stop", ""], "none empty"),
        (["--model", "/no/such/place"], "/no/such/place: nothing there"),
        (["--model", __file__], "a file"),
        (["--model", str(ROOT / "tests")], "no config.json there"),
        (["-p", "y" * 48], "a prompt of 48 tokens"),
        (["-p", "\udcff"], "not UTF-8"),
        (["-p", "-", "-p", "-"], "-p - given twice"),
        (["-p", "-"], "standard input is not UTF-8: byte 1 is 0xff"),
        (["word"], "'word'"),
    ],
)
def test_mistakes_are_told_in_one_line(argv, told, script, folder):
    default = [] if "--model" in argv else ["--model", folder]
    default += [] if "-p" in argv else ["-p", "x"]
    code, _, err = script(*default, *argv, stdin=b"a\xffb")
    assert (code, len(err)) == (2, 1), err
    assert err[0].startswith("error: ") and told in err[0], err


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--mesh", "data=16"], "needs 16 devices and there are 8"),
        (["--mesh", "tensor=4"], "num_kv_heads=2"),
        (["--mesh", "foo"], "mesh 'foo': write data=2,expert=4,tensor=1"),
        (["--mesh", "8x1x1"], None),
    ],
)
def test_meshes(argv, told, folder, monkeypatch, capsys):
    monkeypatch.setattr(start, "keep_compiled_programs", lambda: None)
    if told is None:
        shape = start.start_devices(infer.InferConfig(mesh=argv[1]), CONFIG)
        assert shape == MeshShape(8, 1, 1)
        assert start.start_devices(infer.InferConfig(), CONFIG) == MeshShape(1, 8, 1)
        return
    assert infer.main(["--model", str(folder), "-p", "x", *argv]) == 2
    assert told in capsys.readouterr().err


def test_dtype(folder, flat):
    model = open_model(folder)
    for dtype, expected_dtype in [("auto", "float32"), ("bfloat16", "bfloat16")]:
        blueprint, params, _ = start.load_model(model, MeshShape(1, 2, 1), dtype)
        assert blueprint.config.compute_dtype == expected_dtype
        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
        assert dtypes == {"float32", expected_dtype}


def test_load_weights_keeps_router_and_norms_in_float32(folder):
    blueprint = Blueprint(CONFIG, make_mesh(MeshShape()))
    params, biases = load_weights(open_model(folder).weights(blueprint), blueprint, "bfloat16")
    assert params["final_norm"]["scale"].dtype == np.float32
    assert params["head"]["w"].dtype == jax.numpy.bfloat16
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(biases)} == {"float32"}


# --- as a program of its own ------------------------------------------------------------------


def run_program(home, *argv):
    environment = {**os.environ, "HOME": str(home), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "infer.py", *map(str, argv)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=250,
    )
    # Not as text: that would turn a carriage return that the model wrote into a new line.
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def test_the_program(tmp_path, folder, generator):
    """On four fake devices; the second start finds its programs compiled."""
    argv = ("--model", folder, "-p", "def ", "--mesh", "expert=2,tensor=2", "--max-tokens", 6)
    kept = []
    for _ in range(2):
        done = run_program(tmp_path, *argv)
        assert done.returncode == 0, done.stderr
        assert done.stdout == expected(generator, ["def "])[0] + "\n"
        assert re.fullmatch(SPEED, done.stderr.strip()), done.stderr
        kept.append(sorted((tmp_path / ".cache/moejax/programs").glob("jit_step*-cache")))
    assert kept[0] and kept[0] == kept[1]


def test_the_program_tells_mistakes_without_a_traceback(tmp_path, folder):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    file = min(broken.glob("*.safetensors"))
    os.truncate(file, 1000)
    done = run_program(tmp_path, "--model", broken, "-p", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*model-00001.*damaged.*\n", done.stderr)
