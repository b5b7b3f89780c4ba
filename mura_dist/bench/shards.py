"""bench shards: the `mura-dist shards` command, compared with processes that only decode and resize the same files.

The start of the interpreters is measured on both sides. The processes of the second import only the reader.

The ceiling is the speed of a conversion that decodes and resizes as fast as these processes, and does nothing beyond that except
the parts that a conversion cannot avoid: _measure_parts.
"""

import hashlib
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mura_dist.bench.clock import Contender, Work
from mura_dist.bench.workload import Load, Options
from mura_dist.core.errors import RunError

OWN, BARE = "mura-dist shards (raw)", "decode and resize only"
_START = "import mura_dist.cli.main, mura_dist.data.shards.convert"
_NUM_SAMPLES = 512  # of the part of a shard whose hashing and writing is measured

_READ = """
import sys
from mura_dist.data import radiograph
size = int(sys.argv[1])
for path in sys.stdin.read().split("\\0"):
    radiograph.read(path, size)
"""


def contenders(load: Load) -> list[Contender]:
    """Return the contenders."""
    return [
        Contender(OWN, partial(conversion, "raw"), is_own=True),
        Contender(BARE, reading),
    ]


def more(load: Load, options: Options, results: dict[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """Return `ceiling`: its parts, images_per_s, and `ratio`, the share of it that the conversion reaches.

    parts: decoding_s, start_s and scan_s are wall-clock seconds of the whole work. sha256_ms, crc32_ms, write_ms and compare_ms
    are processor time for each radiograph.
    """
    rates = {result["name"]: result["images_per_s"]["median"] for result in results["contenders"]}
    measured = [_measure_parts(load) for _ in range(options.rounds)]
    parts = {key: statistics.median(round_parts[key] for round_parts in measured) for key in measured[0]}
    number = len(load.paths)
    parts = {"decoding_s": number / rates[BARE]} | parts
    per_radiograph_ms = sum(value for key, value in parts.items() if key.endswith("_ms"))
    whole_s = sum(value for key, value in parts.items() if key.endswith("_s"))
    ceiling = number / (whole_s + number * per_radiograph_ms / 1000 / load.workers)
    return {"ceiling": {"parts": parts, "images_per_s": ceiling, "ratio": rates[OWN] / ceiling}}


def _measure_parts(load: Load) -> dict[str, float]:
    """Return the cost of what a conversion does besides decoding and resizing.

    These are the start of its interpreter, scanning the folder, SHA-256 and CRC-32 of what is written, writing it, and reading it
    back to compare its SHA-256.
    """
    from mura_dist.core import files, storage
    from mura_dist.data.manifest import cut_tune
    from mura_dist.data.source.scan import scan

    def clocked(clock: Callable[[], float], call: Callable[[], Any]) -> float:
        started = clock()
        call()
        return clock() - started

    pixels, path = bytes(load.size**2), load.scratch / "part.bin"

    def write() -> None:
        with files.replacing(path) as file:
            for _ in range(_NUM_SAMPLES):
                file.write(pixels)

    def repeat(call: Callable[[], Any]) -> None:
        for _ in range(_NUM_SAMPLES):
            call()

    digest = hashlib.sha256()
    calls: dict[str, Callable[[], Any]] = {
        "sha256_ms": partial(repeat, partial(digest.update, pixels)),
        "crc32_ms": partial(repeat, partial(zlib.crc32, pixels)),
        "write_ms": write,
        "compare_ms": lambda: storage.sha256(path),
    }
    start = partial(subprocess.run, [sys.executable, "-c", _START], check=True)
    parts = {"start_s": clocked(time.perf_counter, start)}
    parts["scan_s"] = clocked(time.perf_counter, lambda: cut_tune(scan(load.folder, duplicates=False).manifest, 0.1, 0))
    return parts | {key: clocked(time.process_time, call) / _NUM_SAMPLES * 1000 for key, call in calls.items()}


def conversion(encoding: str, load: Load) -> Work:
    """Return the work of one conversion."""

    def work(out: Path) -> int:
        command = [sys.executable, "-m", "mura_dist", "shards", str(load.folder), str(out / "shards"), "--quiet"]
        options = {"size": load.size, "encoding": encoding, "workers": load.workers}
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        _check_exit(subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL))
        return len(load.paths)

    return work


def reading(load: Load) -> Work:
    """Return the work of decoding and resizing all files."""

    def work(out: Path) -> int:
        command, files = [sys.executable, "-c", _READ, str(load.size)], [str(load.folder / path) for path in load.paths]
        readers = [subprocess.Popen(command, stdin=subprocess.PIPE, text=True) for _ in range(load.workers)]
        for number, reader in enumerate(readers):
            assert reader.stdin is not None
            reader.stdin.write("\0".join(files[number :: load.workers]))
            reader.stdin.close()
        for reader in readers:
            _check_exit(reader)
        return len(files)

    return work


def _check_exit(process: subprocess.Popen) -> None:
    if process.wait():
        raise RunError(
            f"a process of the benchmark exited with status {process.returncode}. Its output above gives the reason."
        )
