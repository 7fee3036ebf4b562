"""The step line, the timer, the summary and the pictures."""

from __future__ import annotations

import errno
import io
import math
import os
import sys

import numpy as np
import pytest
from PIL import Image

from moejax.errors import UserError
from moejax.training import files, pictures
from moejax.training.pictures import draw_expert_load, draw_loss
from moejax.training.report import (
    StepTimer,
    format_duration,
    print_summary,
    step_line,
)


def test_step_line():
    line = step_line(
        120,
        2000,
        loss=2.34567,
        learning_rate=3e-4,
        grad_norm=0.871,
        step_seconds=0.1234,
        tokens_per_second=12345.6,
        seconds_left=754,
        bits_per_byte=1.2344,
        utilisation=0.4123,
    )
    assert line == (
        "step  120/2000 (  6%) | loss 2.3457 | 1.234 bits/byte | lr 3.00e-04 | norm 0.87 | "
        "123 ms | 12,346 tok/s | mfu 41.2% | left 12m34s"
    )
    first = step_line(
        1,
        5,
        loss=math.nan,
        learning_rate=0.0,
        grad_norm=math.inf,
        step_seconds=0.0123,
        tokens_per_second=math.nan,
        seconds_left=math.nan,
    )
    assert first == (
        "step 1/5 ( 20%) | loss nan | lr 0.00e+00 | norm inf | 12.30 ms | nan tok/s | left ?"
    )


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"),
        (-1, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (754, "12m34s"),
        (3599.7, "1h00m"),
        (3 * 3600 + 300, "3h05m"),
        (86399, "23h59m"),
        (2 * 86400 + 4 * 3600 + 59, "2d04h"),
        (math.nan, "?"),
        (math.inf, "?"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_timer_splits_all_the_time():
    clock = Clock()
    timer = StepTimer(10, tokens_per_step=1000, clock=clock, window=3)
    assert math.isnan(timer.tokens_per_second) and math.isnan(timer.seconds_left)
    with timer.program():
        clock.now += 7
    clock.now += 20
    timer.tick(compiled=True)
    assert (timer.program_seconds, timer.training_seconds, timer.step_seconds) == (27, 0, 20)
    assert math.isnan(timer.seconds_left)
    clock.now += 1
    with timer.paused():
        clock.now += 50
    clock.now += 2
    timer.tick()
    assert (timer.step_seconds, timer.training_seconds, timer.paused_seconds) == (3, 3, 50)
    assert timer.tokens_per_second == pytest.approx(1000 / 3)
    assert timer.seconds_left == pytest.approx(8 * 3)
    for seconds in (1, 2, 6):  # the first step falls out of the window
        clock.now += seconds
        timer.tick()
    assert timer.mean_step_seconds == pytest.approx(3)
    assert timer.seconds_left == pytest.approx(5 * 3)
    total = timer.training_seconds + timer.program_seconds + timer.paused_seconds
    assert total == pytest.approx(clock.now - 100)
    for _ in range(9):
        timer.tick()
    assert timer.seconds_left == 0


def test_timer_counts_a_block_that_fails_and_refuses_nesting():
    clock = Clock()
    timer = StepTimer(1, 1, clock=clock)
    with pytest.raises(KeyError), timer.paused():
        clock.now += 5
        raise KeyError
    assert timer.paused_seconds == 5
    with pytest.raises(RuntimeError, match="nest"), timer.paused(), timer.program():
        pass
    with timer.program():
        clock.now += 1
    assert timer.program_seconds == 1


def test_summary_prints_brackets_as_they_are():
    out = io.StringIO()
    print_summary(
        "run [bold]", [("held-out", "1.23 bits/byte"), ("talk", "infer.py -p '[x]'")], out
    )
    text = out.getvalue()
    assert "run [bold]" in text and "infer.py -p '[x]'" in text and "\x1b" not in text


# ── pictures ─────────────────────────────────────────────────────────────────


def picture(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def near(pixels: np.ndarray, colour: str, tolerance: int = 12) -> np.ndarray:
    """Pixels [height, width] whose colour is the one given."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return np.abs(pixels - rgb).max(axis=2) <= tolerance


def loss_rows(rng, steps: int = 200, key: str = "bits_per_byte") -> list[dict]:
    curve = 1.8 + 6.0 / (1 + np.arange(steps) / 5) + rng.normal(0, 0.05, steps)
    rows = [{"step": i + 1, "loss": 1.0, key: float(v)} for i, v in enumerate(curve)]
    for i in range(19, steps, 20):
        rows[i]["heldout_" + key] = float(curve[i]) + 0.1
    return rows


def test_loss_picture_shows_curves_and_lines(rng, tmp_path):
    rows = loss_rows(rng)
    rows[7]["bits_per_byte"] = None  # a NaN of the run
    path = tmp_path / "loss.png"
    draw_loss(rows, path, 2.2, 1.4)
    pixels = picture(path)
    plain = tmp_path / "plain.png"
    draw_loss(rows, plain)
    assert near(pixels, pictures._CURVE).sum() > 500
    assert near(pixels, pictures._HELD_OUT).sum() > 500
    # Two dashed lines across the axes: rows of pixels that only the picture with them has.
    dashes = lambda p: (near(p, pictures._LINE).mean(axis=1) > 0.3).sum()  # noqa: E731
    assert dashes(pixels) >= 2 and dashes(picture(plain)) == 0
    assert not (tmp_path / "loss.png.tmp").exists() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("count", [0, 1, 2])
def test_loss_picture_of_little(rng, tmp_path, count):
    draw_loss(loss_rows(rng)[:count], tmp_path / "loss.png", 2.2, 2.19)
    picture(tmp_path / "loss.png")


def test_loss_picture_in_nats(rng, tmp_path):
    draw_loss(loss_rows(rng, key="loss"), tmp_path / "loss.png", 2.2, 1.4)
    pixels = picture(tmp_path / "loss.png")
    assert near(pixels, pictures._CURVE).sum() > 500
    assert (near(pixels, pictures._LINE).mean(axis=1) > 0.3).sum() == 0


def test_smoothing_keeps_a_straight_line_and_averages_noise(rng):
    line = np.linspace(5, 3, 501)
    np.testing.assert_allclose(pictures._smooth(line)[:480], line[:480], rtol=1e-12)
    noisy = line + rng.normal(0, 0.1, 501)
    assert np.std(pictures._smooth(noisy)[20:-20] - line[20:-20]) < 0.05
    assert pictures._smooth(np.zeros(0)).shape == (0,)


@pytest.mark.parametrize("heights", [[0.5, 0.51], [0.51, 0.5], [0.5, 0.5]])
def test_labels_are_moved_apart(heights):
    a, b = pictures._apart(heights)
    assert abs(a - b) == pytest.approx(0.05) and (a > b) == (heights[0] >= heights[1])
    assert pictures._apart([0.2, 0.5]) == [0.2, 0.5] and pictures._apart([0.1]) == [0.1]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 2), (40, 4, 8), (9, 48, 128)])
def test_expert_load_picture(rng, tmp_path, shape):
    history = rng.integers(0, 100, size=shape)
    draw_expert_load(history, tmp_path / "load.png", steps=np.arange(shape[0]) * 10)
    height, width, _ = picture(tmp_path / "load.png").shape
    assert width <= 2600 and height <= 2600


def test_expert_load_picture_tells_balance_from_imbalance(tmp_path):
    even = np.full((4, 4, 8), 25)
    skewed = even.copy()
    skewed[..., 0] = 170
    skewed[..., 1:] = 4
    coloured = []
    for name, history in (("even", even), ("skewed", skewed)):
        draw_expert_load(history, tmp_path / f"{name}.png")
        pixels = picture(tmp_path / f"{name}.png")
        body = pixels[:, : int(pixels.shape[1] * 0.9)]  # without the colour bar
        coloured.append((np.ptp(body, axis=2) > 60).mean())
    assert coloured[0] < 0.01 and coloured[1] > 0.4
    draw_expert_load(np.zeros((2, 2, 4)), tmp_path / "zero.png")  # no token yet
    for bad in (np.zeros((2, 4)), np.zeros((0, 2, 4))):
        with pytest.raises(ValueError, match="history"):
            draw_expert_load(bad, tmp_path / "bad.png")


def test_pictures_leave_pyplot_alone_and_a_full_disk_is_told(rng, tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # another test's
    draw_loss(loss_rows(rng), path)
    before = path.read_bytes()
    assert "matplotlib.pyplot" not in sys.modules

    def refuse(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(UserError, match=r"loss\.png: the disk is full"):
        draw_loss(loss_rows(rng), path)
    assert path.read_bytes() == before
