"""`kill -9` at random moments of evaluate, export, ensemble and score, then the same command again: the files are the same.

python tools/robustness/kill_commands.py [--kills 3] [--seed S] [--keep DIR] [COMMAND ...]

    phantoms -> shards (64 px) -> two runs of a tiny network -> each command whole, timed
        -> for each kill: a fresh copy of what it writes into, killed once, the same command again, compared

A moment is uniform over the time that the whole command took; one that comes too late is halved, and its trial begins anew.
Compared is every file byte for byte but the reports and the gallery, which hold seconds: their JSON is compared without
those, their HTML is not. Exit status: 0 all the same; 1 a difference, a left-over file, a surviving process or a command that
failed.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kill_conversion import LIMIT_S, MURA_DIST, kill_after

TINY = ("architecture=tiny", "epochs=2", "global_batch=12", "micro_batch=6", "precision=fp32", "tensorboard=false")
TIMED = ("report.json", "gallery.json", "report.html", "gallery.html", "predict.json", "status.json", "metrics.jsonl")
CLOCK = (  # keys whose values differ from start to start
    *("seconds", "radiographs_per_s", "files_per_s", "waiting_s", "time", "time_s", "evaluation_s", "images_per_s"),
    *("data_wait_share", "overhead_share", "limited_by", "throughput"),
)
COMMANDS = ("evaluate", "export", "ensemble", "score")


def prepare(folder: Path) -> None:
    """Make in `folder` what the commands read: shards, the runs a and b, the evaluation of a."""
    run("phantoms", folder / "phantoms", "--studies", 60)
    run("shards", folder / "phantoms", folder / "shards", "--size", 64)
    for seed, name in enumerate(("a", "b")):
        run("train", f"shards={folder / 'shards'}", f"run={folder / name}", f"seed={seed}", *TINY)
    shutil.copytree(folder / "a", folder / "evaluated")
    run("evaluate", folder / "evaluated", folder / "shards")


def words_of(command: str, folder: Path) -> list[str]:
    """Return a command's words; it writes below `out`, a copy of run a for the commands that write into a run."""
    out, shards, studies = folder / "out", folder / "shards", folder / "evaluated/studies.csv"
    arguments: dict[str, tuple[object, ...]] = {
        "evaluate": (out / "a", shards),
        "export": (out / "a",),
        "ensemble": (folder / "a", folder / "b", "--top", 2, "--out", out / "models.json"),
        "score": (studies, studies, "--out", out / "score"),
    }
    return [str(MURA_DIST), command, *map(str, arguments[command]), "--quiet"]


def run(*arguments: object) -> None:
    subprocess.run([str(MURA_DIST), *map(str, arguments), "--quiet"], check=True, stdout=subprocess.DEVNULL)


def renew(folder: Path) -> Path:
    """Empty `out` but for a fresh copy of run a."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.copytree(folder / "a", folder / "out/a")
    return folder / "out"


def contents(out: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, content) of every file; of TIMED files without what the clock says."""
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = path.relative_to(out).as_posix()
        if path.name not in TIMED:
            yield name, path.read_bytes()
        elif path.suffix == ".html":
            yield name, None
        else:
            texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            yield name, [without_clock(json.loads(text)) for text in texts]


def without_clock(value: Any) -> Any:
    """Return a JSON value without the keys of CLOCK, at any depth."""
    if isinstance(value, dict):
        return {key: without_clock(item) for key, item in value.items() if key not in CLOCK}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


def finish(arguments: Sequence[str]) -> tuple[float, str]:
    """(seconds, what went wrong or "") of a command to its end."""
    start = time.monotonic()
    done = subprocess.run(arguments, capture_output=True, text=True, errors="replace", timeout=LIMIT_S, check=False)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return time.monotonic() - start, f"ended with status {done.returncode}: {last}" if done.returncode else ""


def kill_often(command: str, folder: Path, *, kills: int, rng: random.Random) -> int:
    """Run a command whole, then kill it `kills` times. Returns how many of these went wrong."""
    arguments, out = words_of(command, folder), renew(folder)
    seconds, problem = finish(arguments)
    if problem:
        raise SystemExit(f"{command}, which nobody killed, {problem}")
    reference = dict(contents(out))
    num_wrong = 0
    for number in range(1, kills + 1):
        renew(folder)
        moment_s = rng.uniform(0, seconds)
        at_work, survivors = kill_after(arguments, moment_s, group=number % 2 == 0)
        while not at_work and not survivors:
            renew(folder)
            moment_s /= 2
            at_work, survivors = kill_after(arguments, moment_s, group=number % 2 == 0)
        _, problem = finish(arguments)
        after = dict(contents(out))
        differing = [
            name
            for name in sorted(reference.keys() | after.keys())
            if reference.get(name, b"-") != after.get(name, b"-")
        ]
        outcome = "; ".join(filter(None, [survivors, problem, *(f"{name} differs" for name in differing)]))
        print(f"{command} killed after {moment_s:.2f} of {seconds:.2f} s: {outcome or 'the same files'}", flush=True)
        num_wrong += bool(outcome)
    return num_wrong


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Kill evaluate, export, ensemble and score; compare what they write.")
    parser.add_argument(
        "commands", nargs="*", metavar="COMMAND", default=COMMANDS, help=f"of {', '.join(COMMANDS)}; all"
    )
    parser.add_argument("--kills", type=int, default=3, help="kills of each command (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments (%(default)s)")
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave all there (needs to be empty)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.commands if name not in COMMANDS]:
        parser.error(f"{unknown[0]}: name some of {', '.join(COMMANDS)}")
    if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep {options.keep} is not empty; name a new folder")
    rng, wrong = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = (Path(scratch) if options.keep is None else options.keep).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder)
        for command in options.commands:
            wrong += kill_often(command, folder, kills=options.kills, rng=rng)
    total = options.kills * len(options.commands)
    print(f"{total} kills at work: {total - wrong} the same files, {wrong} not")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
