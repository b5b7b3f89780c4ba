"""Kill trainings by SIGKILL, resume them with the same command, and compare every tensor with an undisturbed run.

python tools/robustness/chaos_train.py [--kills 20] [--seed S] [--ranks 2] [--victims any] [--keep DIR] [-- key=value ...]

    phantoms -> shards (64 px) -> an undisturbed training, timed -> for each trial: a new run, killed one to three times by
    SIGKILL, each time resumed at once by the same command, trained to its end, compared

key=value are settings of the training, added to those below, as in: -- zero_stage=1 epochs=20

A kill happens at one of four moments: "random" (uniform over the time of the undisturbed training divided by the number of
kills), "start" (uniform over start-up), "write" (a checkpoint's `.partial` folder has just appeared) or "evaluation" (an epoch's
last step is logged, its evaluation is not). The victim is a rank, torchrun alone, whose ranks must then exit by themselves, or
all processes. With --victims ranks it is always a rank. The first kill of each trial takes the next moment in turn, and with
--victims ranks the next rank. The other choices are random.

The tool compares all tensors of the checkpoints that both runs have, among them the last and the best, bit for bit. It compares
all keys of their state.json, and metrics.jsonl line by line without the fields that measure time. Exit status: 0 all equal; 1 a
difference, a surviving process or a failed command.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
SETTINGS = (
    "architecture=tiny",
    "global_batch=12",
    "micro_batch=2",
    "learning_rate=1e-3",
    "epochs=12",
    "checkpoint_every=3",
    "log_every=1",
    "tensorboard=false",
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}  # bits are equal on a CPU with the same number of threads
WALL_CLOCK = {  # the fields of metrics.jsonl that measure time, as metrics_log.py names them
    *("time_s", "evaluation_s", "images_per_s"),
    *("data_wait_share", "limited_by", "overhead_share"),
}
AIMS = ("random", "write", "evaluation", "start")
LIMIT_S = 600.0  # one training to its end
GONE_S = 20.0  # time limit for ranks to exit after their launcher died


@dataclass(frozen=True)
class ReferenceRun:
    """The undisturbed training. It took `seconds`, of which `start_s` before its first line of metrics.jsonl."""

    run: Path
    seconds: float
    start_s: float
    steps_per_epoch: int
    epochs: int
    writes: int  # checkpoints written


@dataclass(frozen=True)
class Aim:
    """The moment of a kill: `after_s` after the start, or after the start of a write or evaluation, with `skip` ignored."""

    kind: str
    after_s: float
    skip: int
    victim: str  # "rank 0", ..., "torchrun", "all"


@dataclass
class Trial:
    """The kills of one run and the result. `late` counts starts that finished before their kill."""

    hits: list[Aim] = field(default_factory=list)
    positions: list[str] = field(default_factory=list)  # the run's progress at each kill
    torn: int = 0  # kills that left a half-written checkpoint
    late: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        hits = ", ".join(
            f"{hit.victim} ({hit.kind}, {position})" for hit, position in zip(self.hits, self.positions, strict=True)
        )
        late = f", {self.late} finished before the kill" if self.late else ""
        return f"killed {hits or 'never'}{late}: {'; '.join(self.problems) or 'the same bits'}"


def command(shards: Path, run: Path, ranks: int, arguments: Sequence[str]) -> list[str]:
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), "-m", "mura_dist.train"]
    return [*launcher, *SETTINGS, f"shards={shards}", f"run={run}", *arguments, "--quiet"]


@contextlib.contextmanager
def running_command(arguments: Sequence[str], log: Path) -> Iterator[subprocess.Popen]:
    """Run a command in a new session that writes to `log`. At the end of the block, kill its processes."""
    with open(log, "ab") as file:
        process = subprocess.Popen(
            arguments, stdout=file, stderr=file, start_new_session=True, env={**os.environ, **ENVIRONMENT}
        )
    try:
        yield process
    finally:
        kill(process.pid, "all")
        process.wait()


def run_to_end(arguments: Sequence[str], log: Path) -> str:
    """Run a command to its end. Return the problem, or ""."""
    with running_command(arguments, log) as process:
        try:
            status = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"did not exit within {LIMIT_S:.0f} s"
    message = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    return f"exited with status {status}: {message}" if status else ""


# ---- processes


def _processes() -> Iterator[tuple[int, int, str]]:
    """Yield (process, parent, state) of all processes. Training runs on Linux, which has /proc."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):  # it ended meanwhile
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            yield int(path.parent.name), int(parent), state


