"""Checkpoints that are not as they were written, or of another model: one line, never wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_cases import assert_same_bits, one_device, one_line, saved, small
from jax.sharding import NamedSharding, PartitionSpec

from moejax.errors import UserError
from moejax.training import manifest
from moejax.training.array_store import ArrayStore
from moejax.training.checkpoint import Checkpoints
from sharding.mesh import MeshShape, make_mesh


def files_of(step_folder: Path) -> list[Path]:
    return sorted(p for p in step_folder.rglob("*") if p.is_file() and p.stat().st_size > 0)


def spoil(path: Path, how: str, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncate":
        path.write_bytes(content[: int(rng.integers(len(content)))])
    elif how == "flip":
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
    elif how == "grow":
        path.write_bytes(content + b"\0")
    else:
        path.unlink()


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    saved(folder, 1, 2, 3)
    return folder


@pytest.mark.parametrize("how", ["truncate", "flip", "grow", "remove"])
def test_any_spoiled_file_is_told_and_the_previous_is_named(rng, three, tmp_path, how):
    targets = one_device(small(3))
    folder = three / "step_00000003"
    paths = [p for p in files_of(folder) if how != "remove" or p.name != "manifest.json"]
    with Checkpoints(three) as checkpoints:
        for path in paths:
            content = path.read_bytes()
            spoil(path, how, rng)
            if path.read_bytes() == content if path.exists() else False:
                continue
            with pytest.raises(UserError) as error:
                Checkpoints(three).restore(3, targets)
            text = one_line(error)
            if "format version" not in text:  # a flipped bit in just that number
                assert "step_00000003: the checkpoint is damaged" in text
                assert path.name in text and "resume from step 2" in text
            path.write_bytes(content)
        assert_same_bits(checkpoints.restore(3, targets), small(3))


def test_the_newest_whole_checkpoint_is_used_and_the_damaged_set_aside(rng, tmp_path):
    saved(tmp_path, 1, 2, 3)
    for step, how in ((3, "truncate"), (2, "flip")):
        largest = max(files_of(tmp_path / f"step_0000000{step}" / "arrays"), key=os.path.getsize)
        spoil(largest, how, rng)
    said: list[str] = []
    with Checkpoints(tmp_path) as checkpoints:
        step, got, metadata = checkpoints.restore_latest(one_device(small(1)), report=said.append)
        assert (step, metadata) == (1, {"step": 1})
        assert_same_bits(got, small(1))
        assert len(said) == 2 and all("damaged" in line and "\n" not in line for line in said)
        assert "resume from step 2" in said[0] and "resume from step 1" in said[1]
        # Training goes on from there, and saves the same steps anew.
        assert checkpoints.save(2, small(2), {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert_same_bits(checkpoints.restore(2, one_device(small(2))), small(2))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["damaged_00000002", "damaged_00000003", "step_00000001", "step_00000002"]


def test_a_previous_one_that_is_torn_as_well_is_not_named(rng, tmp_path):
    checkpoints = saved(tmp_path, 1, 2, 3)
    for step in (2, 3):
        spoil(files_of(tmp_path / f"step_0000000{step}" / "arrays")[0], "truncate", rng)
    with pytest.raises(UserError, match="resume from step 1") as error:
        checkpoints.restore(3, one_device(small(3)))
    assert "truncated" in one_line(error)


def test_nothing_usable(rng, tmp_path):
    assert Checkpoints(tmp_path / "none").restore_latest({}) is None
    assert Checkpoints(tmp_path / "none").steps() == []
    checkpoints = saved(tmp_path, 1)
    spoil(files_of(tmp_path / "step_00000001" / "arrays")[0], "truncate", rng)
    with pytest.raises(UserError, match="no checkpoint is usable") as error:
        checkpoints.restore_latest(one_device(small(1)), report=lambda line: None)
    assert "there is no earlier one" in one_line(error)


def test_missing_step_names_those_there_are(three, tmp_path):
    for call in (lambda c: c.restore(4, {}), lambda c: c.metadata(4)):
        with pytest.raises(UserError, match="no complete checkpoint of step 4: there are 1, 2, 3"):
            call(Checkpoints(three))
    with pytest.raises(UserError, match="there are none"):
        Checkpoints(tmp_path).metadata(1)


def test_another_model_names_all_that_differs(three):
    targets = one_device(
        {
            "w": np.zeros((64, 9), np.float32),
            "step": np.array(0, np.uint32),
            "extra": np.zeros(2, np.float32),
        }
    )
    for restore in (Checkpoints(three).restore_latest, lambda t: Checkpoints(three).restore(3, t)):
        with pytest.raises(UserError) as error:
            restore(targets)
        text = one_line(error)
        assert "of another model" in text and "extra is missing" in text
        assert "w has shape (64, 8) and this model's (64, 9)" in text
        assert "step is int32 and this model's uint32" in text
    many = one_device({f"layer{i}": np.zeros(1, np.float32) for i in range(100)})
    with pytest.raises(UserError, match="and 62 more") as error:
        Checkpoints(three).restore(3, many)
    assert len(one_line(error)) < 3000


def test_another_format_version(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT", manifest.FORMAT + 1)
    checkpoints = saved(tmp_path, 1)
    monkeypatch.undo()
    for call in (
        lambda: checkpoints.restore(1, one_device(small(1))),
        lambda: checkpoints.restore_latest(one_device(small(1))),
        lambda: checkpoints.metadata(1),
    ):
        with pytest.raises(UserError, match=r"format version 2 and this program reads 1") as error:
            call()
        one_line(error)


def test_a_sharding_that_does_not_fit_is_refused_before_reading(three):
    where = NamedSharding(make_mesh(MeshShape(1, 8, 1)), PartitionSpec(None, "expert"))
    targets = one_device(small(3))
    targets["w"] = jax.ShapeDtypeStruct((64, 8), np.float32, sharding=where)
    assert_same_bits(Checkpoints(three).restore(3, targets), small(3))
    targets["w"] = jax.ShapeDtypeStruct((64, 9), np.float32, sharding=where)
    with pytest.raises(ValueError, match="9"):
        Checkpoints(three).restore(3, targets)


def test_what_orbax_refuses_is_one_line(three, monkeypatch):
    checkpoints = Checkpoints(three)

    def refuse(*args):
        raise ValueError("NOT_FOUND: something\nand a long specification")

    monkeypatch.setattr(ArrayStore, "restore", refuse)
    with pytest.raises(UserError, match="could not be restored: NOT_FOUND: something") as error:
        checkpoints.restore(3, one_device(small(3)))
    one_line(error)


def test_manifest_is_plain_json_and_nothing_else_is_needed(three):
    content = json.loads(manifest.path_in(three / "step_00000003").read_text())
    assert (content["format"], content["step"]) == (1, 3)
    assert content["arrays"]["w"] == {"shape": [64, 8], "dtype": "float32"}
    folder = three / "step_00000003"
    assert set(content["files"]) == {
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }
