"""Kill conversions by SIGKILL at random moments, repeat the command, and compare the bytes with an undisturbed conversion.

python tools/robustness/kill_conversion.py [--kills 20] [--seed S] [--source FOLDER | --studies N] [--keep DIR] [-- FLAGS]

    source -> an undisturbed conversion, timed -> for each trial: a new folder, killed one to three times, converted, compared

FLAGS are those of `mura-dist shards` and go to it as they are, as in: -- --size 64 --encoding png --workers 2

A moment is uniform over the time of the undisturbed conversion, from the start of the process. If the first kill of a folder
comes too late, the folder starts again with half the moment. Odd trials kill the command alone, as an operator would, and its
workers must exit by themselves. Even trials kill its process group, as a scheduler or the kernel would. Every file is compared
byte for byte except conversion.json, which has times and settings. Exit status: 0 all equal; 1 a difference, a left-over file, a
surviving process or a failed command.
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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MURA_DIST = Path(sys.executable).parent / "mura-dist"
NOT_COMPARED = "conversion.json"
LIMIT_S = 1800.0  # one conversion to its end
GONE_S = 15.0  # time limit for workers to exit after their launcher died


@dataclass(frozen=True)
class Kill:
    """The kills of one folder and the result. `moments_s`: seconds before each kill. `files`: number of files after the last."""

    moments_s: tuple[float, ...]
    group: bool
    files: int
    finished: int  # starts that finished before their kill
    problems: tuple[str, ...]

    def __str__(self) -> str:
        moments = ", ".join(f"{moment:.2f}" for moment in self.moments_s)
        late = f", {self.finished} finished before the kill" if self.finished else ""
        outcome = "; ".join(self.problems) or "the same bytes"
        return (
            f"{'group' if self.group else 'command'} killed after {moments} s{late}, {self.files} files left: {outcome}"
        )


def command(source: Path, out: Path, flags: Sequence[str]) -> list[str]:
    return [str(MURA_DIST), "shards", str(source), str(out), *flags]


def convert(source: Path, out: Path, flags: Sequence[str]) -> tuple[float, str]:
    """Run a conversion to its end. Return the seconds and the problem, or ""."""
    start = time.monotonic()
    done = subprocess.run(
        command(source, out, flags), capture_output=True, text=True, errors="replace", timeout=LIMIT_S, check=False
    )
    message = (done.stderr.strip().splitlines() or [""])[-1]
    return time.monotonic() - start, f"exited with status {done.returncode}: {message}" if done.returncode else ""


def kill_after(arguments: Sequence[str], moment_s: float, *, group: bool) -> tuple[bool, str]:
    """Send SIGKILL to a command after `moment_s`. Return whether it still ran, and the problem, or ""."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(arguments, stdout=quiet, stderr=quiet, start_new_session=True) as process:
        try:
            process.wait(moment_s)
            was_running = False
        except subprocess.TimeoutExpired:
            was_running = True
        if group:
            _kill_group(process.pid)
        process.kill()
        process.wait()
    return was_running, _survivors(process.pid)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _survivors(leader: int) -> str:
    """Return "" once no process of the group lives. After GONE_S, kill the others and return a problem."""
    end = time.monotonic() + GONE_S
    while alive := _group(leader):
        if time.monotonic() > end:
            _kill_group(leader)
            return f"{len(alive)} processes outlived the kill by {GONE_S:.0f} s"
        time.sleep(0.05)
    return ""


def _group(leader: int) -> list[int]:
    """Return the living processes of a group. Without /proc, return the leader while the group exists."""
    if not Path("/proc/self/stat").exists():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, 0)
            return [leader]
        return []
    results = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):  # it ended meanwhile
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader and state not in "ZX":
                results.append(int(path.parent.name))
    return results


