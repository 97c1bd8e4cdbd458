"""The library's one error type."""

from __future__ import annotations


class EchoError(ValueError):
    """Bad input. The message names the argument, what was expected and what came."""
