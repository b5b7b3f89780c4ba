"""`kill -9` of ranks and launchers of a shared conversion or prediction, and second starts: the bytes stay the same.

python tools/robustness/kill_ranks.py conversion|prediction [--trials 10] [--ranks 2] [--seed S] [--studies N] [--keep DIR]

    phantoms (and a model) -> the command under torchrun, undisturbed, timed -> trials: a fresh folder, disturbed, compared

Trials take turns: SIGKILL for rank 0, rank 1, ..., for torchrun alone, for all of them, or a second start of the same command.
Moments are uniform over the time in which the undisturbed command had its plan on disk. After a kill the same command starts at
once: it has to wait for the ranks that are left. Of two starts one ends with status 0, the other with 0 or refused.

Compared are all files of a conversion but conversion.json, and the tables of a prediction. Exit status: 0 all the same; 1 a
difference, a surviving process or a command that failed.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent
LIMIT_S = 600.0  # one command to its end
GONE_S = 20.0  # how long ranks may need to leave after their launcher
TRIAL = "KILL_RANKS_TRIAL"  # in the environment of all that a trial starts
TABLES = ("predictions.csv", "studies.csv", "failures.csv")


@dataclass(frozen=True)
class Work:
    """The command under trial, but for its output folder; its plan; which files are compared: `only`, or all but `but`."""

    arguments: tuple[str, ...]
    out_option: tuple[str, ...]
    plan: str
    only: tuple[str, ...] = ()
    but: tuple[str, ...] = ()

    def command(self, out: Path, ranks: int) -> list[str]:
        launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks)]
        return [*launcher, *self.arguments, *self.out_option, str(out), "--quiet"]

    def contents(self, out: Path) -> dict[str, bytes]:
        paths = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
        names = self.only or [name for name in paths if name not in self.but]
        return {name: paths[name].read_bytes() for name in names if name in paths}


@dataclass
class Trial:
    """One folder's story."""

    disturbance: str
    moment_s: float
    late: bool = False  # the command had ended before its moment came
    statuses: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        outcome = "; ".join(self.problems) or "the same bytes"
        statuses = ", ".join(map(str, self.statuses))
        late = " (too late)" if self.late else ""
        return f"{self.disturbance} {self.moment_s:.2f} s after the plan{late}, exit statuses {statuses}: {outcome}"


def start(work: Work, out: Path, ranks: int) -> subprocess.Popen[bytes]:
    """Start the command in a session of its own; what it says goes to a log beside `out`."""
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            work.command(out, ranks),
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {TRIAL: out.name, "OMP_NUM_THREADS": "1"},
        )


