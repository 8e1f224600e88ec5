from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from midge.runtime.artifact import Variant
from midge.runtime.backend import BACKENDS, BackendOptions, Placement, TensorSpec, check_batch, open_backend, predict
from midge.runtime.errors import UserError
from midge.runtime.preprocess import Preprocess
from midge.runtime.torch_model import ModelSpec, build_model, save_model

PX = 32
SPEC = ModelSpec("resnet18", {"channels": (16, 24, 32, 64)}, 10, 64, (), Preprocess(PX, PX), PX)


def variant(name: str, model: Path) -> Variant:
    return Variant(name=name, model=model, size_bytes=1, sha256="0" * 64, note="")


@pytest.fixture
def small(small_onnx: Path, tmp_path: Path) -> dict[str, Variant]:
    import openvino

    openvino.save_model(openvino.Core().read_model(small_onnx), tmp_path / "small.xml", compress_to_fp16=False)
    save_model(tmp_path, "small", build_model(SPEC), SPEC)
    return {
        "onnxruntime": variant("onnx-fp32", small_onnx),
        "openvino": variant("openvino-fp32", tmp_path / "small.xml"),
        "torch": variant("torch-fp32", tmp_path / "small.safetensors"),
    }


# TensorRT needs a GPU; Core ML takes pixels, not any floats: both have their own tests.
@pytest.mark.parametrize("runtime", sorted(set(BACKENDS) - {"coreml", "tensorrt"}))
def test_batches_are_checked_and_outputs_are_not_shared(small: dict[str, Variant], runtime: str) -> None:
    with open_backend(small[runtime]) as backend:
        batch = np.random.default_rng(0).normal(size=backend.input_shape).astype(np.float32)
        first = backend.run(batch)
        kept = first.copy()
        turned = np.ascontiguousarray(batch.transpose(0, 1, 3, 2))
        assert not np.allclose(backend.run(turned), kept, atol=1e-6)
        np.testing.assert_array_equal(first, kept)
        np.testing.assert_allclose(backend.run(turned.transpose(0, 1, 3, 2)), kept, atol=1e-5)
        for wrong in (batch[0], np.concatenate([batch, batch]), batch.astype(np.float64)):
            with pytest.raises(ValueError, match="the network takes"):
                backend.run(wrong)
        assert predict(backend, []).shape == (0, 0)


