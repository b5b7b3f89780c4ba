"""`kill -9` at random and chosen moments of a training, then the same command again: every tensor is an undisturbed run's.

python tools/robustness/chaos_train.py [--kills 20] [--seed S] [--ranks 2] [--victims any] [--keep DIR] [-- key=value ...]

    phantoms -> shards (64 px) -> trained whole, timed -> for each kill: a fresh run, killed once to three times by SIGKILL,
    each time started again at once by the same command, trained to its end, compared

key=value are settings of the training, added to those below, as in: -- zero_stage=1 epochs=20

A moment is random (uniform over the time that the whole training took, over the number of this story's kills), at the start
(uniform over start-up: imports, lock, meeting), in a write (a checkpoint's `.partial` folder has just appeared) or in an
evaluation (an epoch's last step is logged, its evaluation is not). A victim is one of the ranks, torchrun alone, whose ranks have
to leave by themselves, or all at once; with --victims ranks always one rank. Stories take turns in their first kill's moment,
with --victims ranks also in its rank; the rest is drawn.

Compared are all tensors of the checkpoints that both runs kept, the last and the best always among them, bit for bit; all keys
of their state.json (learning rate's plateau, best value, counters); metrics.jsonl line by line but for the wall clock's fields.
Exit status: 0 all the same; 1 a difference, a surviving process or a command that failed.
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
}  # bit for bit is a promise of the CPU, with as many threads
WALL_CLOCK = {  # the fields of metrics.jsonl that measure time, as metrics_log.py names them
    *("time_s", "evaluation_s", "images_per_s"),
    *("data_wait_share", "limited_by", "overhead_share"),
}
AIMS = ("random", "write", "evaluation", "start")
LIMIT_S = 600.0  # one training to its end
GONE_S = 20.0  # how long ranks may need to notice that their launcher is dead, and to leave


@dataclass(frozen=True)
class ReferenceRun:
    """The training that nobody killed. `seconds` in all, of these `start_s` before its first line of metrics.jsonl."""

    run: Path
    seconds: float
    start_s: float
    steps_per_epoch: int
    epochs: int
    writes: int  # checkpoints written


@dataclass(frozen=True)
class Aim:
    """When to kill: `after_s` the start, or `after_s` the beginning of a write or an evaluation, `skip` of them let pass."""

    kind: str
    after_s: float
    skip: int
    victim: str  # "rank 0", ..., "torchrun", "all"


@dataclass
class Story:
    """One run's. `hits`: what was killed, when; `late`: starts that had ended before their moment came."""

    hits: list[Aim] = field(default_factory=list)
    places: list[str] = field(default_factory=list)  # where the run stood at each kill
    torn: int = 0  # kills that left a half-written checkpoint
    late: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        hits = ", ".join(
            f"{hit.victim} ({hit.kind}, {position})" for hit, position in zip(self.hits, self.places, strict=True)
        )
        late = f", {self.late} done before" if self.late else ""
        return f"killed {hits or 'never'}{late}: {'; '.join(self.problems) or 'the same bits'}"


def command(shards: Path, run: Path, ranks: int, arguments: Sequence[str]) -> list[str]:
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), "-m", "mura_dist.train"]
    return [*launcher, *SETTINGS, f"shards={shards}", f"run={run}", *arguments, "--quiet"]


@contextlib.contextmanager
def started(arguments: Sequence[str], log: Path) -> Iterator[subprocess.Popen]:
    """A command in a session of its own that writes to `log`; what is left of it when the block ends is killed."""
    with open(log, "ab") as file:
        process = subprocess.Popen(
            arguments, stdout=file, stderr=file, start_new_session=True, env={**os.environ, **ENVIRONMENT}
        )
    try:
        yield process
    finally:
        kill(process.pid, "all")
        process.wait()


def to_its_end(arguments: Sequence[str], log: Path) -> str:
    """What went wrong, or ""."""
    with started(arguments, log) as process:
        try:
            status = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"did not end within {LIMIT_S:.0f} s"
    message = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    return f"ended with status {status}: {message}" if status else ""


# ---- who is there, and how they end


