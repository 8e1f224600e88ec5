"""The linear probe against the conditions of its optimum, the folding, the saved classifier, and fine-tuning."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from midge.runtime.errors import UserError
from midge.runtime.images import list_images
from midge.runtime.proportions import wilson_interval
from midge.runtime.torch_model import load_model
from midge.train.evaluation_config import LinearConfig
from midge.train.features import extract_features
from midge.train.finetune import augment, cosine
from midge.train.linear import fit_logistic, fit_probe, fold, linear, standardization, standardized

pytestmark = pytest.mark.usefixtures("one_thread")

RNG = np.random.default_rng(0)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def overlapping_classes(number: int = 300, dim: int = 6, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian classes with correlated features of very different scale: (N, D) float32 and (N,) int64."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, classes, number)
    centers = rng.normal(size=(classes, dim))
    mixing = rng.normal(size=(dim, dim)) * 10.0 ** np.linspace(-2, 2, dim)
    return ((centers[labels] + rng.normal(size=(number, dim))) @ mixing + 5).astype(np.float32), labels


@pytest.mark.parametrize("l2", [1.0, 0.01, 0.0001])
def test_the_fit_is_where_the_gradient_vanishes(l2: float):
    """The objective is strictly convex in the weights, so this is the one minimum."""
    features, labels = overlapping_classes()
    values = (features - features.mean(axis=0)) / features.std(axis=0)
    weight, bias = (t.numpy() for t in fit_logistic(torch.from_numpy(values).double(), torch.from_numpy(labels), 3, l2))
    residual = softmax(values @ weight.T + bias) - np.eye(3)[labels]  # (N, K)
    np.testing.assert_allclose(residual.T @ values / len(values) + l2 * weight, 0, atol=2e-5)
    np.testing.assert_allclose(residual.mean(axis=0), 0, atol=2e-5)
    assert np.abs(weight).max() > 0.05


def test_the_fit_equals_plain_gradient_descent():
    features, labels = overlapping_classes(number=60)
    values = ((features - features.mean(axis=0)) / features.std(axis=0)).astype(np.float64)
    weight, bias = np.zeros((3, 6)), np.zeros(3)
    for _ in range(20_000):
        residual = (softmax(values @ weight.T + bias) - np.eye(3)[labels]) / len(values)
        weight -= 0.5 * (residual.T @ values + 0.1 * weight)
        bias -= 0.5 * residual.sum(axis=0)
    fitted = fit_logistic(torch.from_numpy(values), torch.from_numpy(labels), 3, 0.1)
    np.testing.assert_allclose(fitted[0].numpy(), weight, atol=1e-4)
    np.testing.assert_allclose(fitted[1].numpy(), bias, atol=1e-4)


def test_standardized_features_are_white_and_the_rotation_changes_no_length():
    features, _ = overlapping_classes()
    mean, transform = standardization(features[None])
    white = standardized(features[None], mean, transform).numpy()
    plain = (features - features.mean(axis=0, dtype=float)) / features.std(axis=0, dtype=float)
    np.testing.assert_allclose(np.linalg.norm(white, axis=1), np.linalg.norm(plain, axis=1), rtol=1e-6)
    covariance = white.T @ white / len(white)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-9)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-9)


def test_folded_weights_give_the_logits_of_standardized_features():
    features, _ = overlapping_classes()
    mean, transform = standardization(features[None])
    weight, bias = RNG.normal(size=(3, 6)), RNG.normal(size=3)
    expected = standardized(features[None], mean, transform).numpy() @ weight.T + bias
    folded_weight, folded_bias = fold(weight, bias, mean, transform)
    np.testing.assert_allclose(features.astype(float) @ folded_weight.T + folded_bias, expected, atol=1e-8)


def test_a_constant_feature_has_no_weight():
    features, labels = overlapping_classes()
    features = np.concatenate([features, np.full((len(features), 1), 7, np.float32)], axis=1)
    probe = fit_probe(features[None], labels, 3, seed=0)
    assert np.isfinite(probe.weight).all()
    np.testing.assert_array_equal(probe.weight[:, 6], 0)
    logits = features @ probe.weight.T + probe.bias
    assert (logits.argmax(axis=1) == labels).mean() > 0.6
    assert 0.5 < probe.held_out_top1 <= 1


def test_noise_asks_for_more_regularization_than_signal():
    labels = np.arange(80) % 2
    noise = RNG.normal(size=(1, 80, 60)).astype(np.float32)
    signal = noise.copy()
    signal[..., 0] += 6 * labels
    noisy = noise.copy()
    noisy[..., 0] += labels
    assert fit_probe(noisy, labels, 2, seed=0).l2 > 0.01
    assert fit_probe(signal, labels, 2, seed=0).held_out_top1 > fit_probe(noisy, labels, 2, seed=0).held_out_top1


@pytest.mark.parametrize(
    ("timm_name", "timm_args", "feature_dim"),
    [
        ("resnet18", {"channels": (4, 8, 8, 16)}, 16),
        ("test_efficientnet", {}, 256),
        ("test_convnext", {}, 64),
        (
            "vit_tiny_patch16_224",
            {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2},
            32,
        ),
    ],
)
def test_the_saved_classifier_is_the_backbone_and_the_probe(
    labelled_folder, run_folder, timm_name: str, timm_args: dict, feature_dim: int, capsys: pytest.CaptureFixture[str]
):
    run = run_folder(labelled_folder("train"), "run", timm_name, timm_args, feature_dim)
    test_root = labelled_folder("test", each=6, seed=1)
    assert linear(LinearConfig(run, labels=30, device="cpu", json=True)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((run / "eval" / "linear.json").read_text())
    classifier, spec = load_model(run, "classifier")
    backbone, _ = load_model(run, "backbone")
    assert (spec.num_classes, spec.labels) == (3, ("ant", "bee", "cat"))
    assert spec.trained["method"] == "none"
    assert spec.trained["classifier"]["l2"] == result["l2"]
    state = classifier.state_dict()
    assert all(torch.equal(state[name], value) for name, value in backbone.state_dict().items())

    train, test = list_images(run.parent / "train", 30), list_images(test_root)
    assert train.labels is not None
    features, _ = extract_features(backbone, train, spec.preprocess)
    probe = fit_probe(features[None], train.labels, 3, seed=0)
    judged, _ = extract_features(backbone, test, spec.preprocess)
    logits, _ = extract_features(classifier, test, spec.preprocess)
    np.testing.assert_allclose(logits, judged @ probe.weight.T + probe.bias, rtol=1e-3, atol=1e-3)
    correct = int((logits.argmax(axis=1) == test.labels).sum())
    assert (result["correct"], result["n"], result["labels"]) == (correct, 18, 30)
    assert result["top1"] == correct / 18
    assert result["ci95"] == list(wilson_interval(correct, 18))


def test_equal_runs_give_equal_bytes_and_test_images_decide_nothing(labelled_folder, run_folder, tmp_path: Path):
    train = labelled_folder("train")
    labelled_folder("test", each=3)
    other = labelled_folder("other", each=4, seed=9, classes=("cat", "bee", "ant"))
    runs = [run_folder(train, name) for name in ("a", "b")]
    for run, test in zip(runs, (None, other), strict=True):
        assert linear(LinearConfig(run, test=test, flip=True, device="cpu")) == 0
    for name in ("classifier.safetensors", "classifier.json"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
    assert str(tmp_path) not in (runs[0] / "classifier.json").read_text()


def test_mirrored_images_are_more_to_learn_from(labelled_folder, run_folder):
    run = run_folder(labelled_folder("train"))
    labelled_folder("test", each=2)
    classifiers = []
    for flip in (False, True):
        assert linear(LinearConfig(run, flip=flip, device="cpu")) == 0
        assert json.loads((run / "eval" / "linear.json").read_text())["flip"] is flip
        classifiers.append(load_model(run, "classifier")[0].state_dict()["fc.weight"])
    assert not torch.equal(*classifiers)


def test_fine_tuning_starts_at_the_probe_and_trains_everything(
    labelled_folder, run_folder, capsys: pytest.CaptureFixture[str]
):
    train = labelled_folder("train")
    labelled_folder("test", each=6, seed=1)
    states = []
    for name in ("a", "b"):
        run = run_folder(train, name)
        config = LinearConfig(run, finetune_epochs=2, finetune_batch_size=8, device="cpu")
        assert linear(config) == 0
        states.append((run / "classifier.safetensors").read_bytes())
    assert states[0] == states[1]
    assert "fine-tuned for 2 epochs" in capsys.readouterr().out
    result = json.loads((run / "eval" / "linear.json").read_text())
    assert result["finetune_epochs"] == 2
    assert result["probe"]["n"] == result["n"] == 18
    classifier, _ = load_model(run, "classifier")
    backbone, _ = load_model(run, "backbone")
    state = classifier.state_dict()
    assert not torch.equal(state["conv1.weight"], backbone.state_dict()["conv1.weight"])
    assert not torch.equal(state["bn1.running_mean"], backbone.state_dict()["bn1.running_mean"])


def test_a_learning_rate_of_zero_leaves_the_weights(labelled_folder, run_folder):
    run = run_folder(labelled_folder("train"))
    labelled_folder("test", each=2)
    assert linear(LinearConfig(run, finetune_epochs=1, finetune_lr=0.0, finetune_batch_size=8, device="cpu")) == 0
    classifier, backbone = (load_model(run, stem)[0].state_dict() for stem in ("classifier", "backbone"))
    assert torch.equal(classifier["layer4.1.conv2.weight"], backbone["layer4.1.conv2.weight"])


def test_augmentation_is_a_mirrored_or_shifted_copy():
    batch = torch.from_numpy(RNG.normal(size=(40, 3, 16, 16)).astype(np.float32))
    result = augment(batch, torch.Generator().manual_seed(0), mirror=True)
    assert result.shape == batch.shape
    found = []
    for image, augmented in zip(batch, result, strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
        matches = [
            (top, left, mirrored)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            if np.array_equal(_crop(padded, top, left, mirrored), augmented)
        ]
        assert len(matches) == 1
        found.append(matches[0])
    tops, lefts, mirrors = (set(values) for values in zip(*found, strict=True))
    assert tops == lefts == set(range(5))
    assert mirrors == {False, True}


def test_without_mirroring_an_image_is_shifted_alone():
    batch = torch.from_numpy(RNG.normal(size=(20, 3, 8, 8)).astype(np.float32))
    result = augment(batch, torch.Generator().manual_seed(0), mirror=False)
    for image, augmented in zip(batch.numpy(), result.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="reflect")
        assert any(
            np.array_equal(padded[:, top : top + 8, left : left + 8], augmented)
            for top in range(3)
            for left in range(3)
        )


def _crop(padded: np.ndarray, top: int, left: int, mirrored: bool) -> np.ndarray:
    crop = padded[:, top : top + 16, left : left + 16]
    return crop[:, :, ::-1] if mirrored else crop


def test_an_image_too_small_to_shift_stays():
    batch = torch.ones(3, 3, 4, 4)
    assert torch.equal(augment(batch, torch.Generator(), mirror=True), batch)


def test_cosine_schedule():
    assert cosine(0.5, 0, 100) == 0.5
    assert math.isclose(cosine(0.5, 50, 100), 0.25)
    assert math.isclose(cosine(0.5, 100, 100), 0, abs_tol=1e-12)


def test_a_class_without_enough_labels(labelled_folder, run_folder):
    run = run_folder(labelled_folder("train", each=12))
    labelled_folder("test", each=2)
    with pytest.raises(UserError, match=r"The class '\w+' has 1 of the 4 labelled images .* raise --labels, now 4"):
        linear(LinearConfig(run, labels=4, device="cpu"))
    assert not (run / "classifier.json").exists()


def test_images_without_labels(image_folder, labelled_folder, run_folder):
    run = run_folder(image_folder())
    with pytest.raises(UserError, match=r"A classifier needs labels: .*ImageFolder layout"):
        linear(LinearConfig(run, test=labelled_folder("labelled")))


def test_unreadable_training_images_are_skipped(labelled_folder, run_folder):
    train = labelled_folder("train", each=20)
    labelled_folder("test", each=2)
    (train / "ant" / "003.png").write_bytes(b"text")
    run = run_folder(train)
    with pytest.raises(UserError, match="1 of 60 images are unreadable"):
        linear(LinearConfig(run, device="cpu"))
    assert linear(LinearConfig(run, device="cpu", max_unreadable=0.05, finetune_epochs=1)) == 0
    result = json.loads((run / "eval" / "linear.json").read_text())
    assert (result["labels"], result["unreadable"]) == (59, 1)


def test_a_network_whose_classifier_is_not_linear(labelled_folder, run_folder):
    args = {"img_size": 32, "embed_dim": (16, 16, 16), "depth": (1, 1, 1)}
    run = run_folder(labelled_folder("train"), timm_name="levit_128s", timm_args=args, feature_dim=16)
    labelled_folder("test", each=2)
    with pytest.raises(UserError, match="is no linear layer on its features"):
        linear(LinearConfig(run, device="cpu"))
    assert not (run / "classifier.json").exists()
