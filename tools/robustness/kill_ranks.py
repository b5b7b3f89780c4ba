"""Kill ranks or launchers of a conversion or prediction on several ranks, or start it twice, and compare the bytes.

python tools/robustness/kill_ranks.py conversion|prediction [--trials 10] [--ranks 2] [--seed S] [--studies N] [--keep DIR]

    phantoms (and a model) -> the command under torchrun, undisturbed, timed -> trials: a new folder, disturbed, compared

Trials take turns: SIGKILL for rank 0, rank 1, ..., torchrun alone, all processes, or a second start of the same command. Moments
are uniform over the time after the undisturbed command wrote its plan. After a kill the same command starts at once, and must
wait for the remaining ranks. Of two starts, one exits with status 0. The second exits with 0 or is refused.

All files of a conversion except conversion.json are compared, and the tables of a prediction. Exit status: 0 all equal; 1 a
difference, a surviving process or a failed command.
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
GONE_S = 20.0  # time limit for ranks to exit after their launcher
TRIAL = "KILL_RANKS_TRIAL"  # environment variable of all processes of a trial
TABLES = ("predictions.csv", "studies.csv", "failures.csv")


@dataclass(frozen=True)
class Work:
    """The command under trial without its output folder, its plan, and the files to compare: `only`, or all except `but`."""

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
    """The disturbance of one folder and the result."""

    disturbance: str
    moment_s: float
    late: bool = False  # the command finished before the disturbance
    statuses: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        outcome = "; ".join(self.problems) or "the same bytes"
        statuses = ", ".join(map(str, self.statuses))
        late = " (too late)" if self.late else ""
        return f"{self.disturbance} {self.moment_s:.2f} s after the plan{late}, exit statuses {statuses}: {outcome}"


def start(work: Work, out: Path, ranks: int) -> subprocess.Popen[bytes]:
    """Start the command in a new session. Its output goes to a log beside `out`."""
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            work.command(out, ranks),
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {TRIAL: out.name, "OMP_NUM_THREADS": "1"},
        )


def processes(out: Path) -> Iterator[tuple[int, dict[bytes, bytes]]]:
    """Yield the living processes of a trial, with their environment."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if (path / "stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                continue
            pairs = (pair.partition(b"=") for pair in (path / "environ").read_bytes().split(b"\0"))
            environment = {name: value for name, _, value in pairs}
            if environment.get(TRIAL.encode()) == out.name.encode():
                yield int(path.name), environment


def victims(disturbance: str, launcher: int, out: Path) -> list[int]:
    """Return the processes to kill. If the rank has not started, return its launcher."""
    ranks: dict[str, list[int]] = {}
    for process, environment in processes(out):
        ranks.setdefault(environment.get(b"RANK", b"").decode(), []).append(process)
    if disturbance == "all":
        return [
            launcher,
            *(process for number, processes_of_rank in ranks.items() if number for process in processes_of_rank),
        ]
    processes_of_rank = ranks.get(disturbance.removeprefix("rank "), [])
    return (
        [min(processes_of_rank)] if disturbance.startswith("rank ") and processes_of_rank else [launcher]
    )  # a rank is older than its workers


def survivors(out: Path) -> str:
    """Return "" once no process of the trial lives. After GONE_S, kill the others and return a problem."""
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
    """Disturb a command, finish its output, compare, and record the result in `trial`."""
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
    allowed = {0, 1} if trial.disturbance == "second start" else {0}  # torchrun exits with 1 after every failure
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
    """Run the command undisturbed, then run `num_trials` trials. Print each trial as it ends."""
    rng, reference = random.Random(seed), folder / "reference"
    command = start(work, reference, ranks)
    wait_for_plan(work, reference, command)
    started = time.monotonic()
    if status := command.wait(LIMIT_S):
        message = reference.with_suffix(".log").read_text(errors="replace").strip().splitlines()
        raise SystemExit(f"the undisturbed command exited with status {status}: {message[-1:]}")
    seconds = time.monotonic() - started
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
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (%(default)s)")
    parser.add_argument("--studies", type=int, default=1500, help="phantoms: studies (%(default)s)")
    parser.add_argument("--keep", type=Path, help="work in this folder and do not delete it (must be empty)")
    options = parser.parse_args(arguments)
    if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep {options.keep} is not empty. Name a new folder.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = (Path(scratch) if options.keep is None else options.keep).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        work = prepare(options.what, folder, options.studies)
        trials = attempt_often(work, folder, ranks=options.ranks, num_trials=options.trials, seed=options.seed)
    num_different, late = sum(bool(trial.problems) for trial in trials), sum(trial.late for trial in trials)
    print(
        f"{len(trials)} {options.what}s of {options.ranks} ranks, {len(trials) - late} disturbed at work: "
        f"{len(trials) - num_different} the same bytes, {num_different} not"
    )
    return 1 if num_different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
