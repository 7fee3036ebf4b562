"""The mode routes of `infer.py`: counts against a model without masks, pictures."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from modes_support import CONFIG, make_folder, make_weights, mode_runner

import infer
from moejax.inference.source import open_model
from moejax.placement.record import Recording
from moejax.serving import routes
from sharding.mesh import MeshShape


@pytest.fixture(scope="module")
def flat():
    return make_weights()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, flat):
    return make_folder(tmp_path_factory, flat)


@pytest.fixture
def script(monkeypatch, capsys):
    monkeypatch.setattr(routes, "keep_compiled_programs", lambda: None)
    return mode_runner(monkeypatch, capsys)


@pytest.mark.parametrize("mesh", ["1x1x1", "2x2x2"])
def test_routes(script, folder, flat, tmp_path, mesh, rng):
    """Counts of a text of several windows are those of one device without masks."""
    text = "".join(rng.choice(list("abc é\n"), 150))
    source = tmp_path / "text"
    source.write_text(text)
    counts, picture = tmp_path / "counts.npz", tmp_path / "picture.png"
    flags = ("--model", folder, "--mesh", mesh, "--counts", counts, "--picture", picture)
    code, _, err = script("routes", "--text", source, *flags)
    assert code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    found = np.load(counts)
    tokens = len(text.encode())
    assert int(found["tokens"]) == tokens and f"{tokens} tokens" in err[-1]
    assert found["layers"].tolist() == [0, 1]
    np.testing.assert_array_equal(found["counts"].sum(axis=1), 2 * tokens)
    np.testing.assert_array_equal(found["counts"], by_windows(flat, text.encode()))


def test_routes_begin_as_the_model_wants(folder, monkeypatch, tmp_path):
    source, seen = dataclasses.replace(open_model(folder), bos_id=11), []
    monkeypatch.setattr("moejax.inference.source.open_model", lambda *_, **__: source)
    monkeypatch.setattr(routes, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(routes, "load_model", lambda *_: (None, None, None))

    def recorded(*args, tokens):
        seen.extend(document.tolist() for document in args[-1])
        return Recording(np.zeros((2, 4, 4), int), np.ones((2, 4), int), 3, None)

    monkeypatch.setattr("moejax.placement.record.record", recorded)
    counts = str(tmp_path / "c.npz")
    assert infer.main(["routes", "-p", "ab", "--counts", counts, "--picture", ""]) == 0
    assert seen == [[11, 97, 98]]


def by_windows(flat, data):
    """Counts [L, E] from a model on one device, one window after the other, without masks."""
    from jax.sharding import PartitionSpec as P

    from moejax.training.state import Blueprint, load_weights
    from sharding.mesh import make_mesh

    blueprint = Blueprint(CONFIG, make_mesh(MeshShape()))
    weights = load_weights(flat, blueprint, jnp.dtype("float32"))

    def run(params, biases, tokens):
        return blueprint.merge(params, biases)(tokens, inference=True).aux.counts_E

    run = jax.jit(
        jax.shard_map(run, mesh=blueprint.mesh, in_specs=P(), out_specs=P(), check_vma=False)
    )
    windows = [data[i : i + CONFIG.max_context] for i in range(0, len(data), CONFIG.max_context)]
    return sum(
        np.asarray(run(*weights, jnp.asarray(np.frombuffer(w, np.uint8).astype(np.int32)[None])))
        for w in windows
    )


def test_a_picture_as_svg(script, folder, tmp_path):
    picture = tmp_path / "picture.svg"
    flags = ("--counts", tmp_path / "c.npz", "--picture", picture, "--mesh", "1x1x1")
    assert script("routes", "--model", folder, "-p", "some text", *flags)[0] == 0
    assert "<svg" in picture.read_text()
