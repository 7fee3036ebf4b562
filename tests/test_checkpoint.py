"""Checkpoints: bit-exact, on any mesh, and whole or refused, whatever kills the save."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import assert_same_bits, one_device, one_line, saved, small, targets_of
from jax.sharding import NamedSharding, PartitionSpec

from moejax.errors import UserError
from moejax.training import manifest
from moejax.training.checkpoint import Checkpoints
from sharding.mesh import MeshShape, make_mesh

ROOT = Path(__file__).parent.parent
SPECS = {
    "layers.0/experts.w_EDH": PartitionSpec(("data", "expert"), None, "tensor"),
    "layers.0/experts.w_EDH/adam.m": PartitionSpec("expert", "data"),
    "embed": PartitionSpec(None, "tensor"),
    "counts": PartitionSpec("expert"),
    "key": PartitionSpec(),
    "step": PartitionSpec(),
}


def values(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Every bit pattern may occur: NaN payloads, denormals, negative zeros."""

    def bits(shape, dtype):
        size = jnp.dtype(dtype).itemsize
        raw = rng.integers(0, 256, size=(*shape, size), dtype=np.uint8)
        return raw.view(jnp.dtype(dtype)).reshape(shape)

    return {
        "layers.0/experts.w_EDH": bits((8, 12, 4), jnp.float32),
        "layers.0/experts.w_EDH/adam.m": bits((8, 12, 4), jnp.bfloat16),
        "embed": bits((5, 4), jnp.float32),
        "counts": bits((8,), jnp.int32),
        "key": np.asarray(jax.random.key_data(jax.random.key(int(rng.integers(2**31))))),
        "step": np.array(int(rng.integers(1000)), np.int32),
    }


def shardings(mesh_shape: MeshShape) -> dict[str, NamedSharding]:
    mesh = make_mesh(mesh_shape)
    return {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}


def put(arrays, where):
    return {name: jax.device_put(a, where[name]) for name, a in arrays.items()}


# ── what goes in comes out ───────────────────────────────────────────────────


@pytest.mark.parametrize("shape", ["1x8x1", "2x2x2", "2x4x1", "1x1x1", "4x1x2"])
def test_bits_survive_a_change_of_mesh(rng, tmp_path, shape):
    want = values(rng)
    metadata = {"step": 7, "data": {"position": [1, 2]}, "model": {"d_model": 6}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, put(want, shardings(MeshShape(1, 8, 1))), metadata)
    where = shardings(MeshShape.parse(shape))
    other = Checkpoints(tmp_path)
    assert other.steps() == [7] and other.latest_step() == 7
    assert other.metadata(7) == metadata
    got = other.restore(7, targets_of(want, where))
    assert_same_bits(got, want)
    for name, array in got.items():
        assert array.sharding.is_equivalent_to(where[name], array.ndim), name
    other.close()


def test_one_device_numpy_and_scalars(rng, tmp_path):
    want = values(rng)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, want, {})
        step, got, metadata = checkpoints.restore_latest(one_device(want))
    assert (step, metadata) == (0, {})
    assert_same_bits(got, want)


def test_partial_restore_and_another_float_dtype(rng, tmp_path):
    want = values(rng) | {"embed": rng.normal(size=(5, 4)).astype(np.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, want, {})
        targets = one_device({"embed": want["embed"].astype(jnp.bfloat16), "key": want["key"]})
        got = checkpoints.restore(1, targets, partial=True)
        assert_same_bits(got, {n: np.asarray(want[n]).astype(t.dtype) for n, t in targets.items()})
        with pytest.raises(UserError, match="counts is not part of this model"):
            checkpoints.restore(1, targets)


def test_arrays_may_be_donated_and_changed_after_save(tmp_path, monkeypatch):
    where = NamedSharding(make_mesh(MeshShape(1, 8, 1)), PartitionSpec("expert"))
    x = jax.device_put(np.arange(1 << 20, dtype=np.float32).reshape(8, -1), where)
    y = np.arange(1 << 16, dtype=np.int32)
    want = {"x": np.array(x), "y": y.copy()}
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x, "y": y}, {})
        y[:] = -1
        x = overwrite(x)
        x.block_until_ready()
        checkpoints.wait()
        assert_same_bits(checkpoints.restore(1, one_device(want)), want)


def test_save_returns_before_the_checkpoint_is_complete(tmp_path, monkeypatch):
    gate = threading.Event()
    write = manifest.write
    monkeypatch.setattr(manifest, "write", lambda *args: (gate.wait(60), write(*args)))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(5, small(5), {})
        assert checkpoints.steps() == [] and checkpoints.latest_step() is None
        assert Checkpoints(tmp_path).restore_latest(one_device(small(5))) is None
        gate.set()
        checkpoints.wait()
        assert checkpoints.steps() == [5]


