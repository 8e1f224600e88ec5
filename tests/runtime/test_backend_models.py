from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from midge.runtime.artifact import Variant
from midge.runtime.backend import open_backend, predict
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
