"""Where a layer's time goes, stream by stream: read from a profile, drawn one below the other.

    python benchmarks/ep_timeline.py     after `ep_layer.py --profile DIR`

`ep_layer.py --profile` writes benchmarks/results/ep_layer_h200x4_timeline.json, a row for each
variant with the `intervals` of one call on the first device, and `under`: the part of the
exchange's time in which an expert kernel runs. This draws docs/img/exchange_timeline.svg, one panel
below the other: what one writes without the library, the ring (one chunk: nothing overlaps), and
the fastest of the others of that shape and pass. In mode `remote` the rows of a layer with narrow
experts travel inside the first product, which has a colour of its own.
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
    "experts, rows arriving meanwhile": "#8a5a83",
    "routing, planning, sums": "#9aa5ae",
}
EXCHANGE = ("nccl", "allgather", "alltoall", "sendrecv", "all-to-all", "all-gather", "memcpyp2p")
PUSHED = ("push_rows", "push_sums", "multigpubarrier")  # of mode `remote`
EXPERTS = ("experts_up", "experts_down", "rows_gradient", "w_in_gradient", "w_out_gradient")
BASELINE_EXPERTS = ("nvjet", "gemm", "cutlass")  # which has no router and no other product


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
    """Which of `COLOURS` a kernel is, by its name alone."""
    if _has(name, EXCHANGE + PUSHED):
        return "exchange"
    return "experts" if _has(name, EXPERTS) else "routing, planning, sums"


def kinds_of(row: dict[str, Any]) -> Callable[[str], str]:
    """`kind_of` for a row of the result file, whose layer is known."""
    names = [name for _, name, *_ in row["intervals"]]
    carried = row["mode"] == "remote" and not any(_has(name, ("push_rows",)) for name in names)

    def kind(name: str) -> str:
        if row["impl"] == "xla_all_to_all" and _has(name, BASELINE_EXPERTS):
            return "experts"
        if carried and _has(name, ("experts_up",)):
            return "experts, rows arriving meanwhile"
        return kind_of(name)

    return kind


def _has(name: str, words: Iterable[str]) -> bool:
    low = name.lower().replace("_", "").replace(" ", "")
    return any(word.replace("_", "") in low for word in words)


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


def draw(rows: list[dict[str, Any]]) -> Any:
    """A panel for each row, a lane for each stream, one scale for all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    panels = [[Interval._make(i) for i in row["intervals"]] for row in rows]
    lanes = [list(dict.fromkeys(i.stream for i in of_panel)) for of_panel in panels]
    heights = [max(1, len(streams)) + 0.9 for streams in lanes]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(11, 1.2 + 0.55 * sum(heights)), height_ratios=heights, sharex=True
    )
    axes = [axes] if len(panels) == 1 else axes
    for ax, row, of_panel, streams in zip(axes, rows, panels, lanes, strict=True):
        kind = kinds_of(row)
        for i in of_panel:
            colour = COLOURS[kind(i.name)]
            ax.barh(streams.index(i.stream), i.ms, 0.75, i.start_ms, color=colour, lw=0)
        end = max((i.end_ms for i in of_panel), default=0.0)
        ax.set_title(f"{_title(row)}: {end:.2f} ms", fontsize=10, color=INK, loc="left")
        ax.set_yticks(range(len(streams)), [f"stream {n + 1}" for n in range(len(streams))])
        ax.tick_params(labelsize=8, colors=GREY, length=0)
        ax.invert_yaxis()
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
    axes[-1].set_xlabel("ms", fontsize=9, color=GREY)
    legend = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=legend, loc="lower center", ncols=4, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def save(figure: Any, path: Path) -> None:
    """As SVG, the same bytes for the same figure."""
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.hashsalt": "moejax"}):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def _title(row: dict[str, Any]) -> str:
    chunks = "one chunk" if row["chunks"] == 1 else f"{row['chunks']} chunks"
    return "{impl}, {shape}, {pass}, {mode}, ".format(**row) + chunks


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the first row's shape and pass: the baseline, the ring in one chunk, the fastest other."""

    def end(row: dict[str, Any]) -> float:
        return max(i.end_ms for i in map(Interval._make, row["intervals"]))

    rows = [row for row in rows if row["intervals"]]
    if not rows:
        raise SystemExit("the profiles saw no kernels of a device: another profiler may hold it")
    rows = [r for r in rows if all(r[k] == rows[0][k] for k in ("shape", "pass"))]
    first = [r for r in rows if r["impl"] == "xla_all_to_all"][:1]
    first += [r for r in rows if r["mode"] == "ring" and r["chunks"] == 1][:1]
    others = [r for r in rows if r not in first]
    return first + sorted(others, key=end)[:1]


def main() -> None:
    rows = json.loads((RESULTS / f"{NAME}.json").read_text())["rows"]
    save(draw(shown(rows)), PICTURE)
    print(PICTURE)


if __name__ == "__main__":
    main()
