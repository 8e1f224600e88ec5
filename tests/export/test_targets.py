from __future__ import annotations

import pytest

from midge.export.quantize import DIALECTS
from midge.export.targets import TARGETS, select_variants
from midge.export.writers import WRITERS
from midge.runtime.artifact import REFERENCE, variant_runtime
from midge.runtime.backend import BACKENDS
from midge.runtime.errors import UserError
from midge.runtime.manifest import VARIANT_NAME

ALL_TARGETS = ", ".join(sorted(TARGETS))
PRECISIONS = ", ".join(sorted({precision for table in TARGETS.values() for precision in table}))


def test_the_defaults_make_every_variant_once() -> None:
    selected = select_variants(("openvino", "onnx", "onnx"), ("int8", "fp32"))
    assert selected == (
        "onnx-fp32",
        *("onnx-int8-u8", "onnx-int8-s8", "onnx-int8-dynamic"),
        *("openvino-fp32", "openvino-int8"),
    )


@pytest.mark.parametrize(
    ("targets", "precisions", "expected"),
    [
        (["onnx"], ["int8"], ("onnx-int8-u8", "onnx-int8-s8", "onnx-int8-dynamic")),
        (["openvino"], ["fp32"], ("openvino-fp32",)),
        (["coreml"], ["fp32", "fp16", "int8"], ("coreml-fp16", "coreml-int8")),
    ],
)
def test_some(targets: list[str], precisions: list[str], expected: tuple[str, ...]) -> None:
    assert select_variants(targets, precisions) == expected


@pytest.mark.parametrize(
    ("targets", "precisions", "says"),
    [
        (["onnx", "ort8"], ["fp32"], f"Unknown target 'ort8': choose one of {ALL_TARGETS}."),
        (["onnx"], ["int4"], f"Unknown precision 'int4': choose one of {PRECISIONS}."),
        (["onnx", "coreml"], ["fp32"], "The target 'coreml' has no fp32: give --precision fp16, int8."),
        ([], ["fp32"], f"--targets names nothing: give one or more of {ALL_TARGETS}."),
        (["onnx"], [], f"--precision names nothing: give one or more of {PRECISIONS}."),
    ],
)
def test_errors_list_what_is_allowed(targets: list[str], precisions: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        select_variants(targets, precisions)
    assert str(caught.value) == says


def test_every_variant_has_a_runtime_and_every_dialect_a_variant() -> None:
    variants = {name for table in TARGETS.values() for names in table.values() for name in names}
    for name in variants | {REFERENCE}:
        assert VARIANT_NAME.fullmatch(name)
        assert variant_runtime(name) in BACKENDS
    assert set(DIALECTS) <= variants
    assert set(WRITERS) == variants | {REFERENCE}
