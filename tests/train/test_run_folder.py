import dataclasses
import json

import pytest

from midge.runtime.errors import UserError
from midge.train.recipes import quickstart
from midge.train.run_folder import open_run

FINGERPRINT = "ab" * 32


@pytest.fixture
def config(tmp_path):
    return quickstart(tmp_path / "data", tmp_path / "run")


def resumed(config, **changes):
    return dataclasses.replace(config, resume=True, **changes)


def test_new_run_writes_its_whole_configuration(config):
    folder = open_run(config, FINGERPRINT, 100)
    description = json.loads((config.out / "config.json").read_text())
    assert description["schema"] == 1
    assert description["config"] == json.loads(json.dumps(config.to_json()))
    assert (description["data_fingerprint"], description["num_images"]) == (FINGERPRINT, 100)
    assert {"python", "torch", "timm", "numpy"} <= set(description["versions"])
    assert len(folder.identity) == 64
    assert not folder.finished


def test_resume_starts_where_there_is_nothing(config):
    assert open_run(resumed(config), FINGERPRINT, 100).identity == open_run(resumed(config), FINGERPRINT, 100).identity
    assert (config.out / "config.json").exists()


def test_without_resume_a_run_is_refused(config):
    open_run(config, FINGERPRINT, 100)
    with pytest.raises(UserError, match="holds a run already: continue it with --resume"):
        open_run(config, FINGERPRINT, 100)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_holds_something_else_is_refused(config, resume):
    config.out.mkdir()
    (config.out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        open_run(dataclasses.replace(config, resume=resume), FINGERPRINT, 100)
    assert [path.name for path in config.out.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_taken(config):
    config.out.mkdir()
    open_run(config, FINGERPRINT, 100)


def test_differing_fields_are_named(config):
    open_run(config, FINGERPRINT, 100)
    before = (config.out / "config.json").read_bytes()
    with pytest.raises(UserError) as caught:
        open_run(resumed(config, epochs=9.0, channels=(8, 16)), FINGERPRINT, 100)
    differing = f"channels [32, 64, 128, 256] there and [8, 16] now, epochs {config.epochs} there and 9.0 now"
    assert f"({differing})" in str(caught.value)
    assert (config.out / "config.json").read_bytes() == before


def test_other_images_are_refused(config):
    open_run(config, FINGERPRINT, 100)
    for changes in ({}, {"head_outputs": 208}):  # what is fitted to the number of images follows from them
        with pytest.raises(UserError, match="was trained on other images"):
            open_run(resumed(config, **changes), "cd" * 32, 100)


def test_what_does_not_decide_may_change(config):
    identity = open_run(config, FINGERPRINT, 100).identity
    moved = resumed(config, data=config.data / "elsewhere", workers=7, checkpoint_every_steps=3, device="cpu")
    assert open_run(moved, FINGERPRINT, 100).identity == identity


@pytest.mark.parametrize("content", ["{}", "[]", '{"schema": 99, "config": {}}', '{"schema": 1, "config": 3}'])
def test_a_configuration_that_is_none(config, content):
    config.out.mkdir()
    (config.out / "config.json").write_text(content)
    with pytest.raises(UserError, match="is no configuration of a run"):
        open_run(resumed(config), FINGERPRINT, 100)
