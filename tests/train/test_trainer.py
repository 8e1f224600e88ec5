"""The whole of ``midge pretrain`` on tiny settings: real data workers, real files."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from midge.__main__ import main
from midge.runtime.errors import UserError
from midge.runtime.images import list_images, load_image
from midge.runtime.torch_model import load_model
from midge.train import checkpoint
from midge.train.pretrain import pretrain
from midge.train.recipes import moco_cnn

pytestmark = pytest.mark.usefixtures("one_thread")


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    return (run / "backbone.safetensors").read_bytes()


def test_end_to_end(image_folder, tmp_path, capsys, tiny):
    data, run = image_folder(28), tmp_path / "run"
    assert pretrain(tiny(data, run, workers=2)) == 0
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    events = {name for name in names if name.startswith("tensorboard/events.out.tfevents")}
    files = {"config.json", "metrics.jsonl", "checkpoints/last.pt", "backbone.safetensors", "backbone.json"}
    assert names == files | events
    assert len(events) == 1
    network, spec = load_model(run, "backbone")
    assert (spec.timm_name, spec.feature_dim, spec.input_px) == ("resnet18", 8, 32)
    assert spec.trained["steps"] == 6  # 28 images are three whole batches
    images = list_images(data)
    batch = torch.from_numpy(np.stack([spec.preprocess(load_image(images.path(i))) for i in range(8)]))
    alive = network(batch).std(dim=0) > 0  # which of the 8 ReLUs are dead depends on torch's version
    assert alive.float().mean() > 0.5
    last = metrics(run)[-1]["loss"]
    assert f"Pretrained backbone (loss {last:.3f} at epoch 2): " in capsys.readouterr().out

    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 5]  # every second step, and each epoch's last
    peak = 0.48 * 8 / 256
    cosine = [0.0048 + (peak - 0.0048) * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(4)]
    assert [line["lr"] for line in lines] == pytest.approx([peak, cosine[0], cosine[1], cosine[3]])
    assert lines[-1]["epoch"] == 2
    assert lines[0]["loss"] == pytest.approx(0.4 * lines[0]["loss_global"] + 0.6 * lines[0]["loss_local"], rel=1e-5)


def test_equal_runs_give_equal_bytes_and_other_seeds_others(image_folder, tmp_path, tiny):
    data = image_folder()
    for name, changes in {"a": {}, "b": {"workers": 1}, "c": {"seed": 1}}.items():
        assert pretrain(tiny(data, tmp_path / name, epochs=1.0, **changes)) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert (tmp_path / "a/backbone.json").read_bytes() == (tmp_path / "b/backbone.json").read_bytes()
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


def test_areas_and_terms_of_the_quickstart_reach_the_run(image_folder, tmp_path, tiny):
    changes = {"global_area": (0.7, 1.0), "local_area": (0.3, 0.8), "koleo_weight": 0.05, "freeze_batch_norm": True}
    config = tiny(image_folder(), tmp_path / "run", **changes)
    assert pretrain(config) == 0
    _, spec = load_model(config.out, "backbone")
    assert (spec.trained["global_area"], spec.trained["local_area"]) == ([0.7, 1.0], [0.3, 0.8])
    state = load_model(config.out, "backbone")[0].state_dict()
    assert all(value.eq(0).all() for name, value in state.items() if name.endswith("running_mean"))
    assert any(not value.eq(1).all() for name, value in state.items() if "bn" in name and name.endswith(".weight"))


def test_teacher_can_be_kept(image_folder, tmp_path, tiny):
    data = image_folder()
    for name in ("student", "teacher"):
        assert pretrain(tiny(data, tmp_path / name, epochs=1.0, export_weights=name)) == 0
    state = checkpoint.load(tmp_path / "teacher/checkpoints/last.pt", identity(tmp_path / "teacher"))["method"]
    kept: Any = load_model(tmp_path / "teacher", "backbone")[0]
    assert torch.equal(kept.conv1.weight, state["teacher.backbone.conv1.weight"])
    assert not torch.equal(kept.conv1.weight, state["student.backbone.conv1.weight"])
    assert weights(tmp_path / "teacher") != weights(tmp_path / "student")


def identity(run):
    return json.loads((run / "backbone.json").read_text())["trained"]["run"]


def test_vit_with_adamw_drop_path_and_bfloat16(image_folder, tmp_path, tiny, caplog):
    changes = {
        "backbone": "vit_tiny_patch16_224",
        "channels": None,
        "patch_px": 8,
        "drop_path": 0.1,
        "optimizer": "adamw",
        "base_lr": 5e-4,
        "head_batch_norm": False,
        "fixed_magnitude": False,
        "precision": "bf16-mixed",
    }
    assert pretrain(tiny(image_folder(), tmp_path / "run", epochs=0.7, **changes)) == 0
    assert "Precision" not in caplog.text  # Fabric's remark
    network, spec = load_model(tmp_path / "run", "backbone")
    assert (spec.timm_args, spec.trained["local_px"]) == ({"img_size": 32, "patch_size": 8}, 16)
    assert next(network.parameters()).dtype == torch.float32


def test_knn_while_it_trains_keeps_the_best_checkpoint(labelled_folder, tmp_path, tiny):
    data = labelled_folder(each=20)
    changes = {"epochs": 3.0, "knn_every_epochs": 1.0, "knn_images": 45, "keep_checkpoints": 2}
    judged, plain = (tiny(data, tmp_path / name, **changes) for name in ("judged", "plain"))
    plain = dataclasses.replace(plain, knn_every_epochs=0.0)
    assert pretrain(judged) == pretrain(plain) == 0
    found = {line["step"] + 1: line["knn_top1"] for line in metrics(judged.out) if "knn_top1" in line}
    assert sorted(found) == [7, 14, 21]
    assert all(0 <= value <= 1 and round(value * 9, 6).is_integer() for value in found.values())  # a fifth of 45
    best = json.loads((judged.out / "checkpoints/best.json").read_text())
    assert found[best["step"]] == best["knn_top1"] == max(found.values())
    kept = {path.name for path in (judged.out / "checkpoints").iterdir()}
    assert kept == {"last.pt", "best.pt", "best.json", "step-00000020.pt", "step-00000021.pt"}
    assert torch.load(judged.out / "checkpoints/best.pt", weights_only=True)["step"] == best["step"]
    assert not any("knn_top1" in line for line in metrics(plain.out))
    assert weights(judged.out) == weights(plain.out)  # looking changes nothing


def test_knn_while_it_trains_puts_up_with_unreadable_images_as_training_does(labelled_folder, tmp_path, tiny):
    data = labelled_folder(each=20)
    for path in sorted(data.rglob("*.png"))[:2]:
        path.write_bytes(b"no image")
    assert pretrain(tiny(data, tmp_path / "run", epochs=1.0, knn_every_epochs=1.0, max_unreadable=0.2)) == 0
    assert any("knn_top1" in line for line in metrics(tmp_path / "run"))


def test_folders_of_one_image_each_are_no_classes(image_folder, tmp_path, tiny):
    data = image_folder()
    for number, path in enumerate(sorted(data.rglob("*.png"))):
        (data / f"id-{number}").mkdir()
        path.rename(data / f"id-{number}" / "image.png")
    assert pretrain(tiny(data, tmp_path / "run", epochs=1.0)) == 0
    assert not any("knn_top1" in line for line in metrics(tmp_path / "run"))
    with pytest.raises(UserError, match=r"has no two of .* images in one class"):
        pretrain(tiny(data, tmp_path / "asked", knn_every_epochs=1.0))


def test_knn_without_labels_is_refused_only_where_it_is_asked_for(image_folder, tmp_path, tiny):
    data = image_folder()
    with pytest.raises(UserError, match=r"--knn-every-epochs is 1, but .* has no labels"):
        pretrain(tiny(data, tmp_path / "asked", knn_every_epochs=1.0))
    assert pretrain(tiny(data, tmp_path / "not", epochs=0.4)) == 0


def test_recipes_are_fitted_to_the_data_and_say_so(image_folder, tmp_path, tiny_settings, capsys):
    changes = {
        name: value
        for name, value in tiny_settings.items()
        if name not in ("batch_size", "head_outputs", "warmup_epochs")
    }
    config = moco_cnn(image_folder(130), tmp_path / "run", image_px=32, **{**changes, "epochs": 1.0})
    assert pretrain(config) == 0
    assert "Fitted moco-cnn to 130 images: batch_size 64, " in capsys.readouterr().err
    written = json.loads((config.out / "config.json").read_text())["config"]
    assert (written["batch_size"], written["queue_size"], written["temperature"]) == (64, 65, 0.1)
    assert pretrain(dataclasses.replace(config, resume=True)) == 0


def test_loss_that_explodes_stops_the_run_and_keeps_the_good_checkpoint(image_folder, tmp_path, tiny):
    changes = {
        "optimizer": "adamw",
        "base_lr": 1e3,
        "weight_decay": 10.0,
        "weight_decay_end": 10.0,
        "warmup_epochs": 0.0,
    }
    config = tiny(image_folder(), tmp_path / "run", epochs=30.0, **changes)
    with pytest.raises(UserError, match=r"The loss is not finite at step \d+: .*--base-lr") as caught:
        pretrain(config)
    failed = int(str(caught.value).split("at step ")[1].split(":")[0])
    state = torch.load(config.out / "checkpoints/last.pt", weights_only=True)
    assert 0 < state["step"] <= failed
    assert all(np.isfinite(line["loss"]) for line in metrics(config.out))
    assert not (config.out / "backbone.json").exists()


def test_unreadable_images_are_skipped_up_to_a_share(image_folder, tmp_path, capsys, tiny):
    data = image_folder(40)
    for name in ("003.png", "007.png"):
        (data / name).write_bytes(b"broken")
    with pytest.raises(UserError, match=r"2 of 40 images are unreadable \(5.0%, allowed 4.0%\)"):
        pretrain(tiny(data, tmp_path / "strict", epochs=1.0, max_unreadable=0.04))
    capsys.readouterr()
    assert pretrain(tiny(data, tmp_path / "lenient", epochs=2.0, max_unreadable=0.05, workers=2)) == 0
    skipped = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Skipped")]
    assert sorted(line.split("'")[1].rsplit("/", 1)[1] for line in skipped) == ["003.png", "007.png"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "simclr"}, "Unknown method 'simclr': choose one of dino, mocov2, swav."),
        ({"backbone": "resnet19"}, "Unknown backbone 'resnet19': did you mean"),
        ({"views": "tiny"}, "Unknown view policy 'tiny': choose one of auto, baseline, lowcompute."),
        ({"optimizer": "sgd"}, "Unknown optimizer 'sgd': choose one of adamw, lars."),
        ({"device": "tpu"}, "Unknown device 'tpu': choose one of"),
        ({"precision": "8"}, "Unknown precision '8': choose one of"),
        ({"precision": "16-mixed"}, "--precision 16-mixed needs a GPU"),
        ({"batch_size": 64}, "gives 24 images, fewer than one batch of 64: lower --batch-size"),
        ({"seed": -3}, "--seed is -3"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(image_folder, tmp_path, changes, message, tiny):
    config = tiny(image_folder(), tmp_path / "run", **changes)
    with pytest.raises(UserError) as caught:
        pretrain(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not config.out.exists()


def test_command_line_reports_mistakes_with_exit_code_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("no image")
    for data, message in [("missing", "No folder at"), ("empty", "is an empty folder"), ("texts", "but no image")]:
        assert main(["pretrain", "--data", str(tmp_path / data), "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("midge: error: ")
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_output_below_a_file_is_refused(image_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["--data", str(image_folder()), "--out", str(tmp_path / "file" / "run"), "--batch-size", "8"]
    assert main(["pretrain", *arguments, "--image-px", "32", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "Not a directory" in error
    assert error.count("\n") == 1


def test_missing_package_names_the_extra(tmp_path):
    """In a process that cannot import lightning."""
    code = (
        "import sys; sys.modules['lightning'] = None\n"
        f"from midge.__main__ import main; sys.exit(main(['pretrain', '--data', {str(tmp_path)!r}, '--out', 'x']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(tmp_path))
    assert result.returncode == 2
    assert "pip install 'midge[train]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_views_auto_fix_the_local_size_once(image_folder, tmp_path, tiny):
    data, run = image_folder(28, px=40), tmp_path / "run"
    config = tiny(data, run, views="auto", epochs=1.0, global_area=None, local_area=None)
    assert pretrain(config) == 0
    assert json.loads((run / "config.json").read_text())["config"]["local_px"] == 18  # 32 x 122 / 224 = 17.4
    assert json.loads((run / "backbone.json").read_text())["trained"]["local_px"] == 18
    assert pretrain(dataclasses.replace(config, resume=True)) == 0
    with pytest.raises(UserError, match="local_px 18 there and 20 now"):
        pretrain(dataclasses.replace(config, resume=True, local_px=20))


def test_decode_cache_changes_nothing_but_the_time(image_folder, tmp_path, capsys, tiny):
    data = image_folder(30)
    (data / "003.png").write_bytes(b"broken")
    changes = {"epochs": 1.0, "max_unreadable": 0.05, "workers": 1}
    assert pretrain(tiny(data, tmp_path / "plain", **changes)) == 0
    capsys.readouterr()
    assert pretrain(tiny(data, tmp_path / "cached", decode_cache=tmp_path / "cache", **changes)) == 0
    assert weights(tmp_path / "plain") == weights(tmp_path / "cached")
    error = capsys.readouterr().err
    assert "for 30 images." in error
    assert error.count("Skipped") == 1
    other = image_folder(20, name="others")
    with pytest.raises(UserError, match="was made from other images"):
        pretrain(tiny(other, tmp_path / "other", decode_cache=tmp_path / "cache", epochs=1.0))
