"""What the CPU can multiply: whether products of 8-bit integers are added up in 32 bits."""

from __future__ import annotations

import platform
from pathlib import Path

X86 = frozenset({"x86_64", "amd64", "i386", "i686"})
ADDS_IN_32_BITS = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"})
CPUINFO = Path("/proc/cpuinfo")


def adds_in_16_bits(machine: str | None = None, cpuinfo: Path = CPUINFO) -> bool:
    """Whether this CPU has to add pairs of products of u8 and s8 in 16 bits, which overflow.

    That is an x86 without VNNI and AMX, of AVX2 alone for instance. Where the system does not say what its x86 has
    (there is no ``/proc/cpuinfo``), it is taken to be one of them: exact and slow is the better mistake.

    Args:
        machine: the architecture by Python's name; None is this machine's.
        cpuinfo: what Linux tells about the CPU.
    """
    if (machine or platform.machine()).lower() not in X86:
        return False
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    flags = next((line.partition(":")[2] for line in text.splitlines() if line.startswith("flags")), "")
    return ADDS_IN_32_BITS.isdisjoint(flags.split())
