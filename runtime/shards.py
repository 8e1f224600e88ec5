"""Images in tar shards: where each lies, and its bytes by random access.

Images are in the order of an index, so that everything that goes by index (subsets, the order of an epoch, the split
over ranks, resuming) is the same as for a folder of images. A shard that has an address may be missing: it is
downloaded when it is first needed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from .decode import UnreadableImageError
from .errors import UserError
from .files import sha256_file
from .tar_scan import BLOCK_BYTES, CUT_OFF, REFUSED, header_mismatch

MAX_IMAGE_BYTES = 512 << 20


class Shard(NamedTuple):
    """One tar.

    Attributes:
        file: its name in the folder.
        size_bytes: its size.
        sha256: of its bytes, 64 hexadecimal digits, or None where only its headers were read.
        url: where it can be downloaded, or None.
    """

    file: str
    size_bytes: int
    sha256: str | None
    url: str | None

    def describe_change(self, found: int) -> str:
        """What is wrong with a tar of ``found`` bytes, in words."""
        return f"shard '{self.file}' has {found} bytes, {self.size_bytes} when it was indexed"


@dataclass(frozen=True, eq=False)
class Shards:
    """Where N images lie.

    Attributes:
        root: folder of the tars.
        shards: the tars.
        number: (N,) int32, which tar.
        offsets: (N,) int64, where the image's bytes begin in it.
        sizes: (N,) int64, their number, or why the member is refused, a key of ``tar_scan.REFUSED``.
    """

    root: Path
    shards: tuple[Shard, ...]
    number: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    def take(self, indices: np.ndarray) -> Shards:
        """Those of the images at ``indices``."""
        return Shards(self.root, self.shards, self.number[indices], self.offsets[indices], self.sizes[indices])

    def shard_of(self, index: int) -> Shard:
        """The tar of one image."""
        return self.shards[self.number[index]]

    def read(self, index: int, path: Path) -> bytes:
        """The bytes of one image.

        Args:
            index: of the image.
            path: its name, for the error; it ends in the member's name.

        Raises:
            UnreadableImageError: it is refused, too large or cut off, or its shard is missing or has changed.
        """
        shard, offset, size = self.shard_of(index), int(self.offsets[index]), int(self.sizes[index])
        if size < 0:
            raise UnreadableImageError(path, REFUSED[size])
        if size > MAX_IMAGE_BYTES:
            raise UnreadableImageError(path, f"it has {size} bytes, more than the {MAX_IMAGE_BYTES} that are read")
        try:
            with self._open(shard) as file:
                if (found := os.fstat(file.fileno()).st_size) != shard.size_bytes:
                    raise UnreadableImageError(path, f"its {shard.describe_change(found)}")
                block = os.pread(file.fileno(), BLOCK_BYTES + size, offset - BLOCK_BYTES)
        except OSError as error:
            raise UnreadableImageError(path, f"its shard cannot be read ({error.strerror or error})") from None
        except UnreadableImageError:
            raise
        except UserError as error:  # the download
            raise UnreadableImageError(path, str(error).rstrip(".")) from None
        if len(block) < BLOCK_BYTES + size:
            raise UnreadableImageError(path, REFUSED[CUT_OFF])
        if header_mismatch(block[:BLOCK_BYTES], str(path), size):
            raise UnreadableImageError(path, "its shard has changed since it was indexed")
        return block[BLOCK_BYTES:]

    def _open(self, shard: Shard) -> BinaryIO:
        path = self.root / shard.file
        if shard.url is not None and not path.exists():
            from .shard_download import download  # it knows this module

            download(shard, self.root)
        return path.open("rb", buffering=0)

    def changed(self) -> list[str]:
        """Names of the shards whose bytes are not those that were indexed. Reads all of them."""
        known = (shard for shard in self.shards if shard.sha256 is not None)
        present = (shard for shard in known if (self.root / shard.file).exists())
        return [shard.file for shard in present if sha256_file(self.root / shard.file) != shard.sha256]
