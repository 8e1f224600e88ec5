"""Text from a file that goes to a terminal."""

from __future__ import annotations

MAX_LENGTH = 200  # of a name


def printable(text: str, max_length: int | None = MAX_LENGTH) -> str:
    """A text, cut to so many characters, in which no control character can reach a terminal: ``?`` stands for it."""
    return "".join(char if char.isprintable() else "?" for char in text[:max_length])
