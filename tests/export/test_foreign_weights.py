from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm.data
import torch
from safetensors.torch import save_file

from midge.__main__ import main
from midge.export.config import ExportConfig
from midge.export.subject import Subject, check_subject, load_subject
from midge.runtime.artifact import load_artifact
from midge.runtime.errors import UserError
from midge.runtime.files import sha256_file
from midge.runtime.preprocess import Preprocess

NAME = "test_efficientnet"  # timm's small networks for tests: real ones of their families
HEAD = {"weight": torch.randn(3, 256, generator=torch.Generator().manual_seed(1)), "bias": torch.tensor([0.0, 1, 2])}


def state_dict(name: str = NAME, num_classes: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(timm.create_model(name, num_classes=num_classes).state_dict())


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("weights") / "five.safetensors", state_dict())


def configure(weights: Path, **changes: Any) -> ExportConfig:
    given = {"backbone": NAME, "data": Path("data"), "image_px": 32, **changes}
    return ExportConfig(out=Path("out"), weights=weights, **given)


def load(weights: Path, **changes: Any) -> Subject:
    config = configure(weights, **changes)
    check_subject(config)
    return load_subject(config)


@pytest.mark.parametrize("name", [NAME, "test_resnet", "test_vit", "test_convnext"])
def test_outputs_are_timms(name: str, tmp_path: Path) -> None:
    state = state_dict(name)
    px = 64
    sized: Any = {"img_size": px} if name == "test_vit" else {}
    if sized:
        state = {**state, **timm.create_model(name, num_classes=5, img_size=px).state_dict()}
    path = save(tmp_path / "w.safetensors", state)
    images = torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(2))
    for num_classes, kind in ((5, None), (0, "embedding")):
        plain = timm.create_model(name, num_classes=num_classes, **sized).eval()
        plain.load_state_dict({key: state[key] for key in plain.state_dict()})
        subject = load(path, backbone=name, image_px=px, kind=kind)
        assert subject.kind == (kind or "classifier")
        with torch.inference_mode():
            torch.testing.assert_close(subject.model(images), plain(images))


