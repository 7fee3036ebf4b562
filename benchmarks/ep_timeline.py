"""Where a layer's time goes, stream by stream: read from a profile, drawn one below the other.

    python benchmarks/ep_timeline.py     after `ep_layer.py --profile DIR`

`ep_layer.py --profile` writes benchmarks/results/ep_layer_h200x4_timeline.json, a row for each
variant with the `intervals` of one call on the first device, and `under`: the part of the
exchange's time in which an expert kernel runs. This draws docs/img/exchange_timeline.svg: the first
row without overlap (one chunk) and the fastest of the others of that shape and pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from common import RESULTS

NAME = "ep_layer_h200x4_timeline"
PICTURE = Path(__file__).parents[1] / "docs" / "img" / "exchange_timeline.svg"
CALLS = 3  # profiled
INK, GREY = "#22303c", "#76838f"
COLOURS = {
    "exchange": "#d9822b",
    "experts": "#1f5a94",
    "routing, planning, sums": "#9aa5ae",
}
EXCHANGE = ("nccl", "allgather", "alltoall", "sendrecv", "all-to-all", "all-gather", "memcpyp2p")
EXPERTS = ("experts_up", "experts_down", "rows_gradient", "w_in_gradient", "w_out_gradient")


class Interval(NamedTuple):
    """A kernel or copy on a stream of a device."""

    stream: str
    name: str
    start_ms: float
    ms: float

    @property
    def end_ms(self) -> float:
        """When it is over."""
        return self.start_ms + self.ms


def kind_of(name: str) -> str:
    """Which of `COLOURS` a kernel is."""
    low = name.lower().replace("_", "").replace(" ", "")
    if any(word.replace("_", "") in low for word in EXCHANGE):
        return "exchange"
    found = any(word.replace("_", "") in low for word in EXPERTS)
    return "experts" if found else "routing, planning, sums"


def profile(call: Callable[[], Any], folder: str | Path) -> list[Interval]:
    """Profiles some calls, each waited for, and reads the last one; [] where no device is seen."""
    import jax

    folder = Path(folder)
    jax.block_until_ready(call())
    with jax.profiler.trace(str(folder)):
        for _ in range(CALLS):
            jax.block_until_ready(call())
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return last_call(read(jax.profiler.ProfileData.from_file(str(newest)).planes), CALLS)


def read(planes: Iterable[Any], device: str = "/device:GPU:0") -> list[Interval]:
    """The intervals of a device's streams, by start; ms since the first."""
    found = [
        Interval(line.name, event.name, event.start_ns / 1e6, event.duration_ns / 1e6)
        for plane in planes
        if plane.name == device
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    first = min((i.start_ms for i in found), default=0.0)
    return sorted(
        (i._replace(start_ms=i.start_ms - first) for i in found), key=lambda i: i.start_ms
    )


def last_call(intervals: list[Interval], calls: int) -> list[Interval]:
    """Of several calls with pauses in between, the last one, its start at 0."""
    gaps, end = [], 0.0
    for i, interval in enumerate(intervals):
        gaps.append((interval.start_ms - end, i))
        end = max(end, interval.end_ms)
    starts = sorted(i for _, i in sorted(gaps[1:], reverse=True)[: calls - 1])
    kept = intervals[starts[-1] if starts else 0 :]
    return [i._replace(start_ms=i.start_ms - kept[0].start_ms) for i in kept]


def busy(intervals: list[Interval], kind: str) -> list[tuple[float, float]]:
    """When anything of a kind runs: disjoint (start, end), ms."""
    found: list[tuple[float, float]] = []
    for i in sorted((i for i in intervals if kind_of(i.name) == kind), key=lambda i: i.start_ms):
        if found and i.start_ms <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], i.end_ms))
        else:
            found.append((i.start_ms, i.end_ms))
    return found


def share_under_experts(intervals: list[Interval]) -> float | None:
    """Part of the exchange's time in which an expert kernel runs; None without exchange."""
    exchange, experts = busy(intervals, "exchange"), busy(intervals, "experts")
    total = sum(end - start for start, end in exchange)
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in exchange for c, d in experts)
    return both / total if total else None


def draw(panels: dict[str, list[Interval]]) -> Any:
    """A panel for each list of intervals, a lane for each stream, one scale for all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    lanes = [list(dict.fromkeys(i.stream for i in of_panel)) for of_panel in panels.values()]
    heights = [max(1, len(streams)) + 0.9 for streams in lanes]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(11, 1.2 + 0.55 * sum(heights)), height_ratios=heights, sharex=True
    )
    axes = [axes] if len(panels) == 1 else axes
    for ax, (title, of_panel), streams in zip(axes, panels.items(), lanes, strict=True):
        for i in of_panel:
            colour = COLOURS[kind_of(i.name)]
            ax.barh(streams.index(i.stream), i.ms, 0.75, i.start_ms, color=colour, lw=0)
        end = max((i.end_ms for i in of_panel), default=0.0)
        ax.set_title(f"{title}: {end:.2f} ms", fontsize=10, color=INK, loc="left")
        ax.set_yticks(range(len(streams)), [f"stream {n + 1}" for n in range(len(streams))])
        ax.tick_params(labelsize=8, colors=GREY, length=0)
        ax.invert_yaxis()
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
    axes[-1].set_xlabel("ms", fontsize=9, color=GREY)
    legend = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=legend, loc="lower center", ncols=3, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def save(figure: Any, path: Path) -> None:
    """As SVG, the same bytes for the same figure."""
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.hashsalt": "moejax"}):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def panels_of(rows: list[dict[str, Any]]) -> dict[str, list[Interval]]:
    """The two rows to show: the first in one chunk, and the fastest of its shape and pass."""

    def end(row: dict[str, Any]) -> float:
        return max(i.end_ms for i in map(Interval._make, row["intervals"]))

    def title(row: dict[str, Any]) -> str:
        chunks = "one chunk" if row["chunks"] == 1 else f"{row['chunks']} chunks"
        return "{shape}, {pass}, {mode}, {options}, ".format(**row) + chunks

    rows = [row for row in rows if row["intervals"]]
    if not rows:
        raise SystemExit("the profiles saw no kernels of a device: another profiler may hold it")
    first = next((row for row in rows if row["chunks"] == 1), rows[0])
    alike = [r for r in rows if all(r[k] == first[k] for k in ("shape", "pass")) and r is not first]
    shown = [first, *([min(alike, key=end)] if alike else [])]
    return {title(row): [Interval._make(i) for i in row["intervals"]] for row in shown}


def main() -> None:
    rows = json.loads((RESULTS / f"{NAME}.json").read_text())["rows"]
    save(draw(panels_of(rows)), PICTURE)
    print(PICTURE)


if __name__ == "__main__":
    main()
