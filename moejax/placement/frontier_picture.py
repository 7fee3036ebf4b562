"""Traffic against loss, drawn: settings, their frontier, and aims or the loss that is allowed."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.errors import UserError
from moejax.placement.frontier import frontier
from moejax.training.files import disk_errors, write_atomically

__all__ = ["FORMS", "draw_frontier", "picture_form", "setting_in_words"]

FORMS = ("svg", "png", "pdf")
_MARKS = "os^DvP"


def setting_in_words(row: dict[str, Any]) -> str:
    """A row's setting: `copies, penalty 0.4`."""
    words = [row["placement"]]
    if row["penalty"]:
        words.append(f"penalty {row['penalty']:g}")
        if row["weights"] != "plain":
            words.append(f"{row['weights']} weights")
    if row["local_threshold"] is not None:
        words.append(f"local from {row['local_threshold']:g}")
    if row["max_devices"] is not None:
        words.append(f"at most {row['max_devices']} devices")
    return ", ".join(words)


def picture_form(path: str | os.PathLike[str]) -> str:
    """The format that a file's ending asks for.

    Raises:
        UserError: it is none of `FORMS`.
    """
    form = Path(path).suffix.removeprefix(".").lower()
    if form not in FORMS:
        raise UserError(
            f"{os.fspath(path)}: a picture's name ends in {', '.join(f'.{f}' for f in FORMS)}, "
            "which picks its format"
        )
    return form


def draw_frontier(
    path: str | os.PathLike[str],
    series: Sequence[tuple[str, Sequence[dict[str, Any]]]],
    aims: Sequence[tuple[float, float]] = (),
    ringed: Sequence[dict[str, Any]] = (),
    most: float | None = None,
) -> None:
    """Draws remote sends, relative to the base, against the increase of the loss.

    Each setting is a mark; the line of a series joins those that none of its others beats.

    Args:
        path: the file, replaced in one piece; its ending picks the format, see `FORMS`.
        series: title and rows of a sweep, `loss_increase` and its error as a share.
        aims: pairs of a ratio of remote sends and a loss increase that are to be beaten, drawn
            as corners; a ratio of 1 is a line of allowed loss.
        ringed: rows to point out.
        most: the largest loss increase to show; None: all.

    Raises:
        UserError: the ending is another one, the disk is full or the place cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    form = picture_form(path)
    figure = Figure((7.6, 5.0), layout="constrained")
    axes = figure.subplots()
    for number, (title, rows) in enumerate(series):
        color, mark = f"C{number % 10}", _MARKS[number % len(_MARKS)]
        points = [(100 * r["remote_sends_ratio"], 100 * r["loss_increase"]) for r in rows]
        axes.errorbar(
            [sends for sends, _ in points],
            [loss for _, loss in points],
            yerr=[100 * row["loss_increase_error"] for row in rows],
            color=color,
            marker=mark,
            linestyle="none",
            markersize=5,
            elinewidth=0.8,
            capsize=2,
            alpha=0.75,
        )
        best = [points[i] for i in frontier(points)]
        axes.plot(
            [sends for sends, _ in best],
            [loss for _, loss in best],
            color=color,
            marker=mark,
            markersize=5,
            linewidth=1.3,
            label=title,
        )
    for number, row in enumerate(ringed):
        axes.plot(
            100 * row["remote_sends_ratio"],
            100 * row["loss_increase"],
            marker="o",
            markersize=14,
            markerfacecolor="none",
            markeredgecolor="black",
            linestyle="none",
            label=None if number else "recommended",
        )
    for ratio, increase in aims:
        axes.plot(
            [0, 100 * ratio, 100 * ratio],
            [100 * increase, 100 * increase, 0],
            color="#777777",
            linestyle="--",
            linewidth=0.9,
        )
    axes.axhline(0.0, color="#bbbbbb", linewidth=0.8)
    axes.set_xlim(0, 104)
    if most is not None:
        # What lies above the top must not stretch the bottom.
        lowest = min((row["loss_increase"] for _, rows in series for row in rows), default=0.0)
        axes.set_ylim(100 * (min(lowest, 0.0) - most / 20), 100 * most)
    axes.set_xlabel("remote sends of a token, % of contiguous placement without a penalty")
    axes.set_ylabel("held-out loss, increase in %")
    axes.legend(fontsize=8, markerscale=0.8)
    # A picture of the same numbers has the same bytes.
    dated = {"svg": "Date", "pdf": "CreationDate"}.get(form)
    with io.BytesIO() as file, rc_context({"svg.hashsalt": "frontier"}):
        figure.savefig(file, format=form, dpi=110, metadata={dated: None} if dated else None)
        with disk_errors(path):
            write_atomically(path, file.getvalue())
