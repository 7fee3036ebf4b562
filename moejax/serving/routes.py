"""The mode `routes` of `infer.py`: which experts texts use, layer by layer.

Shape letters: L layers with experts, E experts, N tokens, K experts of a token.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from moejax.errors import UserError
from moejax.serving.flags import ModelFlags
from moejax.serving.locality import with_locality
from moejax.serving.start import (
    keep_compiled_programs,
    load_model,
    note,
    reading_notes,
    start_devices,
)
from moejax.serving.text_model import TextModel

__all__ = ["RoutesConfig", "main"]

DESCRIPTION = """Shows which experts texts use: counts, layer × expert, pictures, traces."""

_PICTURES = (".png", ".svg")


@dataclass(frozen=True)
class RoutesConfig(ModelFlags):
    """What to count, and where to write it.

    Attributes:
        text: files to read, each a document; `-` is standard input.
        prompt: the text itself.
        domain: a label for all documents, or one for each; if not given, their files' names without
            the ending.
        counts: file for the counts, .npz: counts [layer, expert], layers, tokens.
        picture: file for the picture, .png or .svg; empty: none.
        pairs_picture: file for a picture of which experts are chosen together, .png or .svg; empty:
            none.
        placement_stats: file for what a placement is planned from, .npz: pairs [layer, expert,
            expert], load [layer, expert], tokens [layer]; empty: none.
        trace: file for every token's experts, .npz: experts [token, layer, choice], lens and
            domains of the documents, num_experts; empty: none.
    """

    text: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE [FILE ...]")] = ()
    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"], metavar="TEXT")] = ""
    domain: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ()
    counts: Annotated[str, tyro.conf.arg(metavar="FILE")] = "routes.npz"
    picture: Annotated[str, tyro.conf.arg(metavar="FILE")] = "routes.png"
    pairs_picture: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    placement_stats: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    trace: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, endings in {
            "counts": (".npz",),
            "picture": _PICTURES,
            "pairs_picture": _PICTURES,
            "placement_stats": (".npz",),
            "trace": (".npz",),
        }.items():
            path = getattr(self, name)
            if (path or name == "counts") and Path(path).suffix not in endings:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {path}: must end with {' or '.join(endings)}")
        if self.text.count("-") > 1:
            raise UserError("--text - -: standard input can be read once; name it once")
        documents = max(len(self.text), 1)
        if len(self.domain) not in (0, 1, documents):
            raise UserError(
                f"--domain has {len(self.domain)} labels for {documents} documents: give one for "
                "all, or one for each"
            )

    @property
    def domains(self) -> list[str]:
        """A label of each document."""
        names = ["stdin" if path == "-" else Path(path).stem for path in self.text] or ["prompt"]
        return [*self.domain] * (len(names) // len(self.domain)) if self.domain else names


def main(config: RoutesConfig) -> None:
    """Counts, writes and draws.

    Raises:
        UserError: whatever a user can mend.
    """
    from moejax.inference.source import open_model

    if bool(config.text) == bool(config.prompt):
        raise UserError("--text, --prompt: give one of them, files or a text")
    source = with_locality(open_model(config.model or None, progress=reading_notes()), config)
    layers = [i for i, layer in enumerate(source.config.layers()) if layer.moe is not None]
    if not layers:
        raise UserError(f"{source.path}: the model has no experts")
    texts = [config.prompt] if config.prompt else [_read(path) for path in config.text]
    for path, text in zip(config.text, texts):
        if not text:
            raise UserError(f"--text {path}: the text is empty: there is nothing to count")
    # With the id that begins a text, if the model wants one: it changes all that follows.
    texts_of = TextModel.open(source, chats=False)
    documents = [texts_of.encode(text) for text in texts]
    shape = start_devices(config, source.config)
    keep_compiled_programs()

    from moejax.placement.record import record
    from moejax.placement.statistics import Statistics, write_statistics
    from moejax.placement.trace import Trace, write_trace
    from moejax.serving.route_pictures import draw_pairs, draw_routes

    loaded = load_model(source, shape, config.dtype, config.expert_weights)
    recording = record(*loaded, documents, tokens=bool(config.trace))
    load_LE, tokens = recording.load_LE, recording.num_tokens
    with _told(config.counts):
        np.savez(config.counts, counts=load_LE, layers=layers, tokens=tokens)
    if config.picture:
        with _told(config.picture):
            draw_routes(load_LE, layers, config.picture, source.config.expert_numbers)
    if config.pairs_picture:
        with _told(config.pairs_picture):
            draw_pairs(recording.pairs_LEE, load_LE, tokens, layers, config.pairs_picture)
    if config.placement_stats:
        counts = (recording.pairs_LEE, load_LE, np.full(len(layers), tokens))
        statistics = Statistics(*(array.astype(np.float32) for array in counts))
        write_statistics(config.placement_stats, statistics)
    if recording.experts_NLK is not None:
        lens = np.array([len(document) for document in documents], np.int64)
        experts = load_LE.shape[1]
        trace = Trace(recording.experts_NLK, lens, experts, tuple(config.domains))
        write_trace(config.trace, trace)
    uses = load_LE.sum(axis=1, keepdims=True)
    numbers = np.array(source.config.expert_numbers)
    busiest = ((load_LE / uses).max(axis=1) * numbers).max()
    idle = int(numbers.sum() - (load_LE > 0).sum())
    files = (
        *(config.counts, config.picture, config.pairs_picture),
        *(config.placement_stats, config.trace),
    )
    note(
        f"{tokens} tokens; the busiest expert of a layer has {busiest:.1f} times the mean, "
        f"{idle} of {numbers.sum()} are idle; {' '.join(filter(None, files))}"
    )


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    """Turns what the system says of a file into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: {error.strerror or error}; name another file"
        ) from None


def _read(path: str) -> str:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode()
    except OSError as error:
        raise UserError(f"--text {path}: {error.strerror or error}; check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--text {path}: not UTF-8 at byte {error.start}; give text in UTF-8"
        ) from None
