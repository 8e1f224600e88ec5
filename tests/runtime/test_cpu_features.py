from __future__ import annotations

from pathlib import Path

import pytest

from midge.runtime.cpu_features import adds_in_16_bits


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "fma avx2", True),
        ("x86_64", "fma avx2 avx512f", True),
        ("AMD64", "avx2 avx512_vnni", False),
        ("x86_64", "avx2 avx_vnni", False),
        ("x86_64", "avx512f amx_int8", False),
        ("x86_64", None, True),
        ("aarch64", None, False),
        ("arm64", "asimd", False),
    ],
)
def test_only_x86_without_vnni_overflows(machine: str, flags: str | None, expected: bool, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"processor\t: 0\nmodel name\t: some avx512_vnni\nflags\t\t: {flags}\nbugs\t: none\n")
    assert adds_in_16_bits(machine, cpuinfo) is expected
