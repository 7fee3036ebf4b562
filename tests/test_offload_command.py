"""python -m moejax.offload on a tiny model: what it writes and says, and what it refuses."""

import sys
from pathlib import Path

import numpy as np
import pytest
from compress_model_support import save, weights_of, write_text

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
sys.path.append(str(Path(__file__).parents[1] / "docs"))

import draw_offload
import offload_traces

from moejax.offload.__main__ import main
from moejax.offload.command import recall_table
from moejax.offload.fits import load_fits
from moejax.offload.predictors import PREDICTORS, make_predictor
from moejax.offload.recall import Recall


def test_fits_are_written_and_recall_is_told(rng, tmp_path, capsys):
    save(tmp_path / "model", weights_of(rng))
    flags = write_text(tmp_path, rng)[:2]
    out = tmp_path / "fits.npz"
    rest = ["--data.seq-len", "24", "--tokens", "480", "--windows", "1", "--prompt", "8"]
    assert main([str(tmp_path / "model"), str(out), *flags, *rest]) == 0
    said = capsys.readouterr().out
    assert "fitting on 480 tokens" in said and f"wrote {out}" in said
    for name in (*PREDICTORS, "routers", "linear"):
        assert f"\n{name} " in said
    fits = load_fits(out)
    fits.check(2, 6, 16)
    predictor = make_predictor("combined", 2, 6, 2, fits)
    predictor.begin(None)
    predictor.observe(0, np.array([0, 1]))
    assert predictor.scores(0, 1).shape == (6,)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "255"], "at least 2 must follow"),
        (["--tokens", "0"], "--tokens 0"),
        (["--ridge", "0"], "--ridge 0"),
        (["--data.seq-len", "4096"], "longer than the model's context of 1024"),
    ],
)
def test_refused_before_work(tmp_path, capsys, flags, message):
    assert main(["packaged", str(tmp_path / "fits.npz"), *flags]) != 0
    assert message in capsys.readouterr().err


def test_places_that_cannot_be_written(tmp_path, capsys):
    for out in (tmp_path, tmp_path / "absent" / "fits.npz"):
        assert main(["packaged", str(out)]) != 0
        assert "name a file in a folder that is there" in capsys.readouterr().err


def test_held_out_text_that_is_too_short(rng, tmp_path, capsys):
    save(tmp_path / "model", weights_of(rng))
    (tmp_path / "short.txt").write_text("x = 1")
    flags = [*write_text(tmp_path, rng)[:2], "--data.held-out-paths", str(tmp_path / "short.txt")]
    rest = ["--data.seq-len", "24", "--prompt", "8"]
    assert main([str(tmp_path / "model"), str(tmp_path / "o.npz"), *flags, *rest]) != 0
    assert "no held-out document has 24 tokens" in capsys.readouterr().err


def test_the_table():
    recalls = [Recall("previous", 1, 0.25, 0.5), Recall("previous", None, 0.125, 1.0)]
    lines = list(recall_table([*recalls, Recall("linear", 0, 0.5, 0.75)]))
    assert lines[1].split() == ["0", "1", "next", "token"]
    assert lines[2].split() == ["previous", "25.0%", "50.0%", "12.5%", "100.0%"]
    assert lines[3].split() == ["linear", "50.0%", "75.0%"]
    # Columns stand below their heads.
    assert lines[2].index("50.0%") + 5 == lines[1].index(" 1 ") + 2
    assert lines[3].index("75.0%") + 5 == lines[1].index(" 0 ") + 2


def test_rows_of_a_tiny_model(rng, tmp_path, monkeypatch):
    save(tmp_path / "model", weights_of(rng))
    text = write_text(tmp_path, rng)[1]
    written = {}
    monkeypatch.setattr(
        offload_traces,
        "write_results",
        lambda name, rows, **more: written.update(rows=rows, **more),
    )
    flags = "--tokens 240 --windows 1 --length 24 --prompt 6 --prefetch 2 --fractions 0.5 1"
    flags = [*flags.split(), "--texts", text]
    offload_traces.main(["--model", str(tmp_path / "model"), *flags])
    rows = written["rows"]
    assert {row["cache_fraction"] for row in rows} == {0.5, 1.0}
    for row in rows:
        assert 0 <= row["hit_rate"] <= 1 and 0 <= row["wasted_fraction"] <= 1
        if not row["prefetch_experts"]:
            assert row["hit_rate"] <= row["belady"] + 1e-4
        assert (row["recall_at_k"] is None) == (row["predictor"] == "none")
    # With all experts held nothing is given up, so all policies do as well as the best.
    plain = [r for r in rows if r["cache_fraction"] == 1.0 and not r["prefetch_experts"]]
    assert len(plain) == 8 and all(row["hit_rate"] == row["belady"] for row in plain)
    draw_offload.draw(written).savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000
