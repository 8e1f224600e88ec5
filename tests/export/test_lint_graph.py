from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from midge.__main__ import main
from midge.export import lint_read
from midge.export.config import LintConfig
from midge.export.lint import lint, lint_graph
from midge.export.lint_read import read_graph
from midge.export.lint_rule import SEVERITIES
from midge.export.lint_rules import RULES
from midge.export.lint_targets import TARGETS, TENSORRT
from midge.runtime.errors import UserError

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny-artifact"
Change = Callable[[Any], object]


def model(*changes: Change) -> onnx.ModelProto:
    """A quantized convolution of (1, 2, 4, 4) by (2, 2, 1, 1), changed."""
    q, dq = "QuantizeLinear", "DequantizeLinear"
    nodes = [
        helper.make_node(q, ["image", "scale", "zero"], ["q"], name="round"),
        helper.make_node(dq, ["q", "scale", "zero"], ["x"], name="read"),
        helper.make_node(dq, ["weights", "scales", "zeros"], ["w"], name="weights", axis=0),
        helper.make_node("Conv", ["x", "w"], ["y"], name="conv"),
        helper.make_node(q, ["y", "scale", "zero"], ["yq"], name="round_again"),
        helper.make_node(dq, ["yq", "scale", "zero"], ["z"], name="read_again"),
    ]
    stored = {
        "scale": np.float32(0.1),
        "zero": np.int8(0),
        "weights": np.arange(4, dtype=np.int8).reshape(2, 2, 1, 1),
        "scales": np.full(2, 0.1, np.float32),
        "zeros": np.zeros(2, np.int8),
    }
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "net",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 2, 4, 4])],
            [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 2, 4, 4])],
            [numpy_helper.from_array(np.asarray(values), name) for name, values in stored.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    for change in changes:
        change(made)
    return made


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_model(*changes: Change) -> Path:
        (tmp_path / "model.onnx").write_bytes(model(*changes).SerializeToString())
        return tmp_path / "model.onnx"

    return write_model


def findings(path: Path, *targets: str) -> set[tuple[str, str, str]]:
    report = lint_graph(path, read_graph(path), targets or tuple(TARGETS))
    return {(finding.rule, finding.target, finding.node) for finding in report.findings if finding.severity != "note"}


def test_a_good_file_is_clean_everywhere(write: Callable[..., Path]) -> None:
    assert findings(write()) == set()
    assert lint(LintConfig(model=write())) == 0


def node(name: str) -> Callable[[Any], Any]:
    return lambda made: next(item for item in made.graph.node if item.name == name)


def store(name: str, values: Any) -> Change:
    def change(made: Any) -> None:
        tensor = next(item for item in made.graph.initializer if item.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(values), name))

    return change


@pytest.mark.parametrize(
    ("change", "rule", "targets", "place"),
    [
        (store("zero", np.int8(3)), "zero-point", TENSORRT, "round"),
        (store("zero", np.uint8(0)), "uint8", TENSORRT, "round"),
        (store("zeros", np.ones(2, np.int8)), "zero-point", TENSORRT, "weights"),
        (store("scale", np.float32(0)), "scale", ("onnxruntime", "openvino", *TENSORRT), "round"),
        (
            store("scales", np.full(3, 0.1, np.float32)),
            "scale-shape",
            ("onnxruntime", "openvino", *TENSORRT),
            "weights",
        ),
        (lambda made: node("conv")(made).input.append("image"), "float-bias", ("onnxruntime",), "conv"),
        (lambda made: made.graph.node.pop(), "float-output", (), ""),
    ],
)
def test_rules_name_the_node(
    change: Change, rule: str, targets: tuple[str, ...], place: str, write: Callable[..., Path]
) -> None:
    found = findings(write(change))
    assert {target for name, target, where in found if (name, where) == (rule, place)} == set(targets)


def test_of_tensorrt_8_only_what_its_documents_say(write: Callable[..., Path]) -> None:
    def later(made: Any) -> None:
        made.opset_import[0].version = 18
        made.graph.node.extend(
            [
                helper.make_node("ReduceMean", ["z", "axes"], ["m"], name="mean"),
                helper.make_node("LayerNormalization", ["m", "scales"], ["n"], name="norm"),
            ]
        )
        made.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axes"))

    assert findings(write(later), *TENSORRT) == {
        ("opset", "tensorrt8", "mean"),
        ("later-release", "tensorrt8", "norm"),
    }


def test_core_ml_is_only_told_about_operators(write: Callable[..., Path]) -> None:
    path = write(lambda made: made.graph.node.append(helper.make_node("Det", ["z"], ["d"], name="det")))
    report = lint_graph(path, read_graph(path), ["coreml"])
    assert [(finding.rule, finding.node) for finding in report.findings] == [
        ("not-onnx", ""),
        ("coreml-operator", "det"),
    ]
    assert report.ok and report.float_names("coreml") is None


