"""`kill -9` at random moments of a conversion, then the same command again: the bytes are those of an undisturbed one.

python tools/robustness/kill_conversion.py [--kills 20] [--seed S] [--source FOLDER | --studies N] [--keep DIR] [-- FLAGS]

    source -> converted whole, timed -> for each kill: a fresh folder, killed once to three times, converted to the end, compared

FLAGS are those of `mura-dist shards` and go to it as they are, as in: -- --size 64 --encoding png --workers 2

A moment is uniform over the time that the whole conversion took, from the start of the process on; where the first of a folder
comes too late, because the machine has become faster, the folder starts over with half of it. Odd kills end the command
alone, as an operator would, and its workers have to leave by themselves; even ones end its whole process group, as a scheduler
or the kernel would. Compared is every file byte for byte but conversion.json, which says when, where and how. Exit status: 0 all
the same; 1 a difference, a left-over file, a surviving process or a command that failed.
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
GONE_S = 15.0  # how long workers may need to notice that their launcher is dead


@dataclass(frozen=True)
class Kill:
    """One folder's story. `moments_s`: after how many seconds each start was killed; `files`: what the last of them left."""

    moments_s: tuple[float, ...]
    group: bool
    files: int
    finished: int  # starts that had ended before their moment came
    problems: tuple[str, ...]

    def __str__(self) -> str:
        moments = ", ".join(f"{moment:.2f}" for moment in self.moments_s)
        late = f", {self.finished} done before" if self.finished else ""
        outcome = "; ".join(self.problems) or "the same bytes"
        return (
            f"{'group' if self.group else 'command'} killed after {moments} s{late}, {self.files} files left: {outcome}"
        )


def command(source: Path, out: Path, flags: Sequence[str]) -> list[str]:
    return [str(MURA_DIST), "shards", str(source), str(out), *flags]


def convert(source: Path, out: Path, flags: Sequence[str]) -> tuple[float, str]:
    """(seconds, what went wrong or "") of a conversion to its end."""
    start = time.monotonic()
    done = subprocess.run(
        command(source, out, flags), capture_output=True, text=True, errors="replace", timeout=LIMIT_S, check=False
    )
    message = (done.stderr.strip().splitlines() or [""])[-1]
    return time.monotonic() - start, f"ended with status {done.returncode}: {message}" if done.returncode else ""


def kill_after(arguments: Sequence[str], moment_s: float, *, group: bool) -> tuple[bool, str]:
    """(whether it was still at work, what went wrong or "") of a command that meets SIGKILL after `moment_s`."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(arguments, stdout=quiet, stderr=quiet, start_new_session=True) as process:
        try:
            process.wait(moment_s)
            at_work = False
        except subprocess.TimeoutExpired:
            at_work = True
        if group:
            _kill_group(process.pid)
        process.kill()
        process.wait()
    return at_work, _survivors(process.pid)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _survivors(leader: int) -> str:
    """ "", once no process of the group lives. What is still there after GONE_S is named, then ended."""
    end = time.monotonic() + GONE_S
    while alive := _group(leader):
        if time.monotonic() > end:
            _kill_group(leader)
            return f"{len(alive)} processes outlived the kill by {GONE_S:.0f} s"
        time.sleep(0.05)
    return ""


def _group(leader: int) -> list[int]:
    """The living processes of a group; where there is no /proc, the leader's number as long as any is there."""
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
    """What tells `other` from `whole`: files missing, left over, or of other bytes."""
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


def one_kill(
    source: Path, reference: Path, out: Path, flags: Sequence[str], moments_s: Sequence[float], *, group: bool
) -> Kill:
    """Starts, kills as often as there are moments, converts to the end and compares."""
    problems: list[str] = []
    met_s: list[float] = []
    finished = 0
    for moment_s in moments_s:
        at_work, problem = kill_after(command(source, out, flags), moment_s, group=group)
        while not at_work and not met_s:
            shutil.rmtree(out, ignore_errors=True)
            moment_s /= 2
            at_work, problem = kill_after(command(source, out, flags), moment_s, group=group)
        met_s.append(moment_s)
        finished += not at_work
        problems += [problem] if problem else []
    files = len(_files(out)) if out.exists() else 0
    _, problem = convert(source, out, flags)
    problems += [problem] if problem else differences(reference, out)
    return Kill(tuple(met_s), group, files, finished, tuple(problems))


def kill_often(
    source: Path, work: Path, flags: Sequence[str], *, kills: int, seed: int, log: Callable[[str], None] = print
) -> list[Kill]:
    """Converts `source` whole into `work`, then `kills` times killed. Each is said as it ends."""
    rng, reference = random.Random(seed), work / "whole"
    seconds, problem = convert(source, reference, flags)
    if problem:
        raise SystemExit(f"the conversion that nobody killed {problem}")
    log(f"whole: {len(_files(reference))} files in {seconds:.2f} s")
    stories = []
    for number in range(1, kills + 1):
        moments_s = [rng.uniform(0, seconds) for _ in range(rng.choice((1, 1, 2, 3)))]
        story = one_kill(source, reference, work / f"killed-{number}", flags, moments_s, group=number % 2 == 0)
        stories.append(story)
        log(f"kill {number}: {story}")
    return stories


def main(arguments: list[str]) -> int:
    arguments, flags = (
        (arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :])
        if "--" in arguments
        else (arguments, [])
    )
    parser = argparse.ArgumentParser(
        description="Kill conversions; what follows -- goes to `mura-dist shards` as it is.", allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=20, help="conversions to kill (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments (%(default)s)")
    parser.add_argument("--source", type=Path, help="a folder in MURA's layout; without it, phantoms are drawn")
    parser.add_argument("--studies", type=int, default=300, help="phantoms: studies (%(default)s)")
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave all there (needs to be empty)")
    options = parser.parse_args(arguments)
    if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep {options.keep} is not empty; name a new folder")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) if options.keep is None else options.keep
        work.mkdir(parents=True, exist_ok=True)
        source = options.source or drawn(work / "phantoms", options.studies)
        stories = kill_often(source, work, flags, kills=options.kills, seed=options.seed)
    bad = sum(bool(story.problems) for story in stories)
    at_work = sum(len(story.moments_s) - story.finished for story in stories)
    print(f"{len(stories)} conversions, killed {at_work} times at work: {len(stories) - bad} the same bytes, {bad} not")
    return 1 if bad else 0


def drawn(folder: Path, studies: int) -> Path:
    subprocess.run([str(MURA_DIST), "phantoms", str(folder), "--studies", str(studies), "--quiet"], check=True)
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
