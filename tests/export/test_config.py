from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

from midge.export.config import RANGES, ExportConfig, QuantizeConfig, VerifyConfig
from midge.runtime.errors import UserError

EXPORT = ExportConfig(run=Path("run"), out=Path("artifact"))
VERIFY = VerifyConfig(artifact=Path("artifact"))
QUANTIZE = QuantizeConfig(artifact=Path("artifact"), data=Path("images"))


def test_defaults_are_in_range() -> None:
    EXPORT.check()
    VERIFY.check()
    QUANTIZE.check()


@pytest.mark.parametrize("name", sorted(RANGES))
def test_every_range_is_of_a_field_and_is_checked(name: str) -> None:
    configs = [config for config in (EXPORT, VERIFY, QUANTIZE) if hasattr(config, name)]
    assert configs
    low, high = RANGES[name]
    for config in configs:
        for value in (low, high):
            dataclasses.replace(config, **{name: value}).check()
        for value in (low - 1, high + 1, math.nan):
            with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is {value}: give a value from"):
                dataclasses.replace(config, **{name: value}).check()


def test_config_and_verify_import_nothing_heavy() -> None:
    code = (
        "import sys, midge.export.config, midge.export.targets, midge.export.verify; "
        "print([m for m in ('torch', 'timm', 'onnx', 'openvino', 'nncf', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_config_imports_no_runtime_either() -> None:
    code = (
        "import sys, midge.export.config, midge.export.targets; "
        "print([m for m in ('numpy', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
