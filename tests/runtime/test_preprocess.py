from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from midge.runtime.errors import UserError
from midge.runtime.preprocess import INTERPOLATIONS, Preprocess, resized_size

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("interpolation", sorted(INTERPOLATIONS))
@pytest.mark.parametrize("size", [(28, 28), (1, 1), (7, 300), (301, 77), (64, 65), (256, 256), (333, 500), (39, 40)])
def test_equals_torchvision(size: tuple[int, int], interpolation: str) -> None:
    from torchvision import transforms

    preprocess = Preprocess(40, 33, interpolation, MEAN, STD)
    reference = transforms.Compose(
        [
            transforms.Resize(40, transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(33),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    image = noise(*size)
    expected = np.asarray(reference(Image.fromarray(image)))
    result = preprocess(image)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, expected)


def test_the_image_is_not_changed() -> None:
    image = noise(32, 32)
    before = image.copy()
    Preprocess(32, 32)(image)
    np.testing.assert_array_equal(image, before)


def test_long_side_is_rounded_down() -> None:
    assert resized_size(100, 67, 32) == (47, 32)  # 47.76
    assert resized_size(67, 100, 32) == (32, 47)


def test_json_round_trip() -> None:
    preprocess = Preprocess(36, 32, "bilinear", MEAN, STD)
    assert Preprocess.from_json(json.loads(json.dumps(preprocess.to_json()))) == preprocess


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_px": 41}, "Cannot crop 41 px from images resized to 40 px"),
        ({"crop_px": 0}, "'crop_px': 0"),
        ({"crop_px": True}, "'crop_px': True"),
        ({"resize_px": 10**9}, "'resize_px': 1000000000"),
        ({"resize_px": 40.0}, "'resize_px': 40.0"),
        ({"std": [0.2, 0.0, 0.2]}, "above 0"),
        ({"std": [0.2, float("nan"), 0.2]}, "finite"),
        ({"mean": [10**400, 0, 0]}, "finite"),
        ({"mean": [0.5, 0.5]}, "a list of 3 finite numbers"),
        ({"mean": "abc"}, "a list of 3 finite numbers"),
        ({"interpolation": "cubic"}, "one of bicubic, bilinear, lanczos, nearest"),
    ],
)
def test_hostile_json_is_refused(change: dict[str, object], message: str) -> None:
    value = {**Preprocess(40, 33).to_json(), **change}
    with pytest.raises(UserError, match=message):
        Preprocess.from_json(value)


def test_missing_field_and_no_object_are_refused() -> None:
    value = Preprocess(40, 33).to_json()
    del value["std"]
    with pytest.raises(UserError, match="no field 'std'"):
        Preprocess.from_json(value)
    with pytest.raises(UserError, match="must be a JSON object, not a list"):
        Preprocess.from_json([])


def test_embedded_gives_the_crop_of_which_the_rest_is_the_same() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    plain = Preprocess(20, 16)
    embedded = dataclasses.replace(plain, embedded=True)
    crop = embedded(image)
    assert (crop.shape, crop.dtype, crop.flags.c_contiguous) == ((16, 16, 3), np.uint8, True)
    assert (embedded.input_shape, embedded.input_dtype) == ((16, 16, 3), "uint8")
    assert (plain.input_shape, plain.input_dtype) == ((3, 16, 16), "float32")
    np.testing.assert_array_equal(embedded.normalize(crop[None])[0], plain(image))
    assert Preprocess.from_json(embedded.to_json()) == embedded
    assert "embedded" not in plain.to_json()
