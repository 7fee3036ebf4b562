"""What a run tells while it goes: the step line, the time, the summary."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from moejax.training.config import TrainConfig
    from sharding.mesh import MeshShape

__all__ = [
    "StepTimer",
    "explain_layer",
    "format_duration",
    "print_summary",
    "step_line",
]


def explain_layer(config: TrainConfig, shape: MeshShape) -> list[str]:
    """What computes the layers of experts on this device; see `MoELayer.explain`."""
    from flax import nnx

    from moejax.layer import MoELayer

    model = config.model
    tokens = config.data.batch_size * config.data.seq_len
    tokens //= config.accumulate * shape.data * shape.expert
    lines: dict[str, None] = {}  # each once, in order
    for moe in dict.fromkeys(layer.moe for layer in model.layers() if layer.moe is not None):
        layer = nnx.eval_shape(
            lambda moe=moe: MoELayer(
                model.d_model, moe, expert_devices=shape.expert, rngs=nnx.Rngs(params=0)
            )
        )
        found = layer.explain(tokens, dtype=model.compute_dtype, tensor=shape.tensor)
        lines |= dict.fromkeys(found)
    return list(lines)


def step_line(
    step: int,
    steps: int,
    *,
    loss: float,
    learning_rate: float,
    grad_norm: float,
    step_seconds: float,
    tokens_per_second: float,
    seconds_left: float,
    bits_per_byte: float | None = None,
    utilisation: float | None = None,
) -> str:
    """One line about one step.

    Args:
        step: steps done, this one included.
        steps: steps of the whole run.
        loss: nats a token.
        learning_rate: of this step.
        grad_norm: global norm before clipping.
        step_seconds: duration of this step, in seconds.
        tokens_per_second: over all devices.
        seconds_left: until the last step; NaN while unknown.
        bits_per_byte: the loss in bits a byte of text, where the bytes a token are known.
        utilisation: model FLOPs over the peak of the devices, 0 to 1, where the peak is known.
    """
    width = len(str(steps))
    parts = [f"step {step:{width}d}/{steps} ({step / max(steps, 1):4.0%})", f"loss {loss:.4f}"]
    if bits_per_byte is not None:
        parts.append(f"{bits_per_byte:.3f} bits/byte")
    parts += [
        f"lr {learning_rate:.2e}",
        f"norm {grad_norm:.2f}",
        f"{step_seconds * 1e3:,.0f} ms" if step_seconds >= 0.1 else f"{step_seconds * 1e3:.2f} ms",
        f"{tokens_per_second:,.0f} tok/s",
    ]
    if utilisation is not None:
        parts.append(f"mfu {utilisation:.1%}")
    parts.append(f"left {format_duration(seconds_left)}")
    return " | ".join(parts)


def format_duration(seconds: float) -> str:
    """`45s`, `12m34s`, `3h05m`, `2d04h`; `?` for what is not finite."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = whole // 60
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes // (24 * 60)}d{minutes // 60 % 24:02d}h"


class StepTimer:
    """Splits time into training, program (set-up, compiling) and paused (saving, evaluating).

    Every second since it was made belongs to one of the three. Steps are counted by `tick`, which
    the loop calls when a step's result has arrived; the time between two ticks, less what
    `program` and `paused` blocks took in between, is training.

    Attributes:
        training_seconds, program_seconds, paused_seconds: totals so far.
        step_seconds: duration of the last step; NaN before the first.
    """

    def __init__(
        self,
        steps_left: int,
        tokens_per_step: int,
        clock: Callable[[], float] = time.perf_counter,
        window: int = 50,
    ):
        """Starts the clock.

        Args:
            steps_left: steps that this process is to make.
            tokens_per_step: tokens of a step over all devices.
            clock: seconds, monotonic.
            window: the rates are means over this many last steps.
        """
        self.training_seconds = self.program_seconds = self.paused_seconds = 0.0
        self.step_seconds = math.nan
        self._steps_left = steps_left
        self._tokens_per_step = tokens_per_step
        self._clock = clock
        self._last = clock()
        self._recent: deque[float] = deque(maxlen=window)
        self._pending = 0.0  # training time since the last tick, up to `_last`
        self._inside = False

    def _advance(self) -> float:
        now = self._clock()
        passed, self._last = now - self._last, now
        return passed

    @contextlib.contextmanager
    def program(self) -> Iterator[None]:
        """A block that sets up or compiles."""
        with self._block("program_seconds"):
            yield

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A block that saves, evaluates or samples."""
        with self._block("paused_seconds"):
            yield

    @contextlib.contextmanager
    def _block(self, total: str) -> Iterator[None]:
        if self._inside:
            raise RuntimeError("program() and paused() blocks do not nest")
        self._pending += self._advance()
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            setattr(self, total, getattr(self, total) + self._advance())

    def tick(self, compiled: bool = False) -> None:
        """A step is done.

        Args:
            compiled: this step compiled the program on its way: its time counts as program time
                and stays out of the rates.
        """
        seconds, self._pending = self._pending + self._advance(), 0.0
        self.step_seconds = seconds
        self._steps_left = max(self._steps_left - 1, 0)
        if compiled:
            self.program_seconds += seconds
        else:
            self.training_seconds += seconds
            self._recent.append(seconds)

    @property
    def mean_step_seconds(self) -> float:
        """Mean over the last steps; NaN before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Rate over the last steps; NaN before the first."""
        return self._tokens_per_step / max(self.mean_step_seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        """Training time of the steps to come, in seconds; NaN before the first."""
        return self._steps_left * self.mean_step_seconds


def print_summary(title: str, rows: Sequence[tuple[str, str]], file: TextIO | None = None) -> None:
    """Prints a two-column table, what a run ends with.

    Args:
        title: above the table.
        rows: (name, value).
        file: where to; None is stdout.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="bold"), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        # Text: brackets in a value are no markup.
        table.add_row(Text(name), Text(value))
    Console(file=file, highlight=False).print(table)
