"""``midge lint``: whether runtimes take an ONNX file, and compute in integers what it quantizes. Nothing is run.

It needs neither torch nor a GPU. A file may come from anywhere: its size is checked before it is read, its weights in
other files are never read, and a path of theirs that leaves its folder is an error.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.artifact import MANIFEST, load_artifact
from ..runtime.errors import UserError, unknown_name
from ..runtime.printable import printable
from .config import LintConfig
from .lint_graph import Graph
from .lint_read import read_graph
from .lint_rule import ERROR, NOTE, SEVERITIES
from .lint_rules import RULES
from .lint_rules_float import PLACEMENTS, float_nodes
from .lint_targets import TARGETS

LAST_RESORT = "invalid"


@dataclass(frozen=True)
class Finding:
    """What a rule found at one node, for one target.

    Attributes:
        rule: name of the rule.
        severity: error, warning or note.
        target: name of the target.
        node: name of the node; "" where it is the file as a whole.
        detail: what there is.
        consequence: what the target does.
        fix: what to do.
        source: where that is written, or with what it was tried.
        verified: whether it was tried with the target; else it is from the source alone.
    """

    rule: str
    severity: str
    target: str
    node: str
    detail: str
    consequence: str
    fix: str
    source: str
    verified: bool


@dataclass(frozen=True)
class Report:
    """What was found in a file.

    Attributes:
        path: the file, as given.
        graph: what was read of it.
        targets: that were asked for.
        findings: in the order of the rules' table, then of the targets.
    """

    path: Path
    graph: Graph
    targets: tuple[str, ...]
    findings: tuple[Finding, ...]

    def of(self, target: str) -> list[Finding]:
        """The findings for a target."""
        return [finding for finding in self.findings if finding.target == target]

    def taken(self, target: str) -> bool:
        """Whether the target takes the file."""
        return all(finding.severity != ERROR for finding in self.of(target))

    def float_names(self, target: str) -> list[str] | None:
        """Convolutions and matrix products that the target computes in float; None where it refuses or is not known."""
        if target not in PLACEMENTS or not self.taken(target):
            return None
        return [node.name for node in float_nodes(self.graph, target)]

    @property
    def ok(self) -> bool:
        """Whether every target takes the file, and nothing is computed otherwise than the file says."""
        return all(finding.severity == NOTE for finding in self.findings)


def lint(config: LintConfig) -> int:
    """Look at a file, or at the ONNX variants of an artifact. Returns 1 where there is an error or a warning.

    Raises:
        UserError: a target is not known, or the file is missing or no ONNX.
    """
    targets = check_targets(config.targets)
    reports = [lint_graph(path, read_graph(path), targets) for path in find_models(config.model)]
    if config.json:
        print(json.dumps(result_json(reports), allow_nan=False))
    else:
        from .lint_print import print_report

        for report in reports:
            print_report(report)
    return int(not all(report.ok for report in reports))


def check_targets(given: Sequence[str]) -> tuple[str, ...]:
    """The targets in the table's order, each once.

    Raises:
        UserError: one is not in the table, or none is given.
    """
    for name in given:
        if name not in TARGETS:
            raise unknown_name("target", name, TARGETS)
    if not given:
        raise UserError(f"--targets names nothing: give one or more of {', '.join(TARGETS)}.")
    return tuple(name for name in TARGETS if name in given)


def find_models(path: Path) -> list[Path]:
    """The file itself, or the files of an artifact's ONNX variants.

    Raises:
        UserError: an artifact is damaged, or has none.
    """
    if not (path / MANIFEST).is_file():
        return [path]
    variants = load_artifact(path).variants
    models = [variant.model for name, variant in variants.items() if name.startswith("onnx-")]
    if not models:
        raise UserError(f"The artifact '{path}' has no ONNX variant: export it with --targets onnx.")
    return [Path(path) / model.relative_to(Path(path).resolve()) for model in map(Path.resolve, models)]


def lint_graph(path: Path, graph: Graph, targets: Iterable[str]) -> Report:
    """Apply every rule to a graph."""
    targets = tuple(targets)
    findings: list[Finding] = []
    for rule in RULES:
        refused = {finding.target for finding in findings if finding.severity == ERROR}
        for target in targets:
            if rule != LAST_RESORT or target not in refused:
                findings += apply(rule, graph, target)
    return Report(path, graph, targets, tuple(findings))


def apply(name: str, graph: Graph, target: str) -> list[Finding]:
    """What one rule finds for one target."""
    rule = RULES[name]
    says = rule.on.get(target)
    if says is None:
        return []
    return [
        Finding(
            rule=name,
            severity=says.severity,
            target=target,
            node=found.node,
            detail=printable(found.detail),
            consequence=says.consequence,
            fix=rule.fix,
            source=says.source,
            verified=TARGETS[target].tried if says.tried is None else says.tried,
        )
        for found in rule.check(graph, target)
    ]


def result_json(reports: Sequence[Report]) -> dict[str, Any]:
    """The JSON document of ``--json``."""
    return {
        "schema": 1,
        "ok": all(report.ok for report in reports),
        "files": [
            {
                "path": str(report.path),
                "ok": report.ok,
                "opset": report.graph.opsets.get(""),
                "ir_version": report.graph.model.ir_version,
                "nodes": len(report.graph.nodes),
                "weighted_nodes": [node.name for node in report.graph.weighted],
                "targets": {target: target_json(report, target) for target in report.targets},
                "findings": [dataclasses.asdict(finding) for finding in report.findings],
            }
            for report in reports
        ],
    }


def target_json(report: Report, target: str) -> dict[str, Any]:
    """What a target makes of a file: whether it takes it, the nodes that it computes in float, numbers of findings."""
    counts = Counter(finding.severity for finding in report.of(target))
    return {
        "label": TARGETS[target].label,
        "taken": report.taken(target),
        "float_nodes": report.float_names(target),
        **{f"{severity}s": counts[severity] for severity in SEVERITIES},
    }
