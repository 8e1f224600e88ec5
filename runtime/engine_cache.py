"""Files that a runtime compiled on this machine for itself, kept by what they were made from.

An engine is as good as a program: the runtime trusts it. So only files are read that this user wrote, in a folder that
nobody else may write to; one whose facts, size or hash are not those that were asked for is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError
from .files import atomic_file
from .progress import say

SCHEMA = 1
MAX_HEADER_BYTES = 1 << 16
MAX_BYTES = 8 << 30
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def default_folder() -> Path:
    """Where engines are kept if nothing else is said."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "midge" / "tensorrt"


class EngineCache:
    """A folder of compiled files.

    A file is one line of JSON (schema, facts, size and SHA-256 of the rest), then the content.

    Args:
        folder: made if it is not there, for this user alone.

    Raises:
        UserError: it is a link or no folder, or another user owns it or may write to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not os.path.lexists(folder):
            folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise UserError(f"The cache '{folder}' is no folder, or a link to one: name a folder of your own.")
        if status.st_uid != os.geteuid() or status.st_mode & OTHERS_WRITE:
            raise UserError(
                f"Others may write to the cache '{folder}', and engines run as programs do: chmod 700 it, or name a "
                "folder of your own."
            )

    def path(self, kind: str, facts: Mapping[str, Any]) -> Path:
        """Where a file of a kind (``"engine"``, ``"timing"``) lies that was made from something."""
        text = json.dumps(dict(facts), sort_keys=True, allow_nan=False)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.{kind}"

    def store(self, kind: str, facts: Mapping[str, Any], content: bytes) -> None:
        """Keep a file, in the place of what may lie there."""
        header = {
            "schema": SCHEMA,
            "facts": dict(facts),
            "size_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        with atomic_file(self.path(kind, facts)) as partial:
            partial.touch(mode=0o600)
            with partial.open("wb") as file:
                file.write(json.dumps(header, sort_keys=True).encode() + b"\n")
                file.write(content)

    def load(self, kind: str, facts: Mapping[str, Any]) -> bytes | None:
        """The content of a file that was made from just this; None where there is none that can be trusted."""
        path = self.path(kind, facts)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:  # a link, or not readable
            return self._refuse(path, error.strerror or "it cannot be opened")
        with os.fdopen(descriptor, "rb") as file:
            try:
                return self._read(file, facts)
            except ValueError as error:
                return self._refuse(path, str(error))

    def remove(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Forget a file, e.g. an engine that the runtime refuses."""
        self.path(kind, facts).unlink(missing_ok=True)

    def _refuse(self, path: Path, reason: str) -> None:
        say(f"The cached '{path}' is made again: {reason}.")

    def _read(self, file: BinaryIO, facts: Mapping[str, Any]) -> bytes:
        """The content of an open file.

        Raises:
            ValueError: it is not what was asked for, with the reason.
        """
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & OTHERS_WRITE:
            raise ValueError("it is not this user's alone")
        if status.st_size > MAX_BYTES:
            raise ValueError("it is too large")
        line = file.readline(MAX_HEADER_BYTES)
        try:
            header = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError("its head is damaged") from None
        if not isinstance(header, dict) or header.get("schema") != SCHEMA or header.get("facts") != dict(facts):
            raise ValueError("it was made from something else")
        if header.get("size_bytes") != status.st_size - len(line):
            raise ValueError("it is not whole")
        content = file.read()
        if hashlib.sha256(content).hexdigest() != header.get("sha256"):
            raise ValueError("it was changed")
        return content
