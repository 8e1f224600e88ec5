"""``midge quantize``: the INT8 variants of an artifact once more, by another method or with layers left in float.

It starts from the artifact's own FP32 graph and its calibration.json: the same images, known by their hashes, and the
ranges that were measured on them. What is not INT8 is copied.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.artifact import REFERENCE, Artifact, load_artifact, write_manifest
from ..runtime.errors import UserError, require
from ..runtime.fields import MAX_ITEMS, Fields
from ..runtime.files import atomic_folder, check_replaceable, read_json, sha256_file
from ..runtime.images import list_images
from ..runtime.progress import say
from ..runtime.torch_model import load_model
from .calibration import EvaluationImages, Samples, collect, evaluation_beside, read_images, usable
from .config import QuantizeConfig
from .delivery import Delivery, describe_graph
from .export import tool_versions
from .fold import fold_batch_norm
from .mixed_precision import keep_budget, measure_roundings, order_float_layers
from .onnx_export import save_onnx, without_notes
from .prepare import RANGE_STEPS, Prepared, prepare
from .quantize import refuse_quantized
from .ranges import FILE, METHODS, SCHEMA, RangeTable, check_method, write_calibration
from .sensitivity import DIALECT, LayerCost, by_cost, damage, layer_costs, run_graph
from .sensitivity_plot import print_costs
from .writers import WRITERS, Source, check_packages

if TYPE_CHECKING:
    from onnx import ModelProto

FLOAT_GRAPH = "onnx-fp32"


def quantize(config: QuantizeConfig) -> int:
    """Show what each layer costs, or write an artifact whose INT8 variants are made anew, or both.

    Raises:
        UserError: nothing is asked for, the artifact cannot be quantized, or its images are not there.
    """
    config.check()
    if config.calibration is not None:
        check_method(config.calibration)
    if config.out is None and not config.sensitivity:
        raise UserError("Nothing to do: give --sensitivity, or --out for a new artifact, or both.")
    if config.out is not None:
        check_replaceable(config.out)
    artifact = load_artifact(config.artifact)
    graph = read_float_graph(artifact)
    stored = Fields(read_json(artifact.path / FILE, "calibration"), f"calibration '{artifact.path / FILE}'")
    method, table = read_method(stored, config.calibration)
    check_packages([name for name in artifact.variants if is_int8(name) and name in WRITERS])
    samples = read_stored_images(stored, config, artifact)
    inputs = samples.calibration.inputs
    plain, table = prepare(graph, inputs, method, stored=table, range_steps={})
    costs: list[LayerCost] = []
    if config.sensitivity:
        clipped = RANGE_STEPS["weight clipping"](plain, inputs)  # a layer is judged by the scales it will have
        costs = layer_costs(graph, clipped, inputs[: config.limit])

    def prepared_with(float_nodes: tuple[str, ...]) -> Prepared:
        return prepare(graph, inputs, method, float_nodes, table)[0]

    prepared, lost = plain, None
    if config.budget is not None:
        held_out, classifier = read_held_out(config, artifact, samples), artifact.kind == "classifier"
        reference = run_graph(graph, held_out)
        sets = order_float_layers(graph, measure_roundings(plain, inputs[: config.limit]))
        prepared, lost = keep_budget(
            prepared_with, sets, lambda int8: damage(int8, reference, held_out, classifier), config.budget
        )
    elif config.out is not None:
        prepared = prepared_with(read_float_layers(stored))
    if config.out is not None:
        with atomic_folder(config.out) as folder:
            write_artifact(folder, artifact, graph, samples, prepared)
            seed = stored.integer("seed", 0, 2**63 - 1)
            tools = dict(artifact.manifest["tools"]) | tool_versions(list(artifact.variants))
            write_calibration(folder, samples, table, method, seed, tools, prepared.float_nodes)
            describe(folder, artifact, tools)
    print_result(config, method, costs if config.sensitivity else [], prepared, lost)
    return 0


def is_int8(variant: str) -> bool:
    """Whether a variant's name says that it is INT8."""
    return "int8" in variant.split("-")


