from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midge.runtime import coreml_backend
from midge.runtime.artifact import Variant
from midge.runtime.backend import open_backend
from midge.runtime.coreml_program import read_program
from midge.runtime.coreml_reference import Interpreter
from midge.runtime.errors import UserError
from midge.runtime.preprocess import Preprocess
from midge.runtime.wire import Message, WireError


def load_writer() -> ModuleType:
    path = Path(__file__).with_name("coreml_packages.py")
    spec = importlib.util.spec_from_file_location("coreml_packages", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


write: Any = load_writer()

PX = 4
SIDES = (1, 3, PX, PX)
PREPROCESS = Preprocess(PX, PX)
WEIGHT = np.random.default_rng(0).normal(size=(2, 48)).astype(np.float16)
BLOBS, OFFSETS = write.weights(WEIGHT, np.array([[1.5]], np.float32))
METADATA = {coreml_backend.PREPROCESS: json.dumps(PREPROCESS.to_json())}


def operations() -> list[bytes]:
    """The pixels over 255 in 16-bit floats, times a matrix."""
    return [
        write.operation("const", {}, "scale", ("fp32", ()), val=write.immediate(np.float32(1 / 255))),
        write.operation("mul", {"x": "image", "y": "scale"}, "scaled", ("fp32", SIDES)),
        write.operation("const", {}, "weight", ("fp16", (2, 48)), val=write.stored(("fp16", (2, 48)), OFFSETS[0])),
        write.operation("cast", {"x": "scaled", "dtype": write.immediate("fp16")}, "half", ("fp16", SIDES)),
        write.operation(
            "reshape", {"x": "half", "shape": write.immediate(np.array([1, -1], np.int32))}, "flat", ("fp16", (1, 48))
        ),
        write.operation("linear", {"x": "flat", "weight": "weight"}, "logits", ("fp16", (1, 2))),
    ]


def package(folder: Path, ops: list[bytes] | None = None, blobs: bytes = BLOBS, **changed: Any) -> Path:
    proto = write.model(ops or operations(), **{"sides": SIDES, "output": "logits", "metadata": METADATA, **changed})
    return write.write_package(folder, proto, blobs)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (PX, PX, 3), np.uint8)


def test_a_program_is_computed_in_its_types(tmp_path: Path, pixels: np.ndarray) -> None:
    image = pixels.transpose(2, 0, 1)[None].astype(np.float32)
    (logits,) = Interpreter(package(tmp_path))({"image": image}).values()
    half = (image * np.float32(1 / 255)).astype(np.float16).astype(np.float32).reshape(1, -1)
    expected = (half @ WEIGHT.astype(np.float32).T).astype(np.float16)
    assert logits.dtype == np.float32
    assert np.array_equal(logits, expected)
    assert not np.array_equal(expected, half @ WEIGHT.astype(np.float32).T)  # which the rounding has changed


def test_what_is_read(tmp_path: Path) -> None:
    program = read_program(package(tmp_path))
    assert (program.outputs, program.image_inputs, program.metadata) == (("logits",), ("image",), METADATA)
    assert program.inputs == {"image": ("fp32", SIDES)}
    assert [operation.kind for operation in program.operations] == [
        "const",
        "mul",
        "const",
        "cast",
        "reshape",
        "linear",
    ]
    assert np.array_equal(program.operations[2].constants["val"], WEIGHT)


def test_the_backend_turns_a_batch_back_into_its_image(
    tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coreml_backend, "NATIVE", False)
    batch = PREPROCESS(pixels)[None]
    direct = Interpreter(package(tmp_path))({"image": pixels.transpose(2, 0, 1)[None].astype(np.float32)})
    with open_backend(Variant("coreml-fp16", tmp_path, 1, "0" * 64, "")) as backend:
        assert backend.input_shape == SIDES
        assert np.array_equal(backend.run(batch), direct["logits"])
        placement = backend.placement()
        with pytest.raises(UserError, match="8-bit images"):
            backend.run(batch + np.float32(0.001))
        with pytest.raises(UserError, match="8-bit images"):
            backend.run(np.full_like(batch, np.nan))
    assert (placement.total_macs, placement.share) == (96, None)
    assert placement.ops == {"cast": 1, "linear": 1, "mul": 1, "reshape": 1}
    assert list(placement.uncounted) == ["(computed by the reference interpreter)"]


