"""What listing many files takes: python tests/bench/bench_listing.py [--files 1000000]

Makes that many empty files in folders of a thousand, and prints as JSON: seconds to list them and to fingerprint them,
MiB that the list holds and at the peak, and MiB that become a forked worker's own when it names every file once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path

from midge.runtime.images import fingerprint, list_images


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    given, _ = parser.parse_known_args()  # make bench gives all benchmarks the same flags
    with tempfile.TemporaryDirectory() as folder:
        for first in range(0, given.files, 1000):
            label = Path(folder) / f"n{first:08}"
            label.mkdir()
            for index in range(first, min(first + 1000, given.files)):
                (label / f"{label.name}_{index:08}.JPEG").touch()
        print(json.dumps(measure(Path(folder))))


def measure(folder: Path) -> dict[str, float]:
    """List a folder, and fork."""
    gc.collect()
    before, start = memory_mib("status", "VmRSS"), time.perf_counter()
    images = list_images(folder)
    list_s = time.perf_counter() - start
    gc.collect()
    held, peak = memory_mib("status", "VmRSS") - before, memory_mib("status", "VmHWM") - before
    start = time.perf_counter()
    fingerprint(images)
    fingerprint_s = time.perf_counter() - start
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        own = memory_mib("smaps_rollup", "Private_Dirty")
        for index in range(len(images)):
            images.path(index)
        os.write(write, str(memory_mib("smaps_rollup", "Private_Dirty") - own).encode())
        os._exit(0)
    os.waitpid(child, 0)
    results = {
        "files": len(images),
        "list_s": list_s,
        "fingerprint_s": fingerprint_s,
        "held_mib": held,
        "peak_mib": peak,
        "worker_own_mib": float(os.read(read, 100)),
    }
    return {name: round(value, 2) for name, value in results.items()}


def memory_mib(file: str, key: str) -> float:
    """A field of a file in /proc/self (Linux), MiB."""
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


if __name__ == "__main__":
    main()
