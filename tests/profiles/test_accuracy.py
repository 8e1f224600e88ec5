from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from midge.profiles import accuracy
from midge.profiles.accuracy import Predictions, accuracy_json, match_labels, predict_all, why_no_accuracy
from midge.profiles.child import Children
from midge.runtime.artifact import load_artifact
from midge.runtime.backend import open_backend
from midge.runtime.errors import UserError
from midge.runtime.images import fingerprint, list_images, load_image
from midge.train.data_config import PackConfig
from midge.train.pack import pack

VARIANTS = ("onnx-fp32", "onnx-int8-u8")


def test_every_variant_classifies_as_its_runtime_does(tiny_artifact: Path, colour_images: Path) -> None:
    artifact, images = load_artifact(tiny_artifact), list_images(colour_images)
    with Children() as children:
        found = predict_all(artifact, VARIANTS, images, children, 0.0)
    names = [images.classes[label] for label in images.labels if images.labels is not None]  # type: ignore[union-attr]
    assert [artifact.labels[label] for label in found.labels] == names
    for variant in VARIANTS:
        with open_backend(artifact.variants[variant]) as backend:
            expected = [
                int(backend.run(artifact.preprocess(load_image(images.path(i)))[None]).argmax())
                for i in range(len(images))
            ]
        assert found.classes[variant].tolist() == expected
        assert found.classes[variant].dtype == np.int64
    right = (found.classes["onnx-fp32"] == found.labels).mean()
    assert 0.5 < right < 1
    assert (found.data_fingerprint, found.unreadable) == (fingerprint(images), 0)


def test_portions_change_nothing(tiny_artifact: Path, colour_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, images = load_artifact(tiny_artifact), list_images(colour_images)
    with Children() as children:
        whole = predict_all(artifact, VARIANTS[:1], images, children, 0.0)
        monkeypatch.setattr(accuracy, "PORTION_BYTES", 25 * 3 * 16 * 16)
        portions = predict_all(artifact, VARIANTS[:1], images, children, 0.0)
    np.testing.assert_array_equal(whole.classes["onnx-fp32"], portions.classes["onnx-fp32"])
    np.testing.assert_array_equal(whole.labels, portions.labels)


def test_shards_give_the_classes_of_the_folder(tiny_artifact: Path, colour_images: Path, tmp_path: Path) -> None:
    assert pack(PackConfig(colour_images, tmp_path / "packed")) == 0
    with Children() as children:
        folder, shards = (
            predict_all(load_artifact(tiny_artifact), VARIANTS[:1], list_images(path), children, 0.0)
            for path in (colour_images, tmp_path / "packed")
        )
    np.testing.assert_array_equal(folder.classes["onnx-fp32"], shards.classes["onnx-fp32"])
    np.testing.assert_array_equal(folder.labels, shards.labels)
    assert folder.data_fingerprint == shards.data_fingerprint


@pytest.fixture
def damaged_images(colour_images: Path, tmp_path: Path) -> Path:
    """The images, two of which are no images."""
    for source in colour_images.rglob("*.png"):
        target = tmp_path / "damaged" / source.parent.name / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    for name in ("red/00.png", "blue/05.png"):
        (tmp_path / "damaged" / name).write_bytes(b"no image")
    return tmp_path / "damaged"


def test_unreadable_images_are_named_and_left_out_for_all(
    tiny_artifact: Path, damaged_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, images = load_artifact(tiny_artifact), list_images(damaged_images)
    with Children() as children:
        found = predict_all(artifact, VARIANTS[:1], images, children, 0.1)
        assert (len(found.labels), len(found.classes["onnx-fp32"]), found.unreadable) == (58, 58, 2)
        assert [(found.labels == label).sum() for label in range(3)] == [19, 20, 19]
        said = capsys.readouterr().err
        assert "red/00.png" in said and "blue/05.png" in said
        with pytest.raises(UserError, match="of 60 images are unreadable"):
            predict_all(artifact, VARIANTS[:1], images, children, 0.01)


def test_classes_are_matched_by_name(tiny_artifact: Path, colour_images: Path, tmp_path: Path) -> None:
    artifact = load_artifact(tiny_artifact)
    some = list_images(colour_images)
    part = some.take([i for i in range(len(some)) if not some.paths[i].startswith("green")])
    assert sorted(set(match_labels(artifact, part).tolist())) == [0, 2]  # a class without images is no mistake
    (tmp_path / "images").mkdir()
    for source, name in (("red", "red"), ("blue", "azure")):
        (tmp_path / "images" / name).symlink_to(colour_images / source)
    with pytest.raises(UserError, match=r"class folders 'azure', which .*its classes are 'red', 'green', 'blue'"):
        match_labels(artifact, list_images(tmp_path / "images"))


def test_why_there_is_no_accuracy(tiny_artifact: Path, colour_images: Path) -> None:
    artifact, images = load_artifact(tiny_artifact), list_images(colour_images)
    assert why_no_accuracy(artifact, images) is None
    assert "--data" in str(why_no_accuracy(artifact, None))
    assert "no labels" in str(why_no_accuracy(artifact, list_images(colour_images / "red")))
    assert "embedding" in str(why_no_accuracy(dataclasses.replace(artifact, kind="embedding"), images))
    assert "does not name" in str(why_no_accuracy(dataclasses.replace(artifact, labels=()), images))


@pytest.mark.parametrize("answer", [None, [0, 1], [0.5] * 60, [True] * 60, "0" * 60])
def test_a_damaged_answer_is_refused(
    tiny_artifact: Path, colour_images: Path, answer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, images = load_artifact(tiny_artifact), list_images(colour_images)
    monkeypatch.setattr(Children, "run", lambda self, job, what: {"predictions": answer})
    with Children() as children, pytest.raises(UserError, match="The accuracy of onnx-fp32 came back damaged"):
        predict_all(artifact, VARIANTS[:1], images, children, 0.0)


def predictions(**classes: list[int]) -> Predictions:
    named = {name.replace("_", "-"): np.array(values) for name, values in classes.items()}
    return Predictions(np.array([0, 1, 2, 0, 1]), named, "0" * 64, 0)


def test_the_accuracy_of_a_record() -> None:
    everything = predictions(
        torch_fp32=[0, 1, 2, 0, 0], onnx_fp32=[0, 1, 2, 0, 0], onnx_int8_u8=[0, 1, 0, -1, 1], openvino_int8=[0] * 5
    )
    found = accuracy_json(everything, "onnx-int8-u8")
    assert (found["top1"], found["correct"], found["n"], found["not_finite"]) == (0.6, 3, 5, 1)
    assert found["top1_ci95"][0] < 0.6 < found["top1_ci95"][1]
    assert found["agreement_with_reference"] == {"variant": "torch-fp32", "share": 0.4, "n": 5}
    assert found["vs"]["variant"] == "onnx-fp32"
    assert found["vs"]["discordant"] == [2, 1] and found["vs"]["top1_drop_points"] == pytest.approx(20.0)
    assert accuracy_json(everything, "onnx-fp32")["vs"] is None
    assert accuracy_json(everything, "openvino-int8")["vs"] is None  # no openvino-fp32 was measured
    alone = accuracy_json(predictions(onnx_fp32=[0, 1, 2, 0, 1]), "onnx-fp32")
    assert alone["agreement_with_reference"] is None and alone["top1"] == 1.0
