"""Fetch tar shards from an address: each is streamed once through webdataset, kept, hashed and indexed."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..runtime.errors import UserError, require
from ..runtime.files import refuse_existing
from ..runtime.progress import Bar
from ..runtime.shard_download import save_stream, without_secret
from ..runtime.shard_index import ADDRESS, FILE_NAME
from ..runtime.shard_scan import index_shards

ADDRESS_FILE = ".address"


def is_address(name: str) -> bool:
    """Whether a name of images is an address."""
    return re.match(r"[a-z0-9]+:", name) is not None


def fetch_shards(address: str, out: Path) -> tuple[dict[str, int], bool]:
    """Fetch shards into a folder that is renamed to ``out`` once all are there.

    What an interrupted fetch leaves is gone on from. The index names http addresses that hold no password or key,
    so that the index alone is enough on another machine: shards are then downloaded when they are needed.

    Args:
        address: ``http://…``, ``pipe:COMMAND`` or what else webdataset opens, with braces for many shards:
            ``http://host/train-{000000..000146}.tar``.
        out: folder to write.

    Returns:
        The number of images, which have no splits, and True.

    Raises:
        UserError: the folder is taken, a shard cannot be had, is no tar, or the shards hold no image.
    """
    webdataset = require("webdataset", "hub")
    refuse_existing(out)
    urls = name_shards(webdataset.shardlists.expand_urls(address))
    partial = out.with_name(f".{out.name}.fetching")
    if partial.exists() and _digest_in(partial) != _digest(address):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / ADDRESS_FILE).write_text(_digest(address), encoding="ascii")
    with Bar("Fetching shards", len(urls)) as bar:
        for file, url in urls.items():
            if not (partial / file).exists():
                save_stream(url, partial / file)
            bar.advance(note=file)
    again = {file: url for file, url in urls.items() if ADDRESS.fullmatch(url) and not has_secret(url)}
    index = index_shards(partial, list(urls), with_sha256=True, urls=again)
    (partial / ADDRESS_FILE).unlink()
    if out.exists():
        out.rmdir()  # it is empty
    partial.rename(out)
    return {"images": len(index.paths)}, True


def name_shards(urls: list[str]) -> dict[str, str]:
    """File name -> address of each shard: the name at the address's end, a number for the output of a command.

    Raises:
        UserError: an address does not end in the name of a tar, or two end in the same.
    """
    named: dict[str, str] = {}
    for number, url in enumerate(urls):
        file = f"shard-{number:06}.tar" if url.startswith("pipe:") else unquote(urlsplit(url).path).rpartition("/")[2]
        if not FILE_NAME.fullmatch(file):
            raise UserError(
                f"The address '{without_secret(url)}' does not end in the name of a tar: give one like http://host/x.tar."
            )
        if file in named:
            both = f"'{without_secret(named[file])}' and '{without_secret(url)}'"
            raise UserError(f"The addresses {both} end in the same name: fetch them apart.")
        named[file] = url
    return named


def has_secret(url: str) -> bool:
    """Whether an address may hold a password or a key, which must not be kept in a file."""
    parts = urlsplit(url)
    return "@" in parts.netloc or bool(parts.query)


def _digest(address: str) -> str:
    """What tells addresses apart without giving away a password or a key."""
    return hashlib.sha256(address.encode()).hexdigest()


def _digest_in(folder: Path) -> str | None:
    try:
        return (folder / ADDRESS_FILE).read_text(encoding="ascii")
    except (OSError, UnicodeError):
        return None
