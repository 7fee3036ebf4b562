"""Options of compressed gradients that a method does not read; records of runs that hold some."""

import dataclasses
import json
import re

import numpy as np
import pytest

import train
from moejax.errors import UserError
from moejax.presets import tiny
from moejax.training.config_json import config_to_json
from sharding.compression.config import READ_BY, GradCompression
from sharding.compression.hosts import contradiction
from sharding.mesh import MeshShape, hosts_of_devices, make_mesh


def flags(method: str, *more: str) -> list[str]:
    return ["--grad-compression.method", method, *more]


OTHERS = {"rounding": "error_feedback", "block": 64, "density": 0.2, "rank": 2, "warmup_steps": 5}
METHODS = ("none", "bf16", "int8", "int4", "top_k", "low_rank")


def test_options_are_read_or_refused():
    """Every option with every method, as the methods' own code reads them; defaults always go."""
    assert OTHERS.keys() == READ_BY.keys()
    start, refused = GradCompression(), 0
    for method in METHODS:
        GradCompression(method).check_read(start)
        for name, value in OTHERS.items():
            config = GradCompression(**{"method": method, name: value})
            if method in READ_BY[name]:
                config.check_read(start)
                continue
            flag = "--grad-compression." + name.replace("_", "-")
            with pytest.raises(UserError) as error:
                config.check_read(start)
            words = f"{flag} {value} with --grad-compression.method {method}: only "
            assert str(error.value).startswith(words)
            assert str(error.value).endswith(f"or leave {flag} at {getattr(start, name)}")
            refused += 1
    assert refused == 5 * 6 - (2 + 2 + 1 + 1 + 2)


def test_flags_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"density 0\.05 with .* int8: only"):
        train.read_flags(flags("int8", "--grad-compression.density", "0.05"))
    with pytest.raises(UserError, match=r"rank 2 with .* none: only low_rank reads it; choose"):
        train.read_flags(["--grad-compression.rank", "2"])
    config = train.read_flags(flags("top_k", "--grad-compression.density", "0.05"))
    assert config.grad_compression == GradCompression("top_k", density=0.05)


def test_a_run_goes_on_with_options_of_a_method_it_had(tmp_path):
    """They are passed over as before, but new ones are refused."""
    stored = GradCompression("top_k", density=0.05, warmup_steps=7)
    config = dataclasses.replace(tiny(), grad_compression=stored)
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(config)))
    run = ["--run", str(tmp_path)]
    assert train.read_flags(run).grad_compression == stored
    changed = train.read_flags([*run, *flags("int8")]).grad_compression
    assert changed == dataclasses.replace(stored, method="int8")
    with pytest.raises(UserError, match=r"density 0\.1 with .* int8: only"):
        train.read_flags([*run, *flags("int8", "--grad-compression.density", "0.1")])
    (tmp_path / "config.json").write_text(
        json.dumps(config_to_json(dataclasses.replace(config, grad_compression=changed)))
    )
    assert train.read_flags([*run, "--steps", "9"]).grad_compression == changed


def laid(mesh: tuple[int, ...], devices: int) -> np.ndarray:
    """Hosts of so many devices each, one after the other."""
    return (np.arange(np.prod(mesh)) // devices).reshape(mesh)


@pytest.mark.parametrize(
    ("hosts", "mesh", "devices", "words"),
    [
        (0, (8, 1, 1), 4, ""),
        (2, (8, 1, 1), 4, ""),
        (4, (4, 2, 1), 2, ""),
        (2, (4, 2, 2), 8, ""),
        (2, (8, 1, 1), 2, r"4 hosts: devices that are taken for one host.*hosts 4$"),
        (4, (8, 1, 1), 4, r"2 hosts: gradients are rounded between .*hosts 2$"),
        (2, (8, 1, 1), 8, r"one host: gradients are rounded .* pass .*hosts 0, with method none"),
        # No sum is inside a host where its experts go through several.
        (2, (2, 4, 1), 2, r"4 hosts: devices that are taken for .* pass .*hosts 0$"),
        (2, (6, 1, 1), 4, r"2 hosts: devices that are taken for .* pass .*hosts 3$"),
    ],
)
def test_hosts_that_are_not_there(hosts, mesh, devices, words):
    said = contradiction(hosts, laid(mesh, devices))
    assert re.search(words, said) and bool(said) == bool(words)


def test_hosts_of_a_mesh():
    """Fake devices are all of this machine, and the run goes on."""
    found = hosts_of_devices(make_mesh(MeshShape(4, 2, 1)))
    assert found.shape == (4, 2, 1) and len(np.unique(found)) == 1
    assert "one host" in contradiction(2, found)
