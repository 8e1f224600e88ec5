"""The fast decoder against Pillow's: the same bits, the same refusals."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from midge.runtime import decode
from midge.runtime.decode import UnreadableImageError, image_size, load_image, reduction
from midge.train.jpeg import decode_jpeg


def photo(width, height, mode="RGB"):
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **{"format": "JPEG", "quality": 90, **options})
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_equals_pillow(mode, progressive, subsampling):
    data = encoded(photo(131, 97, mode), progressive=progressive, subsampling=subsampling)
    np.testing.assert_array_equal(load_image(data, decode_jpeg=decode_jpeg), load_image(data))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_reduced_equals_pillows_draft(mode, factor):
    data = encoded(photo(531, 373, mode))
    image = Image.open(io.BytesIO(data))
    image.draft(None, (531 // factor, 373 // factor))
    got = load_image(data, min_px=373 // factor, decode_jpeg=decode_jpeg)
    np.testing.assert_array_equal(got, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(131, 97), exif=exif)
    for min_px in (None, 40):
        got = load_image(data, min_px=min_px, decode_jpeg=decode_jpeg)
        assert image_size(data, min_px) == got.shape[:2]
        assert got.flags.c_contiguous
    np.testing.assert_array_equal(load_image(data, decode_jpeg=decode_jpeg), load_image(data))


FORMS = {
    "PNG": ("1", "L", "P", "RGB", "RGBA", "LA", "I;16"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "LA", "I;16", "CMYK"),
    "WEBP": ("L", "P", "RGB", "RGBA", "LA"),
    "GIF": ("1", "L", "P", "RGB", "RGBA", "LA"),
    "JPEG": ("1", "L", "RGB", "CMYK"),
}


@pytest.mark.parametrize(("form", "mode"), [(form, mode) for form, modes in FORMS.items() for mode in modes])
@pytest.mark.parametrize("size", [(1, 1), (70, 50), (3000, 20)])
def test_every_mode_has_one_size_at_every_part(mode, form, size):
    image = photo(*size).convert("I").convert("I;16") if mode == "I;16" else photo(*size, mode=mode)
    file = io.BytesIO()
    image.save(file, form)
    for min_px in (None, 8):
        got = load_image(file.getvalue(), min_px=min_px, decode_jpeg=decode_jpeg)
        factor = reduction(size, min_px)
        assert got.shape == (-(-size[1] // factor), -(-size[0] // factor), 3)
        assert got.dtype == np.uint8
        assert image_size(file.getvalue(), min_px) == got.shape[:2]


def test_animated_webp_and_a_strip_of_20_000_px(tmp_path):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert load_image(tmp_path / "x.webp", min_px=10, decode_jpeg=decode_jpeg)[3, 3].tolist() == [255, 0, 0]
    data = encoded(photo(20_000, 120))
    assert load_image(data, min_px=60, decode_jpeg=decode_jpeg).shape == (60, 10_000, 3)
    with pytest.raises(UnreadableImageError, match="differ by more than a factor of 200"):
        load_image(encoded(photo(20_000, 90)), decode_jpeg=decode_jpeg)


@pytest.mark.parametrize(
    ("size", "min_px", "factor"),
    [((500, 375), None, 1), ((500, 375), 384, 1), ((768, 767), 384, 1), ((768, 768), 384, 2), ((9000, 8000), 384, 8)],
)
def test_reduction_keeps_the_short_side(size, min_px, factor):
    assert reduction(size, min_px) == factor


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.9])
def test_truncated(tmp_path, keep):
    data = encoded(photo(131, 97))
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UnreadableImageError) as caught:
        load_image(path, decode_jpeg=decode_jpeg)
    assert caught.value.path == path


def test_any_damage_is_an_unreadable_image_or_an_image():
    rng = np.random.default_rng(0)
    whole = encoded(photo(61, 47))
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(whole)
        for position in rng.integers(0, len(whole), 3):
            damaged[position] = rng.integers(0, 256)
        try:
            assert load_image(bytes(damaged), decode_jpeg=decode_jpeg).shape[2] == 3
            outcomes.add("image")
        except UnreadableImageError:
            outcomes.add("unreadable")
    assert outcomes == {"image", "unreadable"}


def test_a_file_that_changes_between_its_header_and_its_pixels(tmp_path):
    """What the decoder gets is looked at again: another size is refused, another format never reaches OpenCV."""
    path = tmp_path / "x.jpg"
    data, other = encoded(photo(64, 48)), encoded(photo(80, 40))
    path.write_bytes(data)
    with pytest.raises(UnreadableImageError, match="it changed while it was read"):
        load_image(path, decode_jpeg=lambda _, factor: decode_jpeg(other, factor))

    with decode._open(io.BytesIO(data)) as header, pytest.raises(ValueError, match="damaged or truncated"):
        decode._decode_jpeg(encoded(photo(64, 48), format="PNG"), header, 1, decode_jpeg)


def test_errors_name_the_image_that_came_as_bytes():
    with pytest.raises(UnreadableImageError, match=r"'shard\.tar/0\.jpg': its 3 bytes are no image"):
        load_image(b"abc", name=Path("shard.tar/0.jpg"), decode_jpeg=decode_jpeg)
    with pytest.raises(UnreadableImageError, match="the file is empty"):
        load_image(b"", decode_jpeg=decode_jpeg)
    assert image_size(b"abc") == (0, 0)
