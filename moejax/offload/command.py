"""What the command does: reads a model and texts, fits predictors, measures and writes them.

Shape letters: V windows to fit on, W to measure on, S tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from moejax.compress.layers import StoredLayers
from moejax.compress.texts import windows_to_fit
from moejax.errors import UserError
from moejax.inference.source import ModelSource, open_model
from moejax.offload.fit_config import FitConfig
from moejax.offload.fits import save_fits
from moejax.offload.recall import Recall
from moejax.offload.study import host_recalls, study
from moejax.placement.judge import windows_of
from moejax.training.text import load_and_split

__all__ = ["fit_model", "open_texts", "recall_table"]


def fit_model(config: FitConfig, say: Callable[[str], None]) -> None:
    """Fits the predictors of a model.

    Args:
        config: which one, and how.
        say: is told what happens, and the recall.

    Raises:
        UserError: there is no model with experts, no text, or the file cannot be written.
    """
    _check_out(config)
    source = open_model(None if config.model == "packaged" else config.model)
    fit_WS, held_WS = open_texts(config, source)
    say(
        f"{source.path}: fitting on {fit_WS.size} tokens, measuring on the {held_WS.size} of "
        f"{len(held_WS)} other texts"
    )
    found = study(
        StoredLayers(source),
        fit_WS,
        held_WS,
        prompt=config.prompt,
        ridge=config.ridge,
        say=say,
    )
    for line in recall_table([*host_recalls(found, prompt=config.prompt), *found.recalls]):
        say(line)
    save_fits(config.out, found.fits)
    say(f"wrote {config.out}: {Path(config.out).stat().st_size / 1e6:.1f} MB")


def open_texts(
    config: FitConfig, source: ModelSource
) -> tuple[Int32[np.ndarray, "V S"], Int32[np.ndarray, "W S"]]:
    """Windows to fit on, and of the held-out documents to measure on.

    Raises:
        UserError: the model has no experts or less context, or there is no such text.
    """
    length = config.data.seq_len
    if not any(layer.moe for layer in source.config.layers()):
        raise UserError(f"{source.path}: the model has no layer with experts")
    if length > source.config.max_context:
        raise UserError(
            f"--data.seq-len {length}: longer than the model's context of "
            f"{source.config.max_context}"
        )
    tokenizer = source.need_tokenizer()
    _, training, held_out = load_and_split(config.data)
    fit_WS = windows_to_fit(training, tokenizer, length, config.tokens, config.seed, source.bos_id)
    windows = windows_of(held_out, tokenizer, length, config.windows)
    held_WS = windows.tokens_NS1[windows.mask_NS.all(1), :length]
    if not len(held_WS):
        raise UserError(
            f"no held-out document has {length} tokens to measure on: name longer text with "
            "--data.held-out-paths, hold out more with --data.held-out, or pass a smaller "
            "--data.seq-len"
        )
    if source.bos_id is not None:
        held_WS = np.insert(held_WS[:, :-1], 0, source.bos_id, axis=1)
    return fit_WS, held_WS.astype(np.int32)


def recall_table(recalls: Sequence[Recall]) -> Iterator[str]:
    """Lines: a row for each predictor, two numbers for each distance."""
    names = list(dict.fromkeys(recall.predictor for recall in recalls))
    distances = sorted(
        {recall.distance for recall in recalls}, key=lambda d: float("inf") if d is None else d
    )
    found = {(recall.predictor, recall.distance): recall for recall in recalls}
    yield "share of the chosen experts among the k and 2k likeliest, by layers ahead:"
    heads = ["next token" if d is None else str(d) for d in distances]
    yield f"{'':14}" + "".join(f"{head:>14}" for head in heads)
    for name in names:
        cells = [found.get((name, distance)) for distance in distances]
        numbers = ("" if r is None else f"{r.at_k:.1%} {r.at_2k:.1%}" for r in cells)
        yield (f"{name:14}" + "".join(f"{number:>14}" for number in numbers)).rstrip()


def _check_out(config: FitConfig) -> None:
    """Refuses to write where it would only be refused after the work."""
    out = Path(config.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        found = "a folder" if out.is_dir() else "its folder is not there"
        raise UserError(f"OUT {config.out}: {found}; name a file in a folder that is there")