def read_float_graph(artifact: Artifact) -> ModelProto:
    """The FP32 graph of an artifact.

    Raises:
        UserError: there is none, it is no ONNX file, or it is quantized.
    """
    onnx = require("onnx", "export")
    missing = [name for name in (FLOAT_GRAPH, REFERENCE) if name not in artifact.variants]
    if missing:
        raise UserError(f"The artifact '{artifact.path}' has no {missing[0]}: export it with --precision fp32 int8.")
    if artifact.preprocess.embedded:
        raise UserError(f"The graphs of '{artifact.path}' normalize inside: export it without --embed-preprocess.")
    if artifact.kind == "features":
        raise UserError(f"'{artifact.path}' gives feature maps: only one vector of outputs is quantized anew.")
    path = artifact.variants[FLOAT_GRAPH].model
    try:
        graph = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(graph)
    except Exception as error:  # the parser's and the checker's kinds differ
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"The graph '{path}' is no ONNX file ({reason}): export the artifact again.") from None
    refuse_quantized(graph)
    without_notes(graph)
    return graph


def read_method(stored: Fields, chosen: str | None) -> tuple[str, RangeTable | None]:
    """The method to choose ranges by, and the ranges of an artifact's calibration where it holds some.

    Raises:
        UserError: the file is damaged or of another schema, or says that the INT8 variants were trained.
    """
    if stored.schema(SCHEMA) < SCHEMA:
        raise UserError(f"The {stored.what} is of an earlier schema: export the artifact again.")
    if "trained" in stored.value and stored.fields("trained").value.get("kept") is not False:
        raise UserError(
            f"The {stored.what} says that the INT8 variants were trained, which quantizing the FP32 graph anew would "
            "undo: export the run again, with the options you want, or without --qat-epochs to quantize that."
        )
    method = stored.choice("method", METHODS)
    table = RangeTable.from_json(stored.fields("ranges")) if "ranges" in stored.value else None
    return chosen or method, table


def read_float_layers(stored: Fields) -> tuple[str, ...]:
    """The layers that an artifact's INT8 variants leave in float.

    Raises:
        UserError: the file is damaged.
    """
    names = stored.value.get("float_nodes", [])
    if not isinstance(names, list) or len(names) > MAX_ITEMS or not all(isinstance(name, str) for name in names):
        raise stored.wrong("float_nodes", names, f"a list of at most {MAX_ITEMS} names")
    return tuple(names)


def read_stored_images(stored: Fields, config: QuantizeConfig, artifact: Artifact) -> Samples:
    """The images that an artifact was calibrated on, from the folder ``--data``.

    Raises:
        UserError: one is missing or was changed.
    """
    entries = stored.value.get("images")
    if not isinstance(entries, list) or len(entries) > MAX_ITEMS:
        raise stored.wrong("images", entries, f"a list of at most {MAX_ITEMS} images")
    listed = [Fields(image, f"{stored.what}, images") for image in entries]
    wanted = {image.text("path"): image.sha256("sha256") for image in listed}
    images = list_images(config.data)
    places = {path: index for index, path in enumerate(images.paths) if path in wanted}
    order = [places[path] for path in wanted if path in places]
    read = read_images(images, order, artifact.preprocess, config.workers) if order else ()
    found = [image for image in read if wanted[image.path] == image.sha256]
    if len(found) < len(wanted) or not found:
        raise UserError(
            f"'{config.data}' holds {len(found)} of the {len(wanted)} images that the artifact was calibrated on: give "
            "the folder of the export with --data."
        )
    sample = collect(found, artifact.preprocess)
    excluded, evaluation = (stored.integer(key, 0, 2**53) for key in ("excluded", "evaluation_images"))
    return Samples(sample, sample, collect([], artifact.preprocess), excluded, evaluation)


