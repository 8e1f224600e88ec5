"""Python processes that have imported torch already: what takes most of the time of a short command.

``python warm_server.py MODULE …`` imports the modules, runs nothing of them, and then forks a process for each request
it reads. The process runs a module or a script as ``python -m MODULE`` or ``python FILE`` would, with its own
environment, folder and output. The client is ``warm`` in conftest.py; a line of JSON is a request, and so is its reply:

    {"run": [file or module, argument, …], "module": true, "env": {…}, "cwd": "…", "out": "…", "err": "…"} -> pid
    {"poll": pid} -> null while it runs, then its exit code as subprocess has it
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

FORKS = sys.platform == "linux"  # elsewhere the system's own libraries may start threads: Python starts afresh there
THREADS = Path("/proc/self/task")


def main() -> None:
    """Serve until stdin ends."""
    for name in sys.argv[1:] if FORKS else ():
        importlib.import_module(name)
    if FORKS and (number := len(list(THREADS.iterdir()))) > 1:
        sys.exit(f"Importing {sys.argv[1:]} left {number} threads, which a fork would not have: leave the module out.")
    gc.collect()
    gc.freeze()  # else each process copies the pages of all that was imported, to find that it is still in use
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        asked = json.loads(line)
        if "poll" in asked:
            pid, status = os.waitpid(asked["poll"], os.WNOHANG)
            reply = None if pid == 0 else os.waitstatus_to_exitcode(status)
        elif (reply := os.fork()) == 0:
            replies.close()
            become(asked)
        print(json.dumps(reply), file=replies)


def become(asked: dict[str, Any]) -> None:
    """Be the process that was asked for; ends by SystemExit, or by what the code raises."""
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, asked["out"], os.O_WRONLY),
        (2, asked["err"], os.O_WRONLY),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    if not FORKS:
        os.execv(sys.executable, [sys.executable, *(["-m"] if asked["module"] else []), *asked["run"]])
    sys.argv = list(asked["run"])
    if asked["module"]:
        runpy.run_module(asked["run"][0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(asked["run"][0], run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    main()
