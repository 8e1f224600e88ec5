"""``SOURCE.json``: where a fetched image set comes from, and of what content; it is written last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..runtime.errors import UserError
from ..runtime.files import read_json, write_json

SOURCE_FILE = "SOURCE.json"


def read_source(out: Path, name: str, expected: dict[str, Any]) -> dict[str, Any] | None:
    """What a folder says of itself, or None where it holds no set of this name.

    Args:
        out: the folder.
        name: of the image set.
        expected: fields that must have these values.

    Raises:
        UserError: it holds another version of the set.
    """
    if not (out / SOURCE_FILE).is_file():
        return None
    source = read_json(out / SOURCE_FILE, "source description", max_bytes=1 << 20)
    if not isinstance(source, dict) or source.get("dataset") != name:
        return None
    if any(source.get(key) != value for key, value in expected.items()):
        raise UserError(f"'{out}' holds another version of {name}: remove it, or name a new folder with --out.")
    return source


def write_source(out: Path, name: str, source: str, licence: str, fields: dict[str, Any]) -> None:
    """Write ``SOURCE.json``.

    Args:
        out: the folder.
        name: of the image set.
        source: where it comes from, in words.
        licence: SPDX name.
        fields: what else there is to say.
    """
    write_json(out / SOURCE_FILE, {"schema": 1, "dataset": name, "source": source, "licence": licence, **fields})
