"""``midge run``: every stage after the other, each through the same config and function as its own command.

The only module above all stages, which is why it stands at the root. What the stages hand on lies in folders:

    OUT/run         pretrain, knn, linear
    OUT/artifact    export, verify
    OUT/records     profile
    OUT/summary.json, OUT/report.html, OUT/pipeline.json (the settings, and the seconds of each finished stage)
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from .runtime.errors import UserError, unknown_name
from .runtime.fields import Fields
from .runtime.files import read_json, refuse_existing, write_json
from .runtime.progress import say

SCHEMA = 1
TARGETS = ("onnx", "openvino")
NEEDED = {
    "train": ("torch", "timm", "lightning", "safetensors"),
    "export": ("onnx", "onnxscript", "onnxslim"),
    "openvino": ("openvino",),
    "report": ("jinja2", "plotly"),
}
"""Extra -> packages; a lack of one is said before the first minute is spent, not after the fifth."""

OPERATIONAL_FIELDS = frozenset({"out", "resume", "json"})
"""Fields that a resumed run may change."""


@dataclass(frozen=True)
class RunConfig:
    """The whole path in one command: pretrain, k-NN, classifier, export, INT8, verify, profile, compare."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """What to run: quickstart."""
    out: Path
    """The folder that receives the run, the artifact, the records, summary.json and report.html."""
    resume: bool = False
    """Go on in OUT after the last finished stage; where all are finished, print the comparison again."""
    data: Path = Path("data/fashion-mnist")
    """A folder with `train/` and `test/`, each in ImageFolder layout (see `midge data fetch fashion-mnist`)."""
    epochs: float | None = None
    """Passes over the unlabelled images; default the recipe's."""
    limit: int | None = None
    """Pretrain on a seeded random subset of so many images; default all."""
    batch_size: int | None = None
    """Images per step of pretraining; default the recipe's."""
    labels: int = 10_000
    """Labelled training images for the k-NN bank and for the classifier."""
    test_limit: int | None = None
    """Use a seeded random subset of so many test images; default all."""
    protocol: str = "quick"
    """How long to measure: smoke, quick, standard or rigorous."""
    seed: int = 0
    """Seed of everything that is drawn."""
    json: bool = False
    """Print the content of summary.json instead of the table."""


COMPARED = ("summary.json", "report.html")
"""What the last stage leaves; where a user has removed one of them, it is taken again."""


@dataclass(frozen=True)
class Paths:
    """Where things lie below OUT."""

    out: Path

    run = property(lambda self: self.out / "run")
    artifact = property(lambda self: self.out / "artifact")
    records = property(lambda self: self.out / "records")
    state = property(lambda self: self.out / "pipeline.json")


def run(config: RunConfig) -> int:
    """Run a recipe by name.

    Returns:
        The largest exit code of its stages: 0, or 1 where a variant strays from the reference.

    Raises:
        UserError: something given cannot work; what is finished stays, and ``--resume`` goes on from there.
    """
    if config.recipe not in RECIPES:
        raise unknown_name("recipe", config.recipe, RECIPES)
    require_all()
    check_data(config.data)
    paths = Paths(config.out)
    stages = RECIPES[config.recipe](config, paths)
    finished = open_state(config, paths)
    if not all((config.out / name).exists() for name in COMPARED):
        finished.pop("compare", None)
    # A stage prints its result to stdout, where with --json nothing but the summary belongs.
    quiet = contextlib.redirect_stdout(sys.stderr) if config.json else contextlib.nullcontext()
    codes = []
    with quiet:
        for name, stage in stages.items():
            if name in finished:
                codes.append(finished[name]["code"])
                continue
            say(f"— {name}")
            start = time.perf_counter()
            code = stage()
            if code > 2:  # stopped by a signal
                return code
            codes.append(code)
            finished[name] = {"code": code, "seconds": round(time.perf_counter() - start, 1)}
            write_json(paths.state, state_json(config, finished))
    print_result(config, paths, finished)
    return max(codes)


def require_all() -> None:
    """Refuse to start where a package of a later stage is missing."""
    for extra, packages in NEEDED.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(f"'midge run' needs the package '{missing[0]}' ({extra}): pip install 'midge[all]'.")


def check_data(data: Path) -> None:
    """Refuse a folder that a later stage could not use."""
    from .runtime.images import list_images

    for split in ("train", "test"):
        if not (data / split).is_dir():
            raise UserError(
                f"'{data}' has no folder '{split}': give labelled images as {data}/train/<class>/ and "
                f"{data}/test/<class>/, or run 'midge data fetch fashion-mnist --out {data}'."
            )
        if list_images(data / split).labels is None:
            raise UserError(
                f"'{data / split}' has no labels: lay its images out as <class>/<image>, two classes or more."
            )


