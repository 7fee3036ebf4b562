"""What a sweep writes while it runs, and its picture."""

import json

import numpy as np
import pytest
from inference_support import CONFIG as SMALL
from matplotlib.figure import Figure

from moejax.errors import UserError
from moejax.placement import sweep_texts
from moejax.placement.frontier import frontier
from moejax.placement.frontier_picture import draw_frontier
from moejax.placement.sweep import run
from moejax.placement.sweep_config import SweepConfig


def made_up_rows(rng, count=12):
    """Rows as a sweep yields them."""
    return [
        {
            "placement": ("contiguous", "copies")[i % 2],
            "penalty": 0.0,
            "local_threshold": None,
            "max_devices": None,
            "weights": "plain",
            "remote_sends": float(sends),
            "remote_sends_ratio": float(sends / 5),
            "loss_increase": float(loss),
            "loss_increase_error": 0.001,
            "score_mass_kept": 1.0,
            "load_max_mean": 1.1,
        }
        for i, (sends, loss) in enumerate(rng.uniform(0, [4, 0.1], (count, 2)))
    ]


def test_each_row_is_written_when_it_is_there(rng, tmp_path, monkeypatch):
    """A sweep that is interrupted keeps what it has."""
    config = SweepConfig(
        replicas=0,
        penalties=(0.5,),
        max_devices=(),
        out=str(tmp_path / "s.json"),
        picture=str(tmp_path / "s.svg"),
    )
    all_rows, last = made_up_rows(rng, 4), 3

    class Made:
        placements = dict.fromkeys(("contiguous", "copies"))

        def rows(self, flat, localities):
            for count, row in enumerate(all_rows):
                if count == last:
                    raise KeyboardInterrupt
                if count:
                    assert json.loads((tmp_path / "s.json").read_text())["rows"] == all_rows[:count]
                yield row

    source = type("Source", (), {"config": SMALL})
    monkeypatch.setattr(sweep_texts, "open_texts", lambda config: (source, [], []))
    monkeypatch.setattr(sweep_texts, "prepare", lambda *args: (Made(), {}))
    with pytest.raises(KeyboardInterrupt):
        run(config, lambda line: None)
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["rows"] == all_rows[:3] and found["complete"] is False
    last = None
    assert run(config, lambda line: None) == all_rows
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["complete"] is True and b"<svg" in (tmp_path / "s.svg").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json", "s.svg"]


def test_picture(rng, tmp_path, monkeypatch):
    """All settings as marks, a line along each frontier, a ring around what is recommended."""
    rows, figures = made_up_rows(rng), []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    names = ("contiguous", "copies")
    series = [(name, [r for r in rows if r["placement"] == name]) for name in names]
    for form, magic in ("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF"):
        path, bytes_of = tmp_path / f"a.{form}", []
        for _ in range(2):
            draw_frontier(path, series, [(1.0, 0.02)], rows[:1])
            bytes_of.append(path.read_bytes())
        assert bytes_of[0] == bytes_of[1] and bytes_of[0].startswith(magic)
    with pytest.raises(UserError, match=r"a\.gif"):
        draw_frontier(tmp_path / "a.gif", series)
    axes = figures[0].axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    for (name, mine), marks in zip(series, axes.containers):
        points = [(100 * r["remote_sends_ratio"], 100 * r["loss_increase"]) for r in mine]
        np.testing.assert_allclose(marks.lines[0].get_xydata(), points)
        assert marks.lines[0].get_linestyle() == "None"
        best = [points[i] for i in frontier(points)]
        np.testing.assert_allclose(lines[name].get_xydata(), best)
        assert lines[name].get_linestyle() == "-"
    ring = 100 * rows[0]["remote_sends_ratio"], 100 * rows[0]["loss_increase"]
    np.testing.assert_allclose(lines["recommended"].get_xydata(), [ring])
