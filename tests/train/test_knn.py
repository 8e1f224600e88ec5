"""k-NN against plain loops, its baselines, and what it says to unusable input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from midge.runtime.errors import UserError
from midge.runtime.images import UnreadableBudget, list_images
from midge.runtime.proportions import wilson_interval
from midge.runtime.torch_model import load_model
from midge.train import knn as knn_module
from midge.train.evaluation_config import KnnConfig
from midge.train.knn import (
    drop_equal_channels,
    forms_by_name,
    knn,
    knn_accuracy,
    knn_predict,
    random_inits,
    stronger_form,
)
from midge.train.labelled import LabelledSets, labelled_sets, stratified_split

pytestmark = pytest.mark.usefixtures("one_thread")


def slow_knn(bank: np.ndarray, labels: np.ndarray, query: np.ndarray, k: int, temperature: float) -> int:
    neighbours = []
    for key, label in zip(bank, labels, strict=True):
        cosine = float(key @ query / (np.linalg.norm(key) * np.linalg.norm(query)))
        neighbours.append((cosine, label))
    votes: dict[int, float] = {}
    for cosine, label in sorted(neighbours, reverse=True)[:k]:
        votes[label] = votes.get(label, 0.0) + math.exp(cosine / temperature)
    return max(votes, key=lambda label: votes[label])


@pytest.mark.parametrize(("seed", "k", "temperature"), [(0, 1, 0.07), (1, 5, 0.07), (2, 20, 0.07), (3, 500, 0.3)])
def test_predictions_equal_plain_loops(seed: int, k: int, temperature: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(knn_module, "SIMILARITIES_AT_ONCE", 60 * 7)  # queries in parts of seven
    rng = np.random.default_rng(seed)
    bank = rng.normal(size=(60, 8)).astype(np.float32) * rng.uniform(0.1, 10, (60, 1)).astype(np.float32)
    queries = rng.normal(size=(45, 8)).astype(np.float32)
    labels = rng.integers(0, 4, 60)
    expected = [slow_knn(bank.astype(float), labels, query.astype(float), k, temperature) for query in queries]
    assert len(set(expected)) > 1
    np.testing.assert_array_equal(knn_predict(bank, labels, queries, k, temperature), expected)


def test_a_near_neighbour_outweighs_many_far_ones():
    angles = np.radians([0, 30, 31, 32, 33])
    bank = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    labels = np.array([1, 0, 0, 0, 0])
    query = np.array([[1, 0]], dtype=np.float32)
    assert knn_predict(bank, labels, query, k=5, temperature=0.02).tolist() == [1]
    assert knn_predict(bank, labels, query, k=5, temperature=10.0).tolist() == [0]
    assert knn_predict(bank, labels, query, k=5, temperature=1e-3).tolist() == [1]  # exp(1000) is no number


def test_a_black_image_has_no_direction():
    bank = np.array([[0, 0], [1, 1]], dtype=np.float32)
    predictions = knn_predict(bank, np.array([0, 1]), np.zeros((1, 2), dtype=np.float32), k=1)
    assert predictions.shape == (1,)


def test_accuracy_has_an_interval():
    bank = np.eye(3, dtype=np.float32)
    queries, labels = np.eye(3, dtype=np.float32).repeat(4, axis=0), np.repeat([0, 1, 2], 4)
    labels[0] = 2
    result = knn_accuracy(bank, np.arange(3), queries, labels, k=1)
    assert result == {"top1": 11 / 12, "correct": 11, "n": 12, "ci95": list(wilson_interval(11, 12))}
    low, high = result["ci95"]
    assert 0.6 < low < 11 / 12 < high < 1


def test_the_stronger_pixels_are_chosen_within_the_bank():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 50)
    # The classes are brighter and darker versions of one image: one direction, until that image is subtracted.
    common = rng.uniform(1, 2, 12)
    brightness = np.where(labels == 0, 1.2, 0.8)[:, None]
    bank = (common * brightness + rng.normal(0, 0.05, (100, 12))).astype(np.float32)
    queries = bank[:10] * 0
    forms = forms_by_name({"pixels": bank}, {"pixels": queries})["pixels"]
    form, facts = stronger_form(forms, labels, KnnConfig(Path("run")), torch.device("cpu"))
    chosen_bank, chosen_queries = forms[form]
    assert facts["form"] == form == "centred"
    assert facts["held_out_top1"]["centred"] > facts["held_out_top1"]["plain"]
    np.testing.assert_allclose(chosen_bank, bank - bank.mean(axis=0))
    np.testing.assert_allclose(chosen_queries, -np.tile(bank.mean(axis=0), (10, 1)))


def test_grey_pixels_need_one_channel():
    rng = np.random.default_rng(0)
    grey = np.tile(rng.uniform(size=(6, 16)).astype(np.float32), 3)
    colour = rng.uniform(size=(6, 48)).astype(np.float32)
    small, _ = drop_equal_channels(grey, grey)
    assert small.shape == (6, 16)
    assert drop_equal_channels(grey, colour)[0].shape == (6, 48)

    def cosines(x: np.ndarray) -> np.ndarray:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        return x @ x.T

    np.testing.assert_allclose(cosines(small), cosines(grey), atol=1e-6)


def test_command_with_baselines(labelled_folder, run_folder, capsys: pytest.CaptureFixture[str]):
    run = run_folder(data=labelled_folder("train", each=12))
    labelled_folder("test", each=5, seed=1)
    config = KnnConfig(run, labels=30, baselines=True, k=3, device="cpu", json=True)
    assert knn(config) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((run / "eval" / "knn.json").read_text())
    assert (result["bank"], result["k"], result["temperature"], result["classes"]) == (30, 3, 0.07, 3)
    for name in ("pixels", "random_init", "pretrained"):
        accuracy = result[name]
        assert accuracy["n"] == 15
        assert accuracy["top1"] == accuracy["correct"] / 15
        assert accuracy["ci95"] == list(wilson_interval(accuracy["correct"], 15))
    assert result["pixels"]["top1"] > 0.9

    before = (run / "eval" / "knn.json").read_bytes()
    assert knn(config) == 0
    assert (run / "eval" / "knn.json").read_bytes() == before
    capsys.readouterr()
    assert knn(KnnConfig(run, k=3, device="cpu", limit=6)) == 0
    printed = capsys.readouterr().out
    assert "pretrained" in printed
    assert "raw pixels" not in printed
    assert json.loads((run / "eval" / "knn.json").read_text())["pretrained"]["n"] == 6


def test_a_bank_of_one_image_a_class_cannot_choose_a_baseline(labelled_folder, run_folder):
    run = run_folder(data=labelled_folder("train"))
    labelled_folder("test", each=2, seed=1)
    with pytest.raises(UserError, match=r"The bank's 3 images are of as many classes.*give more --labels"):
        knn(KnnConfig(run, labels=3, baselines=True, device="cpu"))


def test_random_initialization_is_no_straw_man(labelled_folder, run_folder):
    run = run_folder(data=labelled_folder("train"))
    labelled_folder("test")
    _, spec = load_model(run, "backbone")
    sets = labelled_sets("k-NN", run, None, None, 100, None, 0)
    config = KnnConfig(run, device="cpu")

    def states() -> list[dict[str, torch.Tensor]]:
        encoders = random_inits(config, spec, sets, torch.device("cpu"), UnreadableBudget(0, 36)).values()
        return [encoder.state_dict() for encoder in encoders if isinstance(encoder, torch.nn.Module)]

    initial, estimated = states()
    for state in (initial, estimated):
        assert state["layer1.0.bn2.weight"].eq(1).all()  # timm's default is 0: the residual branch would be absent
    assert initial["layer4.1.bn2.running_var"].eq(1).all()
    assert not estimated["layer4.1.bn2.running_var"].eq(1).any()
    assert torch.equal(initial["conv1.weight"], estimated["conv1.weight"])
    again = states()[1]
    assert all(torch.equal(estimated[name], again[name]) for name in estimated)


def test_the_stronger_random_initialization_is_chosen_within_the_bank():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 50)
    good = (np.eye(2, dtype=np.float32)[labels] + rng.normal(0, 0.1, (100, 2))).astype(np.float32)
    noise = rng.normal(size=(100, 2)).astype(np.float32)
    features = {"random_init, initial statistics": noise, "random_init, estimated statistics": good, "pretrained": good}
    forms = forms_by_name(features, features)
    assert list(forms) == ["random_init", "pretrained"]
    form, facts = stronger_form(forms["random_init"], labels, KnnConfig(Path("run")), torch.device("cpu"))
    assert form == "estimated statistics"
    assert set(facts["held_out_top1"]) == {"initial statistics", "estimated statistics"}
    assert stronger_form(forms["pretrained"], labels, KnnConfig(Path("run")), torch.device("cpu")) == ("", {})


def test_random_initialization_of_a_network_without_that_argument(labelled_folder, run_folder):
    args = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    run = run_folder(labelled_folder("train"), timm_name="vit_tiny_patch16_224", timm_args=args, feature_dim=32)
    labelled_folder("test")
    assert knn(KnnConfig(run, baselines=True, device="cpu")) == 0
    assert json.loads((run / "eval" / "knn.json").read_text())["random_init"]["n"] == 36


def test_test_classes_are_matched_by_name(labelled_folder, run_folder):
    run = run_folder(data=labelled_folder("train"))
    labelled_folder("test", classes=("bee", "cat"))
    sets = labelled_sets("k-NN", run, None, None, 36, None, 0)
    assert isinstance(sets, LabelledSets)
    assert sets.test.classes == ("ant", "bee", "cat")
    assert sets.test.labels is not None
    assert [sets.test.classes[label] for label in sets.test.labels] == [Path(p).parent.name for p in sets.test.paths]


def test_splits_are_stratified():
    labels = np.array([0] * 10 + [1] * 100 + [2] * 2 + [3])
    first, second = stratified_split(labels, 0.2, seed=1)
    assert sorted([*first, *second]) == list(range(113))
    assert np.bincount(labels[second], minlength=4).tolist() == [2, 20, 1, 0]
    assert not np.array_equal(second, stratified_split(labels, 0.2, seed=2)[1])
    np.testing.assert_array_equal(second, stratified_split(labels, 0.2, seed=1)[1])


def test_folder_without_labels(image_folder, labelled_folder, run_folder):
    flat = image_folder()
    run = run_folder(data=flat)
    labelled = labelled_folder("labelled")
    with pytest.raises(UserError, match=r"k-NN needs labels: .* not in ImageFolder layout .* with --data\.$"):
        knn(KnnConfig(run, test=labelled))
    with pytest.raises(UserError, match=r"k-NN needs labels: .* with --test\.$"):
        knn(KnnConfig(run, data=labelled, test=flat))
    assert not (run / "eval").exists()


def test_unusable_folders(labelled_folder, run_folder, tmp_path: Path):
    train = labelled_folder("train")
    run = run_folder(data=train)
    with pytest.raises(UserError, match="No test images beside"):
        knn(KnnConfig(run))
    with pytest.raises(UserError, match="overlap"):
        knn(KnnConfig(run, test=train))
    with pytest.raises(UserError, match="overlap"):
        knn(KnnConfig(run, test=train / "ant"))
    labelled_folder("test", classes=("bee", "cow", "dog"))
    with pytest.raises(UserError, match=r"have the class 'cow' and 1 more that the training images .* ant, bee, cat"):
        knn(KnnConfig(run))
    with pytest.raises(UserError, match="absent"):
        knn(KnnConfig(tmp_path / "absent"))
    bare = run_folder(name="bare")
    with pytest.raises(UserError, match=r"No run configuration at .*bare"):
        knn(KnnConfig(bare))
    (bare / "config.json").write_text('{"config": {}}')
    with pytest.raises(UserError, match="names no images"):
        knn(KnnConfig(bare))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0}, "--k is 0: give a value from 1 to"),
        ({"temperature": 0.0}, "--temperature is 0"),
        ({"labels": 0}, "--labels is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"max_unreadable": 1.0}, r"--max-unreadable is 1\.0"),
        ({"device": "tpu"}, "Unknown device 'tpu'"),
    ],
)
def test_values_out_of_range(values: dict, message: str, run_folder):
    with pytest.raises(UserError, match=message):
        knn(KnnConfig(run_folder(), **values))


def test_fewer_images_than_labels_asked_for(labelled_folder, run_folder):
    run = run_folder(data=labelled_folder("train", each=3))
    labelled_folder("test", each=2)
    assert knn(KnnConfig(run, device="cpu")) == 0
    assert json.loads((run / "eval" / "knn.json").read_text())["bank"] == 9
    assert len(list_images(run.parent / "train")) == 9
