from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from midge.__main__ import main
from midge.export.config import LintConfig
from midge.export.lint import lint, lint_graph
from midge.export.lint_read import read_graph
from midge.export.lint_targets import TARGETS
from midge.runtime.errors import UserError

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny-artifact"
U8 = TINY / "onnx-int8-u8" / "model.onnx"


def nested(depth: int) -> bytes:
    """A graph in an attribute of a node of a graph, and so on."""

    def field(number: int, content: bytes) -> bytes:
        size, length = b"", len(content)
        while length > 127:
            size, length = size + bytes([length % 128 + 128]), length // 128
        return bytes([number * 8 + 2]) + size + bytes([length]) + content

    graph = b""
    for _ in range(depth):
        graph = field(1, field(5, field(6, graph)))
    return field(7, graph)


@pytest.mark.parametrize(
    "content", [nested(1000), b"", b"This is no ONNX file, but a text.\n", b"\x00" * 100, b"\x08\x08", b"{}"]
)
def test_other_files_are_refused(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    assert main(["lint", str(tmp_path / "model.onnx")]) == 2
    assert "is not an ONNX file" in capsys.readouterr().err


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it does not exist"):
        lint(LintConfig(model=tmp_path / "none.onnx"))
    with pytest.raises(UserError, match="it is a folder"):
        lint(LintConfig(model=tmp_path))


@pytest.mark.parametrize("given", [["ort"], ["coreml", "tensorrt9"]])
def test_an_unknown_target_lists_the_known_ones(given: list[str]) -> None:
    with pytest.raises(UserError, match=f"Unknown target '{given[-1]}': choose one of coreml, onnxruntime, openvino"):
        lint(LintConfig(model=U8, targets=tuple(given)))


def test_no_target_is_an_error() -> None:
    with pytest.raises(UserError, match="--targets names nothing: give one or more of onnxruntime"):
        lint(LintConfig(model=U8, targets=()))


def test_the_defaults_are_all_targets() -> None:
    assert LintConfig(model=U8).targets == tuple(TARGETS)


def test_an_artifact_gives_a_report_per_variant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(TINY), "--targets", "onnxruntime", "openvino", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [file["path"] for file in result["files"]] == [str(TINY / "onnx-fp32" / "model.onnx"), str(U8)]
    assert result["ok"] and all(file["ok"] for file in result["files"])


def test_json_names_every_node(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(U8), "--targets", "tensorrt10", "onnxruntime", "--json"]) == 1
    file = json.loads(capsys.readouterr().out)["files"][0]
    assert list(file["targets"]) == ["onnxruntime", "tensorrt10"]
    assert file["targets"]["onnxruntime"]["taken"] and not file["targets"]["tensorrt10"]["taken"]
    assert file["targets"]["onnxruntime"]["float_nodes"] == [] and file["targets"]["tensorrt10"]["float_nodes"] is None
    biases = [finding for finding in file["findings"] if finding["rule"] == "int32-bias"]
    assert len(biases) == len(file["weighted_nodes"]) == 22
    assert set(biases[0]) == {
        *("rule", "severity", "target", "node", "detail", "consequence", "fix", "source", "verified"),
    }
    assert not biases[0]["verified"] and biases[0]["target"] == "tensorrt10"


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from midge.export.lint_print import print_report

    out = io.StringIO()
    print_report(lint_graph(U8, read_graph(U8), TARGETS), Console(file=out, width=columns, highlight=False))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    assert any(line.startswith("TensorRT 10°") and " no " in line for line in lines)
    assert any("22 of 22" in line for line in lines)
    assert "… and 23 more" in out.getvalue()


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from midge.__main__ import main\n"
        f"assert main(['lint', {str(TINY)!r}, '--targets', 'onnxruntime']) == 0\n"
        "print([name for name in ('torch', 'timm', 'openvino', 'nncf', 'tensorrt_rtx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
