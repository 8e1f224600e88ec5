"""Scan the headers of a tar that may be damaged or hostile; nothing is unpacked, and no content is read.

Python's ``tarfile`` parses the headers. What it trusts is checked here: the size of extended headers, negative sizes
(which send older versions into an endless loop), and why it stopped, which it does silently at a damaged header.
"""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .errors import UserError

BLOCK_BYTES = tarfile.BLOCKSIZE
MAX_HEADER_BYTES = 1 << 16  # of all headers of one member; a path takes far less
PLAIN_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)

LEAVES_FOLDER, NOT_A_FILE, CUT_OFF = -1, -2, -3
REFUSED = {
    LEAVES_FOLDER: "its path leads out of the shard's folder",
    NOT_A_FILE: "it is a link or no plain file",
    CUT_OFF: "its shard is cut off",
}
"""Members that are not read, and why; the keys stand in the place of their size."""


class Member(NamedTuple):
    """A member of a tar that is not a folder.

    Attributes:
        name: its path, without control characters and without a leading ``./``.
        offset: where its content begins, bytes from the start of the tar.
        size: of its content, bytes, or a key of :data:`REFUSED`.
    """

    name: str
    offset: int
    size: int


class Scan(NamedTuple):
    """What a tar holds.

    Attributes:
        members: in their order.
        whole: the tar ends with its end mark. Without it, it may have been cut.
    """

    members: list[Member]
    whole: bool


class HeaderReader:
    """A file for ``tarfile`` that reads no more than the headers of one member may take.

    Args:
        file: opened for reading.

    Attributes:
        left: bytes that may still be read; to be reset after each member.
        ended: the file was shorter than what was asked of it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.left = MAX_HEADER_BYTES
        self.ended = False
        self.tell = file.tell
        self.seek = file.seek

    def read(self, size: int = -1) -> bytes:
        """Read, or refuse to."""
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a header of more than {MAX_HEADER_BYTES} bytes")
        self.left -= size
        data = self.file.read(size)
        self.ended |= len(data) < size
        return data


def scan_tar(path: Path) -> Scan:
    """List the members of an uncompressed tar.

    Raises:
        UserError: it is no tar, or damaged before its end. (One that is cut is not: what is left of it is listed.)
    """
    members: list[Member] = []
    position = 0
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        reader = HeaderReader(file)
        try:
            archive = tarfile.TarFile(fileobj=reader, mode="r", errors="surrogateescape")  # type: ignore[arg-type]
            while (info := archive.next()) is not None:
                if info.size < 0 or archive.offset <= position:
                    raise tarfile.ReadError("a negative size")
                archive.members.clear()  # type: ignore[attr-defined]
                position, reader.left = archive.offset, MAX_HEADER_BYTES
                if not info.isdir():
                    members.append(_member(info))
                if position > size:
                    if members and members[-1].offset + members[-1].size > size:
                        members[-1] = members[-1]._replace(size=CUT_OFF)
                    return Scan(members, whole=False)
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            if position == 0 or not reader.ended:
                raise _damaged(path, position, str(error) or type(error).__name__) from None
            return Scan(members, whole=False)
        file.seek(position)
        block = file.read(BLOCK_BYTES)
    if len(block) == BLOCK_BYTES and any(block):
        raise _damaged(path, position, "no header stands there")
    return Scan(members, whole=len(block) == BLOCK_BYTES)


def _damaged(path: Path, position: int, reason: str) -> UserError:
    if position == 0:
        return UserError(f"'{path}' is no uncompressed tar ({reason}): replace it, or remove it.")
    return UserError(f"The tar '{path}' is damaged at byte {position} ({reason}): fetch it again, or remove it.")


def _member(info: tarfile.TarInfo) -> Member:
    name = clean_name(info.name)
    if info.type not in PLAIN_FILES or info.issparse():
        return Member(name, info.offset_data, NOT_A_FILE)
    if name.startswith("/") or ".." in name.split("/"):
        return Member(name, info.offset_data, LEAVES_FOLDER)
    return Member(name, info.offset_data, info.size)


def clean_name(name: str) -> str:
    """A member's name as it can be shown on a terminal: control characters become question marks."""
    return re.sub(r"[\x00-\x1f\x7f]", "?", name).removeprefix("./")


def header_mismatch(header: bytes, name: str, size: int) -> bool:
    """Whether the header in front of a member's content is no longer the one that was scanned.

    Args:
        header: the 512 bytes.
        name: path that ends in the name that was scanned.
        size: that was scanned.
    """
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return True
    found = clean_name(info.name)
    # longer names, and others than ASCII, stand in an extended header before this one
    told = len(found) < 100 and found.isascii() and name.isascii()
    return info.type not in PLAIN_FILES or info.size != size or (told and not name.endswith(found))
