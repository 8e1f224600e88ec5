from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from midge.runtime.errors import UserError
from midge.runtime.preprocess import Preprocess
from midge.runtime.torch_model import ModelSpec, build_model, load_model, save_model

SPEC = ModelSpec(
    timm_name="resnet18",
    timm_args={"channels": [4, 8, 8, 16]},
    num_classes=3,
    feature_dim=16,
    labels=("a", "b", "c"),
    preprocess=Preprocess(32, 32),
    input_px=32,
    trained={"method": "none", "views": 0},
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_model(tmp_path, "model", build_model(SPEC), SPEC)
    return tmp_path


def change(folder: Path, **fields: Any) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_round_trip_gives_the_same_network(saved: Path) -> None:
    torch.manual_seed(0)
    original = build_model(SPEC)
    model, spec = load_model(saved, "model")
    assert spec == SPEC
    assert not model.training
    batch = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model(batch), original(batch))
        assert model(batch).shape == (2, 3)


def test_saving_twice_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    model, spec = load_model(saved, "model")
    save_model(tmp_path / "again", "model", model.train(), spec)
    for name in ("model.safetensors", "model.json"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """The system refuses to write files beyond 4 kB, as a full disk would."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, ignored)


def test_weights_that_do_not_fit_on_the_disk_leave_nothing(tmp_path: Path, small_files_only: None) -> None:
    with pytest.raises(OSError, match="File too large"):
        save_model(tmp_path, "model", build_model(SPEC), SPEC)
    assert list(tmp_path.iterdir()) == []


def test_backbone_gives_features(tmp_path: Path) -> None:
    spec = replace(SPEC, num_classes=0, labels=())
    save_model(tmp_path, "backbone", build_model(spec), spec)
    model, _ = load_model(tmp_path, "backbone")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, spec.feature_dim)


def test_a_network_that_is_not_the_spec_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 'fc.bias' as \(\(3,\), 'F32'\), the network needs \(\(4,\), 'F32'\)"):
        save_model(tmp_path, "model", build_model(SPEC), replace(SPEC, num_classes=4, labels=()))
    assert list(tmp_path.iterdir()) == []


def test_unknown_name_lists_near_matches() -> None:
    with pytest.raises(UserError, match=r"Unknown timm model 'resnet81': did you mean .*resnet18"):
        build_model(replace(SPEC, timm_name="resnet81"))


@pytest.mark.parametrize(
    "name", ["hf-hub:org/model", "local-dir:/tmp/x", "hf_hub:a/b", "../resnet18", "resnet18\n", ""]
)
def test_names_that_fetch_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="is refused"):
        replace(SPEC, timm_name=name)


LOADING_ARGS = """pretrained pretrained_cfg pretrained_cfg_overlay checkpoint_path cache_dir features_only out_indices
scriptable exportable num_classes device model_name in_chans"""


@pytest.mark.parametrize("key", LOADING_ARGS.split())
def test_arguments_that_load_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"'{key}' is refused"):
        replace(SPEC, timm_args={key: "x"})


@pytest.mark.parametrize("value", [{"a": 1}, 10**9, float("nan"), float("inf"), [[[[[1]]]]], [10**9], object()])
def test_arguments_that_are_not_plain_are_refused(value: object) -> None:
    with pytest.raises(UserError, match="The timm argument 'channels' is"):
        replace(SPEC, timm_args={"channels": value})


def test_argument_that_timm_does_not_take() -> None:
    with pytest.raises(UserError, match=r"timm cannot build 'resnet18' with nonsense=1: .*nonsense"):
        build_model(replace(SPEC, timm_args={"nonsense": 1}))


def test_lists_become_tuples_and_back() -> None:
    assert SPEC.timm_args == {"channels": (4, 8, 8, 16)}
    assert SPEC.to_json()["timm_args"] == {"channels": [4, 8, 8, 16]}
    assert ModelSpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": 2}, "has schema 2, this midge reads up to 1: install a newer midge"),
        ({"schema": None}, "'schema': None"),
        ({"num_classes": 4, "labels": []}, "has 'fc.bias' as"),
        ({"num_classes": 0, "labels": []}, "has the unknown tensor 'fc.bias' and 1 more"),
        ({"num_classes": 4}, "has 4 classes but 3 labels"),
        ({"feature_dim": 512}, "has 16 features, its spec says 512"),
        ({"timm_args": {"channels": [60000] * 4}, "feature_dim": 60000}, "the network needs"),
        ({"timm_args": [1]}, "'timm_args': \\[1\\]"),
        ({"timm_name": 5}, "'timm_name': 5"),
        ({"input_px": 64}, "takes 64 px but images are cropped to 32"),
        ({"strides": "8"}, "has 'strides': '8', which must be a list"),
        ({"strides": [0]}, r"has 'strides': \[0\]"),
        ({"strides": [16, 8]}, "of feature maps must rise"),
        ({"strides": [8]}, "and leave no classifier"),
        ({"strides": [7], "num_classes": 0, "labels": []}, "no feature map of stride 7: choose of --strides 2 4 8 16"),
        ({"weights_sha256": "0" * 64}, "are not those that 'model.json' describes"),
        ({"weights_sha256": "x"}, "64 lower-case hexadecimal digits"),
    ],
)
def test_hostile_description_is_refused(saved: Path, fields: dict[str, Any], message: str) -> None:
    change(saved, **fields)
    with pytest.raises(UserError, match=message) as caught:
        load_model(saved, "model")
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_refused(saved: Path) -> None:
    from midge.runtime.files import sha256_file

    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + b"abcd")
    with pytest.raises(UserError, match="are not those"):
        load_model(saved, "model")
    for damaged in (b"", whole[:-100], (2**62).to_bytes(8, "little") + whole[8:], b"\x80\x04K\x01."):
        path.write_bytes(damaged)
        change(saved, weights_sha256=sha256_file(path))
        with pytest.raises(UserError, match="are damaged"):
            load_model(saved, "model")


def test_missing_files_are_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"No weights at '.*model\.safetensors'"):
        load_model(saved, "model")
    with pytest.raises(UserError, match=r"No model description at '.*other\.json'"):
        load_model(saved, "other")