def differences(reference: Path, actual: Path) -> list[str]:
    """Return which files are missing, left over or different."""
    expected_items, actual_items = _files(reference), _files(actual)
    results = [f"{name} is missing" for name in sorted(expected_items - actual_items)] + [
        f"{name} is left over" for name in sorted(actual_items - expected_items)
    ]
    changed = [
        name
        for name in sorted(expected_items & actual_items)
        if (reference / name).read_bytes() != (actual / name).read_bytes()
    ]
    return results + [f"{name} differs" for name in changed]


def _files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != NOT_COMPARED
    }


def kill_and_convert(
    source: Path, reference: Path, out: Path, flags: Sequence[str], moments_s: Sequence[float], *, group: bool
) -> Kill:
    """Start and kill the command once per moment, convert to the end and compare."""
    problems: list[str] = []
    killed_after_s: list[float] = []
    finished = 0
    for moment_s in moments_s:
        was_running, problem = kill_after(command(source, out, flags), moment_s, group=group)
        while not was_running and not killed_after_s:
            shutil.rmtree(out, ignore_errors=True)
            moment_s /= 2
            was_running, problem = kill_after(command(source, out, flags), moment_s, group=group)
        killed_after_s.append(moment_s)
        finished += not was_running
        problems += [problem] if problem else []
    files = len(_files(out)) if out.exists() else 0
    _, problem = convert(source, out, flags)
    problems += [problem] if problem else differences(reference, out)
    return Kill(tuple(killed_after_s), group, files, finished, tuple(problems))


def kill_often(
    source: Path, work: Path, flags: Sequence[str], *, kills: int, seed: int, log: Callable[[str], None] = print
) -> list[Kill]:
    """Convert `source` undisturbed, then run `kills` trials in `work`. Log each trial as it ends."""
    rng, reference = random.Random(seed), work / "reference"
    seconds, problem = convert(source, reference, flags)
    if problem:
        raise SystemExit(f"the undisturbed conversion {problem}")
    log(f"undisturbed: {len(_files(reference))} files in {seconds:.2f} s")
    results = []
    for number in range(1, kills + 1):
        moments_s = [rng.uniform(0, seconds) for _ in range(rng.choice((1, 1, 2, 3)))]
        result = kill_and_convert(source, reference, work / f"killed-{number}", flags, moments_s, group=number % 2 == 0)
        results.append(result)
        log(f"kill {number}: {result}")
    return results


def main(arguments: list[str]) -> int:
    arguments, flags = (
        (arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :])
        if "--" in arguments
        else (arguments, [])
    )
    parser = argparse.ArgumentParser(
        description="Kill conversions and compare their bytes. Options of `mura-dist shards` follow --.",
        allow_abbrev=False,
    )
    parser.add_argument("--kills", type=int, default=20, help="conversions to kill (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (%(default)s)")
    parser.add_argument("--source", type=Path, help="a folder in MURA's layout; without it, phantoms are drawn")
    parser.add_argument("--studies", type=int, default=300, help="phantoms: studies (%(default)s)")
    parser.add_argument("--keep", type=Path, help="work in this folder and do not delete it (must be empty)")
    options = parser.parse_args(arguments)
    if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep {options.keep} is not empty. Name a new folder.")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) if options.keep is None else options.keep
        work.mkdir(parents=True, exist_ok=True)
        source = options.source or draw_phantoms(work / "phantoms", options.studies)
        results = kill_often(source, work, flags, kills=options.kills, seed=options.seed)
    num_different = sum(bool(result.problems) for result in results)
    num_same, num_kills = (
        len(results) - num_different,
        sum(len(result.moments_s) - result.finished for result in results),
    )
    print(
        f"{len(results)} conversions, killed {num_kills} times at work: {num_same} the same bytes, {num_different} not"
    )
    return 1 if num_different else 0


def draw_phantoms(folder: Path, studies: int) -> Path:
    subprocess.run([str(MURA_DIST), "phantoms", str(folder), "--studies", str(studies), "--quiet"], check=True)
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