@pytest.mark.parametrize("overflows", [True, False])
def test_exact_products_are_asked_of_onnxruntime_where_they_would_overflow(
    small: dict[str, Variant], overflows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AMX, asking for them costs a factor of two."""
    monkeypatch.setattr("midge.runtime.ort_backend.adds_in_16_bits", lambda: overflows)
    with open_backend(small["onnxruntime"]) as backend:
        options = backend._session.get_session_options()  # type: ignore[attr-defined]
        if overflows:
            assert options.get_session_config_entry("session.x64quantprecision") == "1"
        else:
            with pytest.raises(RuntimeError):
                options.get_session_config_entry("session.x64quantprecision")


def test_threads_and_precision_reach_the_runtimes(small: dict[str, Variant]) -> None:
    import torch

    for threads in (1, 2):
        with open_backend(small["onnxruntime"], BackendOptions(threads)) as backend:
            options = backend._session.get_session_options()  # type: ignore[attr-defined]
            assert (options.intra_op_num_threads, options.inter_op_num_threads) == (threads, 1)
        with open_backend(small["openvino"], BackendOptions(threads)) as backend:
            compiled = backend._compiled  # type: ignore[attr-defined]
            assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
            assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
            assert compiled.get_property("NUM_STREAMS") == 1
        before = torch.get_num_threads()
        with open_backend(small["torch"], BackendOptions(threads)):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == before
    with pytest.raises(UserError, match="Cannot run with 0 threads: give at least 1"):
        open_backend(small["onnxruntime"], BackendOptions(0))


@pytest.mark.parametrize(
    ("module", "runtime", "extra"), [("openvino", "openvino", "openvino"), ("torch", "torch", "train")]
)
def test_missing_package_names_the_extra(
    small: dict[str, Variant], monkeypatch: pytest.MonkeyPatch, module: str, runtime: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"'{module}' is not installed .*pip install 'midge\[{extra}\]'"):
        open_backend(small[runtime])


@pytest.mark.parametrize(
    ("runtime", "says"), [("onnxruntime", "ONNX Runtime cannot load"), ("openvino", "OpenVINO cannot")]
)
def test_damaged_models_are_one_line(small: dict[str, Variant], runtime: str, says: str) -> None:
    model = small[runtime].model
    for content in (b"", b"garbage", model.read_bytes()[:200]):
        model.write_bytes(content)
        with pytest.raises(UserError, match=says) as caught:
            open_backend(small[runtime])
        assert "\n" not in str(caught.value)
        assert str(model) in str(caught.value)


def test_check_batch_names_both() -> None:
    with pytest.raises(ValueError, match=r"Got a batch \(2, 3\) float64, the network takes \(1, 3\) float32"):
        check_batch(np.zeros((2, 3)), (1, 3))


def test_inputs_and_outputs_are_described(small: dict[str, Variant]) -> None:
    expected = {
        "onnxruntime": (TensorSpec("image", (1, 3, 8, 8)), TensorSpec("logits", (1, 4))),
        "openvino": (TensorSpec("image", (1, 3, 8, 8)), TensorSpec("logits", (1, 4))),
        "torch": (TensorSpec("image", (1, 3, PX, PX)), TensorSpec("logits", (1, 10))),
    }
    for runtime, (given, result) in expected.items():
        with open_backend(small[runtime]) as backend:
            assert (backend.inputs, backend.outputs) == ((given,), (result,))
            assert backend.run(np.zeros(given.shape, np.float32)).shape == result.shape


@pytest.mark.parametrize(
    ("runtime", "device", "says"),
    [
        ("onnxruntime", "Abacus", "Unknown execution provider 'Abacus': choose one of .*CPUExecutionProvider"),
        ("openvino", "NPU.7", "Unknown OpenVINO device 'NPU.7': choose one of CPU"),
        ("torch", "abacus", "Unknown torch device 'abacus': choose one of cpu"),
    ],
)
def test_devices_by_their_own_names(small: dict[str, Variant], runtime: str, device: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_backend(small[runtime], BackendOptions(device=device))
    cpu = {"onnxruntime": "CPUExecutionProvider", "openvino": "CPU", "torch": "cpu"}[runtime]
    batch = np.ones((1, 3, *((PX, PX) if runtime == "torch" else (8, 8))), np.float32)
    with open_backend(small[runtime]) as default, open_backend(small[runtime], BackendOptions(device=cpu)) as named:
        np.testing.assert_array_equal(default.run(batch), named.run(batch))


def test_openvino_keeps_compiled_models_where_it_is_told(small: dict[str, Variant], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for _ in range(2):
        with open_backend(small["openvino"], BackendOptions(cache=cache)) as backend:
            assert backend.run(np.zeros((1, 3, 8, 8), np.float32)).shape == (1, 4)
        assert len(list(cache.glob("*.blob"))) == 1


def test_share_is_null_where_it_is_not_known() -> None:
    assert Placement(50, 200, {"Conv": 2}).share == 0.25
    assert Placement(0, 0, {}).share is None
    assert Placement(50, 200, {"LSTM": 1}, {"LSTM": 1}).share is None


def test_unknown_target() -> None:
    with pytest.raises(
        UserError, match="Unknown target 'tflite': choose one of coreml, onnx, openvino, tensorrt, torch"
    ):
        open_backend(variant("tflite-int8", Path("x")))


def test_importing_the_runtime_imports_no_heavy_package() -> None:
    modules = """artifact backend cuda_device decode engine_cache fields files golden images macs openvino_backend
    ort_backend preprocess progress tensorrt_backend tensorrt_build torch_backend torch_model"""
    imports = ", ".join(f"midge.runtime.{name}" for name in modules.split())
    heavy = ("torch", "openvino", "timm", "safetensors", "tensorrt", "tensorrt_rtx", "cuda")
    code = f"import sys, {imports}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
