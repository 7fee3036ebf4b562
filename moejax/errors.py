"""The exceptions that a user is meant to see: one line."""

__all__ = ["AgreedError", "UserError"]


class UserError(Exception):
    """A mistake in the input, told in one line; the scripts print it without a traceback.

    The message names the value received, the rule it breaks and what to do about it.
    """


class AgreedError(UserError):
    """One that all processes of a program raise, at the same place and with the same words.

    They end together as after a good end; only the first process tells it.
    """
