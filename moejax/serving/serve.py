"""The mode `serve` of `infer.py`: an OpenAI-like server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moejax.errors import UserError
from moejax.serving.flags import EngineFlags
from moejax.serving.start import note, running_model

__all__ = ["ServeConfig", "main"]

DESCRIPTION = """Answers OpenAI's clients over HTTP.

/v1/completions, /v1/chat/completions, /v1/models, /health, /metrics. Ctrl-C ends it when
the requests under way are done; a second one at once."""


@dataclass(frozen=True)
class ServeConfig(EngineFlags):
    """A server.

    Attributes:
        host: address to listen on; 0.0.0.0 lets other machines in.
        port: to listen on; 0 takes a free one.
        name: of the model, for clients; the folder's if not given.
        api_key_file: file with the key that clients must bring; none: no key.
        warm_up: compile all steps before the first request.
        grace: seconds that requests under way may take when the server is stopped.
        request_seconds: most time for an answer.
        max_body: most bytes of a request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    api_key_file: str = ""
    warm_up: bool = True
    grace: float = 30.0
    request_seconds: float = 600.0
    max_body: int = 4 << 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port < 65536:
            raise UserError(f"--port {self.port}: must lie between 0 and 65535")
        if not 0 <= self.grace <= 86400:
            raise UserError(f"--grace {self.grace:g}: must lie between 0 and 86400 seconds")
        if not self.request_seconds > 0:
            raise UserError(f"--request-seconds {self.request_seconds:g}: must be greater than 0")
        if self.max_body < 1:
            raise UserError(f"--max-body {self.max_body}: must be at least 1 byte")


def main(config: ServeConfig) -> int:
    """Serves until it is told to stop: 0, or 1 if the engine has failed.

    Raises:
        UserError: whatever a user can mend.
    """
    try:
        from moejax.serving.app import AppSettings, make_app
        from moejax.serving.server import HttpServer
    except ModuleNotFoundError as error:
        raise UserError(
            f"serve needs {error.name}, which is not here: pip install 'moejax[serve]'"
        ) from None
    settings = AppSettings(
        read_key(config.api_key_file) if config.api_key_file else None,
        config.max_body,
        request_seconds=config.request_seconds,
    )
    with running_model(config, config.name, warm_up=config.warm_up) as (model, loop):
        server = HttpServer(
            make_app(model, loop, settings),
            loop,
            host=config.host,
            port=config.port,
            grace=config.grace,
        )
        if settings.api_key is None and config.host not in ("127.0.0.1", "::1", "localhost"):
            note(f"--host {config.host} without --api-key-file: anyone who gets there may ask")
        host = f"[{config.host}]" if ":" in config.host else config.host
        note(f"serving {model.name!r} at http://{host}:{server.port}/v1")
        server.run()
        return 1 if loop.failure else 0


def read_key(path: str) -> str:
    """The key in a file, without the spaces around it.

    Raises:
        UserError: it cannot be read, or is no key.
    """
    try:
        key = Path(path).read_bytes().decode("ascii").strip()
    except OSError as error:
        raise UserError(
            f"--api-key-file {path}: {error.strerror or error}; check the path"
        ) from None
    except UnicodeDecodeError:
        key = ""
    if not key or not key.isprintable() or " " in key:
        raise UserError(
            f"--api-key-file {path}: must hold one word of ASCII; openssl rand -hex 32 makes one"
        )
    return key
