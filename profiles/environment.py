"""The device that is measured: what it is, what state it is in, and which of its cores a measurement is pinned to.

Everything is read from /proc and /sys (Linux) or sysctl (macOS). What cannot be read is None, never guessed. The
fingerprint covers what makes latencies comparable: the processor, its instruction sets, the number of cores and their
quota, SMT, governor, turbo, kernel. It does not cover load, time, memory or names.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError

Json = dict[str, Any]
Sysctl = Callable[[str], "str | None"]

ROOT = Path("/")

# What decides which kernels a runtime chooses, by the names of /proc/cpuinfo (x86, then Arm).
ISA_FLAGS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx_vnni_int8", "avx512f", "avx512bw", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
MAC_FEATURES = {
    "FEAT_FP16": "asimdhp",
    "FEAT_DotProd": "asimddp",
    "FEAT_I8MM": "i8mm",
    "FEAT_BF16": "bf16",
    "FEAT_SME": "sme",
}
MAC_X86_FEATURES = {"avx2_0": "avx2", "avx512f": "avx512f"}
# /proc/cpuinfo of Arm gives numbers: implementer and part, from the "Main ID Register" of each core's manual.
ARM_PARTS = {
    "0x41 0xd03": "Cortex-A53",
    "0x41 0xd05": "Cortex-A55",
    "0x41 0xd07": "Cortex-A57",
    "0x41 0xd08": "Cortex-A72",
    "0x41 0xd0b": "Cortex-A76",
    "0x41 0xd0c": "Neoverse-N1",
    "0x41 0xd40": "Neoverse-V1",
    "0x41 0xd41": "Cortex-A78",
    "0x41 0xd42": "Cortex-A78AE",
    "0x41 0xd44": "Cortex-X1",
    "0x41 0xd49": "Neoverse-N2",
    "0x41 0xd4f": "Neoverse-V2",
    "0x4e 0x004": "Carmel",
}
COMPARABLE = (*("cpu_model", "cpu_id", "isa", "machine", "kernel", "governor", "turbo", "smt", "cores", "cpu_quota"),)


def describe_device() -> Json:
    """The device as it stands in a record; see :func:`linux_facts` for the fields."""
    if sys.platform == "darwin":
        facts = mac_facts(_sysctl, os.cpu_count() or 1)
    else:
        facts = linux_facts(ROOT, allowed_cpus() or list(range(os.cpu_count() or 1)))
    facts |= {"machine": platform.machine(), "kernel": f"{platform.system()} {platform.release()}"}
    return finish(facts)


def finish(facts: Json) -> Json:
    """Facts with the device's id in front and its fingerprint."""
    comparable = {key: facts[key] for key in COMPARABLE}
    digest = hashlib.sha256(json.dumps(comparable, sort_keys=True).encode()).hexdigest()
    board = facts.pop("board")
    return {"id": device_id(board, facts["cpu_model"], facts["cores"]), "fingerprint": digest, "board": board, **facts}


def device_id(board: str | None, cpu_model: str | None, cores: int) -> str:
    """A name that is safe in paths and readable: the board where it has one, else the processor and its cores."""
    text = board or cpu_model or "unknown"
    text = re.sub(r"\((R|TM|C)\)|\bCPU\b|\bProcessor\b|@.*|\b\d+-Core\b", " ", text, flags=re.IGNORECASE | re.ASCII)
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-") or "unknown"
    return slug if board else f"{slug}-{cores}c"


