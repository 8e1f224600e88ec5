"""PyTorch: the reference, rebuilt by timm, in eval and inference mode, on the CPU unless another device is named.

Weights and images are laid out channels-last, which was measured 14 to 22 % faster than the default layout on one
thread (resnet18 at 32 and 224 px, mobilenetv2_050 at 224 px): the other runtimes are to be compared with a fair torch.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .backend import Placement, TensorSpec, check_batch
from .errors import require, unknown_name
from .torch_model import ModelSpec, build_model, load_model


class TorchBackend:
    """A network in PyTorch.

    The number of threads is the process's; closing sets it back.

    Args:
        model: ``<stem>.safetensors``, with ``<stem>.json`` beside it.
        threads: threads inside an operator, on the CPU.
        device: torch's name of it, e.g. ``"cuda:1"``; None is the CPU.
        cache: not used: nothing is kept.
    """

    def __init__(self, model: Path, threads: int, device: str | None = None, cache: Path | None = None) -> None:
        torch = require("torch", "train")
        self._device = choose_device(device)
        network, spec = load_model(model.parent, model.stem)
        self._preprocess = spec.preprocess
        self.input_shape: tuple[int, ...] = (1, *spec.preprocess.input_shape)
        self.input_dtype = spec.preprocess.input_dtype
        self.dynamic_batch = False
        self.inputs = (TensorSpec("image", self.input_shape, self.input_dtype),)
        self.outputs = _output_specs(spec)
        self._network = network.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)

    def __enter__(self) -> TorchBackend:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(self, batch: np.ndarray) -> np.ndarray:
        """The first output, (1, …) float32, for a batch of ``input_shape``."""
        return self.run_all(batch)[0]

    def run_all(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        """All outputs, (1, …) float32 each."""
        import torch

        check_batch(batch, self.input_shape, self.input_dtype)
        floats = self._preprocess.normalize(batch) if self._preprocess.embedded else batch
        with torch.inference_mode():
            images = torch.from_numpy(floats).to(self._device).contiguous(memory_format=torch.channels_last)
            outputs = self._network(images)
            return tuple(output.cpu().numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))

    def close(self) -> None:
        """Free the network and give the process its threads back."""
        import torch

        torch.set_num_threads(self._threads_before)
        del self._network

    def placement(self) -> Placement:
        """What one inference dispatches: all of it float32, so no integer MACs; the total by torch's own formulas."""
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils.flop_counter import flop_registry

        ops: Counter[str] = Counter()
        macs = 0

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal macs
                result = func(*args, **(kwargs or {}))
                packet = func.overloadpacket
                ops[packet.__name__] += 1
                if packet in flop_registry:
                    macs += flop_registry[packet](*args, **(kwargs or {}), out_val=result) // 2
                return result

        side = self._preprocess.crop_px
        batch = torch.zeros(1, 3, side, side, device=self._device).contiguous(memory_format=torch.channels_last)
        # The plain attention is two matrix products that the formulas know; the fused one for CPUs is not among them.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Count():
            self._network(batch)
        return Placement(0, macs, dict(sorted(ops.items())))


def choose_device(device: str | None) -> str:
    """The device of that name; None is the CPU.

    Raises:
        UserError: torch does not have it here.
    """
    import torch

    allowed = ["cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    if torch.cuda.is_available():
        allowed += ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if device is not None and device not in allowed:
        raise unknown_name("torch device", device, allowed)
    return device or "cpu"


def _output_specs(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    """The outputs; of feature maps their shapes, without the memory of a run."""
    import torch

    if not spec.strides:
        name, size = ("logits", spec.num_classes) if spec.num_classes else ("features", spec.feature_dim)
        return (TensorSpec(name, (1, size)),)
    with torch.device("meta"), torch.inference_mode():
        maps = build_model(spec)(torch.zeros(1, 3, spec.input_px, spec.input_px))
    return tuple(
        TensorSpec(f"stride{stride}", tuple(output.shape)) for stride, output in zip(spec.strides, maps, strict=True)
    )
