"""The benchmark of compressed sums: what it sums, predicts, and keeps of its file."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import common
import compression_loopback as loopback
import grad_compression
from compression_programs import Case, gradients, reductions

from sharding.mesh import MeshShape, make_mesh

NUMBERS = 2**13


def test_bytes():
    """A ring's 2 (n - 1) / n of 2 bytes against as many of a byte and a scale for 256."""
    assert Case("psum_bfloat16").bytes_of(2**20, 4) == 2 * 3 / 4 * 2**21
    assert Case("psum_float32").bytes_ratio(2**20, 4) == 0.5
    assert Case("bf16").bytes_ratio(2**20, 4) == 1
    assert Case("int8").bytes_ratio(2**20, 4) == pytest.approx(2 / (1 + 2 / 256))
    assert Case("int4", "reference").bytes_ratio(2**20, 2) == pytest.approx(2 / (0.5 + 2 / 32))


@pytest.mark.parametrize("name, most", [("psum_float32", 1e-6), ("int8", 0.02)])
def test_sums_in_a_row(name, most):
    """The second sum is of gradients that begin with what the first one begins with."""
    mesh = make_mesh(MeshShape(2))
    grads = gradients(NUMBERS, mesh)
    start, run = reductions(Case(name), mesh, 2)
    (first, second), _ = run(grads, start(grads), jnp.int32(1))
    want = np.asarray(grads, np.float64).sum(axis=0)
    assert want.std() > 1 and want.shape == first.shape
    again = want.copy()
    again[0, 0] = 2 * float(first[0, 0].astype(jnp.bfloat16))
    for got, wanted in ((first, want), (second, again)):
        assert np.linalg.norm(got - wanted) <= most * np.linalg.norm(wanted)
    assert jax.tree.leaves(first)[0].dtype == jnp.float32


def test_prediction():
    """Bytes over the rate, and what the rounding took."""
    parts = {"encode": 0.02, "encode_float32": 9.0, "add_up_and_encode": 0.01, "decode": 0.03}
    rows = [
        {"size": "64MiB", "method": "int8", "backend": backend, "part": part, "ms": ms + extra}
        for backend, extra in (("mosaic_gpu", 0.0), ("reference", 5.0))
        for part, ms in parts.items()
    ]
    found = grad_compression.predict(rows, 2)
    assert [row["link_gbs"] for row in found] == list(grad_compression.LINKS_GBS)
    slow = found[-1]
    assert slow["psum_bfloat16_ms"] == pytest.approx(2**26 / 1.25e6, abs=1e-3)
    sent = 2**25 * (1 + 2 / 256)
    assert slow["int8_ms"] == pytest.approx(sent / 1.25e6 + 0.06, abs=1e-3)
    assert slow["ratio"] == pytest.approx(slow["int8_ms"] / slow["psum_bfloat16_ms"], abs=1e-3)


def test_both_processes_have_to_end():
    one, other = (
        {name: {"times": times, "bytes": [2**22 + 2**17]} for name in loopback.WAYS}
        for times in ([10.0, 30.0, 50.0], [40.0, 20.0, 60.0])
    )
    one["int8"]["codec_ms"], other["int8"]["codec_ms"] = 5.0, 7.0
    rows = loopback.rows_of("100mbit", [4], [[one], [other]])
    for row in rows:
        loopback.compare(row, rows)
    row = next(row for row in rows if row["method"] == "int8")
    assert row["ms"] == 40 and row["mib"] == 4.12 and row["of_bf16"] == 1
    assert row["predicted_ms"] == pytest.approx(2**22 / 12.5e3 + 7, abs=0.01)
    assert "predicted_ms" not in loopback.rows_of("none", [4], [[one], [other]])[3]


def test_what_training_lost_stays_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(grad_compression, "RESULTS", tmp_path)
    path = tmp_path / f"{grad_compression.NAME}.json"
    rows = {"int8": {"method": "int8", "ms_64MiB": 1.0}, "top_k": {"method": "top_k"}}
    grad_compression.write(rows, [], 2)
    content = json.loads(path.read_text())
    assert [row["final_loss_delta_pct"] for row in content["rows"]] == [None, None]
    content["rows"][0]["final_loss_delta_pct"] = 0.1
    path.write_text(json.dumps(content))
    grad_compression.write({"int8": {"method": "int8", "ms_64MiB": 2.0}}, [], 2)
    rows = json.loads(path.read_text())["rows"]
    assert rows[0] == {"method": "int8", "ms_64MiB": 2.0, "final_loss_delta_pct": 0.1}
    assert [row["method"] for row in rows] == ["int8", "top_k"]
