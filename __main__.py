"""The command line: one table of commands. Each imports its stage only when it is called, so that ``--help`` is quick.

A command is a frozen dataclass, from which tyro makes the flags, and a function that takes it and returns the exit
code: 0 done, 1 done but a threshold was missed or something was found, 2 a mistake of the user. Results go to stdout,
progress and errors to stderr.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import __version__


class Command(NamedTuple):
    """A command: its one-line summary and where its parts live (``module:name``, below midge).

    Attributes:
        summary: for the list of commands.
        config: the dataclass that becomes the flags.
        function: takes it and returns the exit code.
        defaults: gives the values that the flags start from, by the arguments; "" where they are the dataclass's.
    """

    summary: str
    config: str
    function: str
    defaults: str = ""


COMMANDS = {
    "run": Command("the whole path in one command, by recipe", "pipeline:RunConfig", "pipeline:run"),
    "data fetch": Command("fetch a known image set", "train.data_config:FetchConfig", "train.fetch:fetch"),
    "data check": Command("find unreadable images", "train.data_config:CheckConfig", "train.data_check:check"),
    "data pack": Command("a folder of images -> tar shards", "train.data_config:PackConfig", "train.pack:pack"),
    "recipes": Command(
        "known good settings, explained", "train.recipes_table:RecipesConfig", "train.recipes_table:recipes"
    ),
    "views": Command(
        "what a view policy does to your images", "train.views_config:ViewsConfig", "train.show_views:show_views"
    ),
    "pretrain": Command(
        "self-supervised pretraining",
        "train.config:PretrainConfig",
        "train.pretrain:pretrain",
        defaults="train.recipes:defaults",
    ),
    "watch": Command("curves of a run in the terminal", "train.watch_config:WatchConfig", "train.watch:watch"),
    "knn": Command(
        "k-NN accuracy of a run, beside its baselines", "train.evaluation_config:KnnConfig", "train.knn:knn"
    ),
    "linear": Command(
        "train the classifier on a frozen backbone", "train.evaluation_config:LinearConfig", "train.linear:linear"
    ),
    "export": Command("run -> artifact, FP32 and INT8", "export.config:ExportConfig", "export.export:export_run"),
    "quantize": Command(
        "what each layer's INT8 costs; mixed precision", "export.config:QuantizeConfig", "export.requantize:quantize"
    ),
    "verify": Command("every variant against the reference", "export.config:VerifyConfig", "export.verify:verify"),
    "lint": Command("will runtimes take an ONNX file, in integers?", "export.config:LintConfig", "export.lint:lint"),
    "profile": Command(
        "accuracy and cost through each runtime", "profiles.config:ProfileConfig", "profiles.profile:profile"
    ),
    "compare": Command(
        "records -> table, verdicts, report", "profiles.compare_config:CompareConfig", "profiles.compare:compare"
    ),
}


def usage() -> str:
    """The text of ``midge --help``."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        f"midge {__version__}: from unlabelled images to a small network proven on the device.\n\n"
        f"usage: midge COMMAND [options]     midge COMMAND --help\n\ncommands:\n{rows}\n\n"
        "start here: midge data fetch fashion-mnist && midge run quickstart --out demo"
    )


def find_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Split the arguments into the command's name (one or two words) and the rest.

    Raises:
        UserError: there is no such command.
    """
    from .runtime.errors import UserError

    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return name, list(argv[words:])
    group = [name for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    given = " ".join(argv[:2]) if group else argv[0]
    near = difflib.get_close_matches(given, COMMANDS, n=1)
    hint = f"did you mean '{near[0]}'? " if near and near[0] != given else ""
    raise UserError(f"Unknown command '{given}': {hint}choose one of {', '.join(group or COMMANDS)}.")


def load(where: str) -> Any:
    """Import ``module:name`` from below midge."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


def dispatch(argv: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    name, arguments = find_command(argv)
    import tyro

    command = COMMANDS[name]
    default = {"default": load(command.defaults)(arguments)} if command.defaults else {}
    config = tyro.cli(load(command.config), prog=f"midge {name}", args=arguments, **default)
    if hasattr(config, "check"):
        config.check()  # at once: the function's module may take seconds to import
    return load(command.function)(config)


def describe_os_error(error: OSError) -> str:
    """One line for an error of the operating system, with the way out where there is one."""
    way_out = {
        errno.ENOSPC: "free some space and run it again",
        errno.EDQUOT: "free some space and run it again",
        errno.EACCES: "choose a place you may write to, or change its permissions",
        errno.EPERM: "choose a place you may write to, or change its permissions",
        errno.EROFS: "choose a place you may write to",
        errno.ENOTDIR: "choose a path whose parents are folders",
    }.get(error.errno or 0, "check the path")
    place = f"'{error.filename}': " if error.filename else ""
    return f"{place}{error.strerror or error}: {way_out}."


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``midge`` and ``python -m midge``."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in {"-h", "--help", "help"}:
        print(usage())
        return 0 if argv else 2
    if argv[0] in {"-V", "--version"}:
        print(f"midge {__version__}")
        return 0
    from .runtime.errors import UserError

    try:
        return dispatch(argv)
    except UserError as error:
        print(f"midge: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's last flush is quiet
        return 0
    except OSError as error:
        if os.environ.get("MIDGE_TRACEBACK"):
            raise
        print(f"midge: error: {describe_os_error(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("midge: interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
