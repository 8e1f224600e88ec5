from __future__ import annotations

import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from midge.runtime import decode
from midge.runtime.decode import UnreadableImageError, load_image, read_size

RED, GREEN, BLUE, WHITE, BLACK = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255] * 3, [0] * 3


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def array(values: Any, dtype: Any) -> Image.Image:
    return Image.fromarray(np.array(values, dtype=dtype))


def test_rgb_is_exact(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    result = load_image(save(tmp_path / "x.png", Image.fromarray(values)))
    assert result.dtype == np.uint8
    assert result.flags.writeable
    np.testing.assert_array_equal(result, values)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "gif", "ppm", "webp", "jpg"])
@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_every_format(tmp_path: Path, suffix: str, mode: str) -> None:
    white = Image.new("RGB", (9, 6), "white").convert(mode)
    result = load_image(save(tmp_path / f"x.{suffix}", white))
    np.testing.assert_array_equal(result, np.full((6, 9, 3), 255, np.uint8))


def test_grey_is_repeated(tmp_path: Path) -> None:
    result = load_image(save(tmp_path / "x.png", array([[0, 100], [200, 255]], np.uint8)))
    np.testing.assert_array_equal(result[..., 0], [[0, 100], [200, 255]])
    np.testing.assert_array_equal(result, np.repeat(result[..., :1], 3, axis=2))


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    rgba = array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    result = load_image(save(tmp_path / "rgba.png", rgba))
    assert result[0].tolist() == [RED, WHITE, [127] * 3]
    la = Image.merge("LA", [Image.new("L", (1, 1), 0), Image.new("L", (1, 1), 0)])
    assert load_image(save(tmp_path / "la.png", la))[0, 0].tolist() == WHITE


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = array([[0, 1, 2]], np.uint8)
    image.putpalette(RED + GREEN + BLUE)
    assert load_image(save(tmp_path / "p.png", image))[0].tolist() == [RED, GREEN, BLUE]
    assert load_image(save(tmp_path / "index.png", image, transparency=1))[0].tolist() == [RED, WHITE, BLUE]
    assert load_image(save(tmp_path / "bytes.png", image, transparency=b"\xff\xff\x00"))[0].tolist() == [
        RED,
        GREEN,
        WHITE,
    ]
    assert load_image(save(tmp_path / "x.gif", image, transparency=0))[0].tolist() == [WHITE, GREEN, BLUE]


def test_transparent_colour_key(tmp_path: Path) -> None:
    image = array([[RED, GREEN]], np.uint8)
    assert load_image(save(tmp_path / "x.png", image, transparency=(255, 0, 0)))[0].tolist() == [WHITE, GREEN]


def test_deep_values_are_scaled_by_their_high_byte(tmp_path: Path) -> None:
    grey16 = array([[0, 255, 256, 32768, 65535]], np.uint16)
    for suffix in ("png", "tif"):
        result = load_image(save(tmp_path / f"x.{suffix}", grey16))
        assert result[0, :, 1].tolist() == [0, 0, 1, 128, 255]
    grey32 = array([[-5, 0, 65535, 1 << 30]], np.int32)
    assert load_image(save(tmp_path / "i.tif", grey32))[0, :, 0].tolist() == [0, 0, 255, 255]
    (tmp_path / "deep.ppm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">2H", 65535, 32768))
    assert load_image(tmp_path / "deep.ppm")[0, :, 2].tolist() == [255, 128]


def test_floats(tmp_path: Path) -> None:
    unit = array([[0.0, 0.5, 1.0, np.nan]], np.float32)
    assert load_image(save(tmp_path / "unit.tif", unit))[0, :, 0].tolist() == [0, 128, 255, 0]
    bytes_range = array([[-3.0, 0.0, 99.6, 300.0, np.inf]], np.float32)
    assert load_image(save(tmp_path / "bytes.tif", bytes_range))[0, :, 0].tolist() == [0, 0, 100, 255, 255]


def test_cmyk_and_lab(tmp_path: Path) -> None:
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert load_image(save(tmp_path / "x.tif", cmyk))[0, 0].tolist() == RED
    result = load_image(save(tmp_path / "x.jpg", cmyk, quality=100))[0, 0].astype(int)
    assert np.abs(result - RED).max() <= 3
    lab = Image.new("LAB", (2, 2), (255, 128, 128))
    assert np.abs(load_image(save(tmp_path / "lab.tif", lab))[0, 0].astype(int) - 255).max() <= 1
    ycc = Image.new("YCbCr", (2, 2), (0, 128, 128))
    assert load_image(save(tmp_path / "ycc.jpg", ycc))[0, 0].tolist() == BLACK


# Orientation -> where the red corner, at the top left when upright, is stored: (row, column) of a 2 × 3 or 3 × 2 image.
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "jpg"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = RED
    upright[16:, 32:] = BLUE
    back = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]}
    turned = upright.transpose(1, 0, 2)
    back |= {5: turned, 6: turned[::-1], 7: turned[::-1, ::-1], 8: turned[:, ::-1]}
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.ascontiguousarray(back[orientation])).save(path, exif=exif, **options)
    result = load_image(path)
    assert result.shape == upright.shape
    assert np.abs(result[8, 8].astype(int) - RED).max() <= 3
    assert np.abs(result[24, 40].astype(int) - BLUE).max() <= 3


