"""TensorRT: the ONNX graph and the recipe that builds an engine of it on the device; and the build as a check, here.

Engines are bound to a version and a GPU, so none is shipped. ``tensorrt-int8`` is the ``s8`` dialect; half precision is
in the graph, because TensorRT 11 has no flag for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.artifact import variant_runtime
from ..runtime.errors import require
from ..runtime.files import read_json, write_json
from ..runtime.progress import say, track
from ..runtime.tensorrt_build import RECIPE, Recipe, build_engine, read_recipe
from .onnx_export import save_onnx

if TYPE_CHECKING:
    from onnx import ModelProto

MODEL = "model.onnx"
CHECKER = "tensorrt_rtx"


def save_tensorrt(graph: ModelProto, path: Path, precision: str) -> None:
    """Write a graph and its recipe beside it."""
    given = graph.graph.input[0]
    kind = given.type.tensor_type
    shape = tuple(side.dim_value or 1 for side in kind.shape.dim)  # a dynamic batch is built for one image
    dtype = require("onnx", "export").helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    save_onnx(graph, path)
    write_json(path.with_name(RECIPE), Recipe(precision, given.name, shape, dtype).to_json())


@dataclass(frozen=True)
class Verdict:
    """What a builder of NVIDIA's said of a variant.

    Attributes:
        builds: whether an engine came out.
        messages: its warnings and errors.
        engine_bytes: size of the engine; None where there is none.
        seconds: how long it took.
    """

    builds: bool
    messages: tuple[str, ...]
    engine_bytes: int | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it builds without a warning."""
        return self.builds and not self.messages


def check_build(model: Path) -> Verdict:
    """Build a TensorRT variant by TensorRT-RTX, which needs no GPU.

    Raises:
        UserError: the package is not installed, or the recipe is damaged.
    """
    trt = require(CHECKER, "tensorrt")
    build = build_engine(trt, model.read_bytes(), read_recipe(model.with_name(RECIPE)))
    size = None if build.engine is None else len(build.engine)
    return Verdict(build.engine is not None, build.messages, size, round(build.seconds, 3))


def note_builds(folder: Path, variants: Iterable[str]) -> bool:
    """Build the TensorRT variants of an artifact that is being written, and note in each recipe what came out.

    Returns:
        Whether all build without a warning.
    """
    chosen = [variant for variant in variants if variant_runtime(variant) == "tensorrt"]
    ok = True
    for variant in track(chosen, "Building for TensorRT"):
        model = folder / variant / MODEL
        verdict = check_build(model)
        recipe: dict[str, Any] = read_json(model.with_name(RECIPE), "build recipe")
        by = f"{CHECKER} {require(CHECKER, 'tensorrt').__version__}"
        recipe["checked"] = {"by": by, "builds": verdict.builds, "messages": list(verdict.messages)}
        write_json(model.with_name(RECIPE), recipe)
        for message in verdict.messages:
            say(f"{variant}: {message}")
        if not verdict.builds:
            say(f"{variant} is refused by {by}: do not ship it.")
        ok = ok and verdict.ok
    return ok
