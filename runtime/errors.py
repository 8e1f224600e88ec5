"""The errors a user can cause: one line each, shown without a traceback, exit code 2."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from types import ModuleType


class UserError(Exception):
    """A mistake of the user or of their input.

    The message is one line that says what was wrong, what was given, what is allowed and what to do.
    """


def unknown_name(what: str, given: str, allowed: Iterable[str]) -> UserError:
    """The error for a name that is not in a table of choices, e.g. ``Unknown backbone 'x': choose one of a, b.``."""
    return UserError(f"Unknown {what} {given!r}: choose one of {', '.join(sorted(allowed))}.")


def check_ranges(config: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse values of a configuration that are out of range, NaN among them.

    Args:
        config: whose fields are the flags; None is in every range, and so is a field that it does not have.
        ranges: field -> smallest and largest allowed value.

    Raises:
        UserError: names the flag, its value and what is allowed.
    """
    for name, (low, high) in ranges.items():
        value = getattr(config, name, None)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} is {value}: give a value from {low:g} to {high:g}.")


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
