"""The tuning command: what it refuses, what it keeps, how it ends."""

import re
import subprocess
import threading
from dataclasses import replace

import jax
import pytest
from kernel_support import ON_GPU
from tuning_support import PRODUCT, Clock, Made, options_of, table_of

from pallas_kernels.tuning import command
from pallas_kernels.tuning.__main__ import main
from pallas_kernels.tuning.arguments import parse, works_of
from pallas_kernels.tuning.lookup import package_table
from pallas_kernels.tuning.table import read_table, store_table

DEVICE = "NVIDIA H100 80GB HBM3"


def test_the_table_after_a_run(tmp_path, capsys):
    """Entries of others stay, one that is no longer better goes; Ctrl-C keeps what was found."""
    path, cuts = tmp_path / "table.json", options_of()
    first, second = Made().products
    other, late = replace(PRODUCT, groups=5), replace(PRODUCT, groups=6)
    store_table(table_of({other: cuts[0], first: cuts[0], second: cuts[0]}, DEVICE), path)

    class Interrupted(Made):
        def inputs(self):
            # Meanwhile another process has stored an entry.
            table = read_table(path, DEVICE)
            entries = {**table.entries, late: table.entries[other]}
            store_table(replace(table, entries=entries), path)
            return super().inputs()

    class Clocks(Clock):
        """Ctrl-C in the second timing of the second work."""

        def __call__(self, program, inputs, kernels):
            if "rows_gradient" in kernels and self.calls == 9 * 3 + 7 * 3:
                raise KeyboardInterrupt
            return super().__call__(program, inputs, kernels)

    names = ("experts_up", "experts_down", "rows_gradient")
    times = {("experts_up", cuts[3]): 0.5, ("rows_gradient", cuts[2]): 0.6}
    works = [Made(), Interrupted(kernels=names[2:]), Made(kernels=("grouped_matmul",))]
    with pytest.raises(KeyboardInterrupt):
        clock = Clocks(times, names=names)
        command.run(works, path, DEVICE, timer=clock, most=6, rounds=3)
    table = read_table(path, DEVICE)
    third = replace(PRODUCT, kernel="rows_gradient")
    expected = {other: cuts[0], late: cuts[0], first: cuts[3], third: cuts[2]}
    assert {p: e.cut for p, e in table.entries.items()} == expected
    measured = table.entries[first].measured
    assert measured.ms < 0.6 * measured.heuristic_ms and measured.jax == jax.__version__
    assert measured.commit
    printed = capsys.readouterr().out
    assert "% less" in printed and printed.endswith(f"{path}: 4 entries\n")


def test_a_path_that_cannot_be_written_is_noticed_first(tmp_path):
    (tmp_path / "file").write_text("")

    class Never(Made):
        def shapes(self):
            raise AssertionError("too late")

    path = tmp_path / "file" / "table.json"
    with pytest.raises(ValueError, match=r"table\.json cannot be written: "):
        command.run([Never()], path, DEVICE, timer=Clock({}), most=1, rounds=1)


def test_an_interrupt_does_not_wait_for_what_is_compiled(tmp_path, capsys):
    """The candidates' compilations end after the message, or never begin."""
    ends, begun = threading.Event(), []

    class Slow(Made):
        def function(self, x):
            if threading.current_thread() is not threading.main_thread():
                begun.append(None)
                if len(begun) > 1:
                    assert ends.wait(60)
            return super().function(x)

        def inputs(self):
            raise KeyboardInterrupt

    path = tmp_path / "table.json"
    try:
        with pytest.raises(KeyboardInterrupt):
            command.run([Slow()], path, DEVICE, timer=Clock({}), most=6, rounds=1)
        assert capsys.readouterr().out.endswith(f"{path}: 0 entries\n")
    finally:
        ends.set()


SHAPE = ["--shape", "640,64,128,4,2"]
ROWS = ["--product", "256,64,128,2"]


@pytest.mark.skipif(ON_GPU, reason="there is a Hopper GPU")
def test_the_command_refuses_without_a_gpu(tmp_path):
    with pytest.raises(SystemExit, match="tuning: no Hopper GPU here: the device is 'cpu'"):
        main([*SHAPE, "--output", str(tmp_path / "table.json")])
    assert not list(tmp_path.iterdir())


