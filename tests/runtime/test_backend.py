from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from midge.runtime.artifact import Variant
from midge.runtime.backend import BACKENDS, BackendOptions, Placement, TensorSpec, check_batch, open_backend, predict
from midge.runtime.errors import UserError
from midge.runtime.preprocess import Preprocess
from midge.runtime.torch_model import ModelSpec, build_model, save_model

PX = 32
SPECS = {
    "resnet18": ModelSpec("resnet18", {"channels": (16, 24, 32, 64)}, 10, 64, (), Preprocess(PX, PX), PX),
    "mobilenetv2_050": ModelSpec("mobilenetv2_050", {}, 10, 1280, (), Preprocess(PX, PX), PX),
}


def variant(name: str, model: Path) -> Variant:
    return Variant(name=name, model=model, size_bytes=1, sha256="0" * 64, note="")


def export(model: Any, folder: Path, images: np.ndarray) -> dict[str, Variant]:
    """One network as each runtime takes it, in float32 and in 8 bits."""
    import openvino
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter and the quantizer use what their own dependencies deprecate
        torch.onnx.export(
            model,
            (torch.zeros(1, 3, PX, PX),),
            folder / "model.onnx",
            input_names=["image"],
            output_names=["logits"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        quantize(folder / "model.onnx", folder / "int8.onnx", images)
    for stem in ("model", "int8"):
        network = openvino.Core().read_model(folder / f"{stem}.onnx")
        openvino.save_model(network, folder / f"{stem}.xml", compress_to_fp16=False)
    files = {
        "torch-fp32": "model.safetensors",
        "onnx-fp32": "model.onnx",
        "onnx-int8-u8": "int8.onnx",
        "openvino-fp32": "model.xml",
        "openvino-int8": "int8.xml",
    }
    return {name: variant(name, folder / file) for name, file in files.items()}


def quantize(model: Path, quantized: Path, images: np.ndarray) -> None:
    """Asymmetric uint8 activations, symmetric per-channel int8 weights."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.items = iter([{"image": image[None]} for image in images])

        def get_next(self) -> dict[str, np.ndarray]:
            return next(self.items, {})

    prepared = quantized.with_suffix(".prepared.onnx")
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(quantized),
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def macs_by_hooks(model: Any) -> int:
    """The sum over convolutions and linear layers, written out."""
    import torch
    from torch import nn

    total = 0

    def count(module: Any, inputs: Any, output: Any) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            total += output.numel() * height * width * module.in_channels // module.groups
        else:
            total += output.numel() * module.in_features

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.inference_mode():
        model(torch.zeros(1, 3, PX, PX))
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.usefixtures("openvino_integers")
@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_runtime_gives_the_same_outputs_and_counts_the_same_macs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    torch.manual_seed(0)
    model = build_model(SPECS[name])
    save_model(tmp_path, "model", model, SPECS[name])
    images = np.random.default_rng(0).normal(size=(8, 3, PX, PX)).astype(np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    macs = macs_by_hooks(model)
    variants = export(model, tmp_path, images)
    for variant_name, exported in variants.items():
        with open_backend(exported) as backend:
            assert backend.input_shape == (1, 3, PX, PX)
            outputs = predict(backend, images)
            placement = backend.placement()
        assert outputs.dtype == np.float32
        is_int8 = "int8" in variant_name
        error = np.abs(outputs - expected).max() / np.abs(expected).max()
        assert error < (0.3 if is_int8 else 1e-4), variant_name
        assert not is_int8 or error > 1e-4, "the quantized network gives the very outputs of the float one"
        # Equal, though ONNX Runtime's blocked layout pads the 8 channels of mobilenetv2_050 to 16.
        assert placement.total_macs == macs, variant_name
        assert placement.share == (1.0 if is_int8 else 0.0), variant_name
        convolution = {"torch": "convolution", "onnx": "QLinearConv" if is_int8 else "Conv", "openvino": "Convolution"}
        assert placement.ops[convolution[variant_name.partition("-")[0]]] >= 20
    monkeypatch.setattr("midge.runtime.openvino_backend.adds_in_16_bits", lambda: True)
    with open_backend(variants["openvino-int8"]) as backend:
        assert backend.placement().share == 0.0  # integers would overflow


@pytest.fixture
def small_onnx(tmp_path: Path) -> Path:
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["maps"], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["maps"], ["logits"], axes=[2, 3], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (tmp_path / "small.onnx").write_bytes(model.SerializeToString())
    return tmp_path / "small.onnx"


@pytest.fixture
def small(small_onnx: Path, tmp_path: Path) -> dict[str, Variant]:
    import openvino

    openvino.save_model(openvino.Core().read_model(small_onnx), tmp_path / "small.xml", compress_to_fp16=False)
    save_model(tmp_path, "small", build_model(SPECS["resnet18"]), SPECS["resnet18"])
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


def test_a_model_that_loads_and_fails_on_an_input_is_one_line(tmp_path: Path) -> None:
    """A Reshape to a shape that is worked out from the image: to (1, 192), the number of its values, or else."""
    from onnx import TensorProto, helper, numpy_helper, save

    nodes = [
        helper.make_node("ReduceSum", ["image"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["whole", "one"], ["number"]),
        helper.make_node("Div", ["number", "values"], ["images"]),
        helper.make_node("Concat", ["images", "number"], ["shape"], axis=0),  # one number alone would become -1
        helper.make_node("Reshape", ["image", "shape"], ["row"]),
        helper.make_node("ReduceMean", ["row", "one"], ["logits"], keepdims=1),
    ]
    graph = helper.make_graph(
        nodes,
        "fails",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, (1, 3, 8, 8))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 1))],
        [numpy_helper.from_array(np.array([n], np.int64), name) for name, n in (("one", 1), ("values", 192))],
    )
    path = tmp_path / "model.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    with open_backend(variant("onnx-fp32", path)) as backend:
        for run in (backend.run, backend.run_all):
            np.testing.assert_allclose(np.ravel(run(np.ones((1, 3, 8, 8), np.float32))), [1])
            with pytest.raises(UserError, match=f"ONNX Runtime loads, but cannot run '{path}'") as caught:
                run(np.full((1, 3, 8, 8), 2, np.float32))
            assert "\n" not in str(caught.value)


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    import onnx

    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)


def free_side(graph: Any, side: int) -> None:
    graph.input[0].type.tensor_type.shape.dim[side].dim_param = "n"


def as_openvino(onnx_path: Path) -> Variant:
    import openvino

    path = onnx_path.with_suffix(".xml")
    openvino.save_model(openvino.Core().read_model(onnx_path), path, compress_to_fp16=False)
    return variant("openvino-fp32", path)


def with_another_input(graph: Any) -> None:
    graph.input.append(graph.input[0])
    graph.input[1].name = "more"


def of_doubles(graph: Any) -> None:
    graph.input[0].type.tensor_type.elem_type = 11
    graph.node[0].op_type, graph.node[1].op_type = "Identity", "Identity"
    del graph.node[0].input[1:], graph.node[0].attribute[:], graph.node[1:]
    graph.node[0].output[0] = graph.output[0].name
    graph.output[0].CopyFrom(graph.input[0])
    graph.output[0].name = "logits"


@pytest.mark.parametrize(
    "change", [lambda graph: free_side(graph, 2), with_another_input, of_doubles], ids=["side", "inputs", "doubles"]
)
def test_models_of_another_form_are_refused(small_onnx: Path, change: Callable[[Any], None]) -> None:
    rewrite(small_onnx, change)
    for exported in (variant("onnx-fp32", small_onnx), as_openvino(small_onnx)):
        with pytest.raises(UserError, match="one float or uint8 input of 4 sides, fixed but for the batch") as caught:
            open_backend(exported)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_batches_of_any_number_are_still_checked(small_onnx: Path, runtime: str) -> None:
    rewrite(small_onnx, lambda graph: free_side(graph, 0))
    rewrite(small_onnx, lambda graph: graph.output[0].type.tensor_type.shape.dim[0].__setattr__("dim_param", "n"))
    exported = variant("onnx-fp32", small_onnx) if runtime == "onnxruntime" else as_openvino(small_onnx)
    images = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)
    with open_backend(exported) as backend:
        assert (backend.input_shape, backend.dynamic_batch) == ((1, 3, 8, 8), True)
        np.testing.assert_allclose(backend.run(images), predict(backend, images), rtol=1e-5, atol=1e-6)
        assert [output.shape for output in backend.run_all(images[:2])] == [(2, 4)]
        assert backend.placement().total_macs == 8 * 8 * 4 * 27
        for wrong in (images[:0], images[0], images[..., :7], images.astype(np.float64), np.repeat(images, 300, 0)):
            with pytest.raises(ValueError, match=r"the network takes \(1..1024, 3, 8, 8\) float32"):
                backend.run(wrong)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torch"])
def test_several_outputs_of_8_bit_images(small_onnx: Path, tmp_path: Path, runtime: str) -> None:
    """The mean of the maps is the other output, so that each is known from the other."""

    def widen(graph: Any) -> None:
        from onnx import TensorProto, helper

        graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 8, 8, 3]))
        graph.node.insert(0, helper.make_node("Cast", ["image"], ["floats"], to=1))
        graph.node.insert(1, helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]))
        graph.node[2].input[0] = "planes"
        graph.output[0].CopyFrom(helper.make_tensor_value_info("maps", TensorProto.FLOAT, [1, 4, 8, 8]))
        graph.output.append(helper.make_tensor_value_info("means", TensorProto.FLOAT, [1, 4, 1, 1]))
        graph.node[3].output[0] = "means"
        graph.node[3].attribute[1].i = 1

    if runtime == "torch":
        spec = dataclasses.replace(SPECS["resnet18"], preprocess=Preprocess(PX, PX, embedded=True))
        save_model(tmp_path, "embedded", build_model(spec), spec)
        exported = variant("torch-fp32", tmp_path / "embedded.safetensors")
    else:
        rewrite(small_onnx, widen)
        exported = variant("onnx-fp32", small_onnx) if runtime == "onnxruntime" else as_openvino(small_onnx)
    with open_backend(exported) as backend:
        assert backend.input_dtype == "uint8"
        image = np.random.default_rng(0).integers(0, 256, backend.input_shape, dtype=np.uint8)
        outputs = backend.run_all(image)
        np.testing.assert_array_equal(backend.run(image), outputs[0])
        if runtime != "torch":
            np.testing.assert_allclose(outputs[0].mean(axis=(2, 3), keepdims=True), outputs[1], rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="uint8"):
            backend.run(image.astype(np.float32))


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