def read_held_out(config: QuantizeConfig, artifact: Artifact, samples: Samples) -> np.ndarray:
    """Images (N, 3, H, W) float32 of ``--data`` that were not calibrated on and are no evaluation images.

    Raises:
        UserError: there are none.
    """
    images = list_images(config.data)
    root = config.evaluation_data or evaluation_beside(config.data)
    evaluation = EvaluationImages(None if root is None else list_images(root))
    order = np.random.default_rng(config.seed).permutation(len(images)).tolist()
    read = read_images(images, order, artifact.preprocess, config.workers)
    others = list(itertools.islice(usable(read, evaluation, samples.calibration.hashes), config.held_out))
    if not others:
        raise UserError(
            f"'{config.data}' holds no image beside those of the calibration and the evaluation: a budget needs some."
        )
    if len(others) < config.held_out:
        say(f"The budget is held on {len(others)} images instead of {config.held_out}: there are no more.")
    return collect(others, artifact.preprocess).inputs


def write_artifact(folder: Path, artifact: Artifact, graph: ModelProto, samples: Samples, prepared: Prepared) -> None:
    """Copy what is not INT8, write the rest anew."""
    reference = artifact.variants[REFERENCE].model
    model, spec = load_model(reference.parent, reference.stem)
    folded = fold_batch_norm(model, spec.input_px)
    delivery = Delivery(artifact.preprocess, describe_graph(artifact.kind, spec))
    shutil.copy(artifact.golden, folder / "golden.npz")
    with tempfile.TemporaryDirectory() as work:
        onnx_path = Path(work) / "model.onnx"  # the graph as it was before it was delivered
        save_onnx(graph, onnx_path)
        source = Source(model, folded, spec, graph, onnx_path, samples.calibration.inputs, prepared, delivery)
        for name in artifact.variants:
            if is_int8(name) and name in WRITERS:
                WRITERS[name].write(source, folder / name / WRITERS[name].model)
            elif is_int8(name):
                say(f"Left out {name}: this midge does not know how it is written.")
            else:
                for path in artifact.manifest["variants"][name]["files"]:  # checked; nothing else there is copied
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(artifact.path / path, folder / path)


def describe(folder: Path, artifact: Artifact, tools: dict[str, str]) -> None:
    """Write the manifest: as the artifact's, with where it comes from."""
    names = [name for name in artifact.variants if (folder / name).is_dir()]
    write_manifest(
        folder,
        name=artifact.name,
        kind=artifact.kind,
        input_shape=artifact.input_shape,
        outputs=artifact.outputs,
        preprocess=artifact.preprocess,
        labels=artifact.labels,
        models={name: f"{name}/{artifact.variants[name].model.name}" for name in names},
        notes={name: artifact.variants[name].note for name in names},
        origin={**artifact.manifest["origin"], "quantized_from": sha256_file(artifact.path / "manifest.json")},
        tools=tools,
        input_name=artifact.input_name,
        dynamic_batch=[name for name in names if artifact.variants[name].dynamic_batch],
    )


def print_result(
    config: QuantizeConfig, method: str, costs: Sequence[LayerCost], prepared: Prepared, lost: float | None
) -> None:
    """Print costs, and what was written."""
    if config.json:
        result: dict[str, Any] = {
            "schema": 1,
            "artifact": None if config.out is None else str(config.out),
            "method": method,
            "layers": [cost.to_json() for cost in by_cost(costs)],
            "float_nodes": list(prepared.float_nodes),
            "lost_points": lost,
        }
        print(json.dumps(result))
        return
    if costs:
        print_costs(costs)
    if lost is not None:
        stay = ", ".join(prepared.float_nodes) or "none"
        print(f"Lost by {DIALECT} on held-out images: {lost:.2f} points (budget {config.budget:g}).")
        print(f"Layers in float: {stay}.")
    if config.out is not None:
        print(f"Wrote {config.out}, ranges by {method}.")