def ranks_of(launcher: int) -> dict[int, int]:
    """Return the living ranks that a torchrun started, by rank."""
    results = {}
    for process, parent, state in _processes():
        if parent == launcher and state not in "ZX":
            with contextlib.suppress(OSError):
                for pair in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
                    if pair.startswith(b"RANK="):
                        results[int(pair.removeprefix(b"RANK="))] = process
    return results


def processes_of(run: Path) -> list[int]:
    """Return the other living processes whose command line names this run: launchers and ranks."""
    results = []
    for process, _, state in _processes():
        with contextlib.suppress(OSError):
            arguments = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            if state not in "ZX" and process != os.getpid() and f"run={run}".encode() in arguments:
                results.append(process)
    return results


def kill(launcher: int, victim: str) -> str:
    """Send SIGKILL to a victim and return its name. If that rank has not started, kill torchrun."""
    ranks = ranks_of(launcher)
    number = int(victim.removeprefix("rank ")) if victim.startswith("rank ") else -1
    targets = [launcher, *ranks.values()] if victim == "all" else [ranks.get(number, launcher)]
    for process in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return victim if number in ranks or number < 0 else "torchrun"


def survivors(run: Path, limit_s: float = GONE_S) -> str:
    """Return "" once no process of the run lives. After `limit_s`, kill the others and return a problem."""
    end = time.monotonic() + limit_s
    while alive := processes_of(run):
        if time.monotonic() > end:
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            return f"{len(alive)} processes outlived their launcher by {limit_s:.0f} s"
        time.sleep(0.05)
    return ""


# ---- progress of a run


def partial_writes(run: Path) -> frozenset[str]:
    """Return the names of the checkpoints that are being written."""
    return frozenset(path.name for path in (run / "checkpoints").glob(".step-*.partial"))


def last_line(run: Path) -> dict[str, Any]:
    """Return the last complete line of metrics.jsonl, or {} if it has none."""
    path = run / "metrics.jsonl"
    with contextlib.suppress(OSError, IndexError, ValueError), open(path, "rb") as file:
        file.seek(max(path.stat().st_size - 2000, 0))
        return json.loads(file.read().rpartition(b"\n")[0].splitlines()[-1])
    return {}


def evaluations(run: Path, steps_per_epoch: int) -> frozenset[str]:
    """Return the running evaluation: an epoch's last step is the last line of the log."""
    line = last_line(run)
    ended = line.get("kind") == "step" and line["step"] % steps_per_epoch == 0
    return frozenset([str(line["step"])] if ended else [])


def position(run: Path) -> str:
    """Return the last logged step, and the checkpoint that is being written."""
    line = last_line(run)
    torn = f", inside {min(writing)}" if (writing := partial_writes(run)) else ""
    return f"step {line['step'] if line else 0}{torn}"


def moment(aim: Aim, run: Path, reference: ReferenceRun) -> Callable[[], bool]:
    """Return a function that returns whether the moment of the kill has come. Call it repeatedly."""
    start = time.monotonic()
    if aim.kind in ("random", "start"):
        return lambda: time.monotonic() >= start + aim.after_s
    before: frozenset[str] = frozenset()
    passed = -1 if _present(aim, run, reference) else 0  # ignore one that an earlier kill left behind

    def is_due() -> bool:
        nonlocal before, passed
        present = _present(aim, run, reference)
        passed += len(present - before)
        before = present
        return passed > aim.skip

    return is_due


def _present(aim: Aim, run: Path, reference: ReferenceRun) -> frozenset[str]:
    return partial_writes(run) if aim.kind == "write" else evaluations(run, reference.steps_per_epoch)


# ---- comparison


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return (dtype, shape, bytes) of each tensor of a safetensors file by name, without torch."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def differences(reference: Path, actual: Path) -> list[str]:
    """Return the differences between two runs: checkpoints, tensors, state, metrics."""
    expected_items, actual_items = _checkpoints(reference), _checkpoints(actual)
    expected_best, actual_best = (_summary(run).get("best_checkpoint") for run in (reference, actual))
    results = [f"the best checkpoint is {actual_best}, not {expected_best}"] if expected_best != actual_best else []
    if max(expected_items, default="") != max(actual_items, default=""):
        results.append(
            f"the last checkpoint is {max(actual_items, default='none')}, not {max(expected_items, default='none')}"
        )
    for name in sorted(expected_items & actual_items):
        results += _checkpoint_differences(reference / "checkpoints" / name, actual / "checkpoints" / name)
    return results + _metrics_differences(_metrics(reference), _metrics(actual))


def _checkpoints(run: Path) -> set[str]:
    """Return the names of the complete checkpoints."""
    return {path.parent.name for path in (run / "checkpoints").glob("step-*/COMPLETE")}


