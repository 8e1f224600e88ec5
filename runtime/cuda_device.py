"""A GPU through NVIDIA's own Python bindings of the CUDA runtime, which bring no framework: choose one, copy, free.

The bindings are ``cuda.bindings.runtime`` (cuda-bindings 12.6 and later) or the older ``cuda.cudart`` (JetPack 5).
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np

from .errors import UserError

MODULES = ("cuda.bindings.runtime", "cuda.cudart")
EXTRA = "tensorrt"


def find_cuda() -> ModuleType | None:
    """The bindings; None where they are not installed."""
    for module in MODULES:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError:
            continue
    return None


def why_no_gpu() -> str | None:
    """Why no GPU can be used here; None where one can."""
    cuda = find_cuda()
    if cuda is None:
        return f"cuda-bindings is not installed (pip install 'midge[{EXTRA}]')"
    error, count = cuda.cudaGetDeviceCount()
    if int(error):
        return f"no GPU can be used ({_reason(cuda, error)})"
    return None if count else "there is no GPU"


def _reason(cuda: ModuleType, error: Any) -> str:
    text = cuda.cudaGetErrorString(error)[1]
    return text.decode() if isinstance(text, bytes) else str(text)


class CudaDevice:
    """One GPU, with a stream and the memory that is taken on it.

    Args:
        index: its number, as text; None is the first.

    Raises:
        UserError: the bindings are missing, there is no GPU, or none of that number.
    """

    def __init__(self, index: str | None) -> None:
        if reason := why_no_gpu():
            raise UserError(f"TensorRT cannot run here: {reason}. Run it on a machine with an NVIDIA GPU.")
        cuda = find_cuda()
        assert cuda is not None
        self._cuda = cuda
        allowed = [str(number) for number in range(self._call(cuda.cudaGetDeviceCount()))]
        if index is not None and index not in allowed:
            raise UserError(f"No GPU {index!r} here: choose one of {', '.join(allowed)}.")
        self.index = int(index or 0)
        self._call(cuda.cudaSetDevice(self.index))
        self.stream: int = int(self._call(cuda.cudaStreamCreate()))
        self._taken: list[int] = []

    def describe(self) -> dict[str, str]:
        """Name and compute capability, which an engine is bound to."""
        cuda = self._cuda
        name = self._call(cuda.cudaGetDeviceProperties(self.index)).name
        attributes = cuda.cudaDeviceAttr
        major, minor = (
            self._call(cuda.cudaDeviceGetAttribute(attribute, self.index))
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        )
        return {
            "name": name.decode(errors="replace").rstrip("\0") if isinstance(name, bytes) else str(name),
            "compute_capability": f"{major}.{minor}",
        }

    def take(self, num_bytes: int) -> int:
        """Address of so much memory on the GPU, kept until :meth:`close`."""
        address = int(self._call(self._cuda.cudaMalloc(num_bytes)))
        self._taken.append(address)
        return address

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the GPU, in the stream's order."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self.stream))

    def download(self, array: np.ndarray, address: int) -> None:
        """Fill a contiguous array from the GPU, in the stream's order; it is ready after :meth:`wait`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self.stream))

    def wait(self) -> None:
        """Wait for all that was put into the stream."""
        self._call(self._cuda.cudaStreamSynchronize(self.stream))

    def close(self) -> None:
        """Free the memory and the stream."""
        while self._taken:
            self._call(self._cuda.cudaFree(self._taken.pop()))
        if self.stream:
            stream, self.stream = self.stream, 0
            self._call(self._cuda.cudaStreamDestroy(stream))

    def _call(self, result: tuple[Any, ...]) -> Any:
        """What a function of the bindings gave, without its error code.

        Raises:
            RuntimeError: it failed.
        """
        error, *values = result
        if int(error):
            raise RuntimeError(f"CUDA: {_reason(self._cuda, error)}")
        return values[0] if values else None
