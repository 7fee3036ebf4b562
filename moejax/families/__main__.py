"""Writes a run, or a model folder, as a folder of Hugging Face transformers.

python -m moejax.families runs/NAME OUT                       in the only family that can say it
python -m moejax.families runs/NAME OUT --family qwen3_moe
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from moejax.cli import parse, run_main
from moejax.errors import UserError
from moejax.families import MODEL_TYPES, write_config
from moejax.progress import NowAndThen

if TYPE_CHECKING:
    from moejax.config import ModelConfig

__all__ = ["ExportConfig", "export", "main"]

_DESCRIPTION = "Writes a model as a folder that Hugging Face transformers opens."


@dataclass(frozen=True)
class ExportConfig:
    """What to write, and where.

    Attributes:
        model: run directory, model folder, or folder of transformers.
        out: the folder to write; one of transformers that is there is replaced.
        family: its `model_type`, such as qwen3_moe; empty: the one that the model came from, or
            the only one that can say it.
        dtype: of the weights.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    family: str = ""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    required: Any = tyro.MISSING
    start = ExportConfig(required, required)
    return run_main(lambda: export(parse(start, argv, "python -m moejax.families", _DESCRIPTION)))


def export(config: ExportConfig) -> None:
    """Writes the folder.

    Experts that were merged, or that share parameters, become independent ones again, see
    `moejax.families.expanded`.

    Raises:
        UserError: there is no model, no family can say it, or the folder cannot be written.
    """
    import jax

    from moejax.families.expanded import expanded_config, expanded_weights, expansion_note
    from moejax.families.export import save_hf_folder
    from moejax.inference.source import open_model
    from moejax.training.origin import origin_of, text_files
    from moejax.training.state import Blueprint
    from moejax.training.streaming import LazyWeight, WeightStream
    from sharding.mesh import MeshShape, make_mesh

    # Weights go from disk to disk. A program that called this may have started its devices.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")
    source = open_model(config.model)
    model, origin = dataclasses.replace(source.config, scan_layers=False), origin_of(source)
    written = expanded_config(model)
    family = config.family or origin.family or only_family(written)
    write_config(written, family)  # refused before anything is read
    if note := expansion_note(model):
        print(f"{config.model}: {note}", flush=True)
    stream = WeightStream(source, Blueprint(model, make_mesh(MeshShape())))
    notes = _Notes({name: stream.num_bytes(name) for name in stream.targets})
    tokenizer = source.tokenizer
    weights = {name: LazyWeight(stream, name, notes.read) for name in stream.targets}
    save_hf_folder(
        config.out,
        expanded_weights(weights, model),
        written,
        family=family,
        tokenizer=tokenizer,
        files=[file for file in text_files(source) if _ends_texts(file)],
        end_ids=origin.end_ids,
        bos_id=origin.bos_id,
        dtype=np.dtype(config.dtype),
    )
    if tokenizer is None or tokenizer.kind == "bytes":
        print(f"{config.out}: without a tokenizer: transformers has none of bytes", flush=True)
    print(f"wrote {config.out}: {family}, {config.dtype}", flush=True)


def only_family(model: ModelConfig) -> str:
    """The family of transformers that a model belongs to.

    Raises:
        UserError: none can say it, or several.
    """
    able = []
    for family in MODEL_TYPES:
        with contextlib.suppress(UserError):
            write_config(model, family)
            able.append(family)
    if len(able) == 1:
        return able[0]
    if able:
        raise UserError(f"{' and '.join(able)} can both say this model: pass --family {able[0]}")
    raise UserError(
        f"no family of {', '.join(MODEL_TYPES)} can say this model: pass --family NAME to be told "
        "what differs"
    )


def _ends_texts(file: Path) -> bool:
    """Whether a copy of the file loses nothing: the ids that end texts may stand elsewhere."""
    if file.name != "generation_config.json":
        return True
    return json.loads(file.read_bytes()).get("eos_token_id") is not None


class _Notes:
    """Tells now and then how far it is."""

    def __init__(self, num_bytes: Mapping[str, int]):
        self._num_bytes, self._total = num_bytes, sum(num_bytes.values())
        self._left, self._seen = self._total, set[str]()
        self._tell = NowAndThen(lambda line: print(line, file=sys.stderr, flush=True))

    def read(self, name: str) -> None:
        """A weight has been read, perhaps not for the first time."""
        if name not in self._seen:
            self._seen.add(name)
            self._left -= self._num_bytes[name]
        self._tell(f"{1 - self._left / self._total:.0%} of the weights")


if __name__ == "__main__":
    sys.exit(main())