def _processes() -> Iterator[tuple[int, int, str]]:
    """(process, parent, state) of all that this system has. Training is for Linux, so there is a /proc."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):  # it ended meanwhile
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            yield int(path.parent.name), int(parent), state


def ranks_of(launcher: int) -> dict[int, int]:
    """rank -> process, of those that this torchrun started and that live."""
    results = {}
    for process, parent, state in _processes():
        if parent == launcher and state not in "ZX":
            with contextlib.suppress(OSError):
                for pair in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
                    if pair.startswith(b"RANK="):
                        results[int(pair.removeprefix(b"RANK="))] = process
    return results


def processes_of(run: Path) -> list[int]:
    """Living processes, but for this one, whose command line names this run: launchers and ranks."""
    results = []
    for process, _, state in _processes():
        with contextlib.suppress(OSError):
            arguments = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            if state not in "ZX" and process != os.getpid() and f"run={run}".encode() in arguments:
                results.append(process)
    return results


def kill(launcher: int, victim: str) -> str:
    """SIGKILL; says who it was: torchrun itself where that rank is not there (yet)."""
    ranks = ranks_of(launcher)
    number = int(victim.removeprefix("rank ")) if victim.startswith("rank ") else -1
    doomed = [launcher, *ranks.values()] if victim == "all" else [ranks.get(number, launcher)]
    for process in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return victim if number in ranks or number < 0 else "torchrun"


def survivors(run: Path, limit_s: float = GONE_S) -> str:
    """ "", once no process of the run lives. What is still there after `limit_s` is named, then ended."""
    end = time.monotonic() + limit_s
    while alive := processes_of(run):
        if time.monotonic() > end:
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            return f"{len(alive)} processes outlived their launcher by {limit_s:.0f} s"
        time.sleep(0.05)
    return ""


# ---- where a run stands


def partial_writes(run: Path) -> frozenset[str]:
    """Checkpoints on their way, by name."""
    return frozenset(path.name for path in (run / "checkpoints").glob(".step-*.partial"))


def last_line(run: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl, {} where there is none."""
    path = run / "metrics.jsonl"
    with contextlib.suppress(OSError, IndexError, ValueError), open(path, "rb") as file:
        file.seek(max(path.stat().st_size - 2000, 0))
        return json.loads(file.read().rpartition(b"\n")[0].splitlines()[-1])
    return {}


def evaluations(run: Path, steps_per_epoch: int) -> frozenset[str]:
    """The evaluation that is going on: an epoch's last step was logged, and nothing since."""
    line = last_line(run)
    ended = line.get("kind") == "step" and line["step"] % steps_per_epoch == 0
    return frozenset([str(line["step"])] if ended else [])


def position(run: Path) -> str:
    line = last_line(run)
    torn = f", inside {min(writing)}" if (writing := partial_writes(run)) else ""
    return f"step {line['step'] if line else 0}{torn}"


def moment(aim: Aim, run: Path, reference: ReferenceRun) -> Callable[[], bool]:
    """A question to ask over and over: is it time to kill?"""
    begin = time.monotonic()
    if aim.kind in ("random", "start"):
        return lambda: time.monotonic() >= begin + aim.after_s
    before: frozenset[str] = frozenset()
    passed = -1 if _present(aim, run, reference) else 0  # one that an earlier kill left behind is none

    def now() -> bool:
        nonlocal before, passed
        present = _present(aim, run, reference)
        passed += len(present - before)
        before = present
        return passed > aim.skip

    return now


def _present(aim: Aim, run: Path, reference: ReferenceRun) -> frozenset[str]:
    return partial_writes(run) if aim.kind == "write" else evaluations(run, reference.steps_per_epoch)


# ---- what is compared


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """name -> (dtype, shape, bytes) of a safetensors file: a length, a JSON header, the bytes. Torch is not needed."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    header.pop("__metadata__", None)
    return {
        name: (about["dtype"], tuple(about["shape"]), body[slice(*about["data_offsets"])])
        for name, about in header.items()
    }


def differences(reference: Path, actual: Path) -> list[str]:
    """What tells run `other` from run `whole`: checkpoints, tensors, state, metrics."""
    expected_items, actual_items = _checkpoints(reference), _checkpoints(actual)
    best, best_other = (_summary(run).get("best_checkpoint") for run in (reference, actual))
    results = [f"the best checkpoint is {best_other}, not {best}"] if best != best_other else []
    if max(expected_items, default="") != max(actual_items, default=""):
        results.append(
            f"the last checkpoint is {max(actual_items, default='none')}, not {max(expected_items, default='none')}"
        )
    for name in sorted(expected_items & actual_items):
        results += _checkpoint_differences(reference / "checkpoints" / name, actual / "checkpoints" / name)
    return results + _metrics_differences(_metrics(reference), _metrics(actual))


def _checkpoints(run: Path) -> set[str]:
    """Names of the complete ones."""
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
    """Its lines without the wall clock's fields. ValueError where one is torn: a finished run has none."""
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


# ---- the stories


def train_reference(shards: Path, work: Path, ranks: int, arguments: Sequence[str]) -> ReferenceRun:
    run, begin = work / "whole", time.monotonic()
    with started(command(shards, run, ranks, arguments), work / "whole.log") as process:
        while not last_line(run) and process.poll() is None:
            time.sleep(0.01)
        start_s = time.monotonic() - begin
        writes = 0
        before: frozenset[str] = frozenset()
        while process.poll() is None:
            present = partial_writes(run)
            writes, before = writes + len(present - before), present
            time.sleep(0.002)
    if process.returncode:
        message = (work / "whole.log").read_text(errors="replace").strip()
        raise SystemExit(f"the training that nobody killed ended with status {process.returncode}:\n{message[-2000:]}")
    lines = [line for line in _metrics(run) if line["kind"] == "epoch"]
    return ReferenceRun(run, time.monotonic() - begin, start_s, lines[1]["step"], len(lines) - 1, writes)


