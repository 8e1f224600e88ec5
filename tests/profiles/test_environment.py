from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from midge.profiles import environment
from midge.profiles.environment import choose_cpus, describe_device, device_id, finish, linux_facts, mac_facts
from midge.runtime.errors import UserError

PI = """\
processor	: 0
BogoMIPS	: 108.00
Features	: fp asimd evtstrm aes crc32 asimdhp cpuid asimdrdm asimddp
CPU implementer	: 0x41
CPU part	: 0xd0b

Model		: Raspberry Pi 5 Model B Rev 1.0
"""
XEON = """\
processor	: 0
vendor_id	: GenuineIntel
cpu family	: 6
model		: 106
model name	: Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz
stepping	: 6
flags		: fpu sse4_2 avx fma avx2 avx512f avx512_vnni
"""


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def finished(facts: dict[str, Any]) -> dict[str, Any]:
    return finish({**facts, "machine": "aarch64", "kernel": "Linux 6.6"})


def test_a_board_is_named_by_its_device_tree(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/cpuinfo": PI,
            "proc/meminfo": "MemTotal:        8245632 kB\n",
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
            **{f"sys/devices/system/cpu/cpu{i}/cpufreq/scaling_governor": "ondemand\n" for i in range(4)},
        },
    )
    device = finished(linux_facts(root, [0, 1, 2, 3]))
    assert device["id"] == "raspberry-pi-5-model-b-rev-1-0"
    assert device["cpu_model"] == "Cortex-A76" and device["cpu_id"] == "0x41 0xd0b"
    assert device["isa"] == ["asimd", "asimdhp", "asimddp"]
    assert (device["governor"], device["cores"], device["memory_mib"]) == ("ondemand", 4, 8052)
    assert device["turbo"] is device["smt"] is device["cpu_quota"] is None


def test_a_server_is_named_by_its_processor(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/cpuinfo": XEON,
            "sys/devices/system/cpu/smt/active": "1\n",
            "sys/devices/system/cpu/intel_pstate/no_turbo": "0\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
            "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "powersave\n",
        },
    )
    device = finished(linux_facts(root, [0, 1]))
    assert device["id"] == "intel-xeon-platinum-8370c-2c"
    assert device["isa"] == ["sse4_2", "avx", "fma", "avx2", "avx512f", "avx512_vnni"]
    assert device["cpu_id"] == "GenuineIntel 6 106 6"
    assert device["smt"] is True and device["turbo"] is True
    assert device["governor"] == "performance, powersave"
    assert device["memory_mib"] is None


def test_nothing_readable_is_null_and_still_a_device(tmp_path: Path) -> None:
    device = finished(linux_facts(tmp_path, [0]))
    assert device["id"] == "unknown-1c"
    known = {"id", "fingerprint", "isa", "cores", "machine", "kernel"}
    assert all(value is None for key, value in device.items() if key not in known)


def test_a_mac(tmp_path: Path) -> None:
    values = {
        "machdep.cpu.brand_string": "Apple M2 Pro",
        "hw.memsize": str(16 << 30),
        "hw.model": "Mac14,9",
        "hw.optional.arm.FEAT_DotProd": "1",
        "hw.optional.arm.FEAT_I8MM": "1",
        "hw.optional.arm.FEAT_SME": "0",
    }
    device = finished(mac_facts(values.get, 10))
    assert device["id"] == "apple-m2-pro-10c"
    assert device["isa"] == ["asimddp", "i8mm"] and device["memory_mib"] == 16384
    assert device.keys() == finished(linux_facts(tmp_path, [0])).keys()


@pytest.mark.parametrize(
    ("board", "cpu", "expected"),
    [
        (None, "AMD EPYC 7763 64-Core Processor", "amd-epyc-7763-4c"),
        (None, "Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", "intel-core-i7-9750h-4c"),
        ("NVIDIA Jetson Orin Nano", "Cortex-A78AE", "nvidia-jetson-orin-nano"),
        (None, "../../etc/passwd\n\x1b", "etc-passwd-4c"),
        (None, "日本", "unknown-4c"),
        ("x" * 200, None, "x" * 60),
    ],
)
def test_ids_are_safe_in_paths(board: str | None, cpu: str, expected: str) -> None:
    assert device_id(board, cpu, 4) == expected


def test_the_fingerprint_changes_with_what_makes_a_latency(tmp_path: Path) -> None:
    facts = {**linux_facts(tree(tmp_path, {"proc/cpuinfo": XEON}), [0, 1]), "machine": "x86_64", "kernel": "Linux 6.6"}
    mark = finish(dict(facts))["fingerprint"]
    assert finish(dict(facts))["fingerprint"] == mark
    assert finish({**facts, "memory_mib": 1})["fingerprint"] == mark
    for key, value in {
        "governor": "powersave",
        "smt": False,
        "cores": 3,
        "cpu_quota": 1.5,
        "kernel": "Linux 6.7",
    }.items():
        assert finish({**facts, key: value})["fingerprint"] != mark, key
    assert finish({**facts, "isa": facts["isa"][:-1]})["fingerprint"] != mark


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/pod\n",
                "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        ({"proc/self/cgroup": "0::/../../..\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, None),
    ],
)
def test_the_quota_is_the_tightest_of_the_groups(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert linux_facts(tree(tmp_path, files), [0])["cpu_quota"] == quota


def topology(root: Path, siblings: dict[int, str], capacities: dict[int, int]) -> Path:
    files = {f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": text for i, text in siblings.items()}
    files |= {f"sys/devices/system/cpu/cpu{i}/cpu_capacity": str(value) for i, value in capacities.items()}
    return tree(root, files)


def test_cores_are_physical_before_they_are_shared_and_core_0_comes_last(tmp_path: Path) -> None:
    root = topology(tmp_path, {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"}, {})
    allowed = range(8)
    assert choose_cpus(1, allowed, root) == [1]
    assert choose_cpus(3, allowed, root) == [1, 2, 3]
    assert choose_cpus(4, allowed, root) == [0, 1, 2, 3]
    assert choose_cpus(5, allowed, root) == [0, 1, 2, 3, 4]
    assert choose_cpus(1, [4, 0], root) == [0]
    with pytest.raises(UserError, match="Cannot measure with 9 threads on 8 usable cores: lower --threads"):
        choose_cpus(9, allowed, root)


def test_big_cores_come_before_little_ones(tmp_path: Path) -> None:
    root = topology(tmp_path, {}, {0: 400, 1: 400, 2: 1024, 3: 1024})
    assert choose_cpus(1, range(4), root) == [2]
    assert choose_cpus(2, range(4), root) == [2, 3]
    assert choose_cpus(3, range(4), root) == [1, 2, 3]


def test_where_nothing_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "allowed_cpus", lambda: None)
    assert choose_cpus(1) is None
    with pytest.raises(UserError, match="usable cores"):
        choose_cpus((os.cpu_count() or 1) + 1)


def test_this_device() -> None:
    device = describe_device()
    assert device == describe_device()
    assert device["cores"] == len(os.sched_getaffinity(0))
    assert len(device["fingerprint"]) == 64 and device["id"]
    assert choose_cpus(1)
