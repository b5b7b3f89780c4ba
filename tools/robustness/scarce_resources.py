"""Run commands with a full disk, few open files, little memory or shared memory, or a clock that jumps.

python tools/robustness/scarce_resources.py [--seed S] [--keep DIR] [CASE ...] [COMMAND ...]

    phantoms -> shards (64 px) -> a run of a tiny network, exported, evaluated -> each command undisturbed
        -> for each case: the command under the limit; if it fails, the same command again without the limit; compared

    disk-10, disk-40, disk-80   a disk with space for 10, 40 or 80 % of what the command writes (root)
    files-20, files-40          20 or 40 open files in each process
    memory                      1 GB of address space in each process; 4 GB for the commands that load torch
    shm                         1 MiB of /dev/shm (root)
    clock                       a wall clock that jumps by hours and years, forwards and backwards (cc, Linux)

A case that this machine or this user does not support is skipped with a line of output. A trial passes if the command exits
within 5 minutes with status 0 and the files of an undisturbed one. It also passes if the command exits with status 1, 2 or 3, at
most 5 lines on stderr and no traceback, and then succeeds with the same files without the limit.

Names and bytes are compared as in kill_commands.py, except conversion.json, which has times and settings. Each process computes
with one thread. Exit status: 0 all trials pass; 1 a trial fails.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kill_commands import TINY, contents, run
from kill_conversion import MURA_DIST, NOT_COMPARED, _survivors

CLOCK_SOURCE = Path(__file__).with_name("clock_jumps.c")
CASES = ("disk-10", "disk-40", "disk-80", "files-20", "files-40", "memory", "shm", "clock")
COMMANDS = ("shards", "evaluate", "export", "predict", "score", "train")
MEMORY_KIB = {"shards": 1_000_000, "predict": 1_000_000, "score": 1_000_000}  # torch alone maps more than 1 GB
TORCH_MEMORY_KIB = 4_000_000
PAGE_BYTES = 4096  # a tmpfs counts pages
LIMIT_S = 300.0  # one command to its end
MAX_LINES = 5  # of stderr of a failed command


@dataclass(frozen=True)
class End:
    """The result of a command: its exit status (None: killed after LIMIT_S), its stderr, processes that outlived it."""

    status: int | None
    stderr: str
    survivors: str = ""

    @property
    def done(self) -> bool:
        """Whether the command succeeded and no process outlived it."""
        return self.status == 0 and not self.survivors

    @property
    def fault(self) -> str:
        """The rule that the command broke, or ""."""
        lines = self.stderr.strip().splitlines()
        if self.status is None:
            return f"did not exit within {LIMIT_S:.0f} s"
        if self.status not in (0, 1, 2, 3):
            return f"exited with status {self.status}: {' | '.join(lines[-2:])}"
        if self.status and ("Traceback" in self.stderr or not 1 <= len(lines) <= MAX_LINES):
            return f"status {self.status}, {len(lines)} lines on stderr: {' | '.join(lines[-2:])}"
        return self.survivors


def prepare(folder: Path) -> None:
    """Write the commands' inputs: phantoms, shards, the run, the run exported and evaluated."""
    run("phantoms", folder / "phantoms", "--studies", 24)
    run("shards", folder / "phantoms", folder / "shards", "--size", 64)
    run("train", f"shards={folder / 'shards'}", f"run={folder / 'run'}", *TINY)
    shutil.copytree(folder / "run", folder / "evaluated")
    run("evaluate", folder / "evaluated", folder / "shards", "--no-gallery")
    run("export", folder / "evaluated", "--out", folder / "model.onnx")


