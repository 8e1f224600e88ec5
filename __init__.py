"""midge: from unlabelled images to a small network proven on the device.

The four stages live in :mod:`midge.train`, :mod:`midge.export`, :mod:`midge.runtime` and :mod:`midge.profiles`; they
meet only in folders on disk. ``python -m midge --help`` lists the commands.
"""

import os

# No telemetry: ONNX Runtime's wheels for Linux send by default, unless told not to before their first import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