def draw_aims(
    rng: random.Random, number: int, reference: ReferenceRun, ranks: int, *, only_ranks: bool = False
) -> list[Aim]:
    """Draw one story's kills, one to three."""
    count = rng.choice((1, 1, 2, 3))
    each_rank = [f"rank {rank}" for rank in range(ranks)]
    victims = each_rank if only_ranks else [*each_rank, "torchrun", "all"]
    span_s = reference.start_s + (reference.seconds - reference.start_s) / count
    aims = []
    for place_in_story in range(count):
        kind = AIMS[number % len(AIMS)] if place_in_story == 0 else rng.choice(AIMS)
        after_s = rng.uniform(
            0, {"random": span_s, "start": reference.start_s, "write": 0.02, "evaluation": 0.02}[kind]
        )
        passing = {"write": reference.writes, "evaluation": reference.epochs}.get(kind, 0) // (2 * count)
        skip, victim = rng.randrange(passing + 1), rng.choice(victims)
        if only_ranks and place_in_story == 0:
            victim = each_rank[number // len(AIMS) % ranks]
        aims.append(Aim(kind, after_s, skip, victim))
    return aims


def killed(arguments: Sequence[str], run: Path, aim: Aim, reference: ReferenceRun, story: Story, log: Path) -> None:
    """One start that meets SIGKILL at its moment; `story` hears of it."""
    now = moment(aim, run, reference)
    with started(arguments, log) as process:
        while process.poll() is None and not now():
            time.sleep(0.001)
        if process.poll() is not None:
            story.late += 1
            return
        if aim.kind in ("write", "evaluation"):
            time.sleep(aim.after_s)
        victim = kill(process.pid, aim.victim)
        story.hits.append(Aim(aim.kind, aim.after_s, aim.skip, victim))
        story.places.append(position(run))
        story.torn += bool(partial_writes(run)) and victim in ("rank 0", "all")
        if victim.startswith("rank "):
            try:
                process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                story.problems.append(f"torchrun did not end within {LIMIT_S:.0f} s of the death of a rank")


def one_story(arguments: Sequence[str], run: Path, aims: Sequence[Aim], reference: ReferenceRun, log: Path) -> Story:
    """Starts, kills as often as there are aims, trains to the end and compares."""
    story = Story()
    for aim in aims:
        killed(arguments, run, aim, reference, story, log)
        while story.late and not story.hits:  # the machine has become faster
            shutil.rmtree(run, ignore_errors=True)
            aim = Aim("random", reference.seconds / 2**story.late, 0, aim.victim)
            killed(arguments, run, aim, reference, story, log)
    problem = to_its_end(arguments, log)
    story.problems += [problem] if problem else differences(reference.run, run)
    problem = survivors(run)
    story.problems += [problem] if problem else []
    return story


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
) -> list[Story]:
    """Trains whole into `work`, then `kills` runs that are killed. Each is said as it ends."""
    rng = random.Random(seed)
    reference = train_reference(shards, work, ranks, arguments)
    log(
        f"whole: {reference.epochs} epochs of {reference.steps_per_epoch} steps, {reference.writes} checkpoints, {ranks} ranks, "
        f"in {reference.seconds:.1f} s, {reference.start_s:.1f} s of them start-up"
    )
    stories = []
    for number in range(1, kills + 1):
        aims, run = draw_aims(rng, number, reference, ranks, only_ranks=only_ranks), work / f"killed-{number}"
        story = one_story(command(shards, run, ranks, arguments), run, aims, reference, work / f"killed-{number}.log")
        stories.append(story)
        log(f"kill {number}: {story}")
    return stories


def summary(stories: Sequence[Story], seed: int) -> str:
    hits = [hit for story in stories for hit in story.hits]
    victims = Counter("a rank" if hit.victim.startswith("rank ") else hit.victim for hit in hits)
    kinds = Counter(hit.kind for hit in hits)
    bad = sum(bool(story.problems) for story in stories)
    return (
        f"{len(stories)} trainings (seed {seed}), killed {len(hits)} times at work "
        f"({', '.join(f'{count} {name}' for name, count in sorted(victims.items()))}; "
        f"{', '.join(f'{count} {name}' for name, count in sorted(kinds.items()))}; "
        f"{sum(story.torn for story in stories)} left a half-written checkpoint): "
        f"{len(stories) - bad} the same bits, {bad} not"
    )


def drawn(work: Path) -> Path:
    """Shards of phantoms, 64 px."""
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
        description="Kill trainings; what follows -- are settings of the training.", allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=20, help="trainings to kill (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws moments and victims (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of a training (%(default)s)")
    parser.add_argument(
        "--victims",
        choices=("any", "ranks"),
        default="any",
        help="ranks: never torchrun, nor all at once (%(default)s)",
    )
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave all there (needs to be empty)")
    options = parser.parse_args(arguments)
    if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep {options.keep} is not empty; name a new folder")
    with tempfile.TemporaryDirectory() as scratch:
        work = (Path(scratch) if options.keep is None else options.keep).resolve()
        work.mkdir(parents=True, exist_ok=True)
        chosen = {"kills": options.kills, "seed": options.seed, "ranks": options.ranks}
        stories = kill_often(drawn(work), work, settings, **chosen, only_ranks=options.victims == "ranks")
    print(summary(stories, options.seed))
    return 1 if any(story.problems for story in stories) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