def command_line(command: str, folder: Path) -> list[str]:
    """Return the arguments of a command. It writes below `out`, into a copy of the run if it writes into one."""
    out, shards, studies = folder / "out", folder / "shards", folder / "evaluated/studies.csv"
    arguments: dict[str, tuple[object, ...]] = {
        "shards": (folder / "phantoms", out / "shards", "--size", 64),
        "evaluate": (out / "run", shards),
        "export": (out / "run",),
        "predict": (folder / "model.onnx", folder / "phantoms", "--out", out / "predictions"),
        "score": (studies, studies, "--out", out / "score"),
        "train": (f"shards={shards}", f"run={out / 'run'}", *TINY, "epochs=1"),
    }
    return [str(MURA_DIST), command, *map(str, arguments[command]), "--quiet"]


def copy_inputs(command: str, folder: Path) -> None:
    """Copy the run into the empty `out` if the command writes into one."""
    if command in ("evaluate", "export"):
        shutil.copytree(folder / "run", folder / "out/run")


def finish(arguments: Sequence[str], environment: Mapping[str, str]) -> End:
    """Run a command to its end, or kill it after LIMIT_S."""
    with tempfile.TemporaryFile("w+", errors="replace") as stderr:
        with subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True, env=os.environ | environment
        ) as process:
            try:
                status: int | None = process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                status = None
                os.killpg(process.pid, signal.SIGKILL)
        survivors = _survivors(process.pid)
        stderr.seek(0)
        return End(status, stderr.read(), survivors)