def test_nonsense_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 99
    assert load_image(save(tmp_path / "x.jpg", Image.new("RGB", (4, 2)), exif=exif)).shape == (2, 4, 3)
    path = save(tmp_path / "y.jpg", Image.new("RGB", (4, 2)), exif=b"Exif\0\0garbage")
    assert load_image(path).shape == (2, 4, 3)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert load_image(tmp_path / f"x.{suffix}")[0, 0].tolist() == RED


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif", "ppm"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = save(tmp_path / f"x.{suffix}", noise).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for keep in (0.02, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * keep)])
        with pytest.raises(UnreadableImageError) as caught:
            load_image(path)
        assert caught.value.path == path
        assert str(path) in str(caught.value)
        assert caught.value.reason in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_no_image(tmp_path: Path) -> None:
    for content, reason in ((b"", "the file is empty"), (b"hello", "its 5 bytes are no image of a known format")):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(UnreadableImageError, match=reason):
            load_image(tmp_path / "x.png")
    with pytest.raises(UnreadableImageError, match="No such file"):
        load_image(tmp_path / "none.png")


def test_decoders_that_start_programs_are_off(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(UnreadableImageError, match="no image of a known format"):
        load_image(tmp_path / "x.png")


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (100_000, 100_000)])
def test_decompression_bombs_are_refused(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "x.png").write_bytes(png_header(width, height))
    with pytest.raises(UnreadableImageError, match=f"more than the {decode.MAX_PIXELS} pixels that are decoded"):
        load_image(tmp_path / "x.png")


def test_strips_and_empty_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png_header(1, 201))
    with pytest.raises(UnreadableImageError, match="differ by more than a factor of 200"):
        load_image(tmp_path / "x.png")
    assert load_image(save(tmp_path / "long.png", Image.new("RGB", (200, 1)))).shape == (1, 200, 3)
    (tmp_path / "x.gif").write_bytes(b"GIF89a" + struct.pack("<HHBBB", 0, 5, 0, 0, 0) + b";")
    with pytest.raises(UnreadableImageError):
        load_image(tmp_path / "x.gif")
    (tmp_path / "x.bmp").write_bytes(
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 0, 0, 1, 24, 0, 0, 0, 0, 0, 0)
    )
    with pytest.raises(UnreadableImageError):
        load_image(tmp_path / "x.bmp")


def test_any_damage_is_an_unreadable_image_or_an_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    outcomes = set()
    for suffix in ("jpg", "png", "webp", "gif", "bmp", "tif", "ppm"):
        whole = save(tmp_path / f"x.{suffix}", noise).read_bytes()
        path = tmp_path / f"damaged.{suffix}"
        for _ in range(60):
            damaged = bytearray(whole)
            for position in rng.integers(0, min(len(whole), 300), 3):
                damaged[position] = rng.integers(0, 256)
            path.write_bytes(damaged)
            try:
                assert load_image(path).shape[2] == 3
                outcomes.add("image")
            except UnreadableImageError:
                outcomes.add("unreadable")
    assert outcomes == {"image", "unreadable"}


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImageError(Path("a.png"), "it is cut")))
    assert (error.path, error.reason) == (Path("a.png"), "it is cut")
    assert str(error) == "Cannot read the image 'a.png': it is cut. Remove it or replace it."


def test_the_size_is_read_without_the_pixels(tmp_path: Path) -> None:
    Image.effect_noise((64, 48), 50).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:200])
    assert read_size(tmp_path / "a.png") == (48, 64)
    with pytest.raises(UnreadableImageError):
        load_image(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UnreadableImageError, match="the file is empty"):
        read_size(tmp_path / "a.png")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    with pytest.raises(UnreadableImageError, match="pixels"):
        read_size(tmp_path / "huge.png")