def test_rules_are_whole() -> None:
    for name, rule in RULES.items():
        assert rule.fix.endswith("."), name
        assert set(rule.on) <= set(TARGETS), name
        for target, says in rule.on.items():
            assert says.severity in SEVERITIES
            assert says.source or says.severity == "note", (name, target)
            assert not says.consequence.endswith(".")


def test_a_file_inside_a_graph_is_looked_at(write: Callable[..., Path]) -> None:
    inner = helper.make_graph([helper.make_node("Foo", ["z"], ["f"])], "inner", [], [])
    path = write(
        lambda made: made.graph.node.append(
            helper.make_node("If", ["image"], ["i"], name="if", then_branch=inner, else_branch=inner)
        )
    )
    assert ("operator", "onnxruntime", "if") in findings(path)


def external(location: str) -> Change:
    def change(made: Any) -> None:
        tensor = next(item for item in made.graph.initializer if item.name == "weights")
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return change


def external_constant(location: str) -> Change:
    """A constant of a node whose numbers are in another file."""

    def change(made: Any) -> None:
        tensor = TensorProto(name="far", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=location)
        made.graph.node.append(helper.make_node("Constant", [], ["far"], value=tensor))

    return change


def cut_short(made: Any) -> None:
    made.graph.initializer[3].raw_data = made.graph.initializer[3].raw_data[:-1]


def cycle(made: Any) -> None:
    made.graph.node[0].input[0] = "z"


HOSTILE: dict[str, tuple[Change, str]] = {
    "cycle": (cycle, "The node 'round' takes 'z', which a later node makes (a cycle, or nodes out of order)"),
    "nothing": (lambda made: made.graph.node.pop(0), "The node 'read' takes 'q', which nothing makes"),
    "no outputs": (lambda made: made.graph.node[0].ClearField("output"), "The node 'round' makes nothing"),
    "no nodes": (lambda made: made.graph.ClearField("node"), "holds no graph"),
    "cut short": (cut_short, "The tensor 'scales' is damaged"),
    "unknown type": (
        lambda made: setattr(made.graph.initializer[3], "data_type", 99),
        "The tensor 'scales' is damaged",
    ),
    "huge": (lambda made: made.graph.initializer[3].dims.append(2**62), "The tensor 'scales' is damaged"),
    "above": (external("../weights.bin"), "outside of the model's folder"),
    "absolute": (external("/etc/passwd"), "outside of the model's folder"),
    "of a constant": (external_constant("../weights.bin"), "outside of the model's folder"),
    "with control characters": (external("../\x1b[2J"), "in '../?[2J': outside"),
    "empty": (external(""), "outside of the model's folder"),
    "absent": (external("weights.bin"), "which is not there"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_line(
    name: str, write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    change, says = HOSTILE[name]
    assert main(["lint", str(write(change))]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err and captured.err.startswith("midge: error: ")
    assert captured.err.count("\n") == 1


def test_names_are_utf8(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(model().SerializeToString().replace(b"image", b"im\xffge"))
    with pytest.raises(UserError, match="a name that is no UTF-8"):
        read_graph(tmp_path / "model.onnx")


def test_a_link_out_of_the_folder_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "weights.bin").symlink_to(TINY / "manifest.json")
    with pytest.raises(UserError, match="outside of the model's folder"):
        read_graph(write(external("weights.bin")))


def test_weights_in_another_file_are_not_read(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(4))
    assert findings(write(external("weights.bin"))) == set()


def test_what_the_checker_says_is_a_note(write: Callable[..., Path]) -> None:
    path = write(lambda made: made.graph.output[0].type.tensor_type.ClearField("shape"))
    report = lint_graph(path, read_graph(path), ["onnxruntime"])
    assert [(found.rule, found.severity) for found in report.findings] == [("invalid", "note")]
    assert "shape" in report.findings[0].detail


def test_a_large_file_is_not_read(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    monkeypatch.setattr(lint_read, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(UserError, match=r"has \d+ bytes, more than the \d+ that are read"):
        read_graph(path)
    monkeypatch.undo()
    monkeypatch.setattr(lint_read, "MAX_NODES", 3)
    with pytest.raises(UserError, match="has 6 nodes: more than the 3"):
        read_graph(path)


def test_names_cannot_reach_the_terminal(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    def rename(made: Any) -> None:
        node("round")(made).name = "\x1b[31mred\n"

    assert main(["lint", str(write(rename, store("zero", np.int8(1))))]) == 1
    assert "?[31mred?" in capsys.readouterr().out


def test_nodes_need_no_name(write: Callable[..., Path]) -> None:
    def clear(made: Any) -> None:
        for item in made.graph.node:
            item.ClearField("name")

    assert ("zero-point", "tensorrt10", "q") in findings(write(clear, store("zero", np.int8(1))))