def limited(case: str, command: str, arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command under a case's limit. The limits of disk and clock are not in the arguments."""
    kind, _, number = case.partition("-")
    limit = {
        "files": f"ulimit -n {number}",
        "memory": f"ulimit -v {MEMORY_KIB.get(command, TORCH_MEMORY_KIB)}",
        "shm": "mount -t tmpfs -o size=1m tmpfs /dev/shm",
    }.get(kind)
    if limit is None:
        return list(arguments)
    namespace = ["unshare", "--mount"] if kind == "shm" else []
    return [*namespace, "sh", "-c", f'{limit} && exec "$@"', "sh", *arguments]


def size_bytes(out: Path) -> int:
    """Return the bytes that the files below `out` need on a tmpfs."""
    sizes = (path.stat().st_size for path in out.rglob("*") if path.is_file())
    return sum(-(-size // PAGE_BYTES) * PAGE_BYTES for size in sizes)


@contextlib.contextmanager
def output_folder(out: Path, *, disk: bool) -> Iterator[None]:
    """Create an empty `out`, on a new tmpfs if `disk`, and delete it at the end."""
    out.mkdir()
    if disk:
        mount("-t", "tmpfs", "tmpfs", out)
    try:
        yield
    finally:
        if disk:
            subprocess.run(["umount", "--lazy", str(out)], check=True)
        shutil.rmtree(out)


def mount(*arguments: object) -> None:
    """Run mount with these arguments."""
    subprocess.run(["mount", *map(str, arguments)], check=True)


def read_output(out: Path) -> dict[str, Any]:
    """Return the content of each file of the output by name, None for conversion.json."""
    return {name: None if Path(name).name == NOT_COMPARED else content for name, content in contents(out)}


def differences(reference: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Name the files that are missing, left over or different."""
    return [
        *(f"{name} is missing" for name in sorted(reference.keys() - after.keys())),
        *(f"{name} is left over" for name in sorted(after.keys() - reference.keys())),
        *(f"{name} differs" for name in sorted(reference.keys() & after.keys()) if reference[name] != after[name]),
    ]


class Trials:
    """The trials of one folder. `counts` has the number of outcomes: done, refused, wrong."""

    def __init__(self, folder: Path, clock: Path | None, rng: random.Random) -> None:
        self.folder, self.clock, self.rng = folder, clock, rng
        self.counts: Counter[str] = Counter()

    def compare_all(self, command: str, cases: Sequence[str]) -> None:
        """Run a command undisturbed, then under each case."""
        out = self.folder / "out"
        with output_folder(out, disk=False):
            copy_inputs(command, self.folder)
            before = size_bytes(out)
            end = finish(command_line(command, self.folder), {})
            if not end.done:
                last = end.stderr.strip().splitlines()[-1:]
                raise SystemExit(f"{command} without a limit exited with status {end.status}: {last}")
            reference, growth = read_output(out), size_bytes(out) - before
        for case in cases:
            with output_folder(out, disk=case.startswith("disk")):
                copy_inputs(command, self.folder)
                if case.startswith("disk"):
                    share = int(case.removeprefix("disk-")) / 100
                    mount("-o", f"remount,size={before + max(PAGE_BYTES, int(share * growth))}", out)
                self.compare(case, command, reference)

    def compare(self, case: str, command: str, reference: Mapping[str, Any]) -> None:
        """Run a command under a limit, again without it if it failed, and print the result."""
        arguments, out = command_line(command, self.folder), self.folder / "out"
        end = finish(limited(case, command, arguments), self.environment(case))
        faults = [end.fault]
        if not end.done:
            if case.startswith("disk"):
                mount("-o", "remount,size=0", out)  # 0: no limit
            again = finish(arguments, {})
            if not again.done:
                faults.append(f"again, without the limit: {again.fault or f'status {again.status}: {again.stderr}'}")
        faults += differences(reference, read_output(out))
        outcome = "; ".join(filter(None, faults))
        self.counts["wrong" if outcome else "done" if end.done else "refused"] += 1
        last = (end.stderr.strip().splitlines() or [""])[-1]
        verdict = outcome or ("the same files" if end.done else f"{last}; the same files without the limit")
        print(f"{case} {command}: status {end.status}: {verdict}", flush=True)

    def environment(self, case: str) -> dict[str, str]:
        """Return the environment variables of a case."""
        if case != "clock":
            return {}
        return {"LD_PRELOAD": str(self.clock), "CLOCK_JUMPS_SEED": str(self.rng.randrange(2**31))}


def compile_clock(folder: Path) -> Path | None:
    """Compile the library of the jumping clock. Return None without a compiler or Linux."""
    compiler, library = shutil.which("cc"), folder / "clock_jumps.so"
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, CLOCK_SOURCE, "-ldl"], check=True)
    return library


def obstacle(case: str, clock: Path | None) -> str:
    """Return why this machine or user does not support a case, or ""."""
    if case == "clock":
        return "" if clock is not None else "needs Linux and a C compiler (cc)"
    if case == "shm" or case.startswith("disk"):
        mounts = shutil.which("mount") and shutil.which("unshare") and hasattr(os, "geteuid") and os.geteuid() == 0
        return "" if mounts else "needs root, mount and unshare"
    return "" if os.name == "posix" else "needs ulimit"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Run commands under scarce resources; compare what they write.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"cases ({', '.join(CASES)}) and commands ({', '.join(COMMANDS)}); all"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the clock's jumps (%(default)s)")
    parser.add_argument("--keep", type=Path, help="work in this folder and do not delete the inputs (must be empty)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in CASES + COMMANDS]:
        parser.error(f"{unknown[0]}: unknown. Name some of {', '.join(CASES + COMMANDS)}")
    if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep {options.keep} is not empty. Name a new folder.")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        folder = (Path(scratch) if options.keep is None else options.keep).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        clock = compile_clock(folder)
        cases = []
        for case in [name for name in CASES if name in options.names] or CASES:
            if reason := obstacle(case, clock):
                print(f"{case}: skipped, {reason}", flush=True)
            else:
                cases.append(case)
        prepare(folder)
        trials = Trials(folder, clock, random.Random(options.seed))
        for command in [name for name in COMMANDS if name in options.names] or COMMANDS:
            trials.compare_all(command, cases)
    counts = trials.counts
    num_passed = counts["done"] + counts["refused"]
    print(f"{counts['done']} done under the limit, {counts['refused']} refused and done without it")
    print(f"{counts.total()} trials: {num_passed} pass, {counts['wrong']} fail")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
