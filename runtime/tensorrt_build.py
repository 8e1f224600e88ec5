"""An ONNX file and a build recipe become a TensorRT engine, by what the installed TensorRT has, never by its version.

* 8.5 takes integers and half precision only where a flag allows them; 10 can be told to keep to the types in the graph
  (``STRONGLY_TYPED``), and is; 11 does nothing else and has no flags of precision left. In all of them Q/DQ and float16
  stand in the graph, so a recipe names flags for those that need them, and each is set where it exists.
* ``tensorrt_rtx``, of the same interface, builds without a GPU: it shows that a parser and a builder of NVIDIA's take a
  graph, and nothing about speed.
"""

from __future__ import annotations

import functools
import importlib
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .backend import installed_package
from .errors import UserError
from .fields import Fields
from .files import read_json

SCHEMA = 1
RECIPE = "recipe.json"
EXTRA = "tensorrt"

NETWORK_FLAGS = ("EXPLICIT_BATCH", "STRONGLY_TYPED")
CLEARED_FLAGS = ("TF32",)  # 10 bits of mantissa where the variant promises 23

# Precision -> flags of the builder where the network cannot be strongly typed.
BUILDER_FLAGS: dict[str, tuple[str, ...]] = {"fp32": (), "fp16": ("FP16",), "int8": ("INT8",)}

INPUT_DTYPES = ("float32", "uint8")
MAX_WORKSPACE_MIB = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """How an engine is built.

    Attributes:
        precision: a key of ``BUILDER_FLAGS``.
        input_name: the network's input.
        input_shape: (N, 3, H, W), which a graph of dynamic batch is built for, too.
        input_dtype: one of ``INPUT_DTYPES``.
        workspace_mib: memory that the builder may take for one layer, MiB.
    """

    precision: str
    input_name: str
    input_shape: tuple[int, ...]
    input_dtype: str = "float32"
    workspace_mib: int = 1024

    def to_json(self) -> dict[str, Any]:
        """All that a builder needs to be told, in this module or another."""
        return {
            "schema": SCHEMA,
            "model": "model.onnx",
            "precision": self.precision,
            "input": {"name": self.input_name, "shape": list(self.input_shape), "dtype": self.input_dtype},
            "workspace_mib": self.workspace_mib,
            "network_flags": list(NETWORK_FLAGS),
            "builder_flags_unless_strongly_typed": list(BUILDER_FLAGS[self.precision]),
            "cleared_builder_flags": list(CLEARED_FLAGS),
            "trtexec": self.commands(),
        }

    def commands(self) -> dict[str, str]:
        """How ``trtexec`` builds the same, by version."""
        build = f"trtexec --onnx=model.onnx --noTF32 --memPoolSize=workspace:{self.workspace_mib}"
        save = "--saveEngine=model.engine"
        flags = [f"--{flag.lower()}" for flag in BUILDER_FLAGS[self.precision]]
        return {
            "8.5": " ".join([build, *flags, save]),
            "10": f"{build} --stronglyTyped {save}",
            "11": f"{build} {save}",
        }


def read_recipe(path: Path) -> Recipe:
    """Read a recipe, which may be hostile: of its flags only the precision is looked at.

    Raises:
        UserError: it is damaged, or of a later schema.
    """
    fields = Fields(read_json(path, "build recipe", 1 << 20), f"build recipe '{path}'")
    fields.schema(SCHEMA)
    given = fields.fields("input")
    return Recipe(
        precision=fields.choice("precision", BUILDER_FLAGS),
        input_name=given.text("name", 200),
        input_shape=given.integers("shape", 1, 1_000_000, [4]),
        input_dtype=given.choice("dtype", INPUT_DTYPES),
        workspace_mib=fields.integer("workspace_mib", 1, MAX_WORKSPACE_MIB),
    )


@dataclass(frozen=True, eq=False)
class Build:
    """What a builder made of a graph.

    Attributes:
        engine: its bytes; None where the graph was refused.
        timing: the timing cache to keep; b"" where there is none.
        messages: warnings and errors, e.g. ``"WARNING: …"``.
        seconds: how long parsing and building took.
    """

    engine: bytes | None
    timing: bytes
    messages: tuple[str, ...]
    seconds: float


def import_tensorrt() -> ModuleType:
    """The installed TensorRT.

    Raises:
        UserError: none is installed.
    """
    name = installed_package("tensorrt")
    if name is None:
        raise UserError(
            "The package 'tensorrt' is not installed and this step needs it: on a Jetson it comes with JetPack, else "
            f"from NVIDIA's package index; to build without a GPU, pip install 'midge[{EXTRA}]'."
        )
    return importlib.import_module(name)


@functools.cache
def logger(trt: ModuleType) -> Any:
    """The one logger of the process: a second one makes TensorRT warn."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                self.messages.append(f"{severity.name}: {' '.join(message.split())}")

    return Logger()


def take_messages(trt: ModuleType) -> tuple[str, ...]:
    """Warnings and errors since the last call, each once, in order."""
    messages = logger(trt).messages
    taken = tuple(dict.fromkeys(messages))
    messages.clear()
    return taken


def build_engine(trt: ModuleType, model: bytes, recipe: Recipe, timing: bytes | None = None) -> Build:
    """Parse and build.

    Args:
        trt: the package.
        model: the ONNX file's bytes.
        recipe: how.
        timing: a timing cache of this TensorRT on this GPU, b"" for a new one; None keeps none.
    """
    take_messages(trt)
    start = time.monotonic()
    builder = trt.Builder(logger(trt))
    flags = [getattr(trt.NetworkDefinitionCreationFlag, name, None) for name in NETWORK_FLAGS]
    network = builder.create_network(sum(1 << int(flag) for flag in flags if flag is not None))
    parser = trt.OnnxParser(network, logger(trt))
    engine = config = None
    if parser.parse(model):
        config = _configure(trt, builder, recipe)
        if -1 in network.get_input(0).shape:
            profile = builder.create_optimization_profile()
            profile.set_shape(recipe.input_name, *(recipe.input_shape,) * 3)
            config.add_optimization_profile(profile)
        if timing is not None:
            config.set_timing_cache(config.create_timing_cache(timing), False)
        engine = builder.build_serialized_network(network, config)
    kept = b""
    if timing is not None and config is not None:
        kept = bytes(config.get_timing_cache().serialize())
    messages = take_messages(trt)
    if engine is None and not messages:
        messages = tuple(f"ERROR: {parser.get_error(number)}" for number in range(parser.num_errors))
    content = None if engine is None else bytes(engine)
    return Build(content, kept, messages, time.monotonic() - start)


def _configure(trt: ModuleType, builder: Any, recipe: Recipe) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace_mib << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that an engine can say what it runs
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        for name in BUILDER_FLAGS[recipe.precision]:
            if hasattr(trt.BuilderFlag, name):
                config.set_flag(getattr(trt.BuilderFlag, name))
    for name in CLEARED_FLAGS:
        if hasattr(trt.BuilderFlag, name):
            config.clear_flag(getattr(trt.BuilderFlag, name))
    return config


def keeps_timing(trt: ModuleType) -> bool:
    """Whether a timing cache is of use: TensorRT-RTX times nothing while it builds, and warns of one."""
    return not hasattr(getattr(trt, "IRuntimeConfig", None), "create_runtime_cache")