def test_typed_keys_and_foreign_metadata_are_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="key_data"):
            checkpoints.save(1, {"k": jax.random.key(0)}, {})
        with pytest.raises(TypeError, match="JSON"):
            checkpoints.save(1, small(1), {"x": object()})
        assert checkpoints.steps() == []


# ── retention and cleaning ───────────────────────────────────────────────────


def test_the_newest_are_kept(tmp_path):
    checkpoints = saved(tmp_path, 2, 9, 30, 100_000_000, keep=2)
    assert checkpoints.steps() == [30, 100_000_000]
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UserError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_a_step_that_is_there_is_left_alone(tmp_path):
    saved(tmp_path, 4)
    before = manifest.path_in(tmp_path / "step_00000004").read_bytes()
    with Checkpoints(tmp_path) as checkpoints:
        assert not checkpoints.save(4, small(5), {})
    assert manifest.path_in(tmp_path / "step_00000004").read_bytes() == before


def test_incomplete_checkpoints_are_ignored_and_removed_by_the_next_save(tmp_path):
    saved(tmp_path, 1, 2)
    manifest.path_in(tmp_path / "step_00000002").unlink()
    torn = tmp_path / "step_00000003"
    (torn / "arrays.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    reader = Checkpoints(tmp_path)
    assert reader.steps() == [1]
    step, got, _ = reader.restore_latest(one_device(small(1)))
    assert step == 1 and float(got["w"][0, 0]) == 1.0
    assert torn.exists(), "reading changes nothing"
    reader.close()
    saved(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("notes.txt", "step_00000001", "step_00000002")
    ]


KILLED = """
import os, signal, sys
import jax
jax.config.update("jax_platforms", "cpu")
import numpy as np
from moejax.training import checkpoint, manifest

def small(step):
    return {"w": np.full((64, 8), step, np.float32), "step": np.array(step, np.int32)}

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

checkpoints = checkpoint.Checkpoints(sys.argv[1])
checkpoints.save(1, small(1), {"step": 1})
checkpoints.wait()
if sys.argv[2] == "before the manifest":
    manifest.write = die
elif sys.argv[2] == "before the manifest is renamed":
    os.replace = die
else:
    import orbax.checkpoint as ocp
    ocp.PyTreeCheckpointHandler.finalize = die  # all data written, nothing committed
checkpoints.save(2, small(2), {"step": 2})
checkpoints.wait()
"""


@pytest.mark.parametrize(
    "moment",
    ["before orbax commits", "before the manifest", "before the manifest is renamed"],
)
def test_kill_in_the_middle_of_a_save_leaves_the_previous(tmp_path, moment):
    command = [sys.executable, "-c", KILLED, str(tmp_path), moment]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (tmp_path / "step_00000002").exists()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        step, got, metadata = checkpoints.restore_latest(one_device(small(1)))
        assert (step, metadata) == (1, {"step": 1})
        assert_same_bits(got, small(1))
        assert checkpoints.save(2, small(2), {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert_same_bits(checkpoints.restore(2, one_device(small(2))), small(2))


# ── disks that refuse ────────────────────────────────────────────────────────


FULL = """
import resource, signal, sys
import jax
jax.config.update("jax_platforms", "cpu")
import numpy as np
from moejax.cli import run_main
from moejax.training.checkpoint import Checkpoints

def main():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    rng = np.random.default_rng(0)
    with Checkpoints(sys.argv[1]) as checkpoints:
        checkpoints.save(1, {"w": rng.normal(size=100)}, {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        checkpoints.save(2, {"w": rng.normal(size=100_000)}, {})
        checkpoints.wait()
        print("not reached")

sys.exit(run_main(main))
"""


def test_a_save_that_fails_in_the_background_is_one_line(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("error: "), ended.stderr
    assert "could not be saved" in ended.stderr and "step 1 stays usable" in ended.stderr
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1]
    target = one_device({"w": np.zeros(100, np.float64).astype(np.float32)})
    assert checkpoints.restore(1, target)["w"].shape == (100,)


def test_a_full_disk_is_told_and_the_previous_stays(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, small(1), {})
        checkpoints.wait()

        def refuse(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(manifest, "write_atomically", refuse)
        checkpoints.save(2, small(2), {})
        with pytest.raises(UserError, match="the disk is full") as error:
            checkpoints.wait()
        assert "step 1 stays usable" in one_line(error)
        checkpoints.wait()  # told once
        monkeypatch.undo()
        assert checkpoints.steps() == [1]
        assert checkpoints.save(2, small(2), {})
        checkpoints.wait()
        assert checkpoints.steps() == [2]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a directory is needed") as error:
        Checkpoints(tmp_path / "file" / "checkpoints").save(1, small(1), {})
    one_line(error)
