"""The errors a user can cause: one line each, shown without a traceback, exit code 2."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(Exception):
    """A mistake of the user or of their input.

    The message is one line that says what was wrong, what was given, what is allowed and what to do.
    """


def unknown_name(what: str, given: str, allowed: Iterable[str]) -> UserError:
    """The error for a name that is not in a table of choices, e.g. ``Unknown backbone 'x': choose one of a, b.``."""
    return UserError(f"Unknown {what} {given!r}: choose one of {', '.join(sorted(allowed))}.")


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or name the extra that brings it.

    Args:
        module: import name, e.g. ``"openvino"``.
        extra: the extra of midge that installs it, e.g. ``"openvino"``.

    Raises:
        UserError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise UserError(
            f"The package '{error.name}' is not installed and this step needs it: pip install 'midge[{extra}]'."
        ) from None
