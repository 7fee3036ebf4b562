"""`infer.py --offload`: from flags to texts, and what is refused."""

import dataclasses
import os
import re

import numpy as np
import pytest
from modes_support import make_folder, make_weights, mode_runner

import infer
from moejax.errors import UserError
from moejax.inference.source import open_model
from moejax.offload import host_limit, load
from moejax.serving import start
from moejax.serving.flags import EngineFlags
from moejax.serving.metrics_text import metrics_text

SMALL = ("--max-len", 64, "--prefill-chunk", 16, "--dtype", "float32")
# 2 layers of 8 experts of 6144 bytes, 96 KiB in all; 70 kB of other weights, a page of 16 KiB.
HALF = ("--offload", "--device-memory", "220KB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory, make_weights())


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setattr(start, "keep_compiled_programs", lambda: None)
    return mode_runner(monkeypatch, capsys)


def test_texts_are_the_same(run, folder):
    text = ("--model", folder, *SMALL, "-p", "abc", "--max-tokens", 8)
    code, want, _ = run(*text, "--mesh", "1x1x1")
    assert code == 0
    code, got, err = run(*text, *HALF)
    assert code == 0 and got == want
    told = re.fullmatch(
        r"offload: (\d+) of 8 experts of a layer on the device; decoding hit [\d.]+% \([\d.]+% "
        r"guessed early\), stall [\d.]+ ms a token; [\d.]+ GB came from the host, [\d.]+ of them "
        r"in vain",
        err[-1],
    )
    assert told and 1 <= int(told[1]) < 8, err


def test_memory_that_is_free(folder, monkeypatch):
    """Without --device-memory what is free is divided; the server's counts tell of it."""
    monkeypatch.setattr(start, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(load, "free_bytes", lambda blueprint: 220e3 / 0.9)
    flags = EngineFlags(model=str(folder), offload=True, max_rows=1, max_len=64, dtype="float32")
    engine = start.make_engine(open_model(folder), flags)
    stats = engine.stats()
    assert 1 <= stats.offload.slots < stats.offload.experts == 16
    lines = metrics_text(stats).splitlines()
    assert f"moejax_offload_slots {stats.offload.slots}" in lines
    assert "moejax_offload_decode_missed_total 0" in lines
    # All fits: nothing will ever come from the host.
    monkeypatch.setattr(load, "free_bytes", lambda blueprint: 1e9)
    assert start.make_engine(open_model(folder), flags).stats().offload.slots == 16


def test_too_little_memory(folder):
    flags = EngineFlags(offload=True, device_memory="80KB", max_rows=1, max_len=64)
    with pytest.raises(UserError, match=r"--device-memory of .* need (\d+) bytes"):
        start.make_engine(open_model(folder), flags)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"device_memory": "1GB"}, "--device-memory 1GB: only with --offload"),
        ({"offload_policy": "lru"}, "--offload-policy lru: only with --offload"),
        ({"offload": True, "placement": "auto"}, "--offload with --placement auto"),
        ({"offload": True, "device_memory": "much"}, "--device-memory 'much': is no size"),
        ({"offload": True, "prefetch_bytes": "x"}, "--prefetch-bytes 'x': is no size"),
        ({"offload": True, "offload_predictor": "linear"}, "needs --offload-fits"),
        ({"offload": True, "offload_bonus": -1.0}, "--offload-bonus -1"),
        (
            {"offload": True, "offload_bonus": 1.0, "deterministic": True},
            "--offload-bonus 1.0 with --deterministic",
        ),
        (
            {"offload": True, "offload_predictor": "none", "offload_guesses": "all"},
            "--offload-guesses all with --offload-predictor none",
        ),
        (
            {"offload": True, "offload_predictor": "none", "prefetch_bytes": "1MB"},
            "--prefetch-bytes 1MB with --offload-predictor none",
        ),
    ],
)
def test_flags_that_are_refused(flags, told):
    with pytest.raises(UserError, match=re.escape(told)):
        EngineFlags(**flags)


def test_what_else_is_refused(folder, tmp_path):
    flags = EngineFlags(offload=True, mesh="1x2x1", max_len=64)
    with pytest.raises(UserError, match="--offload on a mesh of 2 devices"):
        start.make_engine(open_model(folder), flags)
    source = open_model(folder)
    config = dataclasses.replace(source.config, first_dense_layers=2, dense_hidden=8)
    dense = dataclasses.replace(source, config=config)
    with pytest.raises(UserError, match="--offload: the model has no experts"):
        start.make_engine(dense, EngineFlags(offload=True, max_len=64))
    np.savez(tmp_path / "fits.npz", other=np.zeros(2))
    flags = EngineFlags(offload=True, offload_fits=str(tmp_path / "fits.npz"), max_len=64)
    with pytest.raises(UserError, match=r"fits\.npz"):
        start.make_engine(source, flags)


def test_more_memory_than_is_free(folder, monkeypatch):
    monkeypatch.setattr(load, "free_bytes", lambda blueprint: 200e3)
    flags = EngineFlags(offload=True, device_memory="220KB", max_rows=1, max_len=64)
    with pytest.raises(UserError, match=r"--device-memory 220KB: the device has 180000 bytes"):
        start.make_engine(open_model(folder), flags)


def test_the_hosts_memory(folder, monkeypatch):
    """It is pinned as far as it goes, unless somebody has said how far; and must hold all."""
    monkeypatch.delenv(host_limit.LIMIT, raising=False)
    host_limit.allow_pinned_memory()
    allowed = int(os.environ[host_limit.LIMIT])
    assert allowed == max(1, int(0.9 * host_limit.meminfo("MemTotal") / 2**30))
    monkeypatch.setenv(host_limit.LIMIT, "7")
    host_limit.allow_pinned_memory()
    assert os.environ[host_limit.LIMIT] == "7"
    host_limit.check_host_memory(1000)
    monkeypatch.setattr(host_limit, "meminfo", lambda name: 50_000)
    flags = EngineFlags(offload=True, device_memory="220KB", max_rows=1, max_len=64)
    with pytest.raises(UserError, match=r"--offload: experts of 0\.0 GiB on a host with 0\.0 GiB"):
        start.make_engine(open_model(folder), flags)


def test_a_flag_that_is_misspelled():
    with pytest.raises(UserError, match="no such flag; the closest is --offload"):
        infer._run(["--offlaod"])
