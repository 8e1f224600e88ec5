"""Text from a file that goes to a terminal."""

from __future__ import annotations

MAX_LENGTH = 200


def printable(text: str) -> str:
    """At most 200 characters of a text, in which no control character can reach a terminal: ``?`` stands for it."""
    return "".join(char if char.isprintable() else "?" for char in text[:MAX_LENGTH])
