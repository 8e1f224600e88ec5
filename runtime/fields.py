"""Read the fields of a JSON object that may be hostile: each with its type and range, each error naming the field."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from .errors import UserError

SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_ITEMS = 100_000


class Fields:
    """A JSON object of which every field is read once and checked.

    Args:
        value: what was read from the file.
        what: the object's name for errors, e.g. ``"manifest 'a/manifest.json'"``.

    Raises:
        UserError: ``value`` is no JSON object; every method raises it for a field that is missing or wrong.
    """

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise UserError(f"The {what} must be a JSON object, not {_kind(value)}.")
        self.value: dict[str, Any] = value
        self.what = what

    def wrong(self, key: str, given: object, allowed: str) -> UserError:
        """The error for a field: what it holds and what it must be."""
        shown = repr(given)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return UserError(f"The {self.what} has '{key}': {shown}, which must be {allowed}.")

    def _get(self, key: str) -> Any:
        if key not in self.value:
            raise UserError(f"The {self.what} has no field '{key}': it is damaged or was written by something else.")
        return self.value[key]

    def schema(self, latest: int) -> int:
        """The schema version: an integer from 1 to ``latest``."""
        version = self.integer("schema", 1, 2**31)
        if version > latest:
            raise UserError(
                f"The {self.what} has schema {version}, this midge reads up to {latest}: install a newer midge."
            )
        return version

    def integer(self, key: str, low: int, high: int) -> int:
        """An integer in ``low..high``."""
        value = self._get(key)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(key, value, f"an integer in {low}..{high}")
        return value

    def integers(self, key: str, low: int, high: int, lengths: Iterable[int]) -> tuple[int, ...]:
        """A list of integers in ``low..high``, of one of the given lengths."""
        value, lengths = self._get(key), tuple(lengths)
        allowed = f"a list of {' or '.join(map(str, lengths))} integers in {low}..{high}"
        if not isinstance(value, list) or len(value) not in lengths:
            raise self.wrong(key, value, allowed)
        if any(type(item) is not int or not low <= item <= high for item in value):
            raise self.wrong(key, value, allowed)
        return tuple(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of ``count`` finite numbers."""
        value = self._get(key)
        if not isinstance(value, list) or len(value) != count or not all(_is_finite(item) for item in value):
            raise self.wrong(key, value, f"a list of {count} finite numbers")
        return tuple(float(item) for item in value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean, or ``default`` where the field is not there."""
        value = self.value.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, max_length: int = 4096) -> str:
        """A string of at most ``max_length`` characters."""
        value = self._get(key)
        if not isinstance(value, str) or len(value) > max_length:
            raise self.wrong(key, value, f"a string of at most {max_length} characters")
        return value

    def choice(self, key: str, allowed: Iterable[str]) -> str:
        """One of the strings in ``allowed``."""
        value, allowed = self._get(key), sorted(allowed)
        if not isinstance(value, str) or value not in allowed:
            raise self.wrong(key, value, f"one of {', '.join(allowed)}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self._get(key)
        if not isinstance(value, list) or len(value) > MAX_ITEMS or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, value, f"a list of at most {MAX_ITEMS} strings")
        return tuple(value)

    def sha256(self, key: str) -> str:
        """64 lower-case hexadecimal digits."""
        value = self._get(key)
        if not isinstance(value, str) or not SHA256.fullmatch(value):
            raise self.wrong(key, value, "64 lower-case hexadecimal digits")
        return value

    def object(self, key: str) -> dict[str, Any]:
        """A JSON object, unchecked inside."""
        value = self._get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, value, "a JSON object")
        return value

    def items(self, key: str, lengths: range) -> list[Fields]:
        """A list of JSON objects, to be checked field by field."""
        value = self._get(key)
        if not isinstance(value, list) or len(value) not in lengths:
            raise self.wrong(key, value, f"a list of {lengths[0]} to {lengths[-1]} JSON objects")
        return [Fields(item, f"{self.what}, {key} {number}") for number, item in enumerate(value)]

    def fields(self, key: str) -> Fields:
        """A JSON object, to be checked field by field."""
        value = self.object(key)
        return Fields(value, f"{self.what}, {key if key.isprintable() and len(key) <= 100 else repr(key[:100])}")


def _is_finite(value: object) -> bool:
    if type(value) not in {int, float}:
        return False
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer beyond the floats
        return False


def _kind(value: object) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), type(value).__name__)
