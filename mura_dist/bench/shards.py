"""bench shards: the `mura-dist shards` command, compared with processes that only decode and resize the same files.

The start of the interpreters is measured on both sides. The processes of the second import only the reader.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

from mura_dist.bench.clock import Contender, Work
from mura_dist.bench.workload import Load
from mura_dist.core.errors import RunError

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
        Contender("mura-dist shards (raw)", partial(conversion, "raw"), is_own=True),
        Contender("decode and resize only", reading),
    ]


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
