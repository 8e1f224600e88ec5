from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[1] / "data/tiny-artifact/onnx-fp32/model.onnx"  # OpenVINO reads ONNX too

OPEN_TWO_CLOSE_THE_FIRST_FIRST = """
import gc, os, signal, sys
from pathlib import Path
from midge.runtime.openvino_backend import OpenVinoBackend

first, second = (OpenVinoBackend(Path(sys.argv[1]), threads=1) for _ in range(2))
for name in ("first", "second"):
    globals()[name].close()
    del globals()[name]
    gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_are_handled_once_openvino_is_closed() -> None:
    pytest.importorskip("openvino")
    script = [sys.executable, "-c", OPEN_TWO_CLOSE_THE_FIRST_FIRST, str(MODEL)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
