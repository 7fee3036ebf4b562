"""Experts in a model's files: what is read is what lies in host memory, bit by bit."""

import dataclasses
import gc
import json
import threading
import time
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from draws import draws
from fewer_experts_support import draw, model_of
from modes_support import make_folder, make_weights, mode_runner
from offload_support import KINDS, SOFTMAX, Offloaded, Source, Watched

from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.families.export import save_hf_folder
from moejax.inference.model_folder import save_model_folder
from moejax.inference.safetensors_file import open_safetensors, write_safetensors
from moejax.inference.source import open_model
from moejax.offload import host_limit, mapped_store
from moejax.offload.config import OffloadConfig
from moejax.offload.load import OffloadedModel
from moejax.offload.mapped_store import quantizing_on_host
from moejax.offload.sending import THREADS
from moejax.offload.transfers import Transfers
from moejax.serving import start
from moejax.serving.flags import EngineFlags
from moejax.serving.metrics_text import metrics_text
from moejax.training.state import Blueprint
from sharding.mesh import MeshShape, make_mesh


def in_float8(folder, rng):
    """Makes the experts' matrices float8 with scales; the bytes that they then have."""
    file = folder / "model.safetensors"
    tensors, size = {}, 0
    for name, array in open_safetensors(file).items():
        tensors[name] = np.array(array)
        if ".experts." in name:
            blocks = [-(-n // 16) for n in array.shape]
            scales = rng.uniform(0.1, 1, blocks).astype(np.float32)
            tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scales
            size += array.size + scales.nbytes
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    write_safetensors(file, tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    return size


def saved(path, rng, kind):
    """A folder of a small model, of random weights, opened."""
    words = kind.split("+")
    config = KINDS[words[0]]
    if "bf16" in words:
        config = dataclasses.replace(config, compute_dtype="bfloat16")
    flat = draw(rng, config)
    dtype = ml_dtypes.bfloat16 if "stored16" in words else np.float32
    if "hf" in words:
        family = {"softmax": "mixtral", "gpt_oss": "gpt_oss"}[words[0]]
        save_hf_folder(path, flat, config, family=family, end_ids=(0,), dtype=dtype)
    else:
        limit = 9000 if "pieces" in words else 16_000_000
        tokenizer = Tokenizer()
        save_model_folder(
            path, flat, config, tokenizer, record={}, dtype=dtype, max_file_bytes=limit
        )
    return open_model(path)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("softmax", "none"),
        ("softmax+pieces+bf16", "none"),
        ("softmax+stored16", "none"),
        ("gpt_oss+stored16+bf16", "none"),
        ("softmax+hf", "none"),
        ("softmax+hf+bf16", "none"),
        ("gpt_oss+hf", "none"),
        ("softmax+hf+float8+bf16", "none"),
        ("deepseek+stored16", "none"),
        ("softmax+bf16", "int8"),
        ("softmax+hf+bf16", "fp8"),
    ],
)
def test_what_is_read_is_what_lies_in_memory(kind, weights, rng, tmp_path):
    source, size = saved(tmp_path / "m", rng, kind), None
    if "float8" in kind:
        size = in_float8(tmp_path / "m", rng)
        source = open_model(tmp_path / "m")
    compute = "bfloat16" if "bf16" in kind else "float32"
    config = dataclasses.replace(source.config, compute_dtype=compute)
    pinned = Offloaded(config, rng, weights, source=source)
    mapped = Offloaded(config, rng, weights, source=source, store="mapped")
    assert jax.tree.structure(pinned.params) == jax.tree.structure(mapped.params)
    for want, got in zip(
        jax.tree.leaves((pinned.params, pinned.biases)),
        jax.tree.leaves((mapped.params, mapped.biases)),
    ):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    assert mapped.store.read_bytes == 0
    numbers = 0
    for layer, bank in pinned.store.banks.items():
        for expert in range(bank.experts):
            for want, got in zip(
                pinned.store.expert(layer, expert), mapped.store.expert(layer, expert), strict=True
            ):
                assert (got.dtype, got.shape) == (want.dtype, want.shape)
                assert got.sharding == want.sharding
                np.testing.assert_array_equal(
                    np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8)
                )
            numbers += config.d_model * config.moe.experts.hidden * 3
            if config.moe.experts.bias:
                numbers += config.d_model + 2 * config.moe.experts.hidden
    assert mapped.store.read_bytes == (size or numbers * (2 if "stored16" in kind else 4))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The same model twice: in host memory, and mapped."""
    rng = draws(__name__)
    source = saved(tmp_path_factory.mktemp("models") / "m", rng, "softmax")
    return {
        store: Offloaded(source.config, rng, source=source, store=store)
        for store in ("pinned", "mapped")
    }


def wait_for(what):
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_what_is_asked_for_is_read_first(small, rng):
    """Guesses in the queue give way, and one of them goes ahead when it is needed."""
    mapped = small["mapped"]
    mesh, size = mapped.model.parts.blueprint.mesh, mapped.store.banks[0].expert_bytes
    slow = Watched(mapped.store, rng, gate=threading.Semaphore(0))
    transfers = Transfers(slow, mesh, 8 * size)
    assert transfers.guess(1, range(8)) == 8
    wait_for(lambda: len(slow.begun) >= THREADS - 1)
    assert sorted(slow.begun) == [(1, e) for e in range(THREADS - 1)]
    # One thread takes no guesses: so this one does not wait for them.
    transfers.ask(0, [7])
    wait_for(lambda: len(slow.begun) == THREADS)
    assert slow.begun[-1] == (0, 7)
    transfers.ask(1, [6])
    transfers.ask(0, [3])
    for number, key in enumerate([(1, 6), (0, 3)], THREADS):
        slow.gate.release()
        wait_for(lambda number=number: len(slow.begun) > number)
        assert slow.begun[number] == key
    slow.gate.release(100)
    for layer, expert in (0, 7), (1, 6), (0, 3), (1, 4):
        want = small["pinned"].store.expert(layer, expert)
        for got, array in zip(transfers.take(layer, expert), want, strict=True):
            np.testing.assert_array_equal(got, array)
            assert got.sharding.memory_kind == jax.devices()[0].default_memory().kind
    assert transfers.moved.asked_bytes == 2 * size
    transfers.forget()


@pytest.mark.parametrize("ended", ["closed", "let go"])
def test_a_guess_that_is_given_up(small, rng, ended):
    """Before its turn it costs nothing, afterwards its bytes and its room."""
    mapped = small["mapped"]
    mesh, size = mapped.model.parts.blueprint.mesh, mapped.store.banks[0].expert_bytes
    slow = Watched(mapped.store, rng, gate=threading.Semaphore(0))
    others = {*threading.enumerate()}
    transfers = Transfers(slow, mesh, 3 * size)
    threads = {*threading.enumerate()} - others
    assert len(threads) == THREADS
    assert transfers.guess(1, [5, 2, 6]) == 3 and transfers.guess(2, [1, 4]) == 2
    wait_for(lambda: len(slow.begun) == THREADS - 1)
    transfers.give_up(2)
    assert transfers.moved.vain_bytes == 0 and transfers.moved.guessed_bytes == 3 * size
    transfers.give_up(1)
    assert transfers.moved.vain_bytes == 3 * size == transfers.moved.guessed_bytes
    assert transfers.guess(0, range(8)) == 3  # of twice three
    assert transfers.guess(2, [0]) == 0
    transfers.forget()
    assert transfers.moved.guessed_bytes == 3 * size
    slow.gate.release(100)
    wait_for(lambda: slow.here == 0)
    assert {*slow.begun} == {(1, 5), (1, 2), (1, 6)}
    if ended == "closed":
        transfers.close()
    del transfers
    gc.collect()
    assert not any(thread.is_alive() for thread in threads)


def test_what_cannot_be_read(small, rng, monkeypatch):
    """Whoever waits for it is told; others come all the same."""
    mesh = small["mapped"].model.parts.blueprint.mesh
    store, transfers = small["mapped"].store, Transfers(small["mapped"].store, mesh, 10**6)
    read = store._files.read_part

    def broken(name, target, index):
        if index[0].start == 3:
            raise UserError("a scale is not finite")
        return read(name, target, index)

    monkeypatch.setattr(type(store._files), "read_part", lambda self, *args: broken(*args))
    transfers.ask(0, [2, 3, 4])
    transfers.guess(1, [3])
    for layer, expert in (0, 3), (1, 3):
        with pytest.raises(UserError, match="scale is not finite"):
            transfers.take(layer, expert)
    assert len(transfers.take(0, 4)) == len(transfers.take(0, 2)) == 2


def test_what_is_refused(rng, tmp_path, monkeypatch):
    config = dataclasses.replace(SOFTMAX, scan_layers=False)
    mesh = make_mesh(MeshShape())
    mapped = OffloadConfig(store="mapped")
    memory = Source(config, {})
    memory.path = "runs/a"
    for model, told in (
        (OffloadedModel(memory, Blueprint(config, mesh)), "runs/a is no folder of safetensors"),
        (shared(rng, tmp_path, mesh), "share parameters .*kind='up'"),
    ):
        with pytest.raises(UserError, match=f"--offload-store mapped.*{told}"):
            model.check(mapped)
        with pytest.raises(UserError, match=told):
            model.load(mapped)
    with pytest.raises(UserError, match="store 'disk': must be one of pinned, mapped"):
        OffloadConfig(store="disk")
    with pytest.raises(UserError, match="--offload-store mapped: only with --offload"):
        EngineFlags(offload_store="mapped")

    def none(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(mapped_store, "jax", SimpleNamespace(local_devices=none))
    with pytest.raises(UserError, match=r"--expert-weights: .* add cpu to it"):
        quantizing_on_host(None)


def shared(rng, tmp_path, mesh):
    config = dataclasses.replace(model_of("up"), scan_layers=False)
    save_model_folder(tmp_path / "up", draw(rng, config), config, Tokenizer(), record={})
    return OffloadedModel(open_model(tmp_path / "up"), Blueprint(config, mesh))


def test_the_flag(tmp_path_factory, monkeypatch):
    """The host is not asked for room for all experts."""
    monkeypatch.setattr(start, "keep_compiled_programs", lambda: None)
    folder = make_folder(tmp_path_factory, make_weights())
    flags = {"offload": True, "device_memory": "220KB", "max_rows": 1, "max_len": 64}
    # 16 experts of 6144 bytes; a thread holds one to send, and one as read: up to twice that.
    monkeypatch.setattr(host_limit, "meminfo", lambda name: 3 * THREADS * 6144)
    engine = start.make_engine(open_model(folder), EngineFlags(**flags, offload_store="mapped"))
    assert isinstance(engine._offload.store, mapped_store.MappedStore)
    stats = engine.stats().offload
    assert engine._offload.store.read_bytes == stats.slots * 6144 and stats.read_bytes == 0
    assert "moejax_offload_read_bytes_total 0" in metrics_text(engine.stats()).splitlines()
    with pytest.raises(UserError, match="on a host with"):
        start.make_engine(open_model(folder), EngineFlags(**flags))


@pytest.mark.slow
def test_the_command(tmp_path_factory, monkeypatch, capsys):
    monkeypatch.setattr(start, "keep_compiled_programs", lambda: None)
    run = mode_runner(monkeypatch, capsys)
    text = (
        *("--model", make_folder(tmp_path_factory, make_weights()), "-p", "abc"),
        *("--max-len", 64, "--prefill-chunk", 16, "--dtype", "float32", "--max-tokens", 8),
        *("--offload", "--device-memory", "220KB"),
    )
    code, want, err = run(*text)
    assert code == 0 and "read from files" not in err[-1]
    code, got, err = run(*text, "--offload-store", "mapped")
    assert (code, got) == (0, want)
    assert err[-1].endswith("GB read from files")