def processes(out: Path) -> Iterator[tuple[int, dict[bytes, bytes]]]:
    """The living processes of a trial, with their environment."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if (path / "stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                continue
            pairs = (pair.partition(b"=") for pair in (path / "environ").read_bytes().split(b"\0"))
            environment = {name: value for name, _, value in pairs}
            if environment.get(TRIAL.encode()) == out.name.encode():
                yield int(path.name), environment


def victims(disturbance: str, launcher: int, out: Path) -> list[int]:
    """The processes to kill; a rank that is not there yet has its launcher killed for it."""
    ranks: dict[str, list[int]] = {}
    for process, environment in processes(out):
        ranks.setdefault(environment.get(b"RANK", b"").decode(), []).append(process)
    if disturbance == "all":
        return [launcher, *(process for number, some in ranks.items() if number for process in some)]
    some = ranks.get(disturbance.removeprefix("rank "), [])
    return [min(some)] if disturbance.startswith("rank ") and some else [launcher]  # a rank is older than its workers


def survivors(out: Path) -> str:
    """ "", once no process of the trial lives. What is still there after GONE_S is named, then ended."""
    end = time.monotonic() + GONE_S
    while alive := [process for process, _ in processes(out)]:
        if time.monotonic() > end:
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            return f"{len(alive)} processes outlived the command by {GONE_S:.0f} s"
        time.sleep(0.05)
    return ""


def wait_for_plan(work: Work, out: Path, command: subprocess.Popen[bytes]) -> None:
    while command.poll() is None and not (out / work.plan).exists():
        time.sleep(0.005)


def attempt(work: Work, reference: Path, out: Path, ranks: int, trial: Trial) -> None:
    """Disturb a command, bring its work to an end, compare. `trial` hears of it."""
    first = start(work, out, ranks)
    wait_for_plan(work, out, first)
    with contextlib.suppress(subprocess.TimeoutExpired):
        first.wait(trial.moment_s)
        trial.late = True
    if trial.disturbance != "second start":
        for process in victims(trial.disturbance, first.pid, out):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    second = start(work, out, ranks)
    trial.statuses = [command.wait(LIMIT_S) for command in (first, second)]
    allowed = {0, 1} if trial.disturbance == "second start" else {0}  # torchrun makes 1 of every failure
    if trial.statuses[1] not in allowed or (trial.disturbance == "second start" and 0 not in trial.statuses):
        message = out.with_suffix(".log").read_text(errors="replace").strip().splitlines()
        trial.problems.append(f"failed: {' | '.join(message[-3:])}")
    expected, results = work.contents(reference), work.contents(out) if out.is_dir() else {}
    names = expected.keys() | results.keys()
    trial.problems += [f"{name} differs" for name in sorted(names) if expected.get(name) != results.get(name)]
    trial.problems += [problem] if (problem := survivors(out)) else []


def prepare(what: str, folder: Path, studies: int) -> Work:
    """Draw the source and, for a prediction, export a model of random weights."""

    def run(*arguments: object) -> None:
        subprocess.run([str(BIN / "mura-dist"), *map(str, arguments), "--quiet"], check=True, stdout=subprocess.DEVNULL)

    source, shards, model = folder / "phantoms", folder / "shards", folder / "run"
    run("phantoms", source, "--studies", studies)
    if what == "conversion":
        script = Path(__file__).resolve().parents[1] / "make_shards.py"
        arguments = (str(script), str(source), "--size", "64", "--workers", "1")
        return Work(arguments, (), "conversion.json", but=("conversion.json",))
    run("shards", source, shards, "--size", 64)
    tiny = ("architecture=tiny", "epochs=0", "global_batch=12", "micro_batch=6", "precision=fp32", "tensorboard=false")
    run("train", f"shards={shards}", f"run={model}", *tiny)
    run("export", model)
    arguments = ("-m", "mura_dist.predict", str(model / "model.onnx"), str(source), "--workers", "1")
    return Work(arguments, ("--out",), ".parts/plan.json", only=TABLES)


def attempt_often(work: Work, folder: Path, *, ranks: int, num_trials: int, seed: int) -> list[Trial]:
    """The command undisturbed, then disturbed `num_trials` times. Each trial is printed as it ends."""
    rng, reference = random.Random(seed), folder / "whole"
    command = start(work, reference, ranks)
    wait_for_plan(work, reference, command)
    began = time.monotonic()
    if status := command.wait(LIMIT_S):
        message = reference.with_suffix(".log").read_text(errors="replace").strip().splitlines()
        raise SystemExit(f"the command that nobody disturbed ended with status {status}: {message[-1:]}")
    seconds = time.monotonic() - began
    print(f"undisturbed: {len(work.contents(reference))} files in {seconds:.2f} s after the plan", flush=True)
    kinds = [*(f"rank {rank}" for rank in range(ranks)), "torchrun", "all", "second start"]
    trials = []
    for number in range(num_trials):
        trial = Trial(kinds[number % len(kinds)], rng.uniform(0, seconds))
        attempt(work, reference, folder / f"trial-{number}", ranks, trial)
        trials.append(trial)
        print(f"trial {number + 1}: {trial}", flush=True)
    return trials


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Kill ranks and launchers, or start twice; compare the bytes.")
    parser.add_argument("what", choices=("conversion", "prediction"))
    parser.add_argument("--trials", type=int, default=10, help="folders to disturb (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks under torchrun (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments (%(default)s)")
    parser.add_argument("--studies", type=int, default=1500, help="phantoms: studies (%(default)s)")
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave all there (needs to be empty)")
    options = parser.parse_args(arguments)
    if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep {options.keep} is not empty; name a new folder")
    with tempfile.TemporaryDirectory() as scratch:
        folder = (Path(scratch) if options.keep is None else options.keep).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        work = prepare(options.what, folder, options.studies)
        trials = attempt_often(work, folder, ranks=options.ranks, num_trials=options.trials, seed=options.seed)
    bad, late = sum(bool(trial.problems) for trial in trials), sum(trial.late for trial in trials)
    print(
        f"{len(trials)} {options.what}s of {options.ranks} ranks, {len(trials) - late} disturbed at work: "
        f"{len(trials) - bad} the same bytes, {bad} not"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