def _summary(run: Path) -> dict[str, Any]:
    status = json.loads((run / "status.json").read_bytes())
    return status.get("summary", {"best_checkpoint": f"of a run that is {status['state']}"})


def _checkpoint_differences(reference: Path, actual: Path) -> list[str]:
    names = [{path.name for path in folder.glob("*.safetensors")} for folder in (reference, actual)]
    results = [f"{reference.name}/{name} is missing or left over" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        results += [
            f"{reference.name}/{name}: {key} differs"
            for key in _unequal(tensors(reference / name), tensors(actual / name))
        ]
    states = [json.loads((folder / "state.json").read_bytes()) for folder in (reference, actual)]
    return results + [f"{reference.name}/state.json: {key} differs" for key in _unequal(*states)]


def _unequal(expected: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    absent = object()
    return [
        key for key in sorted(expected.keys() | actual.keys()) if expected.get(key, absent) != actual.get(key, absent)
    ]


def _metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without the fields that measure time.

    Raises:
        ValueError: A line is incomplete, which no finished run has.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in lines]


def _metrics_differences(expected_items: list[dict[str, Any]], actual_items: list[dict[str, Any]]) -> list[str]:
    results = (
        [f"metrics.jsonl has {len(actual_items)} lines, not {len(expected_items)}"]
        if len(expected_items) != len(actual_items)
        else []
    )
    for number, (expected, actual) in enumerate(zip(expected_items, actual_items, strict=False), 1):
        results += [f"metrics.jsonl:{number}: {key} differs" for key in _unequal(expected, actual)]
    return results


# ---- trials


def train_reference(shards: Path, work: Path, ranks: int, arguments: Sequence[str]) -> ReferenceRun:
    """Train undisturbed, and measure the start-up, the total time and the number of checkpoint writes."""
    run, start = work / "reference", time.monotonic()
    with running_command(command(shards, run, ranks, arguments), work / "reference.log") as process:
        while not last_line(run) and process.poll() is None:
            time.sleep(0.01)
        start_s = time.monotonic() - start
        writes = 0
        before: frozenset[str] = frozenset()
        while process.poll() is None:
            present = partial_writes(run)
            writes, before = writes + len(present - before), present
            time.sleep(0.002)
    if process.returncode:
        message = (work / "reference.log").read_text(errors="replace").strip()
        raise SystemExit(f"the undisturbed training exited with status {process.returncode}:\n{message[-2000:]}")
    lines = [line for line in _metrics(run) if line["kind"] == "epoch"]
    return ReferenceRun(run, time.monotonic() - start, start_s, lines[1]["step"], len(lines) - 1, writes)


def draw_aims(
    rng: random.Random, number: int, reference: ReferenceRun, ranks: int, *, only_ranks: bool = False
) -> list[Aim]:
    """Draw the one to three kills of a trial."""
    count = rng.choice((1, 1, 2, 3))
    rank_names = [f"rank {rank}" for rank in range(ranks)]
    victims = rank_names if only_ranks else [*rank_names, "torchrun", "all"]
    span_s = reference.start_s + (reference.seconds - reference.start_s) / count
    aims = []
    for kill_index in range(count):
        kind = AIMS[number % len(AIMS)] if kill_index == 0 else rng.choice(AIMS)
        after_s = rng.uniform(
            0, {"random": span_s, "start": reference.start_s, "write": 0.02, "evaluation": 0.02}[kind]
        )
        num_passing = {"write": reference.writes, "evaluation": reference.epochs}.get(kind, 0) // (2 * count)
        skip, victim = rng.randrange(num_passing + 1), rng.choice(victims)
        if only_ranks and kill_index == 0:
            victim = rank_names[number // len(AIMS) % ranks]
        aims.append(Aim(kind, after_s, skip, victim))
    return aims


def kill_once(arguments: Sequence[str], run: Path, aim: Aim, reference: ReferenceRun, trial: Trial, log: Path) -> None:
    """Start the command, kill it at the moment of `aim`, and record the kill in `trial`."""
    is_due = moment(aim, run, reference)
    with running_command(arguments, log) as process:
        while process.poll() is None and not is_due():
            time.sleep(0.001)
        if process.poll() is not None:
            trial.late += 1
            return
        if aim.kind in ("write", "evaluation"):
            time.sleep(aim.after_s)
        victim = kill(process.pid, aim.victim)
        trial.hits.append(Aim(aim.kind, aim.after_s, aim.skip, victim))
        trial.positions.append(position(run))
        trial.torn += bool(partial_writes(run)) and victim in ("rank 0", "all")
        if victim.startswith("rank "):
            try:
                process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                trial.problems.append(f"torchrun did not exit within {LIMIT_S:.0f} s of the death of a rank")


def run_trial(arguments: Sequence[str], run: Path, aims: Sequence[Aim], reference: ReferenceRun, log: Path) -> Trial:
    """Start and kill the command once per aim, train to the end and compare."""
    trial = Trial()
    for aim in aims:
        kill_once(arguments, run, aim, reference, trial, log)
        while trial.late and not trial.hits:  # the machine has become faster
            shutil.rmtree(run, ignore_errors=True)
            aim = Aim("random", reference.seconds / 2**trial.late, 0, aim.victim)
            kill_once(arguments, run, aim, reference, trial, log)
    problem = run_to_end(arguments, log)
    trial.problems += [problem] if problem else differences(reference.run, run)
    problem = survivors(run)
    trial.problems += [problem] if problem else []
    return trial


def kill_often(
    shards: Path,
    work: Path,
    arguments: Sequence[str],
    *,
    kills: int,
    seed: int,
    ranks: int,
    only_ranks: bool = False,
    log: Callable[[str], None] = print,
) -> list[Trial]:
    """Train undisturbed in `work`, then run `kills` trials. Log each trial as it ends."""
    rng = random.Random(seed)
    reference = train_reference(shards, work, ranks, arguments)
    log(
        f"undisturbed: {reference.epochs} epochs of {reference.steps_per_epoch} steps, {reference.writes} checkpoints, "
        f"{ranks} ranks, in {reference.seconds:.1f} s, {reference.start_s:.1f} s of them start-up"
    )
    trials = []
    for number in range(1, kills + 1):
        aims, run = draw_aims(rng, number, reference, ranks, only_ranks=only_ranks), work / f"killed-{number}"
        trial = run_trial(command(shards, run, ranks, arguments), run, aims, reference, work / f"killed-{number}.log")
        trials.append(trial)
        log(f"kill {number}: {trial}")
    return trials


def summary(trials: Sequence[Trial], seed: int) -> str:
    """Return the line that is printed at the end."""
    hits = [hit for trial in trials for hit in trial.hits]
    victims = Counter("a rank" if hit.victim.startswith("rank ") else hit.victim for hit in hits)
    kinds = Counter(hit.kind for hit in hits)
    bad = sum(bool(trial.problems) for trial in trials)
    return (
        f"{len(trials)} trainings (seed {seed}), killed {len(hits)} times at work "
        f"({', '.join(f'{count} {name}' for name, count in sorted(victims.items()))}; "
        f"{', '.join(f'{count} {name}' for name, count in sorted(kinds.items()))}; "
        f"{sum(trial.torn for trial in trials)} left a half-written checkpoint): "
        f"{len(trials) - bad} the same bits, {bad} not"
    )


def convert_phantoms(work: Path) -> Path:
    """Draw phantoms and convert them to shards of 64 px. Return the shard folder."""
    mura_dist, source, shards = str(BIN / "mura-dist"), str(work / "phantoms"), work / "shards"
    quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run(
        [mura_dist, "phantoms", source, "--studies", "60", "--size", "128", "--seed", "1", "--quiet"], **quiet
    )
    subprocess.run([mura_dist, "shards", source, str(shards), "--size", "64", "--quiet"], **quiet)
    return shards


def main(arguments: list[str]) -> int:
    arguments, settings = (
        (arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :])
        if "--" in arguments
        else (arguments, [])
    )
    parser = argparse.ArgumentParser(
        description="Kill trainings and compare their tensors. Settings of the training follow --.", allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=20, help="trainings to kill (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments and victims (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of a training (%(default)s)")
    parser.add_argument(
        "--victims",
        choices=("any", "ranks"),
        default="any",
        help="ranks: never torchrun, nor all at once (%(default)s)",
    )
    parser.add_argument("--keep", type=Path, help="work in this folder and do not delete it (must be empty)")
    options = parser.parse_args(arguments)
    if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep {options.keep} is not empty. Name a new folder.")
    with tempfile.TemporaryDirectory() as scratch:
        work = (Path(scratch) if options.keep is None else options.keep).resolve()
        work.mkdir(parents=True, exist_ok=True)
        kill_options = {"kills": options.kills, "seed": options.seed, "ranks": options.ranks}
        trials = kill_often(
            convert_phantoms(work), work, settings, **kill_options, only_ranks=options.victims == "ranks"
        )
    print(summary(trials, options.seed))
    return 1 if any(trial.problems for trial in trials) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
