"""The mode `routes` of `infer.py`: which experts a text uses, layer by layer.

Shape letters: L layers with experts, E experts, B windows of the text, S tokens of a window.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from moejax.errors import UserError
from moejax.serving.flags import ModelFlags
from moejax.serving.start import (
    keep_compiled_programs,
    load_model,
    note,
    reading_notes,
    start_devices,
)
from moejax.serving.text_model import TextModel

if TYPE_CHECKING:
    from moejax.training.state import Blueprint

__all__ = ["RoutesConfig", "count_routes", "draw_routes", "main"]

DESCRIPTION = """Shows which experts a text uses: counts, layer × expert, and a picture."""

_WINDOW = 512
_TOGETHER = 8  # windows of each device that run at once


@dataclass(frozen=True)
class RoutesConfig(ModelFlags):
    """What to count, and where to write it.

    Attributes:
        text: file to read; `-` is standard input.
        prompt: the text itself.
        counts: file for the counts, .npz: counts [layer, expert], layers, tokens.
        picture: file for the picture, .png or .svg; empty: none.
    """

    text: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"], metavar="TEXT")] = ""
    counts: Annotated[str, tyro.conf.arg(metavar="FILE")] = "routes.npz"
    picture: Annotated[str, tyro.conf.arg(metavar="FILE")] = "routes.png"

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.counts).suffix != ".npz":
            raise UserError(f"--counts {self.counts}: must end with .npz")
        if self.picture and Path(self.picture).suffix not in (".png", ".svg"):
            raise UserError(f"--picture {self.picture}: must end with .png or .svg")


def main(config: RoutesConfig) -> None:
    """Counts, writes and draws.

    Raises:
        UserError: whatever a user can mend.
    """
    from moejax.inference.source import open_model

    if bool(config.text) == bool(config.prompt):
        raise UserError("--text, --prompt: give one of them, a file or a text")
    source = open_model(config.model or None, progress=reading_notes())
    layers = [i for i, layer in enumerate(source.config.layers()) if layer.moe is not None]
    if not layers:
        raise UserError(f"{source.path}: the model has no experts")
    text = config.prompt or _read(config.text)
    if not text:
        raise UserError("the text is empty: there is nothing to count")
    # With the id that begins a text, if the model wants one: it changes all that follows.
    tokens = TextModel.open(source, chats=False).encode(text)
    shape = start_devices(config, source.config)
    keep_compiled_programs()
    loaded = load_model(source, shape, config.dtype, config.expert_weights)
    counts_LE = count_routes(*loaded, tokens)
    try:
        np.savez(config.counts, counts=counts_LE, layers=layers, tokens=len(tokens))
        if config.picture:
            draw_routes(counts_LE, layers, config.picture)
    except OSError as error:
        raise UserError(
            f"{error.filename or config.counts}: {error.strerror or error}; name another file"
        ) from None
    uses = counts_LE.sum(axis=1, keepdims=True)
    busiest = (counts_LE / uses).max() * counts_LE.shape[1]
    idle = int((counts_LE == 0).sum())
    note(
        f"{len(tokens)} tokens; the busiest expert of a layer has {busiest:.1f} times the mean, "
        f"{idle} of {counts_LE.size} are idle; {config.counts} {config.picture}".rstrip()
    )


def count_routes(blueprint: Blueprint, params: Any, biases: Any, tokens: np.ndarray) -> np.ndarray:
    """How often each expert of each layer was chosen.

    A text longer than a window of 512 tokens, or than the context, is cut into several, and the
    model sees nothing across a cut.

    Args:
        blueprint: model and mesh.
        params, biases: its weights.
        tokens: int [n], n > 0.

    Returns:
        int64 [L, E]; each row sums to n · K.
    """
    import jax
    from jax import numpy as jnp
    from jax.sharding import PartitionSpec as P

    from sharding.collectives import psum_statistics
    from sharding.mesh import TOKEN_AXES
    from sharding.specs import specs_of

    length = min(_WINDOW, blueprint.config.max_context, len(tokens))
    devices = blueprint.shape.data * blueprint.shape.expert
    windows = -(-len(tokens) // length)
    together = devices * min(_TOGETHER, -(-windows // devices))
    steps = -(-windows // together)
    tokens_NBS = np.zeros(steps * together * length, np.int32)
    tokens_NBS[: len(tokens)] = tokens
    shape = (steps, together, length)
    mask_NBS = (np.arange(tokens_NBS.size) < len(tokens)).reshape(shape)

    def count(params: Any, biases: Any, tokens_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
        model = blueprint.merge(params, biases)
        out = model(tokens_BS, token_mask_BS=mask_BS, inference=True)
        assert out.aux is not None
        return psum_statistics(out.aux.counts_E, TOKEN_AXES)

    rows = P(TOKEN_AXES, None)
    run = jax.jit(
        jax.shard_map(
            count,
            mesh=blueprint.mesh,
            in_specs=(specs_of(blueprint.params), blueprint.bias_specs, rows, rows),
            out_specs=P(),
            check_vma=False,
        )
    )
    batches = zip(tokens_NBS.reshape(shape), mask_NBS)
    counts = [np.asarray(run(params, biases, jnp.asarray(t), jnp.asarray(m))) for t, m in batches]
    return np.array(counts, np.int64).sum(axis=0)


def draw_routes(counts_LE: np.ndarray, layers: list[int], path: str) -> None:
    """Draws the share of each expert in its layer, as a multiple of an equal share.

    The experts of a layer are numbered as they are; they are not related across layers.
    """
    from matplotlib.figure import Figure

    num_layers, experts = counts_LE.shape
    shares_LE = counts_LE / np.maximum(counts_LE.sum(axis=1, keepdims=True), 1) * experts
    figure = Figure((min(4 + experts / 12, 16), min(2 + num_layers / 4, 16)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares_LE, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    shown = range(0, num_layers, max(1, num_layers // 24))
    axes.set_yticks(list(shown), [str(layers[i]) for i in shown])
    figure.colorbar(image, label="uses, 1: as many as the mean expert of the layer")
    figure.savefig(path, dpi=120)


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