def test_it_needs_neither_torch_nor_coremltools(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from midge.runtime.coreml_reference import Interpreter;"
        f"Interpreter(pathlib.Path({str(package(tmp_path))!r}));"
        "print([name for name in ('torch', 'coremltools', 'google.protobuf') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    ops = [*operations(), write.operation("gather_nd", {"x": "logits"}, "y", ("fp16", (1, 2)))]
    with pytest.raises(UserError, match="'gather_nd', which the reference interpreter does not know"):
        Interpreter(package(tmp_path, ops))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (write.operation("relu", {"x": "flat"}, "logits", ("fp16", (1, 2))), r"it gives float32 \(1, 48\)"),
        (write.operation("relu", {"x": "flat"}, "logits", ("int8", (1, 48))), "the program says"),
        (write.operation("relu", {"x": "nothing"}, "logits", ("fp16", (1, 2))), "nothing"),
        (write.operation("relu", {"z": "flat"}, "logits", ("fp16", (1, 2))), "unexpected keyword"),
        (
            write.operation("split", {"x": "flat", "axis": write.immediate(np.int32(7))}, "logits", ("fp16", (1, 2))),
            "split",
        ),
        (write.operation("relu", {"x": "flat"}, "other", ("fp16", (1, 48))), "computes no 'logits'"),
    ],
)
def test_what_does_not_fit_the_program_is_one_line(tmp_path: Path, changed: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Interpreter(package(tmp_path, [*operations()[:-1], changed]))({"image": np.zeros(SIDES, np.float32)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (write.stored(("fp16", (2, 48)), 1 << 40), "starts at byte"),
        (write.stored(("fp16", (2, 48)), OFFSETS[0] + 8), "is type|is fp32|is fp16|is uint8|is int8"),
        (write.stored(("fp32", (2, 48)), OFFSETS[0]), "is fp16, not fp32"),
        (write.stored(("fp16", (2, 49)), OFFSETS[0]), "has 192 bytes"),
        (write.stored(("int32", (2, 48)), OFFSETS[0]), "is int32"),
        (write.stored(("fp16", (2, 48)), 64, "@model_path/../../../secret"), "must be a plain one inside it"),
        (write.stored(("fp16", (2, 48)), 64, "/etc/passwd"), "not below @model_path/"),
        (write.stored(("fp16", (1 << 20, 1 << 20)), 64), "numbers are allowed"),
        (write.field(2, write.kind_of(("fp32", (3,)))) + write.field(3, b""), "holds 0 values"),
    ],
)
def test_constants_are_checked_before_they_are_read(tmp_path: Path, value: bytes, message: str) -> None:
    ops = operations()
    ops[2] = write.operation("const", {}, "weight", ("fp16", (2, 48)), val=value)
    with pytest.raises(UserError, match=message):
        read_program(package(tmp_path, ops))


def test_weights_that_are_cut_off(tmp_path: Path) -> None:
    for size in (0, 32, 100, 250):
        with pytest.raises(UserError, match="cannot be read"):
            read_program(package(tmp_path, blobs=BLOBS[:size]))


def test_paths_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"")
    for path in ("../../outside", "/etc/passwd", "", ".", "com.apple.CoreML", "com.apple.CoreML/none"):
        write.write_package(tmp_path / "model", write.model(operations(), sides=SIDES, output="logits"), BLOBS, path)
        with pytest.raises(UserError, match="must be a plain one inside it"):
            read_program(tmp_path / "model")
    package(tmp_path / "model")
    target = tmp_path / "model/Data/com.apple.CoreML/weights/weight.bin"
    target.rename(tmp_path / "moved")
    target.symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match="must be a plain one inside it"):
        read_program(tmp_path / "model")


def test_no_package_and_no_program(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No Core ML manifest"):
        read_program(tmp_path)
    for proto in (b"", write.field(502, b""), b"\xff" * 20):
        with pytest.raises(UserError, match="cannot be read"):
            read_program(write.write_package(tmp_path, proto))


def test_the_backend_takes_images_only(tmp_path: Path) -> None:
    for metadata in ({}, {coreml_backend.PREPROCESS: "{"}):
        with pytest.raises(UserError, match="does not say its preprocessing"):
            coreml_backend.CoreMlBackend(package(tmp_path, metadata=metadata), 1)
    with pytest.raises(UserError, match="'std'"):
        wrong = dataclasses.asdict(PREPROCESS) | {"std": [1, 2], "mean": [0, 0, 0]}
        coreml_backend.CoreMlBackend(package(tmp_path, metadata={coreml_backend.PREPROCESS: json.dumps(wrong)}), 1)
    with pytest.raises(UserError, match="Unknown compute units 'GPU': choose one of"):
        coreml_backend.CoreMlBackend(package(tmp_path), 1, "GPU")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_models_are_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    proto = bytearray(write.model(operations(), sides=SIDES, output="logits", metadata=METADATA))
    for _ in range(data.draw(st.integers(1, 4))):
        proto[data.draw(st.integers(0, len(proto) - 1))] = data.draw(st.integers(0, 255))
    folder = write.write_package(tmp_path_factory.getbasetemp() / "damaged.mlpackage", bytes(proto), BLOBS)
    try:
        Interpreter(folder)({"image": np.zeros(SIDES, np.float32)})
    except UserError as error:
        assert "\n" not in str(error)


@given(st.binary(max_size=40))
def test_bytes_are_a_message_or_refused(data: bytes) -> None:
    with contextlib.suppress(WireError):
        message = Message(memoryview(data))
        for read in (message.integers, message.texts, message.floats, message.entries):
            read(1)
