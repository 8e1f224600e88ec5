"""The comparison in the terminal: a table of at most 100 columns that also reads well in a plain log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..runtime.printable import printable
from .display import runtime_name, shown

Json = dict[str, Any]

WIDTH = 100
MARKS = {"faster": "▲", "better": "▲", "slower": "▼", "worse": "▼"}


def print_table(summary: Json, console: Console | None = None) -> None:
    """Print the summary for a person, to stdout.

    Args:
        summary: what ``summarize`` returned.
        console: where to print; by default stdout, 100 columns wide where it is no terminal.
    """
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=WIDTH)
    for sentence in summary["headline"]:
        console.print(plain(sentence), style="bold")
    if where := summary["where"]:
        console.print(plain(f"{where['matched']} of {where['of']} rows satisfy: {where['condition']}"))
    groups: dict[tuple[str, str], list[Json]] = {}
    for row in summary["rows"]:
        groups.setdefault((row["artifact"], row["device"]), []).append(row)
    for (artifact, device), rows in groups.items():
        console.print()
        console.print(plain(f"{artifact} on {device}"))
        console.print(_table(rows))
    _print_remarks(summary, console)


def _table(rows: Sequence[Json]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("variant", overflow="fold", min_width=13)
    table.add_column("runtime", overflow="fold")
    for name in ("thr", "top-1 %\n95 % int.", "p50 ms\n95 % int.", "p90\nms", "INT8\nMACs %", "peak\nMiB", "size\nMB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        mark = "*" if row["pareto"] else "" if row["valid"] else "!"
        table.add_row(
            plain(f"{row['variant']} {mark}".rstrip()),
            plain(runtime_name(row["runtime"])),
            str(row["threads"]),
            _with_interval(row["top1"], row["top1_ci95"], "percent", "share"),
            _with_interval(row["p50_ms"], row["p50_ci95"], "ms", "ms"),
            shown(row["p90_ms"], "ms"),
            shown(row["int8_mac_share"], "share"),
            shown(row["peak_rss_mib"], "mib"),
            shown(row["size_bytes"], "mb"),
            style="" if row["valid"] else "dim",
        )
    return table


def _with_interval(value: float | None, interval: Sequence[float] | None, form: str, interval_form: str) -> str:
    if value is None or not interval:
        return shown(value, form)
    return f"{shown(value, form)} {shown(interval[0], interval_form)}–{shown(interval[1], interval_form)}"


def _print_remarks(summary: Json, console: Console) -> None:
    if summary["verdicts"]:
        console.print()
    for verdict in summary["verdicts"]:
        console.print(plain(f"{MARKS.get(verdict['verdict'], '≈')} {verdict['text']}"))
    rows = summary["rows"]
    notes = ["* Pareto: no other valid row is at least as fast (p50) and at least as accurate."]
    notes = notes if any(row["pareto"] for row in rows) else []
    invalid: dict[str, list[str]] = {}
    for row in rows:
        if not row["valid"]:
            invalid.setdefault("; ".join(row["invalid_reasons"]), []).append(row["variant"])
    for reasons, variants in invalid.items():
        names = list(dict.fromkeys(variants))
        notes.append(f"! {', '.join(names)} {'are' if len(names) > 1 else 'is'} invalid: {reasons}.")
    if notes or summary["notes"]:
        console.print()
    for note in [*notes, *summary["notes"]]:
        console.print(plain(note), style="dim")


def plain(text: str) -> Text:
    """Text without markup, in which control characters of a record cannot reach the terminal."""
    return Text(printable(text, None))
