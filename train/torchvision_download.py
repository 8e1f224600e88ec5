"""Downloads by torchvision, with a time limit, its messages kept from stdout, and its errors in one line."""

from __future__ import annotations

import contextlib
import http.client
import socket
import sys
import urllib.error
from collections.abc import Iterator

import numpy as np

from ..runtime.errors import UserError
from ..runtime.progress import say

DOWNLOAD_TIMEOUT_S = 30.0

Splits = dict[str, tuple[np.ndarray, np.ndarray]]
"""split -> images (N, H, W) or (N, H, W, 3) uint8, and labels (N,) integers."""


@contextlib.contextmanager
def downloading(name: str, way_out: str) -> Iterator[None]:
    """Around a download by torchvision.

    Args:
        name: what is downloaded.
        way_out: what to do where it fails.

    Raises:
        UserError: the download has failed.
    """
    say(f"Downloading {name} with torchvision.")
    timeout_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torchvision sets none: a silent server would hold it for ever
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (RuntimeError, urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"The download of {name} failed ({reason}): {way_out}.") from None
    finally:
        socket.setdefaulttimeout(timeout_s)
