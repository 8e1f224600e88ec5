"""The artifact that is stored in the repository: small, loadable, verifiable where only the base install is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from midge.export.config import VerifyConfig
from midge.export.verify import verify
from midge.runtime.artifact import load_artifact

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny-artifact"


def test_it_is_small_and_whole() -> None:
    artifact = load_artifact(TINY)
    assert (artifact.name, artifact.labels) == ("tiny-artifact", ("cross", "disc", "square"))
    assert tuple(artifact.variants) == ("onnx-fp32", "onnx-int8-u8")
    assert artifact.manifest["calibration"] is not None
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 400_000


def test_it_passes_and_runs_on_integers(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(VerifyConfig(TINY, json=True)) == 0
    variants = json.loads(capsys.readouterr().out)["variants"]
    assert variants["onnx-fp32"]["golden"]["cosine_min"] > 0.9999
    assert variants["onnx-int8-u8"]["golden"]["top1_agreement"] > 0.95
    assert variants["onnx-int8-u8"]["golden"]["cosine_min"] > 0.99  # 0.86 where products overflow, see OrtBackend
    assert variants["onnx-int8-u8"]["int8_mac_share"] > 0.95


def test_there_is_no_reference_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(VerifyConfig(TINY, data=tmp_path)) == 0
    assert "--data are not looked at: the artifact has no torch-fp32" in capsys.readouterr().err


def test_the_command_prints_both_variants() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "midge", "verify", str(TINY)], capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["onnx-fp32", "onnx-int8-u8"]
    assert done.stderr == ""
