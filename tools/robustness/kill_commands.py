"""Kill evaluate, export, ensemble and score by SIGKILL at random moments, repeat the command, and compare the files.

python tools/robustness/kill_commands.py [--kills 3] [--seed S] [--keep DIR] [COMMAND ...]

    phantoms -> shards (64 px) -> two runs of a tiny network -> each command undisturbed, timed
        -> for each kill: a new copy of its output folder, killed once, the same command again, compared

A moment is uniform over the time of the undisturbed command. A moment that comes too late is halved, and its trial starts again.
Every file is compared byte for byte, except reports and galleries, which contain times. Their JSON is compared without the times,
and their HTML and the stamp with its digests are not compared. Exit status: 0 all equal; 1 a difference, a left-over file, a
surviving process or a failed command.
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
STAMP = ".evaluate.json"  # digests of the reports
CLOCK = (  # keys whose values differ from start to start
    *("seconds", "radiographs_per_s", "files_per_s", "waiting_s", "time", "time_s", "evaluation_s", "images_per_s"),
    *("data_wait_share", "overhead_share", "limited_by", "throughput", "loading_s"),
)
COMMANDS = ("evaluate", "export", "ensemble", "score")


def prepare(folder: Path) -> None:
    """Write the commands' inputs into `folder`: shards, the runs a and b, the evaluation of a."""
    run("phantoms", folder / "phantoms", "--studies", 60)
    run("shards", folder / "phantoms", folder / "shards", "--size", 64)
    for seed, name in enumerate(("a", "b")):
        run("train", f"shards={folder / 'shards'}", f"run={folder / name}", f"seed={seed}", *TINY)
    shutil.copytree(folder / "a", folder / "evaluated")
    run("evaluate", folder / "evaluated", folder / "shards")


def command_line(command: str, folder: Path) -> list[str]:
    """Return the arguments of a command. It writes below `out`, into a copy of run a if it writes into a run."""
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


def reset_output(folder: Path) -> Path:
    """Empty `out`, copy run a into it and return it."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.copytree(folder / "a", folder / "out/a")
    return folder / "out"


def contents(out: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, content) of every file. The content of TIMED files is without times."""
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = path.relative_to(out).as_posix()
        if path.name not in (*TIMED, STAMP):
            yield name, path.read_bytes()
        elif path.suffix == ".html" or path.name == STAMP:
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
    """Run a command to its end. Return the seconds and the problem, or ""."""
    start = time.monotonic()
    done = subprocess.run(arguments, capture_output=True, text=True, errors="replace", timeout=LIMIT_S, check=False)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return time.monotonic() - start, f"exited with status {done.returncode}: {last}" if done.returncode else ""


def kill_often(command: str, folder: Path, *, kills: int, rng: random.Random) -> int:
    """Run a command undisturbed, then kill it `kills` times. Return how many trials had a problem."""
    arguments, out = command_line(command, folder), reset_output(folder)
    seconds, problem = finish(arguments)
    if problem:
        raise SystemExit(f"the undisturbed {command} {problem}")
    reference = dict(contents(out))
    num_wrong = 0
    for number in range(1, kills + 1):
        reset_output(folder)
        moment_s = rng.uniform(0, seconds)
        was_running, survivors = kill_after(arguments, moment_s, group=number % 2 == 0)
        while not was_running and not survivors:
            reset_output(folder)
            moment_s /= 2
            was_running, survivors = kill_after(arguments, moment_s, group=number % 2 == 0)
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
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (%(default)s)")
    parser.add_argument("--keep", type=Path, help="work in this folder and do not delete it (must be empty)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.commands if name not in COMMANDS]:
        parser.error(f"{unknown[0]}: unknown. Name some of {', '.join(COMMANDS)}")
    if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep {options.keep} is not empty. Name a new folder.")
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
