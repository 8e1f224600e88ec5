from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tyro

from midge.profiles.child import TRANSPORTS
from midge.profiles.config import ProfileConfig
from midge.profiles.latency import PROTOCOLS
from midge.runtime.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"artifacts": ()}, "No artifact was given"),
        ({"protocol": "fast"}, "Unknown protocol 'fast': choose one of quick, rigorous, smoke, standard."),
        ({"on": "pi5"}, "Unknown device 'pi5': choose one of local."),
        ({"threads": (1, 0)}, "--threads is 1 0: give one number or more from 1 to 1024."),
        ({"threads": ()}, "--threads is empty"),
        ({"limit": 0}, "--limit is 0: give a value from 1"),
        ({"seed": -1}, "--seed is -1"),
        ({"max_unreadable": 0.6}, "--max-unreadable is 0.6"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        ProfileConfig(**{"artifacts": (Path("a"),), "out": Path("b"), **options}).check()


def test_every_choice_passes() -> None:
    for protocol in PROTOCOLS:
        for place in TRANSPORTS:
            ProfileConfig((Path("a"),), Path("b"), protocol=protocol, on=place).check()


def test_the_command_line() -> None:
    line = "a b --out records --variants onnx-fp32 onnx-int8-u8 --threads 1 2 --data test --protocol quick --overwrite"
    assert tyro.cli(ProfileConfig, args=line.split()) == ProfileConfig(
        (Path("a"), Path("b")),
        out=Path("records"),
        data=Path("test"),
        variants=("onnx-fp32", "onnx-int8-u8"),
        threads=(1, 2),
        protocol="quick",
        overwrite=True,
    )
