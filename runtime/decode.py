"""Decode an image of any mode to RGB; a damaged or hostile one is refused with its reason."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from .errors import UserError

# Only these decoders: Pillow has others that start external programs (EPS) or are rarely looked after.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM")

MAX_PIXELS = 89_478_485  # Pillow's own first limit: a 24-bit image of 256 MiB
MAX_ASPECT = 200  # resized to a short side of 512 px, a longer strip would take more than 150 MiB

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


def load_image(source: Path | bytes, name: Path | None = None) -> np.ndarray:
    """Decode an image of any Pillow mode to RGB.

    The EXIF orientation is applied; transparency is composited on white; of an animation the first frame is taken.
    16-bit values are scaled to 8 by their high byte (32-bit integers are taken as 16-bit and clipped); floats are taken
    as 0..1 where none is above 1, else as 0..255.

    Args:
        source: the file, or its content.
        name: what errors call it; default the file's path.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UnreadableImageError: it is missing, truncated, no image, without pixels, or too large to be decoded safely.
    """
    with _opened(source, name) as image:
        image.load()
        return _to_rgb(_upright(image))


def read_size(source: Path | bytes, name: Path | None = None) -> tuple[int, int]:
    """Height and width of an image, px, from its header alone: its pixels may still turn out to be damaged.

    They are as stored, before the EXIF orientation, which may exchange the two.

    Args:
        source: the file, or its content.
        name: what errors call it; default the file's path.

    Raises:
        UnreadableImageError: it is missing, no image, without pixels, or too large to be decoded safely.
    """
    with _opened(source, name) as image:
        return image.height, image.width


@contextlib.contextmanager
def _opened(source: Path | bytes, name: Path | None) -> Iterator[Image.Image]:
    """Open an image whose size is safe; whatever goes wrong within the block is told as unreadable, with the reason."""
    path = name or (Path("image in memory") if isinstance(source, bytes) else source)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata in an image that decodes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
                _check_size(image.size)
                yield image
    except UnreadableImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImageError(path, f"it has more than the {MAX_PIXELS} pixels that are decoded") from None
    except Image.UnidentifiedImageError:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        reason = f"its {size} bytes are no image of a known format" if size else "the file is empty"
        raise UnreadableImageError(path, reason) from None
    except OSError as error:
        raise UnreadableImageError(path, error.strerror or str(error)) from None
    except Exception as error:  # a damaged file may raise anything inside a decoder
        raise UnreadableImageError(path, str(error) or type(error).__name__) from None


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < 1:
        raise ValueError(f"it has no pixels ({width} × {height})")
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has {width * height} pixels, more than the {MAX_PIXELS} that are decoded")
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(f"its sides {width} × {height} differ by more than a factor of {MAX_ASPECT}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
    except Exception:  # damaged metadata of an image that decodes
        return image
    method = ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None
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
