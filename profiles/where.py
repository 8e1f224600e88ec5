"""The condition of ``midge compare --where``: comparisons of measures with numbers, joined by and, or, parentheses.

    expression  = conjunction { "or" conjunction }
    conjunction = comparison { "and" comparison }
    comparison  = "(" expression ")" | MEASURE ("<" | "<=" | ">" | ">=" | "==" | "!=") NUMBER

A measure that was not taken (null) satisfies no comparison.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..runtime.errors import UserError, unknown_name

Row = Mapping[str, Any]
Condition = Callable[[Row], bool]

# What may be asked about -> the row's field. Accuracies are fractions 0..1, drops are in points.
MEASURES = {
    "top1": "top1",
    "top1_drop": "top1_drop_points",
    "p50_ms": "p50_ms",
    "p90_ms": "p90_ms",
    "p95_ms": "p95_ms",
    "p99_ms": "p99_ms",
    "mean_ms": "mean_ms",
    "int8_mac_share": "int8_mac_share",
    "peak_rss_mib": "peak_rss_mib",
    "size_bytes": "size_bytes",
    "threads": "threads",
}
FRACTIONS = frozenset({"top1", "int8_mac_share"})
OPERATORS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
MAX_LENGTH = 1000
MAX_DEPTH = 20
EXAMPLE = "p90_ms <= 5 and top1_drop <= 0.5"

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])"
    r"|(?P<name>[A-Za-z_]\w*)|(?P<operator><=|>=|==|!=|<|>)|(?P<paren>[()]))"
)


def parse_where(text: str) -> Condition:
    """Read a condition; nothing of it is ever evaluated as code.

    Args:
        text: e.g. ``"p90_ms <= 5 and top1_drop <= 0.5"``; ``*_drop`` in points, ``top1`` as a fraction.

    Returns:
        A function from a row of the summary to whether it satisfies the condition.

    Raises:
        UserError: the text does not follow the grammar or names an unknown measure.
    """
    parser = _Parser(text)
    condition = parser.expression()
    if parser.peek() is not None:
        raise parser.wrong("'and', 'or' or the end")
    return condition


class _Parser:
    """Recursive descent over the tokens of one condition."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise UserError(f"The condition of --where has {len(text)} characters: at most {MAX_LENGTH} are read.")
        self.text = text
        self.tokens = _tokens(text)
        self.at = 0
        self.depth = 0

    def peek(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self) -> str | None:
        token = self.peek()
        self.at += 1
        return token

    def wrong(self, wanted: str) -> UserError:
        token = self.peek()
        given = "ends" if token is None else f"has {token!r}"
        return UserError(f"The condition {self.text!r} {given} where {wanted} must stand: write e.g. '{EXAMPLE}'.")

    def expression(self) -> Condition:
        return self.chain("or", any, lambda: self.chain("and", all, self.comparison))

    def chain(self, word: str, join: Callable[..., bool], part: Callable[[], Condition]) -> Condition:
        parts = [part()]
        while self.peek() == word:
            self.take()
            parts.append(part())
        return lambda row: join(holds(row) for holds in parts)

    def comparison(self) -> Condition:
        if self.peek() == "(":
            self.take()
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise UserError(f"The condition {self.text[:60]!r}… nests deeper than {MAX_DEPTH} parentheses.")
            condition = self.expression()
            if self.peek() != ")":
                raise self.wrong("')'")
            self.take()
            self.depth -= 1
            return condition
        name = self.peek()
        if name is None or not (name[0].isalpha() or name[0] == "_") or name in {"and", "or"}:
            raise self.wrong("a measure or '('")
        if name not in MEASURES:
            raise unknown_name("measure", name, MEASURES)
        self.take()
        if self.peek() not in OPERATORS:
            raise self.wrong(f"one of {' '.join(OPERATORS)}")
        compare = OPERATORS[str(self.take())]
        number = self.number(name)
        field = MEASURES[name]

        def holds(row: Row) -> bool:
            value = row[field]
            return value is not None and compare(value, number)

        return holds

    def number(self, name: str) -> float:
        token = self.peek()
        if token is None or not (token[0].isdigit() or token[0] in "+-."):
            raise self.wrong("a number")
        number = float(token)
        if not math.isfinite(number):
            raise self.wrong("a finite number")
        if name in FRACTIONS and not 0 <= number <= 1:
            raise UserError(f"The measure '{name}' is a fraction: compare it with a number in 0..1, not {token}.")
        self.take()
        return number


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    at, end = 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            rest = text[at:].strip()
            raise UserError(f"The condition {text!r} cannot be read at {rest[:20]!r}: write e.g. '{EXAMPLE}'.")
        tokens.append(match.group().strip())
        at = match.end()
    return tokens
