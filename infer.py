"""Runs a trained Mixture-of-Experts language model.

python infer.py -p "def "                      the model that comes with the package
python infer.py --model runs/NAME -p "def "    the newest checkpoint of a run
python infer.py                                asks for one text after the other
python infer.py MODE --help                    chat, serve, batch, bench or routes
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from moejax.cli import parse, run_main
from moejax.errors import UserError
from moejax.serving.flags import EngineFlags

if TYPE_CHECKING:
    from moejax.inference.source import ModelSource
    from moejax.serving.loop import EngineLoop

_MODES = {
    "chat": ("chat_mode", "ChatConfig", "a conversation"),
    "serve": ("serve", "ServeConfig", "an OpenAI-like HTTP server"),
    "batch": ("batch", "BatchConfig", "answers a file of requests"),
    "bench": ("bench", "BenchConfig", "speed at several loads"),
    "routes": ("routes", "RoutesConfig", "which experts a text uses"),
}
_ALONE = {
    "chat": "a conversation is of one process",
    "serve": "a server is of one process, or it would end with any of them",
    "routes": "what a text uses is recorded in one process",
}
_DESCRIPTION = "\n".join(
    [
        "Continues texts with a trained Mixture-of-Experts language model. A first word picks",
        "another mode; infer.py MODE --help tells its flags:",
        "",
        *(f"  {mode:<8}{told}" for mode, (_, _, told) in _MODES.items()),
    ]
)
Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]
Prompts = Annotated[Repeated, tyro.conf.arg(aliases=["-p"], metavar="TEXT")]


@dataclass(frozen=True)
class InferConfig(EngineFlags):
    """What to continue, and how.

    Attributes:
        prompt: beginning of a text; `-` reads standard input; several are continued together.
        max_tokens: most tokens of a continuation.
        temperature: of the probabilities; 0 takes the most probable token, always.
        top_k: draw from this many most probable tokens; 0: all.
        top_p: draw from the fewest most probable tokens with this mass.
        min_p: draw from tokens at least this times as probable as the most probable.
        seed: of the random numbers.
        stop: end a text before this string.
    """

    prompt: Prompts = ()
    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: Repeated = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 1:
            raise UserError(f"--max-tokens {self.max_tokens}: must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """The script; returns the exit code."""
    return run_main(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(argv: list[str]) -> int | None:
    if not argv or argv[0].startswith("-"):
        plain = parse(InferConfig(), argv, "infer.py", _DESCRIPTION)
        return _joined(plain, lambda: infer(plain))
    if argv[0] not in _MODES:
        raise UserError(
            f"{argv[0]!r}: no such mode; there are {', '.join(_MODES)}; -p TEXT continues a text"
        )
    name, config, _ = _MODES[argv[0]]
    module = importlib.import_module(f"moejax.serving.{name}")
    default = getattr(module, config)()
    flags = parse(default, argv[1:], f"infer.py {argv[0]}", module.DESCRIPTION)
    if flags.distributed and argv[0] in _ALONE:
        raise UserError(f"--distributed with {argv[0]}: {_ALONE[argv[0]]}; leave it out")
    return _joined(flags, lambda: module.main(flags))


def _joined(flags: EngineFlags, main: Callable[[], int | None]) -> int | None:
    """Runs a mode in the first process; the others do the steps of its engine."""
    from moejax.serving.start import follow
    from sharding.distributed import check_same, from_first, is_first, joined
    from sharding.join_flags import JoinFlags

    names = {f.name for f in dataclasses.fields(EngineFlags)}
    names -= {f.name for f in dataclasses.fields(JoinFlags)}  # of one process, or alike already
    shared = {name: getattr(flags, name) for name in sorted(names) if hasattr(flags, name)}
    with joined(flags):
        check_same("flags", shared, "start all processes with the same ones")
        code = None
        if is_first():
            code = main() or 0
        else:
            follow(flags)
        # What starts the processes looks at all of them: what failed in a batch failed in each.
        return from_first("exit code", code)


def infer(config: InferConfig) -> None:
    """Opens the model, lays it over the mesh and continues the prompts.

    Raises:
        UserError: whatever a user can mend.
    """
    from moejax.inference.console import Printer, interact, read_prompts
    from moejax.inference.params import SamplingParams
    from moejax.inference.source import open_model
    from moejax.serving.plain import continue_together
    from moejax.serving.start import reading_notes
    from moejax.serving.text_model import TextModel

    params = SamplingParams(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        seed=config.seed,
        stop=config.stop,
        max_tokens=config.max_tokens,
    )
    source = open_model(config.model or None, progress=reading_notes())
    model = TextModel.open(source, chats=False)
    prompts = read_prompts(config.prompt)
    with load(source, config, len(prompts)) as loop:

        def continue_texts(prompts: Sequence[str]) -> None:
            printer = Printer(prompts)
            found = continue_together(model, loop, prompts, params, printer.on_text)
            printer.finish(found)

        if prompts:
            continue_texts(prompts)
        else:
            interact(continue_texts)


@contextlib.contextmanager
def load(source: ModelSource, config: InferConfig, prompts: int) -> Iterator[EngineLoop]:
    """The model on the mesh, ready for so many prompts at once.

    Raises:
        UserError: the mesh does not fit, or the weights are damaged or of another model.
    """
    from moejax.serving.start import make_engine, running_loop

    settings = dataclasses.replace(
        config.engine_settings(),
        max_rows=min(config.max_rows, max(prompts, 1)),
        max_waiting=max(config.max_waiting, prompts),
        # The same prompt gives the same bits, whatever came before.
        prefix_reuse=False,
    )
    engine = make_engine(source, config, settings)
    with running_loop(engine, source.need_tokenizer()) as loop:
        yield loop


if __name__ == "__main__":
    sys.exit(main())
