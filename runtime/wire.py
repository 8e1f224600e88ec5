"""The wire format of protocol buffers, read without the message definitions: field number -> values.

It is what a Core ML model is written in. Reading it here keeps a device free of coremltools, whose import takes seconds
and brings torch with it. The bytes may be hostile: every length is checked against what is left before it is used.

https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_FIELDS = 1_000_000


class WireError(ValueError):
    """The bytes are no message, or a field is not of the kind that is asked for."""


class Message:
    """One message.

    Args:
        data: its bytes.
    """

    def __init__(self, data: memoryview) -> None:
        self._fields: dict[int, list[int | memoryview]] = {}
        for count, (number, value) in enumerate(_fields(data)):
            if count >= MAX_FIELDS:
                raise WireError(f"a message has more than {MAX_FIELDS} fields")
            self._fields.setdefault(number, []).append(value)

    def __contains__(self, number: int) -> bool:
        return number in self._fields

    def integer(self, number: int) -> int:
        """A number; 0 where the field is absent."""
        value = self._last(number, 0)
        if not isinstance(value, int):
            raise WireError(f"field {number} is no number")
        return value

    def data(self, number: int) -> memoryview:
        """Bytes; none where the field is absent."""
        value = self._last(number, memoryview(b""))
        if isinstance(value, int):
            raise WireError(f"field {number} holds a number, not bytes")
        return value

    def text(self, number: int) -> str:
        """A string; "" where the field is absent."""
        return _decode(self.data(number))

    def texts(self, number: int) -> list[str]:
        """A repeated string."""
        return [_decode(value) for value in self._all(number)]

    def message(self, number: int) -> Message:
        """A message; an empty one where the field is absent."""
        return Message(self.data(number))

    def messages(self, number: int) -> list[Message]:
        """A repeated message."""
        return [Message(value) for value in self._all(number)]

    def entries(self, number: int) -> dict[str, Message]:
        """A map from strings to messages."""
        return {entry.text(1): entry.message(2) for entry in self.messages(number)}

    def integers(self, number: int) -> list[int]:
        """A repeated number, packed or not, in two's complement of 64 bits."""
        values: list[int] = []
        for value in self._fields.get(number, ()):
            values.extend([value] if isinstance(value, int) else _varints(value))
        return [value - (1 << 64) if value >> 63 else value for value in values]

    def floats(self, number: int) -> np.ndarray:
        """A repeated float, packed."""
        packed = b"".join(self._all(number))
        if len(packed) % 4:
            raise WireError(f"field {number} is no list of floats")
        return np.frombuffer(packed, "<f4")

    def _last(self, number: int, default: int | memoryview) -> int | memoryview:
        return self._fields[number][-1] if number in self._fields else default

    def _all(self, number: int) -> list[memoryview]:
        values = self._fields.get(number, [])
        if any(isinstance(value, int) for value in values):
            raise WireError(f"field {number} holds numbers, not bytes")
        return values  # type: ignore[return-value]


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) in the order of the bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if kind == BYTES:
            size, position = _varint(data, position)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise WireError(f"field {number} has the unknown wire type {kind}")
        if size > len(data) - position:
            raise WireError(f"field {number} is longer than what is left")
        yield number, data[position : position + size]
        position += size


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise WireError("a number is cut off")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, position
    raise WireError("a number is longer than 10 bytes")


def _varints(data: memoryview) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value


def _decode(data: memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise WireError("a string is not UTF-8") from None
