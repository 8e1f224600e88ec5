"""Download tar shards through ``webdataset``, which knows http, pipes and object stores; each once per folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import select
import subprocess
import threading
from pathlib import Path
from typing import Any

from .errors import UserError, require, unknown_name
from .files import atomic_file
from .progress import say
from .shard_index import INDEX_FILE
from .shards import Shard

BLOCK_BYTES = 1 << 20
SILENCE_S = 60.0  # of a server that sends nothing: then the download has failed
_one_at_a_time = threading.Lock()


def download(shard: Shard, root: Path) -> None:
    """Download a shard that is missing, unless another process does or has done so; it is there afterwards.

    Args:
        shard: with its address.
        root: folder that holds the index, on which processes lock the shard's number.

    Raises:
        UserError: the download fails, or gives other bytes than were indexed.
    """
    assert shard.url is not None
    lock_place = int.from_bytes(hashlib.blake2b(shard.file.encode(), digest_size=6).digest(), "big")
    with _one_at_a_time, (root / INDEX_FILE).open("r+b") as lock:  # the system's lock does not tell threads apart
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, lock_place)
        if not (root / shard.file).exists():
            say(f"Downloading the shard '{without_secret(shard.url)}'.")
            save_stream(shard.url, root / shard.file, shard)


def without_secret(url: str) -> str:
    """An address for messages: what may be a password or a key is ``…``."""
    return re.sub(r"(?<=//)[^/@]*(?=@)|(?<=\?).*", "…", url) if re.match(r"[a-z0-9+]+://", url) else url


def save_stream(url: str, path: Path, expected: Shard | None = None) -> None:
    """Save what comes from an address as a file, or leave nothing.

    Args:
        url: what ``webdataset.gopen`` opens: ``http://…``, ``pipe:COMMAND``, …
        path: file to write.
        expected: what its bytes must be, if that is known.

    Raises:
        UserError: the stream cannot be had, ends early, falls silent, or holds other bytes than expected.
    """
    webdataset, shown = require("webdataset", "hub"), without_secret(url)
    if (kind := url.partition(":")[0]) not in (kinds := {*webdataset.gopen_schemes} - {"__default__"}):
        raise unknown_name("kind of address", kind, kinds)
    most = None if expected is None else expected.size_bytes
    digest, size = hashlib.sha256(), 0
    stream = None
    try:
        with atomic_file(path) as partial, partial.open("wb") as file:
            stream = webdataset.gopen(url)
            while block := _read(stream):
                size += len(block)
                if most is not None and size > most:
                    raise UserError(f"The download of '{shown}' has more than the {most} bytes that were indexed.")
                digest.update(block)
                file.write(block)
            if status := stream.proc.wait():
                raise UserError(f"The download of '{shown}' failed ({_explain(stream, status)}): try again.")
            file.flush()
            if expected is not None and (size, digest.hexdigest()) != (most, expected.sha256 or digest.hexdigest()):
                raise UserError(f"The download of '{shown}' is not the shard that was indexed: index it again.")
    except FileNotFoundError as error:
        raise UserError(f"The download of '{shown}' needs the program '{error.filename}': install it.") from None
    except TimeoutError as error:
        raise UserError(f"The download of '{shown}' failed ({error}): check the address and try again.") from None
    finally:
        if stream is not None:
            _end(stream.proc)


def _read(stream: Any) -> bytes:
    """The next bytes of a webdataset pipe, b"" at its end."""
    descriptor = stream.stream.fileno()
    ready, _, _ = select.select([descriptor], [], [], SILENCE_S)
    if not ready:
        raise TimeoutError(f"nothing came for {SILENCE_S:g} s")
    return os.read(descriptor, BLOCK_BYTES)


def _explain(stream: Any, status: int) -> str:
    """Why a pipe's program has failed; curl's exit codes are those that its manual lists."""
    command = stream.args[0][0]
    meaning = {6: "no such server", 7: "no connection", 18: "it ended early", 22: "the server refuses it"}
    return meaning.get(status, f"curl ends with {status}") if isinstance(command, list) else f"it ends with {status}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
