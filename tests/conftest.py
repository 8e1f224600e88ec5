"""Real images for the tests of the whole path: a part of Fashion-MNIST, fetched as a user would; and a server."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

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
