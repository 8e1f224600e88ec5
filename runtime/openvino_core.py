"""OpenVINO's one ``Core``, which lives as long as the process.

OpenVINO's CPU plugin gives the thread that loads it a stack for signals of its own (sigaltstack), and takes that away
when the ``Core`` goes. Of two that go in the order in which they came, the second puts back the first one's stack,
which is no longer mapped; the next signal with a handler, Ctrl-C or a child's end, then kills the process with SIGSEGV
and without a word (OpenVINO 2026.4).
"""

from __future__ import annotations

import functools
from typing import Any

from .errors import require


@functools.cache
def openvino_core() -> Any:
    """The ``openvino.Core`` of this process.

    Raises:
        UserError: OpenVINO is not installed.
    """
    return require("openvino", "openvino").Core()