def test_preprocessing_is_timms_unless_given(weights: Path) -> None:
    known = timm.get_pretrained_cfg("test_vit")
    assert known is not None
    config = timm.data.resolve_data_config(pretrained_cfg=known.to_dict())  # type: ignore[attr-defined]
    vit = save(weights.with_name("vit.safetensors"), state_dict("test_vit"))
    found = load(vit, backbone="test_vit", image_px=None).spec.preprocess
    assert (found.mean, found.std, found.interpolation) == (config["mean"], config["std"], config["interpolation"])
    assert (found.resize_px, found.crop_px) == (int(160 / config["crop_pct"]), 160)
    given = {"resize_px": 40, "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    found = load(weights, **given).spec.preprocess
    assert found == Preprocess(40, 32, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_head_stands_for_the_classifier(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = save(tmp_path / "head.safetensors", HEAD)
    (tmp_path / "names.txt").write_text("ant\nbee\nmaillot\n")
    subject = load(weights, head=head, labels_file=tmp_path / "names.txt")
    assert "gives way to that of --head" in capsys.readouterr().err
    assert (subject.spec.labels, subject.spec.num_classes) == (("ant", "bee", "maillot"), 3)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        features = load(weights, kind="embedding").model(images)
        torch.testing.assert_close(subject.model(images), features @ HEAD["weight"].T + HEAD["bias"])


def test_half_precision_and_missing_counters_are_taken(weights: Path, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in state_dict().items() if not name.endswith("num_batches_tracked")}
    half = {name: tensor.half() for name, tensor in state.items()}
    subject = load(save(tmp_path / "half.safetensors", half))
    for name, tensor in subject.model.state_dict().items():
        assert tensor.dtype in (torch.float32, torch.int64)
        assert name not in half or torch.equal(tensor, half[name].float())
    assert subject.spec.labels == ("0", "1", "2", "3", "4")


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state_dict().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (without("conv_stem.weight"), r"lacks tensor 'conv_stem.weight': it does not fit timm's 'test_efficientnet'"),
        (without("classifier.bias"), r"lacks tensor 'classifier.bias'"),
        (without("classifier.weight"), r"has the unknown tensor 'classifier.bias'"),
        ({**state_dict(), "ema.decay": torch.zeros(1)}, r"has the unknown tensor 'ema.decay'"),
        ({**state_dict(), "conv_stem.weight": torch.zeros(4, 4)}, r"has 'conv_stem.weight' as \(\(4, 4\), 'F32'\)"),
        ({**state_dict(), "bn1.bias": torch.zeros(16, dtype=torch.int64)}, r"has 'bn1.bias' as \(\(16,\), 'I64'\)"),
        (state_dict("test_resnet"), r"lacks tensor 'blocks.0.0.bn1.bias' and \d+ more"),
    ],
)
def test_weights_that_do_not_fit(tensors: dict[str, torch.Tensor], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says) as caught:
        load(save(tmp_path / "w.safetensors", tensors))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", (2**62).to_bytes(8, "little") + b"{}"])
def test_files_that_are_no_weights(weights: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    for changes in ({"weights": path}, {"weights": weights, "head": path}):
        with pytest.raises(UserError, match="are damaged"):
            load(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ({**HEAD, "weight": torch.zeros(3, 9)}, r"is for 9 features, 'test_efficientnet' gives 256"),
        ({**HEAD, "bias": torch.zeros(4)}, r"has 'bias' as \(\(4,\), 'F32'\), the network needs \(\(3,\), 'F32'\)"),
        ({"weight": HEAD["weight"]}, r"lacks tensor 'bias': it does not fit a linear classifier"),
        ({"bias": HEAD["bias"]}, r"lacks tensor 'weight'"),
        ({**HEAD, "scale": torch.ones(1)}, r"has the unknown tensor 'scale'"),
        ({**HEAD, "weight": torch.zeros(3, 256, 1, 1)}, r"has 'weight' as \(\(3, 256, 1, 1\), 'F32'\)"),
    ],
)
def test_heads_that_do_not_fit(weights: Path, tmp_path: Path, head: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        load(weights, head=save(tmp_path / "head.safetensors", head))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a\nb\nc\nd\n", "are 4, the network has 5 classes: give one each"),
        (b"", "are 0, the network has 5 classes"),
        (b"a\nb\n\nd\ne\n", "have '' in line 3"),
        (b"a\nb\n\x1b[2J\nd\ne\n", r"have '\\x1b\[2J' in line 3"),
        (b"a\nb\n" + b"c" * 201 + b"\nd\ne\n", "in line 3: each must be a printable name of at most 200"),
        (b"\xff\xfe\x00", "it is no UTF-8 text"),
    ],
)
def test_labels_are_checked(weights: Path, tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load(weights, labels_file=tmp_path / "names.txt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"run": Path("run")}, "Give either a run folder or --weights"),
        ({"weights": None}, "Give either a run folder or --weights"),
        ({"weights": None, "run": Path("run")}, "--backbone goes with --weights"),
        ({"backbone": None}, "--weights needs --backbone"),
        ({"data": None}, "--weights needs --data"),
        ({"kind": "detector"}, "Unknown kind 'detector': choose one of classifier, embedding, features"),
        ({"backbone": "resnet19"}, "Unknown backbone 'resnet19': did you mean"),
        ({"kind": "embedding", "head": Path("head")}, "--head makes a classifier"),
        ({"kind": "embedding", "labels_file": Path("names")}, "features of .* have none"),
        ({"labels_file": Path("nowhere")}, r"'nowhere' cannot be read \(No such file"),
        ({"resize_px": 16}, "Cannot crop 32 px from images resized to 16 px"),
        ({"interpolation": "area"}, "Unknown interpolation 'area'"),
    ],
)
def test_mistakes_are_one_line(weights: Path, changes: dict[str, Any], says: str) -> None:
    given = {"weights": weights, **changes}
    run = given.pop("run", None)
    config = ExportConfig(run, out=Path("out"), **{"backbone": NAME, "data": Path("data"), "image_px": 32, **given})
    with pytest.raises(UserError, match=says) as caught:
        check_subject(config)
        load_subject(config)
    assert "\n" not in str(caught.value)


def test_an_embedding_has_no_classifier_to_export(tmp_path: Path) -> None:
    path = save(tmp_path / "w.safetensors", state_dict(num_classes=0))
    assert load(path).kind == "embedding"
    with pytest.raises(UserError, match=r"has no classifier: give one with --head"):
        load(path, kind="classifier")


def test_the_command(weights: Path, images: Path, tmp_path: Path) -> None:
    arguments = ["--weights", str(weights), "--backbone", NAME, "--image-px", "32", "--data", str(images / "train")]
    arguments += ["--targets", "onnx", "--precision", "fp32", "--out", str(tmp_path / "out")]
    assert main(["export", *arguments]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    artifact = load_artifact(tmp_path / "out")
    assert (artifact.kind, artifact.labels, artifact.output_shape) == ("classifier", tuple("01234"), (1, 5))
    assert artifact.preprocess.crop_px == 32
    origin = artifact.manifest["origin"]
    assert origin["weights"] == {"name": "five.safetensors", "sha256": sha256_file(weights)}
    assert origin["backbone"] == NAME and "head" not in origin
    assert str(tmp_path) not in json.dumps(artifact.manifest)
