"""Real verdicts of TensorRT-RTX, whose builder needs no GPU."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from midge.runtime.artifact import Variant
from midge.runtime.backend import BackendOptions, missing_packages, open_backend, why_not_on_this_machine
from midge.runtime.cuda_device import why_no_gpu
from midge.runtime.engine_cache import EngineCache
from midge.runtime.errors import UserError
from midge.runtime.files import sha256_file
from midge.runtime.tensorrt_backend import open_engine
from midge.runtime.tensorrt_build import (
    RECIPE,
    Recipe,
    build_engine,
    import_tensorrt,
    keeps_timing,
    read_recipe,
)

RECIPES = Recipe("fp32", "image", (1, 3, 8, 8))


def network(zero_point: int | None = None, batch: int | str = 1, dtype: int = TensorProto.INT8) -> ModelProto:
    """A convolution and a mean, quantized where a zero point is given."""
    rng = np.random.default_rng(0)
    constants = {"weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32)}
    nodes = []
    if zero_point is not None:
        kind = np.int8 if dtype == TensorProto.INT8 else np.uint8
        constants |= {"scale": np.float32(0.05), "zero": np.array(zero_point, kind)}
        nodes = [
            helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["integers"]),
            helper.make_node("DequantizeLinear", ["integers", "scale", "zero"], ["given"]),
        ]
    nodes += [
        helper.make_node("Conv", ["given" if nodes else "image", "weight"], ["maps"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["maps"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx")


def build(trt: Any, model: ModelProto, precision: str = "fp32", timing: bytes | None = None) -> Any:
    recipe = dataclasses.replace(RECIPES, precision=precision)
    return build_engine(trt, model.SerializeToString(), recipe, timing)


@pytest.mark.parametrize(("precision", "zero_point"), [("fp32", None), ("int8", 0)])
def test_good_graphs_build_without_a_word(trt: Any, precision: str, zero_point: int | None) -> None:
    built = build(trt, network(zero_point), precision)
    assert len(built.engine) > 1000
    assert (built.messages, built.timing) == ((), b"")
    assert 0 < built.seconds < 60


def test_what_tensorrt_does_not_take_is_told(trt: Any) -> None:
    refused = build(trt, network(zero_point=3), "int8")
    assert refused.engine is None
    assert any("zero" in message.lower() for message in refused.messages)
    warned = build(trt, network(zero_point=0, dtype=TensorProto.UINT8), "int8")
    assert any("UINT8" in message for message in warned.messages)
    garbage = build_engine(trt, b"garbage", RECIPES)
    assert garbage.engine is None
    assert garbage.messages[0].startswith("ERROR: ")
    assert build(trt, network()).messages == ()  # each build has only its own


def test_a_dynamic_batch_is_built_for_the_recipe_s_shape(trt: Any) -> None:
    built = build(trt, network(batch="n"))
    assert built.engine is not None
    assert built.messages == ()


def test_rtx_keeps_no_timing(trt: Any) -> None:
    assert not keeps_timing(trt)
    with pytest.warns(DeprecationWarning, match="no-ops"):  # what a TensorRT with a GPU keeps, through the same calls
        built = build(trt, network(), timing=b"")
    assert built.engine is not None
    assert built.timing


def test_features_not_versions_decide_what_keeps_timing() -> None:
    module = ModuleType("tensorrt")
    assert keeps_timing(module)  # 8.5 has no such class
    module.IRuntimeConfig = type("IRuntimeConfig", (), {})  # type: ignore[attr-defined]
    assert keeps_timing(module)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_recipe_is_read_back(precision: str, tmp_path: Path) -> None:
    recipe = Recipe(precision, "image", (1, 3, 32, 32), "uint8", workspace_mib=256)
    (tmp_path / RECIPE).write_text(json.dumps(recipe.to_json()))
    assert read_recipe(tmp_path / RECIPE) == recipe
    commands = recipe.to_json()["trtexec"]
    assert ("--int8" in commands["8.5"], "--fp16" in commands["8.5"]) == (precision == "int8", precision == "fp16")
    assert "--stronglyTyped" in commands["10"]
    assert not {"--int8", "--fp16"} & set(" ".join((commands["10"], commands["11"])).split())
    assert all("workspace:256" in command for command in commands.values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precision": "int4"}, "'precision': 'int4', which must be one of fp16, fp32, int8"),
        ({"workspace_mib": 0}, "'workspace_mib': 0, which must be an integer"),
        ({"schema": 2}, "has schema 2, this midge reads up to 1"),
        ({"input": {"name": "image", "shape": [1, 3, 8], "dtype": "float32"}}, "'shape'"),
        ({"input": {"name": "image", "shape": [1, 3, 8, 8], "dtype": "object"}}, "'dtype'"),
        ({"input": None}, "'input'"),
    ],
)
def test_a_damaged_recipe_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    (tmp_path / RECIPE).write_text(json.dumps({**RECIPES.to_json(), **changes}))
    with pytest.raises(UserError, match=says):
        read_recipe(tmp_path / RECIPE)


def save(folder: Path, model: ModelProto) -> Variant:
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / RECIPE).write_text(json.dumps(RECIPES.to_json()))
    return Variant("tensorrt-fp32", folder / "model.onnx", 1, "0" * 64, "")


@pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU")
def test_without_a_gpu_the_reason_is_given(trt: Any, tmp_path: Path) -> None:
    reason = why_not_on_this_machine("tensorrt")
    assert reason is not None
    assert "GPU" in reason or "cuda-bindings" in reason
    with pytest.raises(UserError, match="TensorRT cannot run here: ") as caught:
        open_backend(save(tmp_path, network()))
    assert reason in str(caught.value)
    assert why_not_on_this_machine("onnxruntime") is None


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    assert missing_packages("tensorrt") == ["tensorrt"]
    with pytest.raises(UserError, match=r"'tensorrt' is not installed .*pip install 'midge\[tensorrt\]'"):
        import_tensorrt()
    with pytest.raises(UserError, match="'tensorrt' is not installed"):
        open_backend(save(tmp_path, network()))
    for module in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, module, None)
    assert why_no_gpu() == "cuda-bindings is not installed (pip install 'midge[tensorrt]')"


@pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU")
def test_an_engine_that_cannot_be_loaded_is_not_kept(
    trt: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Built for a GPU that is not there: the builder takes the graph, the runtime then refuses the engine."""
    gpu = {"name": "none", "compute_capability": "8.7"}
    model, cache = save(tmp_path, network()).model, tmp_path / "cache"
    with pytest.raises(UserError, match=r"TensorRT cannot load .*(?i:cuda)") as caught:
        open_engine(trt, model, RECIPES, gpu, cache)
    assert "\n" not in str(caught.value)
    assert not list(cache.iterdir())
    facts = {
        **{"runtime": "tensorrt_rtx", "version": trt.__version__, "gpu": gpu},
        **{"onnx_sha256": sha256_file(model), "recipe": RECIPES.to_json()},
    }
    EngineCache(cache).store("engine", facts, b"an engine of another make")
    capsys.readouterr()
    with pytest.raises(UserError, match="TensorRT cannot load"):
        open_engine(trt, model, RECIPES, gpu, cache)
    assert f"The cached engine of '{model}' is built again" in " ".join(capsys.readouterr().err.split())
    assert not list(cache.iterdir())
    model.write_bytes(network(zero_point=3).SerializeToString())
    with pytest.raises(UserError, match=r"TensorRT cannot load .*(?i:zero)"):
        open_engine(trt, model, RECIPES, gpu, cache)


@pytest.mark.skipif(why_no_gpu() is not None, reason=f"no GPU: {why_no_gpu()}")
def test_an_engine_runs_and_is_kept(tmp_path: Path) -> None:
    import onnxruntime

    model, cache = network(), tmp_path / "cache"
    batch = np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"image": batch})
    variant = save(tmp_path, model)
    for _ in range(2):  # built, then read
        with open_backend(variant, BackendOptions(cache=cache)) as backend:
            np.testing.assert_allclose(backend.run(batch), np.asarray(expected), atol=1e-5)
            assert backend.placement().ops
        assert len(list(cache.glob("*.engine"))) == 1
    next(cache.glob("*.engine")).write_bytes(b"damaged")
    with open_backend(variant, BackendOptions(cache=cache)) as backend:
        np.testing.assert_allclose(backend.run(batch), np.asarray(expected), atol=1e-5)
    with pytest.raises(UserError, match="No GPU '99' here"):
        open_backend(variant, BackendOptions(device="99"))
