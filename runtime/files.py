"""Files that are either complete or absent: atomic writes of JSON, files and folders, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):  # hashlib.file_digest is not in Python 3.10 (JetPack 6)
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and move it there, synced to disk, once the block has succeeded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` and rename it to ``path`` once the block has succeeded.

    Raises:
        UserError: as :func:`check_replaceable`.
    """
    path = path.resolve()  # a link to a folder, or ".", cannot be replaced; the folder itself can
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    partial.chmod(0o777 & ~_umask())
    try:
        yield partial
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def refuse_existing(path: Path) -> None:
    """Refuse an output path that is taken.

    Raises:
        UserError: ``path`` is a file or a folder that is not empty.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"'{path}' exists already: name a new folder with --out, or remove it first.")


def check_replaceable(path: Path) -> None:
    """Refuse an output path to which no finished folder can be renamed.

    Raises:
        UserError: ``path`` exists and is not an empty folder, or it is a mounted volume.
    """
    refuse_existing(path)
    if path.is_mount():
        raise UserError(f"'{path}' is a mounted volume, which cannot be replaced: name a folder in it with --out.")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path, what: str, max_bytes: int = 64 << 20) -> Any:
    """Read a JSON file that may be hostile: its size is checked before it is read.

    Args:
        path: the file.
        what: what the file is, for the error, e.g. ``"manifest"``.
        max_bytes: the largest size that is read.

    Raises:
        UserError: the file is missing, too large, or not JSON.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise UserError(f"The {what} '{path}' has {size} bytes: more than the {max_bytes} that are read.")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"No {what} at '{path}': check the path.") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or a number of too many digits
        raise UserError(f"The {what} '{path}' is not valid JSON ({error}): make it again.") from None
