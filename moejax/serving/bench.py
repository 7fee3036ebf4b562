"""The mode `bench` of `infer.py`: how fast texts come at several loads."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from moejax.errors import UserError
from moejax.inference.params import SamplingParams
from moejax.serving.flags import EngineFlags
from moejax.serving.loop import EngineLoop, Piece
from moejax.serving.start import note, running_model
from moejax.serving.text_model import TextModel

__all__ = ["BenchConfig", "Load", "main", "measure"]

DESCRIPTION = """Measures how fast texts come.

At each load so many requests are always under way, until all are done: tokens a second, the time to
the first token, and the time between two tokens of a text."""


@dataclass(frozen=True)
class BenchConfig(EngineFlags):
    """A measurement.

    Attributes:
        loads: requests under way at once, for each row of the table.
        requests: of each load; 0: four times the load.
        prompt_tokens: length of a random prompt.
        max_tokens: length of each continuation.
        prompts: file of prompts, a text a line, taken in turn; random tokens if not given.
        json: file for the figures.
        seed: of the random prompts.
    """

    loads: tuple[int, ...] = (1, 4, 16)
    requests: int = 0
    prompt_tokens: int = 64
    max_tokens: int = 64
    prompts: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    json: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.loads or min(self.loads) < 1:
            raise UserError(f"--loads {' '.join(map(str, self.loads))}: must be at least 1 each")
        for name, low in (("requests", 0), ("prompt_tokens", 1), ("max_tokens", 1), ("seed", 0)):
            if getattr(self, name) < low:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {getattr(self, name)}: must be at least {low}")


@dataclass(frozen=True)
class Load:
    """What one load gave. Times in seconds; of those for each request median and 99th percentile.

    first: from handing a request in to its first token.
    between: from the first token to the last, for each token after the first.
    """

    load: int
    requests: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    first_p50: float
    first_p99: float
    between_p50: float
    between_p99: float

    @property
    def speed(self) -> float:
        """Output tokens a second, of all texts together."""
        return self.output_tokens / self.seconds


@dataclass
class _Timed:
    start: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0


def main(config: BenchConfig) -> None:
    """Prints a table, and writes the figures if asked to.

    Raises:
        UserError: whatever a user can mend.
    """
    # Files first: a wrong name should be told before a model is loaded.
    texts = _texts(config)
    # The same prompts come again: pages kept of them would be measured, not the model.
    with running_model(config, chats=False, prefix_reuse=False) as (model, loop):
        prompts = _prompts(config, texts, model, loop)
        params = SamplingParams(temperature=0, max_tokens=config.max_tokens, ignore_eos=True)
        rows = []
        print(_HEAD)
        for load in config.loads:
            count = config.requests or 4 * load
            # The first round compiles, and is not counted.
            measure(loop, prompts(min(count, 2 * load)), params, load)
            rows.append(measure(loop, prompts(count), params, load))
            print(_row(rows[-1]), flush=True)
    if config.json:
        _write(config, rows)


def measure(
    loop: EngineLoop, prompts: Sequence[np.ndarray], params: SamplingParams, load: int
) -> Load:
    """Continues prompts, `load` of them at a time.

    Raises:
        UserError: a prompt is refused, or the engine has failed.
    """
    news: queue.Queue[tuple[_Timed, float, Piece]] = queue.Queue()
    timed: list[_Timed] = []
    under_way = 0
    start = time.perf_counter()
    while len(timed) < len(prompts) or under_way:
        while under_way < load and len(timed) < len(prompts):
            one = _Timed(time.perf_counter())

            def listen(piece: Piece, one: _Timed = one) -> None:
                news.put((one, time.perf_counter(), piece))

            loop.submit([prompts[len(timed)]], params, listen)
            timed.append(one)
            under_way += 1
        one, now, piece = news.get()
        if piece.finish in ("cancelled", "failed"):
            raise UserError("the engine has ended; start again")
        if piece.tokens:
            one.first = one.first or now
            one.last = now
            one.tokens += len(piece.tokens)
        under_way -= piece.finish is not None
    seconds = time.perf_counter() - start
    first = [one.first - one.start for one in timed if one.tokens]
    between = [(one.last - one.first) / (one.tokens - 1) for one in timed if one.tokens > 1]
    return Load(
        load,
        len(timed),
        seconds,
        sum(map(len, prompts)),
        sum(one.tokens for one in timed),
        *_percentiles(first),
        *_percentiles(between),
    )


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    return tuple(np.percentile(values, [50, 99]).tolist()) if values else (0.0, 0.0)


def _texts(config: BenchConfig) -> list[str]:
    """The prompts of the file; empty where none is named."""
    if not config.prompts:
        return []
    try:
        lines = Path(config.prompts).read_bytes().decode().splitlines()
    except OSError as error:
        raise UserError(
            f"--prompts {config.prompts}: {error.strerror or error}; check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompts {config.prompts}: not UTF-8 at byte {error.start}; give text in UTF-8"
        ) from None
    if not any(lines):
        raise UserError(f"--prompts {config.prompts}: holds no text; give a text a line")
    return [line for line in lines if line]


def _prompts(
    config: BenchConfig, texts: Sequence[str], model: TextModel, loop: EngineLoop
) -> Callable[[int], list[np.ndarray]]:
    """Gives so many prompts, each time others."""
    if texts:
        given = [model.encode(text) for text in texts]
        return lambda count: [given[i % len(given)] for i in range(count)]
    longest = loop.engine.max_len
    if config.prompt_tokens + config.max_tokens > longest:
        raise UserError(
            f"--prompt-tokens {config.prompt_tokens} --max-tokens {config.max_tokens}: together "
            f"at most {longest}, the context"
        )
    rng = np.random.default_rng(config.seed)
    size = model.tokenizer.vocab_size
    return lambda count: list(rng.integers(0, size, (count, config.prompt_tokens), np.int32))


_HEAD = (
    "| load | requests | tokens/s | of one text | first token, ms | between tokens, ms |\n"
    "| ---: | ---: | ---: | ---: | ---: | ---: |"
)


def _row(row: Load) -> str:
    each = 1 / row.between_p50 if row.between_p50 else 0.0
    times = [
        f"{1e3 * p50:.1f} (p99 {1e3 * p99:.1f})"
        for p50, p99 in ((row.first_p50, row.first_p99), (row.between_p50, row.between_p99))
    ]
    return f"| {row.load} | {row.requests} | {row.speed:.1f} | {each:.1f} | {' | '.join(times)} |"


def _write(config: BenchConfig, rows: Sequence[Load]) -> None:
    import jax

    figures = {
        "device": f"{len(jax.devices())} × {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "settings": asdict(replace(config, json="")),
        "rows": [{**asdict(row), "tokens_per_second": row.speed} for row in rows],
    }
    try:
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"--json {config.json}: {error.strerror or error}; name another file"
        ) from None
    note(f"figures in {config.json}")
