from __future__ import annotations

import operator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midge.profiles.where import MAX_DEPTH, MAX_LENGTH, MEASURES, parse_where
from midge.runtime.errors import UserError

PLAIN = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne}

values = st.none() | st.floats(0, 1) | st.sampled_from([0.0, 0.25, 0.5, 1.0])
rows = st.fixed_dictionaries({field: values for field in MEASURES.values()})
numbers = st.floats(0, 1).map(lambda value: (f"{value!r}", value)) | st.sampled_from(
    [("0", 0.0), (".5", 0.5), ("1.", 1.0), ("2.5e-1", 0.25), ("+0.25", 0.25)]
)
gaps = st.sampled_from(["", " ", "  \t"])

Tree = tuple[Any, ...]
trees = st.recursive(
    st.tuples(st.sampled_from(sorted(MEASURES)), st.sampled_from(sorted(PLAIN)), numbers, gaps),
    lambda inner: st.tuples(st.sampled_from(["and", "or"]), inner, inner),
    max_leaves=6,
)


def text_of(tree: Tree) -> str:
    """The tree as text, with parentheses only where the precedence of `and` over `or` needs them."""
    if len(tree) == 4:
        name, symbol, (number, _), gap = tree
        return f"{name}{gap}{symbol}{gap}{number}"
    word, *parts = tree
    texts = [f"({text_of(part)})" if word == "and" and part[0] == "or" else text_of(part) for part in parts]
    return f" {word} ".join(texts)


def holds(tree: Tree, row: dict[str, float | None]) -> bool:
    if len(tree) == 4:
        name, symbol, (_, number), _ = tree
        value = row[MEASURES[name]]
        return value is not None and PLAIN[symbol](value, number)
    word, left, right = tree
    if word == "and":
        return holds(left, row) and holds(right, row)
    return holds(left, row) or holds(right, row)


@given(trees, rows)
def test_a_condition_means_what_its_tree_means(tree: Tree, row: dict[str, float | None]) -> None:
    assert parse_where(text_of(tree))(row) == holds(tree, row)


@given(st.text(max_size=60) | st.text(alphabet="()<>=!. andor1_p50ms", max_size=60))
def test_any_other_text_is_a_mistake_of_the_user(text: str) -> None:
    try:
        condition = parse_where(text)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert condition({field: 0.5 for field in MEASURES.values()}) in {True, False}


def test_and_binds_stronger_than_or() -> None:
    row = {"p50_ms": 1.0, "threads": 1, "top1": 0.5}
    assert parse_where("p50_ms < 2 or threads > 9 and top1 > 0.9")(row)
    assert not parse_where("(p50_ms < 2 or threads > 9) and top1 > 0.9")(row)


def test_many_parentheses_are_read_side_by_side() -> None:
    assert parse_where(" and ".join(["(threads == 1)"] * (MAX_DEPTH + 5)))({"threads": 1})


def test_a_measure_that_was_not_taken_satisfies_nothing() -> None:
    assert not any(parse_where(f"top1 {symbol} 0.5")({"top1": None}) for symbol in PLAIN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p90 <= 5", "Unknown measure 'p90': choose one of int8_mac_share, mean_ms, p50_ms, p90_ms"),
        ("", "ends where a measure or '(' must stand"),
        ("p90_ms", "ends where one of < <= > >= == != must stand"),
        ("p90_ms <=", "ends where a number must stand"),
        ("p90_ms <= top1", "has 'top1' where a number must stand"),
        ("p90_ms <= 5 top1 > 0.5", "has 'top1' where 'and', 'or' or the end must stand"),
        ("(p90_ms <= 5", "ends where ')' must stand"),
        ("and p90_ms <= 5", "has 'and' where a measure or '(' must stand"),
        ("p90_ms <= 1e999", "where a finite number must stand"),
        ("top1 >= 87", "'top1' is a fraction: compare it with a number in 0..1, not 87"),
        ("p90_ms <= 5ms", "cannot be read at '5ms'"),
        ("__import__('os')", "cannot be read at \"'os')\""),
        ("os.system == 1", "cannot be read at '.system == 1'"),
        ("eval == 1", "Unknown measure 'eval'"),
        ("p90_ms = 5", "cannot be read at '= 5'"),
        ("(" * (MAX_LENGTH + 1), f"at most {MAX_LENGTH} are read"),
        ("(" * MAX_LENGTH, f"nests deeper than {MAX_DEPTH} parentheses"),
    ],
)
def test_errors_say_what_was_wrong(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_where(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
