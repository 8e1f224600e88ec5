"""A torch network as a Core ML package: an ML Program for iOS 17 in 16-bit floats, from an 8-bit image to the outputs.

The preprocessing after the crop is inside, in 32-bit floats, so an app hands over the cropped image as it is. What the
app must know beside (crop, labels, origin) stands in the package's metadata. Equal weights give equal bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.coreml_backend import LABELS, ORIGIN, PREPROCESS
from ..runtime.errors import UserError, require
from ..runtime.files import write_json

if TYPE_CHECKING:
    from torch import nn

    from ..runtime.torch_model import ModelSpec

INPUT = "image"

# The two operators of the preprocessing, as coremltools names them: it multiplies by an inverse. No network here has
# such ones, so all others keep the names that they have in ONNX.
PREPROCESSING = ("sub", "_inversed_div")
MODEL, WEIGHTS = "com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what coremltools says: its progress, and with which versions of other packages it was not tested."""
    logger = logging.getLogger("coremltools")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def import_coremltools() -> Any:
    """The package coremltools, whose import takes seconds.

    Raises:
        UserError: it is not installed.
    """
    with quiet():
        return require("coremltools", "coreml")


def convert_coreml(folded: nn.Module, spec: ModelSpec, output_name: str) -> Any:
    """Convert a network.

    Args:
        folded: in eval mode on the CPU, batch normalization folded; (N, 3, H, W) float32 -> (N, K) float32.
        spec: its preprocessing, labels and origin.
        output_name: name of the output.

    Returns:
        coremltools' MLModel, an ML Program: input ``image``, RGB of 8 bits; output (1, K) float32.

    Raises:
        UserError: coremltools is missing or cannot follow the network, or what it made is not finite.
    """
    ct = import_coremltools()
    torch = require("torch", "train")
    image = torch.zeros(1, 3, spec.input_px, spec.input_px)
    try:
        with quiet():
            program = torch.export.export(with_preprocessing(folded, spec), (image,), strict=False)
            model = ct.convert(
                program.run_decompositions({}),
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS17,
                compute_precision=ct.transform.FP16ComputePrecision(lambda op: op.name not in PREPROCESSING),
                inputs=[ct.ImageType(name=INPUT, shape=tuple(image.shape), color_layout=ct.colorlayout.RGB)],
                outputs=[ct.TensorType(name=output_name, dtype=np.float32)],
                skip_model_load=True,
            )
    except Exception as error:  # its kinds depend on what in the network's code it cannot follow
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"coremltools cannot convert this network ({reason}): choose another backbone.") from error
    model.short_description = f"{spec.timm_name}, exported by midge"
    return model


def with_preprocessing(network: nn.Module, spec: ModelSpec) -> nn.Module:
    """The network for images with values 0..255, (N, 3, H, W) float32."""
    import torch
    from torch import nn

    class Deployed(nn.Module):
        mean: torch.Tensor
        std: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.network = network
            for name in ("mean", "std"):
                values = 255 * torch.tensor(getattr(spec.preprocess, name), dtype=torch.float64)
                self.register_buffer(name, values.float()[:, None, None])

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.network((image - self.mean) / self.std)

    return Deployed().eval()


def metadata(spec: ModelSpec) -> dict[str, str]:
    """What an app must know to use a package: preprocessing, labels and origin, each as JSON."""
    origin = {"timm_name": spec.timm_name, "timm_args": spec.to_json()["timm_args"], "trained": spec.trained}
    values = {PREPROCESS: spec.preprocess.to_json(), LABELS: list(spec.labels), ORIGIN: origin}
    return {key: json.dumps(value, allow_nan=False) for key, value in values.items()}


def save_coreml(model: Any, spec: ModelSpec, path: Path) -> None:
    """Write a package, the same bytes for the same model.

    Args:
        model: coremltools' MLModel.
        spec: of the network.
        path: the ``.mlpackage`` folder, not there yet.

    Raises:
        UserError: a weight is not finite.
    """
    proto = model.get_spec()
    proto.description.metadata.userDefined.clear()
    for key, value in metadata(spec).items():
        proto.description.metadata.userDefined[key] = value
    with tempfile.TemporaryDirectory() as work:
        saved = Path(work) / "model.mlpackage"
        with quiet():
            model.save(str(saved))
        folder = path / "Data" / Path(MODEL).parent
        folder.mkdir(parents=True)
        shutil.copytree(saved / "Data" / WEIGHTS, path / "Data" / WEIGHTS)
    (path / "Data" / MODEL).write_bytes(proto.SerializeToString(deterministic=True))
    manifest: dict[str, Any] = {"fileFormatVersion": "1.0.0", "itemInfoEntries": {}}
    for item, what in ((WEIGHTS, "Weights"), (MODEL, "Specification")):
        entry = {"author": "com.apple.CoreML", "description": f"Core ML Model {what}"}
        identifier = str(uuid.uuid5(uuid.NAMESPACE_URL, item))  # coremltools' own is a new one each time
        manifest["itemInfoEntries"][identifier] = {**entry, "name": Path(item).name, "path": item}
        manifest["rootModelIdentifier"] = identifier
    write_json(path / "Manifest.json", manifest)
