"""The run folder: whose it is, what lies in it, and whether a run may start, go on, or has ended (no torch)."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..runtime.errors import UserError
from ..runtime.files import read_json, refuse_existing, write_json
from .config import OPERATIONAL_FIELDS, PretrainConfig

SCHEMA = 1
PACKAGES = ("torch", "timm", "lightning", "numpy", "pillow")


@dataclass(frozen=True)
class RunFolder:
    """A run folder that belongs to one configuration and one set of images.

    Attributes:
        path: the folder.
        identity: SHA-256 of what decides about the run's result: a checkpoint belongs to one identity.
    """

    path: Path
    identity: str

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint."""
        return self.path / "checkpoints" / "last.pt"

    @property
    def metrics(self) -> Path:
        """One JSON document per line."""
        return self.path / "metrics.jsonl"

    @property
    def backbone(self) -> Path:
        """The weights of the result."""
        return self.path / "backbone.safetensors"

    @property
    def finished(self) -> bool:
        """The result is there; its JSON is written last."""
        return self.backbone.exists() and self.backbone.with_suffix(".json").exists()

    def last_metrics(self) -> dict[str, Any]:
        """The last line of the metrics, or nothing."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        return json.loads(lines[-1]) if lines else {}


def open_run(config: PretrainConfig, data_fingerprint: str, num_images: int) -> RunFolder:
    """Take a folder for a run, and write its config.json if it is new.

    Args:
        config: of the run; ``config.resume`` decides whether the folder may hold something.
        data_fingerprint: of the images.
        num_images: their number.

    Raises:
        UserError: the folder holds something and ``resume`` is false; or what it holds is not a run, or a run of
            another configuration or of other images.
    """
    description = describe_run(config, data_fingerprint, num_images)
    deciding = _deciding(description)
    identity = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    config_path = config.out / "config.json"
    if not config.resume:
        _refuse_occupied(config.out)
    elif config_path.exists():
        _refuse_other(config, _deciding(read_json(config_path, "run configuration")), deciding)
        return RunFolder(config.out, identity)
    else:
        refuse_existing(config.out)
    write_json(config_path, description)
    return RunFolder(config.out, identity)


def describe_run(config: PretrainConfig, data_fingerprint: str, num_images: int) -> dict[str, Any]:
    """The content of config.json: the whole configuration, the data, and what ran it."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "schema": SCHEMA,
        "kind": "pretrain",
        "config": config.to_json(),
        "data_fingerprint": data_fingerprint,
        "num_images": num_images,
        "midge": __version__,
        "git_commit": _git_commit(),
        "versions": {"python": platform.python_version(), **versions},
    }


def _deciding(description: Any) -> dict[str, Any]:
    """What decides about a run's result, as it reads back from JSON."""
    config = description.get("config") if isinstance(description, dict) else None
    if not isinstance(config, dict) or description.get("schema") != SCHEMA:
        return {}
    fields = {name: value for name, value in config.items() if name not in OPERATIONAL_FIELDS}
    return json.loads(json.dumps({**fields, "data_fingerprint": description.get("data_fingerprint")}))


def _refuse_occupied(path: Path) -> None:
    if (path / "config.json").exists():
        raise UserError(f"'{path}' holds a run already: continue it with --resume, or name a new folder with --out.")
    refuse_existing(path)


def _refuse_other(config: PretrainConfig, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Name the fields in which the run in the folder differs."""
    if not there:
        raise UserError(f"'{config.out / 'config.json'}' is no configuration of a run: name a new folder with --out.")
    differing = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if not differing:
        return
    if "data_fingerprint" in differing:  # what is fitted to the images then differs too
        raise UserError(
            f"The run in '{config.out}' was trained on other images than '{config.data}' holds now: "
            "restore them, or start a new run with another --out."
        )
    shown = ", ".join(f"{name} {there.get(name)!r} there and {here.get(name)!r} now" for name in differing)
    raise UserError(
        f"The run in '{config.out}' has another configuration ({shown}): "
        "give the same values to resume it, or start a new run with another --out."
    )


def _git_commit() -> str | None:
    """The commit of a source checkout, or None where midge is installed as a package."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
