"""Errors in the form that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

from moejax.errors import UserError
from moejax.inference.engine import QueueFull
from moejax.serving.loop import Stopping

__all__ = ["ApiError"]

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that is refused.

    status: of HTTP.
    message: one line for a person.
    param: the field of the body that is at fault, if one is.
    code: a word for programs.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @classmethod
    def of(cls, error: UserError, param: str | None = None) -> ApiError:
        """What a UserError is to a client."""
        if isinstance(error, QueueFull):
            return cls(429, str(error), code="queue_full")
        if isinstance(error, Stopping):
            return cls(503, str(error), code="stopping")
        return cls(400, str(error), param=param)
