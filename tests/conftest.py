"""Real images for the tests of the whole path: a part of Fashion-MNIST, fetched as a user would; and a server."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

TRAIN_IMAGES, TEST_IMAGES = 300, 120

settings.register_profile("midge", deadline=None)  # how long an example takes on a busy machine is no defect
settings.load_profile("midge")


Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Make a folder once for all of xdist's processes: ``once(name, make)``, the others wait while the first makes it.

    ``make(folder)`` gets a folder that does not exist; what it leaves there is read by every process and changed by
    none. One that failed, or whose process died, is made anew.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def find(name: str, make: Callable[[Path], None]) -> Path:
        made = shared / f"{name}.made"  # leads to the folder
        with FileLock(shared / f"{name}.lock"):
            if not made.exists():
                folder = tmp_path_factory.mktemp(name) / name
                make(folder)
                made.symlink_to(folder)
        return made.resolve()

    return find


@pytest.fixture(scope="session")
def fashion(once: Once) -> Path:
    """All of Fashion-MNIST, from the Debian package where it is installed, else downloaded by torchvision."""
    from midge.__main__ import main

    def fetch(folder: Path) -> None:
        assert main(["data", "fetch", "fashion-mnist", "--out", str(folder)]) == 0

    return once("fashion-mnist", fetch)


@pytest.fixture(scope="session")
def small_fashion(once: Once, fashion: Path) -> Path:
    """The first images of each class: 300 to train on, 120 to test on."""

    def thin_out(folder: Path) -> None:
        for split, number in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES)):
            for source in sorted((fashion / split).iterdir()):
                target = folder / split / source.name
                target.mkdir(parents=True)
                for path in sorted(source.iterdir())[: number // 10]:
                    (target / path.name).hardlink_to(path)

    return once("small-fashion-mnist", thin_out)


WARM = (
    *("torch", "torchvision", "timm", "lightning.fabric", "onnx", "onnxscript", "onnxslim"),
    *("midge.train.pretrain", "midge.train.knn", "midge.train.linear"),
)
"""Imported once for the processes of :class:`Warm`: no runtime, for those start threads, which a fork would lose."""


class WarmProcess:
    """A process of :class:`Warm`, to be used as one of subprocess."""

    def __init__(self, ask: Callable[[dict[str, Any]], Any], asked: dict[str, Any]) -> None:
        self._ask, self._asked = ask, asked
        self.pid: int = ask(asked)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout_s: float = 600.0) -> int:
        """Its exit code, when it has ended; one that takes too long is killed."""
        end = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"{self._asked['run']} ran for over {timeout_s} s.")
            time.sleep(0.01)
        return code

    def communicate(self, timeout_s: float = 600.0) -> tuple[str, str]:
        """What it wrote to stdout and stderr until its end."""
        self.wait(timeout_s)
        out, err = (Path(self._asked[name]).read_text(encoding="utf-8") for name in ("out", "err"))
        return out, err

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Warm:
    """``python -m midge …`` and ``python FILE …`` in processes of their own that need not import torch, see
    warm_server.py. What a process finds imported it would have imported itself; tests of what is imported, of how fast,
    and of what is said meanwhile start Python afresh.

    Args:
        folder: for the outputs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self._server = subprocess.Popen(
            [sys.executable, Path(__file__).parent / "warm_server.py", *WARM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def _ask(self, asked: dict[str, Any]) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(
        self, *run: object, module: bool = False, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> WarmProcess:
        """Start a file, or a module, with arguments; ``env`` comes on top of this process's."""
        self._number += 1
        outputs = {name: self._folder / f"{self._number}.{name}" for name in ("out", "err")}
        for path in outputs.values():
            path.touch()
        asked = {
            "run": [str(word) for word in run],
            "module": module,
            "env": {**os.environ, **(env or {})},
            "cwd": str(cwd or Path.cwd()),
            **{name: str(path) for name, path in outputs.items()},
        }
        return WarmProcess(self._ask, asked)

    def midge(self, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """What ``python -m midge`` does."""
        return self._finished(self.start("midge", *arguments, module=True, cwd=cwd), arguments)

    def python(self, *run: object) -> subprocess.CompletedProcess[str]:
        """What ``python FILE …`` does."""
        return self._finished(self.start(*run), run)

    def _finished(self, process: WarmProcess, run: Sequence[object]) -> subprocess.CompletedProcess[str]:
        out, err = process.communicate()
        return subprocess.CompletedProcess([str(word) for word in run], process.wait(), out, err)

    def close(self) -> None:
        """End the server, which ends at the end of its input."""
        with self._server as server:
            assert server.stdin is not None
            server.stdin.close()


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Processes that have imported torch."""
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Warm(Path(folder))) as started:
        yield started


Midge = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def midge(warm: Warm) -> Midge:
    """``midge(argument, …, cwd=…)`` as a user starts it: exit code, stdout and stderr."""
    return warm.midge


@dataclass
class Served:
    """A folder behind a real HTTP server on this machine.

    Attributes:
        address: of the folder, with a slash at its end.
        requests: paths that were asked for, in order, from whatever process.
    """

    address: str
    requests: list[str]


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Served]]:
    """Serve folders until the test ends: ``serve(folder)``."""
    with contextlib.ExitStack() as stack:

        def start(folder: Path) -> Served:
            requests: list[str] = []

            class Handler(http.server.SimpleHTTPRequestHandler):
                def do_GET(self) -> None:
                    requests.append(self.path)
                    super().do_GET()

                def log_message(self, format: str, *args: object) -> None:
                    pass

            handler = functools.partial(Handler, directory=str(folder))
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return Served(f"http://127.0.0.1:{server.server_address[1]}/", requests)

        yield start


@pytest.fixture
def openvino_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO computes in integers on any CPU, as it does by default where they cannot overflow."""
    monkeypatch.setattr("midge.runtime.openvino_backend.adds_in_16_bits", lambda: False)
