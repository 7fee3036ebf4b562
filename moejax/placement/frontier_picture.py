"""Traffic against loss, drawn: lines of settings, and the aims or the loss that is allowed."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

from moejax.training.files import disk_errors, write_atomically

__all__ = ["draw_frontier", "setting_in_words"]

_MARKS = "os^DvP"
_LINES = (":", "-", "--", "-.")


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


def draw_frontier(
    path: str | os.PathLike[str],
    series: Sequence[tuple[str, Sequence[dict[str, Any]]]],
    aims: Sequence[tuple[float, float]] = (),
    form: str = "png",
    most: float | None = None,
) -> None:
    """Draws remote sends, relative to the base, against the increase of the loss.

    Args:
        path: the file; replaced in one piece.
        series: title and rows of a sweep for each line, `loss_increase` and its error as a share.
            What begins alike, up to a comma, has one colour; what ends alike one mark.
        aims: pairs of a ratio of remote sends and a loss increase that are to be beaten, drawn
            as corners; a ratio of 1 is a line of allowed loss.
        form: `png` or `svg`.
        most: the largest loss increase to show; None: all.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure((7.6, 5.0), layout="constrained")
    axes = figure.subplots()
    heads = list(dict.fromkeys(title.partition(", ")[0] for title, _ in series))
    tails = list(dict.fromkeys(title.partition(", ")[2] for title, _ in series))
    for title, rows in series:
        head, _, tail = title.partition(", ")
        kind = tails.index(tail) % len(_MARKS)
        rows = sorted(rows, key=lambda row: row["remote_sends_ratio"])
        axes.errorbar(
            [100 * row["remote_sends_ratio"] for row in rows],
            [100 * row["loss_increase"] for row in rows],
            yerr=[100 * row["loss_increase_error"] for row in rows],
            color=f"C{heads.index(head)}",
            marker=_MARKS[kind],
            linestyle=_LINES[kind % len(_LINES)],
            markersize=5,
            linewidth=1.3,
            elinewidth=0.8,
            capsize=2,
            label=title,
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
        axes.set_ylim(top=100 * most)
    axes.set_xlabel("remote sends of a token, % of contiguous placement without a penalty")
    axes.set_ylabel("held-out loss, increase in %")
    axes.legend(fontsize=8)
    metadata = {"Date": None} if form == "svg" else None
    with io.BytesIO() as file, rc_context({"svg.hashsalt": "frontier"}):
        figure.savefig(file, format=form, dpi=110, metadata=metadata)
        with disk_errors(path):
            write_atomically(path, file.getvalue())
