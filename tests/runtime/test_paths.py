from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from midge.runtime.images import list_images
from midge.runtime.paths import PackedPaths, walk

# all that a file system can give, bytes that are no UTF-8 among them
NAMES = st.lists(st.binary(min_size=1, max_size=12).map(os.fsdecode), max_size=30)


@given(NAMES, st.data())
def test_packed_paths_are_a_sequence_of_the_same_strings(names: list[str], data: st.DataObject) -> None:
    packed = PackedPaths.pack(names)
    assert (len(packed), list(packed), packed) == (len(names), names, tuple(names))
    assert [packed[i] for i in range(-len(names), len(names))] == [names[i] for i in range(-len(names), len(names))]
    indices = data.draw(st.lists(st.integers(0, len(names) - 1))) if names else []
    assert (
        list(packed.take(indices))
        == list(packed.take(np.array(indices, dtype=np.int64)))
        == [names[i] for i in indices]
    )
    assert list(packed[1:5]) == names[1:5]
    assert packed == pickle.loads(pickle.dumps(packed))
    assert packed != (*names, "more") and packed != PackedPaths.pack([*names, "more"])


def test_an_index_beyond_the_end_is_none() -> None:
    packed = PackedPaths.pack(["a", "b"])
    for index in (2, -3):
        with pytest.raises(IndexError):
            packed[index]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    st.lists(
        st.lists(
            st.text("a-./_ü\udce4 ", min_size=1, max_size=3).filter(lambda s: "/" not in s), min_size=1, max_size=3
        ),
        max_size=12,
    )
)
def test_the_walk_goes_in_the_order_of_sorted_paths(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[str]]
) -> None:
    root = tmp_path_factory.mktemp("walk")
    for path in parts:
        target = root.joinpath(*(f"x{part}" for part in path))
        if not any(p.is_file() for p in (target, *target.parents)) and not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
    expected = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    assert list(walk(root)) == expected


def test_what_a_list_holds_does_not_grow_with_pythons_objects(tmp_path: Path) -> None:
    """The bytes of the paths, 16 per image for their offsets and labels, and nothing that is counted by reference."""
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(2000):
            (tmp_path / label / f"{i:06}.png").touch()
    images = list_images(tmp_path)
    assert len(pickle.dumps(images)) < 4000 * (len("a/000000.png") + 16) + 2000
