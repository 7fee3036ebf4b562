"""What the command does: reads a model, compresses it, writes it, measures both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moejax.compress.changed import check
from moejax.compress.config import CompressConfig
from moejax.compress.layers import StoredLayers
from moejax.compress.measure import Measured, agreement, measure, prompts_of
from moejax.compress.pipeline import Compressed, compress
from moejax.compress.texts import read_texts
from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.inference.model_folder import is_model_folder, save_model_folder
from moejax.inference.source import ModelSource, open_model
from moejax.training.origin import keep_origin

__all__ = ["compress_model", "weights_of"]

_PROMPTS = 16


def compress_model(config: CompressConfig, say: Callable[[str], None]) -> None:
    """Compresses a model.

    Args:
        config: which one, and how.
        say: is told what happens.

    Raises:
        UserError: there is no model, it cannot be compressed so, or the folder cannot be written.
    """
    packaged = config.model == "packaged"
    source = open_model(None if packaged else config.model)
    tokenizer = source.need_tokenizer()
    check(source.config, config)
    _check_out(config, source)
    if config.data.seq_len > source.config.max_context:
        raise UserError(
            f"--data.seq-len {config.data.seq_len}: longer than the model's context of "
            f"{source.config.max_context}"
        )
    say("reading text")
    texts = read_texts(config, tokenizer, source.bos_id)
    say(f"{source.path}: calibrating on {texts.calibration_WS.size} tokens")
    stored = StoredLayers(source)
    found = compress(stored, texts.calibration_WS, config, say)
    flat = weights_of(stored, found)
    final = dataclasses.replace(
        found.config,
        scan_layers=source.config.scan_layers,
        compute_dtype=source.config.compute_dtype,
    )
    record = {
        "compressed_from": str(source.path.absolute()) if not packaged else "packaged",
        "how": _how(config),
        "layers": [dataclasses.asdict(report) for report in found.reports],
    }
    save_model_folder(config.out, flat, final, tokenizer, record=record)
    keep_origin(Path(config.out), source)  # chat templates, and the ids that end texts
    size = sum(file.stat().st_size for file in Path(config.out).glob("*.safetensors"))
    say(f"wrote {config.out}: {size / 1e6:.1f} MB of weights; {_sizes(final)}")
    if not config.measure_windows:
        return
    limit = config.measure_windows
    prompts = prompts_of(texts.windows, _PROMPTS, source.config.max_context, source.bos_id)
    before, after = (
        measure(model, weights, texts.windows, limit=limit, prompts=prompts)
        for model, weights in (
            (stored.config, {name: stored.weight(name) for name in stored.names}),
            (found.config, flat),
        )
    )
    for line in _comparison(before, after):
        say(line)


def weights_of(stored: StoredLayers, found: Compressed) -> dict[str, Any]:
    """All weights of the compressed model by name, those that stayed read when they are needed."""
    gone = found.changed.keys() | found.removed
    return {n: stored.weight(n) for n in stored.names if n not in gone} | found.changed


def _check_out(config: CompressConfig, source: ModelSource) -> None:
    """Refuses to write where it would only be refused after the work, or over what is read."""
    out = Path(config.out).resolve()
    if out == source.path.resolve():
        raise UserError(f"OUT {config.out}: is the model that is read; name another folder")
    if out.exists() and not is_model_folder(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"OUT {config.out}: is there and no model folder; name another folder")


def _how(config: CompressConfig) -> dict[str, Any]:
    from moejax.training.config_json import config_to_json

    said = config_to_json(config)
    return {name: value for name, value in said.items() if name not in ("model", "out", "data")}


def _sizes(model: ModelConfig) -> str:
    numbers = model.expert_numbers
    experts = ", ".join(map(str, numbers if len(set(numbers)) > 1 else numbers[:1]))
    sharing, came = model.moe.experts.sharing, model.moe.router.merged_from
    if sharing.active:
        experts += f" sharing {sharing.kind!r}" + (f" of {sharing.rank}" if sharing.rank else "")
    if (together := model.moe.experts.together) > 1:
        experts += f", computed {together} together"
    return f"experts a layer: {experts}" + (f", merged from {came}" if came else "")


def _comparison(before: Measured, after: Measured) -> Iterator[str]:
    change = after.bits_per_byte / before.bits_per_byte - 1
    exact, leading = agreement(after.continuations, before.continuations)
    size, active = after.parameters / before.parameters, after.active / before.active
    yield (
        f"parameters: {before.parameters} before, {after.parameters} after ({size:.1%}); a token "
        f"uses {before.active} before, at most {after.active} after ({active:.1%})"
    )
    yield (
        f"held-out bits per byte: {before.bits_per_byte:.4f} before, {after.bits_per_byte:.4f} "
        f"after ({change:+.2%})"
    )
    if after.continuations:
        yield (
            f"{len(after.continuations)} continuations: {exact:.0%} the same, {leading:.0%} of "
            "tokens before the first that differs"
        )
