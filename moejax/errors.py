"""The one exception that a user is meant to see: one line."""

__all__ = ["UserError"]


class UserError(Exception):
    """A mistake in the input, told in one line; the scripts print it without a traceback.

    The message names the value received, the rule it breaks and what to do about it.
    """