def test_a_dry_run(capsys, tmp_path):
    main([*SHAPE, "--product", "256,64,128,2", "--most", "3", "--dry-run"])
    printed = capsys.readouterr().out
    for kernel in ("experts_up", "experts_down_backward", "w_out_gradient", "grouped_matmul"):
        assert f"  {kernel} " in printed
    assert printed.count("(the heuristic's)") == printed.count(" groups, ")


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "nothing to tune"),
        (["--shape", "64,64,128,4"], "5 integers T,D,H,E,K"),
        (["--shape", "64,64,128,4,-2"], "5 integers T,D,H,E,K"),
        (["--shape", f"{2**31},64,128,4,2"], "from 1 to 2147483647 are needed"),
        ([*ROWS, "9" * 5000 + ",64,64,2"], "4 integers M,K,N,G"),
        ([*SHAPE, "--rounds", "0"], "--rounds: 0: an integer from 1"),
        ([*SHAPE, "--most", str(2**31)], "--most: 2147483648: an integer from 1"),
        ([*SHAPE, "--tokens", "16", "0"], "--tokens: 0: an integer from 1"),
        ([*ROWS, "--tokens", "16"], "--tokens is of a --shape, and none is given"),
        ([*ROWS, "--activation", "relu"], "--activation is of a --shape"),
        ([*SHAPE, "--alignment", "1"], "--alignment is of a --product"),
    ],
)
def test_wrong_arguments(words, message, capsys):
    with pytest.raises(SystemExit):
        main(words)
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and len(error) < 250


def test_wrong_works():
    few = "nothing to tune: skipped: 16,64,128,4,2 fwdbwd: so few tokens"
    for words, message in (
        (["--shape", "64,64,128,4,5"], "5 experts a token, and there are 4"),
        ([*SHAPE, "--activation", "mish"], "activation 'mish' is none of"),
        (["--shape", "64,60,128,4,2"], "d_model=60 is no multiple of 64"),
        ([*SHAPE, "--tokens", str(2**30)], "places are more than 2147483647; give fewer"),
        (["--shape", "16,64,128,4,2", "--passes", "fwdbwd"], few),
        (["--product", "200,64,128,2"], "M must be a multiple of --alignment 128; or give --al"),
        (["--product", "64,64,128,2"], "--product 64,64,128,2: M must be a multiple"),
        (["--product", "256,60,128,2"], "contraction=60"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*words, "--dry-run"])
        text = str(caught.value)
        assert text.startswith("tuning: ") and message in text and "\n" not in text


def names_of(*words):
    works, skipped = works_of(parse(words))
    return [work.name for work in works], skipped


def test_several_of_an_option_and_what_is_skipped():
    names, skipped = names_of(*SHAPE, "--shape", "16,64,128,4,2", *SHAPE, "--alignment", "1", *ROWS)
    assert sorted(names) == sorted(
        ["640,64,128,4,2 fwdbwd", "640,64,128,4,2 fwd", "16,64,128,4,2 fwd"]
        + ["256,64,128,2 fwdbwd", "256,64,128,2 fwd"]
    )
    assert len(skipped) == 1 and skipped[0].startswith("skipped: 16,64,128,4,2 fwdbwd: ")
    names, skipped = names_of("--product", "100,64,128,2", "--alignment", "1", "--passes", "fwd")
    assert names == ["100,64,128,2 fwd"] and not skipped


@pytest.mark.parametrize(
    "error,code",
    [
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 1),
        (RuntimeError(""), "tuning: RuntimeError"),
        (PermissionError(13, "Permission denied", "there"), "tuning: [Errno 13] Permission denied"),
        (ValueError("one\ntwo"), "tuning: one"),
    ],
)
def test_how_the_command_ends(error, code, monkeypatch, capfd):
    def fails(argv):
        raise error

    monkeypatch.setattr(command, "execute", fails)
    monkeypatch.setattr("pallas_kernels.tuning.__main__._silence", lambda: None)
    with pytest.raises(SystemExit) as caught:
        main([])
    found = caught.value.code
    assert found == code or (isinstance(code, str) and str(found).startswith(code))
    assert "two" not in str(found)
    assert capfd.readouterr().err == ("tuning: interrupted\n" if code == 130 else "")


def test_the_commit_is_this_projects(tmp_path, monkeypatch):
    """Of a repository that the library only lies in, nothing is recorded."""

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    def commit(root):
        command._commit.cache_clear()
        monkeypatch.setattr(command, "ROOT", root)
        return command._commit()

    try:
        git("init", "-q")
        project, other = '[project]\nname = "moejax"\n', '[project]\nname = "other"\n'
        (tmp_path / "inside").mkdir()
        (tmp_path / "inside" / "pyproject.toml").write_text(project)
        (tmp_path / "pyproject.toml").write_text(other)
        git("add", ".")
        git("commit", "-q", "-m", "foreign")
        assert commit(tmp_path) == commit(tmp_path / "inside") == "unknown"
        assert command._output(None, DEVICE) == package_table(DEVICE)
        monkeypatch.setattr(command, "ROOT", tmp_path)
        with pytest.raises(ValueError, match="--output FILE is needed"):
            command._output(None, DEVICE)
        (tmp_path / "pyproject.toml").write_text(project)
        assert re.fullmatch(r"[0-9a-f]{7,}\+", commit(tmp_path))
    finally:
        command._commit.cache_clear()
