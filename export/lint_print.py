"""What ``midge lint`` found, for a person: a line per target, then each finding once, whatever targets it concerns."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..runtime.printable import printable
from .lint import Finding, Report
from .lint_rule import SEVERITIES
from .lint_rules import RULES
from .lint_rules_float import PLACEMENTS
from .lint_targets import TARGETS, TENSORRT

WIDTH = 100
SHOWN = 3
STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
UNVERIFIED = "°"

Group = tuple[str, str, str]


def print_report(report: Report, console: Console | None = None) -> None:
    """Print what was found in a file.

    Args:
        report: of the file.
        console: where to print; by default stdout, 100 columns wide where it is no terminal.
    """
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=WIDTH)
    graph = report.graph
    console.print(Text(printable(str(report.path)), style="bold"))
    console.print(
        f"opset {graph.opsets.get('', '?')}, {len(graph.nodes)} nodes: {len(graph.quantizations)} Q/DQ, "
        f"{len(graph.weighted)} convolutions and matrix products"
    )
    console.print(_targets(report))
    for key, findings in _groups(report).items():
        console.print()
        _print_group(console, key, findings)
    if any(not finding.verified for finding in report.findings):
        console.print()
        console.print(Text(f"{UNVERIFIED} not verified: from the source alone, not tried.", style="dim"))
    console.print()


def _targets(report: Report) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("target", no_wrap=True)
    table.add_column("takes it")
    table.add_column("in integers", no_wrap=True)
    for severity in SEVERITIES:
        table.add_column(f"{severity}s", justify="right")
    for target in report.targets:
        counts = Counter(finding.severity for finding in report.of(target))
        taken = "–" if target not in PLACEMENTS else "yes" if report.taken(target) else "no"
        table.add_row(
            _label(target),
            Text(taken, style="bold red" if taken == "no" else ""),
            _integers(report, target),
            *(
                Text(str(counts[severity] or "–"), style=STYLES[severity] if counts[severity] else "dim")
                for severity in SEVERITIES
            ),
        )
    return table


def _label(target: str) -> str:
    return TARGETS[target].label + ("" if TARGETS[target].tried else UNVERIFIED)


def _integers(report: Report, target: str) -> str:
    names, total = report.float_names(target), len(report.graph.weighted)
    if names is None:
        return "–"
    return f"{total - len(names)} of {total}{UNVERIFIED if target in TENSORRT else ''}"


def _groups(report: Report) -> dict[Group, list[Finding]]:
    """The findings by rule, severity and consequence, the worst first."""
    groups: dict[Group, list[Finding]] = {}
    for finding in report.findings:
        groups.setdefault((finding.severity, finding.rule, finding.consequence), []).append(finding)
    return dict(sorted(groups.items(), key=lambda item: SEVERITIES.index(item[0][0])))


def _print_group(console: Console, key: Group, findings: list[Finding]) -> None:
    severity, rule, consequence = key
    heading = Text.assemble((severity, STYLES[severity]), " ", (rule, "bold"), f" · {_names(findings)}")
    console.print(heading)
    found = list(dict.fromkeys((finding.node, finding.detail) for finding in findings))
    lines = [f"{node}: {detail}" if node else detail for node, detail in found[:SHOWN]]
    if len(found) > SHOWN:
        lines.append(f"… and {len(found) - SHOWN} more (--json names them)")
    lines += [f"→ {consequence}.", f"Fix: {RULES[rule].fix}"]
    _print_indented(console, lines)
    sources = [source for source in dict.fromkeys(finding.source for finding in findings) if source]
    _print_indented(console, [f"Source: {'; '.join(sources)}."] if sources else [], style="dim")


def _names(findings: Iterable[Finding]) -> str:
    """The targets of some findings, e.g. ``OpenVINO, TensorRT 8°, 10°``."""
    marks = {finding.target: "" if finding.verified else UNVERIFIED for finding in findings}
    names: list[str] = []
    for target, mark in marks.items():
        label = TARGETS[target].label + mark
        family, _, version = label.rpartition(" ")
        names.append(version if any(name.startswith(f"{family} ") for name in names) and family else label)
    return ", ".join(names)


def _print_indented(console: Console, lines: Iterable[str], style: str = "") -> None:
    for line in lines:
        for part in textwrap.wrap(line, console.width - 2, break_on_hyphens=False):
            console.print(Text(f"  {part}", style=style))
