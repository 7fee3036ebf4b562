"""Continues text with a trained Mixture-of-Experts language model.

python infer.py -p "def "                      the model that comes with the package
python infer.py --model runs/NAME -p "def "    the newest checkpoint of a run
python infer.py                                asks for one text after the other
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from moejax.cli import parse, run_main
from moejax.errors import UserError

if TYPE_CHECKING:
    from moejax.config import ModelConfig
    from moejax.inference.source import ModelSource
    from sharding.mesh import MeshShape

_DESCRIPTION = "Continues text with a trained Mixture-of-Experts language model."
Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]
Prompts = Annotated[Repeated, tyro.conf.arg(aliases=["-p"], metavar="TEXT")]


@dataclass(frozen=True)
class InferConfig:
    """What to continue, and how.

    Attributes:
        prompt: beginning of a text; `-` reads standard input; several are continued together.
        model: run directory or model folder; the packaged model if not given.
        mesh: such as data=2,expert=4,tensor=1; `auto` lays the experts over all devices.
        devices: number of fake devices on a CPU; 0: as many as the mesh needs.
        max_tokens: most tokens of a continuation.
        temperature: of the probabilities; 0 takes the most probable token, always.
        top_k: draw from this many most probable tokens; 0: all.
        top_p: draw from the fewest most probable tokens with this mass.
        min_p: draw from tokens at least this times as probable as the most probable.
        seed: of the random numbers.
        stop: end a text before this string.
        dtype: of the computation; `auto` is float32 on a CPU and the model's own elsewhere.
    """

    prompt: Prompts = ()
    model: str = ""
    mesh: str = "auto"
    devices: int = 0
    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: Repeated = ()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        if self.devices < 0:
            raise UserError(f"--devices {self.devices}: must be 0 (as needed) or more")
        if self.max_tokens < 1:
            raise UserError(f"--max-tokens {self.max_tokens}: must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """The script; returns the exit code."""
    return run_main(lambda: infer(parse(InferConfig(), argv, "infer.py", _DESCRIPTION)))


def infer(config: InferConfig) -> None:
    """Opens the model, lays it over the mesh and continues the prompts.

    Raises:
        UserError: whatever a user can mend.
    """
    from moejax.inference.console import Printer, interact, read_prompts
    from moejax.inference.sampling import SamplingConfig
    from moejax.inference.source import open_model
    from moejax.inference.text import complete

    sampling = SamplingConfig(
        config.temperature, config.top_k, config.top_p, config.min_p, config.seed
    )
    source = open_model(config.model or None)
    shape = start_devices(config, source.config)
    prompts = read_prompts(config.prompt)
    keep_compiled_programs()
    generator = load(source, shape, config.dtype)

    def continue_texts(prompts: Sequence[str]) -> None:
        printer = Printer(prompts)
        completions = complete(
            generator,
            source.tokenizer,
            prompts,
            sampling=sampling,
            max_tokens=config.max_tokens,
            stop=config.stop,
            on_text=printer.on_text,
        )
        printer.finish(completions)

    if prompts:
        continue_texts(prompts)
    else:
        interact(continue_texts)


def start_devices(config: InferConfig, model: ModelConfig) -> MeshShape:
    """The mesh that the flags name, after making the (fake) devices it needs.

    Raises:
        UserError: the text names no mesh.
    """
    import jax

    from sharding.mesh import MeshShape

    named = None if config.mesh == "auto" else MeshShape.parse(config.mesh)
    wanted = config.devices or (named.size if named else 1)
    # A program that called `main` may have started its devices; `make_mesh` tells if they are few.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", wanted)
    if named is not None:
        return named
    return MeshShape(expert=min(len(jax.devices()), model.moe.router.num_experts))


def load(source: ModelSource, shape: MeshShape, dtype: str) -> Any:
    """The model on the mesh, ready to generate.

    Raises:
        UserError: the mesh does not fit, or the weights are damaged or of another model.
    """
    import jax.numpy as jnp

    from moejax.inference.generate import Generator
    from moejax.training.state import Blueprint, load_weights
    from sharding.mesh import make_mesh

    mesh = make_mesh(shape)
    model = source.config
    if dtype == "auto":
        # Few CPUs multiply bfloat16 any faster.
        dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else model.compute_dtype
    chosen: Any = dtype
    blueprint = Blueprint(dataclasses.replace(model, compute_dtype=chosen), mesh)
    weights = load_weights(source.weights(blueprint), blueprint, jnp.dtype(dtype))
    return Generator(blueprint, *weights, num_ids=source.tokenizer.vocab_size)


def keep_compiled_programs() -> None:
    """Keeps compiled programs in the user's cache, so that the next start is quick."""
    import jax

    folder = Path.home() / ".cache" / "moejax" / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
    except (OSError, RuntimeError):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


if __name__ == "__main__":
    sys.exit(main())