def linux_facts(root: Path, cpus: list[int]) -> Json:
    """What Linux tells about the device.

    Args:
        root: where ``proc`` and ``sys`` lie.
        cpus: the logical cores that this process may use.

    Returns:
        ``board`` (device tree), ``cpu_model``, ``cpu_id`` (vendor or implementer, and model numbers), ``isa`` (those of
        :data:`ISA_FLAGS` that it has), ``governor``, ``turbo``, ``smt``, ``cores`` (usable logical cores),
        ``cpu_quota`` (cores' worth of time that the control group may use), ``memory_mib``; None where not known.
    """
    info = _cpuinfo(root)
    part = f"{info.get('CPU implementer')} {info.get('CPU part')}"
    x86 = [info.get(key, "?") for key in ("vendor_id", "cpu family", "model", "stepping")]
    flags = (info.get("flags") or info.get("Features") or "").split()
    governors = {_read(root, f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor") for cpu in cpus}
    smt = _read(root, "sys/devices/system/cpu/smt/active")
    memory = re.search(r"MemTotal:\s+(\d+) kB", _read(root, "proc/meminfo") or "")
    return {
        "board": _one_line(_read(root, "proc/device-tree/model") or "") or None,
        "cpu_model": info.get("model name") or ARM_PARTS.get(part),
        "cpu_id": " ".join(x86) if "vendor_id" in info else part if "CPU part" in info else None,
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "governor": _one_line(", ".join(sorted(filter(None, governors)))) or None,
        "turbo": _turbo(root),
        "smt": None if smt is None else smt == "1",
        "cores": len(cpus),
        "cpu_quota": _cpu_quota(root),
        "memory_mib": int(memory.group(1)) // 1024 if memory else None,
    }


def mac_facts(sysctl: Sysctl, cores: int) -> Json:
    """What macOS tells about the device, in the fields of :func:`linux_facts`."""
    isa = [flag for name, flag in MAC_FEATURES.items() if sysctl(f"hw.optional.arm.{name}") == "1"]
    isa += [flag for name, flag in MAC_X86_FEATURES.items() if sysctl(f"hw.optional.{name}") == "1"]
    memory = sysctl("hw.memsize")
    return {
        "board": None,
        "cpu_model": sysctl("machdep.cpu.brand_string"),
        "cpu_id": sysctl("hw.model"),
        "isa": isa,
        "governor": None,
        "turbo": None,
        "smt": None,
        "cores": cores,
        "cpu_quota": None,
        "memory_mib": int(memory) >> 20 if memory and memory.isdigit() else None,
    }


def allowed_cpus() -> list[int] | None:
    """The logical cores that this process may use; None where the system does not tell (macOS)."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def choose_cpus(threads: int, allowed: Iterable[int] | None = None, root: Path = ROOT) -> list[int] | None:
    """The cores to pin ``threads`` threads to: the fastest kind, one per physical core, core 0 last.

    Core 0 is where most systems handle their interrupts.

    Args:
        threads: how many.
        allowed: logical cores to choose from; default those of this process.
        root: where ``sys`` lies.

    Returns:
        Sorted logical cores, or None where a process cannot be pinned (macOS).

    Raises:
        UserError: there are fewer cores.
    """
    allowed = allowed_cpus() if allowed is None else sorted(allowed)
    available = len(allowed) if allowed is not None else os.cpu_count() or 1
    if threads > available:
        raise UserError(f"Cannot measure with {threads} threads on {available} usable cores: lower --threads.")
    if allowed is None:
        return None
    cpu_dir = "sys/devices/system/cpu"
    siblings = {cpu: _read(root, f"{cpu_dir}/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    first = {cores: cpu for cpu, cores in sorted(siblings.items(), reverse=True)}
    speeds = {
        cpu: int(
            _read(root, f"{cpu_dir}/cpu{cpu}/cpu_capacity")
            or _read(root, f"{cpu_dir}/cpu{cpu}/cpufreq/cpuinfo_max_freq")
            or 0
        )
        for cpu in allowed
    }
    order = sorted(allowed, key=lambda cpu: (cpu != first[siblings[cpu]], -speeds[cpu], cpu == 0, cpu))
    return sorted(order[:threads])


def _cpuinfo(root: Path) -> dict[str, str]:
    """The fields of the first core in /proc/cpuinfo, and of the board below them all."""
    fields: dict[str, str] = {}
    for line in (_read(root, "proc/cpuinfo") or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), _one_line(value))
    return fields


def _turbo(root: Path) -> bool | None:
    no_turbo = _read(root, "sys/devices/system/cpu/intel_pstate/no_turbo")
    if no_turbo is not None:
        return no_turbo == "0"
    boost = _read(root, "sys/devices/system/cpu/cpufreq/boost")
    return None if boost is None else boost == "1"


def _cpu_quota(root: Path) -> float | None:
    """Cores' worth of CPU time that this process's control group or one above it allows; None without a limit."""
    limits = []
    for line in (_read(root, "proc/self/cgroup") or "").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        base = "sys/fs/cgroup" if not controllers else f"sys/fs/cgroup/{controllers}"
        if controllers and "cpu" not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part not in {"", ".."}]
        for depth in range(len(parts) + 1):  # inside a container its own group is mounted at the top
            group = "/".join((base, *parts[:depth]))
            quota, _, period = (_read(root, f"{group}/cpu.max") or "max").partition(" ")
            if controllers:
                quota, period = (_read(root, f"{group}/cpu.cfs_{name}_us") or "-1" for name in ("quota", "period"))
            if quota.isdigit() and period.isdigit() and int(period):
                limits.append(int(quota) / int(period))
    return min(limits, default=None)


def _read(root: Path, path: str) -> str | None:
    """A small text file without the white space and NUL around it; None where it cannot be read."""
    try:
        return (root / path).read_text(encoding="utf-8", errors="replace").strip(" \n\t\0")
    except OSError:
        return None


def _one_line(text: str) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:1000]


def _sysctl(name: str) -> str | None:
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return _one_line(done.stdout) or None
