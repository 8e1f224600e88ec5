"""Decode an image of any mode to RGB; a damaged or hostile one is refused with its reason."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms

from .errors import UserError

# Only these decoders: Pillow has others that start external programs (EPS) or are rarely looked after.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM")

MAX_PIXELS = 89_478_485  # Pillow's own first limit: a 24-bit image of 256 MiB
MAX_ASPECT = 200  # resized to a short side of 512 px, a longer strip would take more than 150 MiB
# Larger than its pixels, a JPEG is no photo: it is left to Pillow, which reads in parts.
MAX_JPEG_BYTES = 3 * MAX_PIXELS

JpegDecoder = Callable[[bytes, int], "np.ndarray | None"]
"""From the bytes of a JPEG and a factor, 1, 2, 4 or 8, to (ceil(H / factor), ceil(W / factor), 3) uint8 RGB, not turned
upright; None where they are damaged."""

# https://exiftool.org/TagNames/EXIF.html, tag 0x0112
ORIENTATION_TAG = 0x0112
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = (5, 6, 7, 8)  # height and width change places
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels.transpose(1, 0, 2)[:, ::-1],
    7: lambda pixels: pixels.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda pixels: pixels.transpose(1, 0, 2)[::-1],
}
"""The same on an array."""


class UnreadableImageError(UserError):
    """An image that cannot be decoded, or that is refused before it is.

    Attributes:
        path: the file.
        reason: why, in a few words.
    """

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"Cannot read the image '{path}': {reason}. Remove it or replace it.")

    def __reduce__(self) -> tuple[type[UnreadableImageError], tuple[Path, str]]:
        return type(self), (self.path, self.reason)  # so that it comes back whole from a worker process


def load_image(
    source: Path | bytes,
    name: Path | None = None,
    min_px: int | None = None,
    decode_jpeg: JpegDecoder | None = None,
) -> np.ndarray:
    """Decode an image of any Pillow mode to RGB.

    The EXIF orientation is applied; transparency is composited on white; of an animation the first frame is taken.
    16-bit values are scaled to 8 by their high byte (32-bit integers are taken as 16-bit and clipped); floats are taken
    as 0..1 where none is above 1, else as 0..255.

    Args:
        source: the file, or what is in it.
        name: what to call it in an error; default its path.
        min_px: decode a large image at 1/2, 1/4 or 1/8 of its size, the smallest whose short side has so many px still:
            by the scaled transform in a JPEG that ``decode_jpeg`` takes, else by the mean of squares. None: full size.
        decode_jpeg: a faster decoder for the JPEGs that are grey or of three channels.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UnreadableImageError: it is missing, truncated, no image, without pixels, or too large to be decoded safely.
    """
    with _opened(source, name) as (file, image):
        return _decode(file, image, min_px, decode_jpeg)


def read_size(source: Path | bytes, name: Path | None = None) -> tuple[int, int]:
    """Height and width of an image, px, from its header alone: its pixels may still turn out to be damaged.

    They are as stored, before the EXIF orientation, which may exchange the two.

    Args:
        source: the file, or its content.
        name: what errors call it; default the file's path.

    Raises:
        UnreadableImageError: it is missing, no image, without pixels, or too large to be decoded safely.
    """
    with _opened(source, name) as (_, image):
        return image.height, image.width


@contextlib.contextmanager
def _opened(source: Path | bytes, name: Path | None) -> Iterator[tuple[BinaryIO, Image.Image]]:
    """Open an image whose size is safe; whatever goes wrong within the block is told as unreadable, with the reason."""
    name = name or (source if isinstance(source, Path) else Path("image in memory"))
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file, _open(file) as image:
            yield file, image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImageError(name, f"it has more than the {MAX_PIXELS} pixels that are decoded") from None
    except Image.UnidentifiedImageError:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        reason = f"its {size} bytes are no image of a known format" if size else "the file is empty"
        raise UnreadableImageError(name, reason) from None
    except OSError as error:
        raise UnreadableImageError(name, error.strerror or str(error)) from None
    except Exception as error:  # a damaged file may raise anything inside a decoder
        raise UnreadableImageError(name, str(error) or type(error).__name__) from None


def image_size(source: Path | bytes, min_px: int | None = None) -> tuple[int, int]:
    """Height and width that :func:`load_image` will give, px, from the header alone; (0, 0) where there is none."""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file, _open(file) as image:
            factor = reduction(image.size, min_px)
            width, height = (-(-side // factor) for side in image.size)
            return (width, height) if _orientation(image) in TURNED else (height, width)
    except Exception:  # the reason is given when it is decoded
        return 0, 0


def reduction(size: tuple[int, int], min_px: int | None) -> int:
    """The largest of 1, 2, 4 and 8 by which both sides can be divided so that ``min_px`` px are left."""
    if min_px is None:
        return 1
    return max(factor for factor in (1, 2, 4, 8) if factor == 1 or min(size) // factor >= min_px)


@contextlib.contextmanager
def _open(file: BinaryIO) -> Iterator[Image.Image]:
    """The image in a file, its header read and its size found fit to be decoded."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata in an image that decodes
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=FORMATS) as image:
            _check_size(image.size)
            yield image


def _decode(file: BinaryIO, image: Image.Image, min_px: int | None, decode_jpeg: JpegDecoder | None) -> np.ndarray:
    factor = reduction(image.size, min_px)
    if decode_jpeg and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        file.seek(0)
        data = file.read(MAX_JPEG_BYTES + 1)
        if len(data) <= MAX_JPEG_BYTES:
            return _decode_jpeg(data, image, factor, decode_jpeg)
        file.seek(0)
    image.load()
    pixels = _to_rgb(_upright(image))
    return pixels if factor == 1 else np.array(Image.fromarray(pixels).reduce(factor))


def _decode_jpeg(data: bytes, header: Image.Image, factor: int, decode: JpegDecoder) -> np.ndarray:
    """The pixels, upright; nothing but a JPEG of the size in the header comes to the decoder and out of it."""
    pixels = decode(data, factor) if data.startswith(b"\xff\xd8\xff") else None
    if pixels is None:
        raise ValueError("its JPEG data is damaged or truncated")
    width, height = (-(-side // factor) for side in header.size)
    if pixels.shape != (height, width, 3):
        raise ValueError("it changed while it was read")
    turn = TURNS.get(_orientation(header))
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < 1:
        raise ValueError(f"it has no pixels ({width} × {height})")
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has {width * height} pixels, more than the {MAX_PIXELS} that are decoded")
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(f"its sides {width} × {height} differ by more than a factor of {MAX_ASPECT}")


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
    except Exception:  # damaged metadata of an image that decodes
        return 1
    return orientation if isinstance(orientation, int) else 1


def _upright(image: Image.Image) -> Image.Image:
    method = ORIENTATIONS.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 from an image of any mode."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0.0, posinf=255.0, neginf=0.0)
        grey = np.clip(np.rint(values * (255.0 if values.max() <= 1 else 1.0)), 0, 255)
    elif image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None
        return np.array(converted)
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return np.array(Image.alpha_composite(white, rgba).convert("RGB"))
    else:
        return np.array(image.convert("RGB"))
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