def open_state(config: RunConfig, paths: Paths) -> dict[str, Any]:
    """The finished stages of OUT: name -> exit code and seconds.

    Raises:
        UserError: OUT is taken, or was made with other settings.
    """
    if not paths.state.exists():
        refuse_existing(config.out)
        write_json(paths.state, state_json(config, {}))
        return {}
    if not config.resume:
        raise UserError(f"'{config.out}' holds a run: go on with --resume, or name a new folder with --out.")
    fields = Fields(read_json(paths.state, "pipeline state"), f"pipeline state '{paths.state}'")
    fields.schema(SCHEMA)
    before, now = fields.object("config"), state_json(config, {})["config"]
    for name in sorted(now):
        if before.get(name) != now[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"'{config.out}' was started with {flag} {before.get(name)}, not {now[name]}: "
                "resume with the same settings, or name a new folder with --out."
            )
    stages = fields.fields("stages")
    for name in stages.value:
        stages.fields(name).integer("code", 0, 1)
    return dict(stages.value)


def state_json(config: RunConfig, finished: dict[str, Any]) -> dict[str, Any]:
    """What pipeline.json holds."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in OPERATIONAL_FIELDS}
    values["data"] = str(config.data.absolute())
    return {"schema": SCHEMA, "config": values, "stages": finished}


def quickstart(config: RunConfig, paths: Paths) -> dict[str, Callable[[], int]]:
    """The stages of the quickstart: DINO on small images with a narrow ResNet18, and everything after it.

    Raises:
        UserError: a value is not one that its stage takes, said before the first stage begins.
    """
    from .profiles.config import ProfileConfig
    from .train import recipes
    from .train.evaluation_config import KnnConfig, LinearConfig

    train, test = config.data / "train", config.data / "test"
    changes = {"epochs": config.epochs, "batch_size": config.batch_size}
    changes = {name: value for name, value in changes.items() if value is not None}
    pretraining = recipes.quickstart(train, paths.run, limit=config.limit, seed=config.seed, resume=True, **changes)
    sizes = {"labels": config.labels, "limit": config.test_limit}
    knn_config = KnnConfig(paths.run, train, test, baselines=True, seed=config.seed, **sizes)
    linear_config = LinearConfig(paths.run, train, test, seed=config.seed, **sizes)
    profile_config = ProfileConfig(
        (paths.artifact,),
        out=paths.records,
        data=test,
        limit=config.test_limit,
        protocol=config.protocol,
        seed=config.seed,
    )
    for given in (pretraining, knn_config, linear_config, profile_config):
        given.check()

    def pretrain() -> int:
        from .train.pretrain import pretrain

        return pretrain(pretraining)

    def knn() -> int:
        from .train.knn import knn

        return knn(knn_config)

    def linear() -> int:
        from .train.linear import linear

        return linear(linear_config)

    def export() -> int:
        from .export.config import ExportConfig
        from .export.export import export_run

        shutil.rmtree(paths.artifact, ignore_errors=True)  # of a run that was killed before it was marked as finished
        return export_run(
            ExportConfig(
                paths.run,
                out=paths.artifact,
                targets=TARGETS,
                evaluation_data=test,
                name="quickstart",
                seed=config.seed,
            )
        )

    def verify() -> int:
        from .export.config import VerifyConfig
        from .export.verify import verify

        return verify(VerifyConfig(paths.artifact))

    def profile() -> int:
        from .profiles.profile import profile

        shutil.rmtree(paths.records, ignore_errors=True)
        profile(profile_config)
        return 0  # a record may be invalid because the machine was busy: the comparison says so; verify judged parity

    def compare() -> int:
        from .profiles import compare, report

        records = compare.load_records(paths.records)
        summary = compare.summarize(records, read_json(paths.run / "eval" / "knn.json", "k-NN evaluation"))
        summary_path, report_path = (config.out / name for name in COMPARED)
        compare.write_summary(summary_path, summary)
        report.write_report(report_path, records, summary, "midge quickstart")
        return 0

    return {
        "pretrain": pretrain,
        "knn": knn,
        "linear": linear,
        "export": export,
        "verify": verify,
        "profile": profile,
        "compare": compare,
    }


def print_result(config: RunConfig, paths: Paths, finished: dict[str, Any]) -> None:
    """Print the comparison, what each stage took, and where to look."""
    from .profiles.table import print_table

    summary = read_json(config.out / "summary.json", "summary")
    if config.json:
        print(json.dumps(summary))
        return
    print_table(summary)
    seconds = {name: stage["seconds"] for name, stage in finished.items()}
    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    print(f"\nTook {sum(seconds.values()):.0f} s ({parts}).")
    print(f"Report: {config.out / 'report.html'}    summary: {config.out / 'summary.json'}")


RECIPES: dict[str, Callable[[RunConfig, Paths], dict[str, Callable[[], int]]]] = {"quickstart": quickstart}
"""Recipe -> its stages by name, in order; each returns an exit code."""
