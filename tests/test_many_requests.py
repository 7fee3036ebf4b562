"""`infer.py batch` and `bench` over several processes, which talk by gloo: as a single one does.

Process 0 reads and writes, all others only compute; all end with the same exit code.
"""

import json

import numpy as np
import pytest
from draws import draws
from inference_support import CONFIG, random_weights
from processes_support import processes

import infer
from moejax.data.tokenizer import Tokenizer
from moejax.inference.model_folder import save_model_folder
from moejax.serving import start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    weights = random_weights(CONFIG, draws(__name__))
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model_folder(path, weights, CONFIG, Tokenizer(), record={}, dtype=np.float32)
    return path


@pytest.fixture
def alone(monkeypatch, capsys):
    """Runs infer.py in this process: flags → exit code, stdout, stderr."""
    monkeypatch.setattr(start, "keep_compiled_programs", lambda: None)

    def run(*argv):
        capsys.readouterr()
        code = infer.main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run


def ended(folder, number, *argv):
    """So many processes with the same flags, once they have ended."""
    with processes(folder, "infer", *[argv] * number) as group:
        return group.wait()


def request(name, prompt, **body):
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, **body}
    return json.dumps({"custom_id": name, "url": "/v1/completions", "body": body}) + "\n"


def answers(path):
    """What was answered, by name; what tells one run from the next is left out."""
    found = {}
    for line in path.read_text().splitlines():
        one = json.loads(line)
        body = one["response"]["body"]
        told = (body.get("choices"), body.get("usage"), body.get("error"))
        assert one["custom_id"] not in found
        found[one["custom_id"]] = (one["response"]["status_code"], *told)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("number", "mesh"), [(2, "expert=2"), (4, "data=2,expert=2")])
def test_batch(folder, tmp_path, alone, number, mesh):
    requests = tmp_path / "in.jsonl"
    lines = [request(f"greedy {i}", f"text {i}" * i, logprobs=2) for i in range(5)]
    lines += [request("drawn", "a", temperature=1.0, seed=7), request("two", ["x", "and y"])]
    requests.write_text("".join(lines))
    flags = ["batch", "--model", folder, "--mesh", mesh, "-i", requests, "--max-rows", 4, "-o"]
    many, one = tmp_path / "many.jsonl", tmp_path / "one.jsonl"
    first, *others = ended(tmp_path / "said", number, *flags, many)
    assert [process.code for process in (first, *others)] == [0] * number, first.err
    assert first.out == "" and first.err.splitlines()[-1].startswith("[7 answered, 0 failed, 0 ")
    assert all(process.out == process.err == "" for process in others)
    code, _, err = alone(*flags, one)
    assert code == 0, err
    expected, found = answers(one), answers(many)
    assert found.keys() == expected.keys() and len(found) == 7
    for name, (status, choices, *rest) in expected.items():
        assert found[name][0] == status == 200 and list(found[name][2:]) == rest
        for ours, theirs in zip(found[name][1], choices, strict=True):
            assert ours["text"] == theirs["text"], name
            if ours["logprobs"] is not None:
                logprobs = [c["logprobs"]["token_logprobs"] for c in (ours, theirs)]
                # Sums of float32 in another order.
                np.testing.assert_allclose(*logprobs, rtol=0, atol=1e-4)

    # Started again, it goes on; and a line that fails is the exit code of all processes.
    if number > 2:
        return
    requests.write_text("".join(lines) + request("wrong", "x", temperature=-1))
    before = many.read_bytes()
    first, *others = ended(tmp_path / "again", number, *flags, many)
    assert [process.code for process in (first, *others)] == [1] * number, first.err
    assert first.err.splitlines()[-1].startswith("[0 answered, 1 failed, 7 were there;")
    assert all(process.out == process.err == "" for process in others)
    assert many.read_bytes().startswith(before)
    assert answers(many)["wrong"][0] == 400 and len(answers(many)) == 8


@pytest.mark.slow
def test_bench(folder, tmp_path, alone):
    flags = ["bench", "--model", folder, "--mesh", "expert=2", "--loads", 1, 3, "--requests", 4]
    flags += ["--prompt-tokens", 5, "--max-tokens", 4, "--json"]
    many, one = tmp_path / "many.json", tmp_path / "one.json"
    first, other = ended(tmp_path / "said", 2, *flags, many)
    assert (first.code, other.code) == (0, 0), first.err + other.err
    assert other.out == other.err == "" and str(many) in first.err
    code, out, err = alone(*flags, one)
    assert code == 0, err

    def loads(out):
        return [line.split("|")[1:3] for line in out.splitlines()]

    assert loads(first.out) == loads(out) and len(loads(out)) == 4
    found, expected = (json.loads(path.read_text()) for path in (many, one))
    assert found["device"].startswith("2 × ")
    counts = ("load", "requests", "prompt_tokens", "output_tokens")
    rows = [[[row[c] for c in counts] for row in all_["rows"]] for all_ in (found, expected)]
    assert rows[0] == rows[1] == [[1, 4, 20, 16], [3, 4, 20, 16]]
    for row in found["rows"]:
        assert 0 < row["first_p50"] <= row["first_p99"] and row["between_p50"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["batch", "-o", "{}/out", "-i", "{}/absent"], "--input {}/absent: No such file"),
        (["batch", "-o", "{}/no/out", "-i", __file__], "--output {}/no/out: No such file"),
        (["batch", "-o", "{}/out"], "--input: missing"),
        (["bench", "--prompts", "{}/absent"], "--prompts {}/absent: No such file"),
        (["bench", "--prompt-tokens", "50"], "--prompt-tokens 50 --max-tokens 64: together"),
    ],
)
def test_one_message(folder, tmp_path, flags, told):
    """Process 0 says what is wrong; the other one names process 0, and both end alike."""
    flags = [flag.replace("{}", str(tmp_path)) for flag in flags]
    told = told.replace("{}", str(tmp_path))
    first, other = ended(tmp_path / "said", 2, *flags, "--model", folder, "--mesh", "expert=2")
    assert (first.code, other.code) == (2, 2), first.err + other.err
    assert first.out == other.out == ""
    (line,) = first.err.splitlines()
    assert line.startswith(f"error: {told}")
    (line,) = other.err.splitlines()
    assert line.startswith("error: process 0 of 2 on ") and f"has failed: {told}" in line
    assert first.seconds < 60 and other.seconds < 60


@pytest.mark.slow
def test_wrong_flags_differ(folder, tmp_path):
    """Flags of the engine are the same in all processes; those of process 0's files need not be."""
    flags = ["bench", "--model", folder, "--mesh", "expert=2", "--max-rows"]
    with processes(tmp_path / "said", "infer", [*flags, 4], [*flags, 8]) as group:
        first, other = group.wait()
    assert (first.code, other.code) == (2, 2), first.err + other.err
    (line,) = (first.err + other.err).splitlines()
    assert line.startswith("error: flags: max_rows is 4 in process 0 and 8 in process 1")
