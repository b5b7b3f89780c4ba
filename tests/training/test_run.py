"""Test that a run has one writer and no rank survives its launcher: locks, waiting starts, stopped and killed launchers.

The tests of the lock use processes that only hold it. The tests below use trainings under torchrun and `deepspeed`.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from helpers.commands import BIN, NO_GPU, ROOT, TINY, deepspeed, warm_python, warm_script
from helpers.tools import tool

from mura_dist.core import config
from mura_dist.core.errors import StopRequestedError, UserError
from mura_dist.distributed import processes as workers
from mura_dist.training import metrics_log
from mura_dist.training.run import Run

chaos = tool("robustness/chaos_train")

RUN_OF = """
import os, sys, time
from pathlib import Path
from mura_dist.core import config
from mura_dist.training.run import Run
def run(wait_s):
    return Run(Path(sys.argv[1]), config.load(None, [f"run={sys.argv[1]}", "shards=none", f"lock_wait_s={wait_s}"]))
"""
HOLDS = RUN_OF + "with run(0).writing():\n    print('holds', flush=True)\n    time.sleep(float(sys.argv[2]))\n"
BEATS = "import os, sys, time\nwhile True:\n    os.utime(sys.argv[1])\n    time.sleep(0.3)\n"
IN_TURN = (
    RUN_OF
    + """
with run(60).writing():
    for what in ("in", "out"):
        with open(Path(sys.argv[1]).parent / "book", "a") as book:
            book.write(f"{what} {os.getpid()}\\n")
        time.sleep(0.05)
"""
)


def run_of(folder: Path, wait_s: float = 0) -> Run:
    return Run(folder, config.load(None, [f"run={folder}", "shards=none", f"lock_wait_s={wait_s}"]))


@pytest.fixture
def processes() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start processes, and kill those that remain after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, more: dict[str, str] | None = None, **how: object) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        environment = {**os.environ, **NO_GPU, "OMP_NUM_THREADS": "1", **(more or {})}
        started.append(subprocess.Popen([str(word) for word in arguments], env=environment, **{**pipes, **how}))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def lock(folder: Path, **owner: object) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "lock"
    path.write_text(json.dumps({"host": platform.node(), **owner}))
    return path


# ---- the lock


def test_process_start_time(processes: Callable[..., subprocess.Popen[str]]) -> None:
    """It is constant for a live process, and None for an ended one, waited for or not."""
    child = processes("sleep", 60)
    since = workers.process_start_time(child.pid)
    assert since
    assert workers.process_start_time(child.pid) == since >= (workers.process_start_time(os.getpid()) or 0) > 0
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    os.kill(child.pid, 0)  # its number is still taken
    assert workers.process_start_time(child.pid) is None
    child.wait()
    assert workers.process_start_time(child.pid) is None
    assert workers.process_start_time(0) is None


BOOT = Path("/proc/sys/kernel/random/boot_id")
LOCKS = {
    "living": ({}, 0, False),
    "living, of another version": ({"born": None}, 0, False),
    "living, its heart stands still": ({}, 1000, False),  # stopped by Ctrl-Z, or its machine was asleep
    "its heart stands still, of another version": ({"born": None}, 1000, True),
    "of another container, whose numbers are not ours": ({"numbers": "pid:[1]", "process": 2**22 + 1}, 0, False),
    "of another container, its heart stands still": ({"numbers": "pid:[1]", "process": 2**22 + 1}, 1000, True),
    "its number is another's by now": ({"born": 1}, 0, True),
    "of another host": ({"host": "elsewhere", "process": 2**22 + 1}, 0, False),
    "of another host, its heart stands still": ({"host": "elsewhere", "process": 2**22 + 1}, 1000, True),
    "of a host of the same name": ({"boot": "another", "process": 2**22 + 1}, 0, False),
    "no such process": ({"process": 2**22 + 1}, 0, True),
}


@pytest.mark.parametrize("case", LOCKS)
def test_live_lock_is_respected_and_stale_lock_taken(
    case: str,
    processes: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts, age_s, is_taken = LOCKS[case]
    child = processes("sleep", 60)
    owner = {
        "process": child.pid,
        "born": workers.process_start_time(child.pid),
        "boot": BOOT.read_text().strip(),
    } | facts
    path = lock(tmp_path / "run", **{key: value for key, value in owner.items() if value is not None})
    os.utime(path, (time.time() - age_s,) * 2)
    before, run = path.read_bytes(), run_of(tmp_path / "run")
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 3600)  # our clock, which is not the disk's
    if is_taken:
        with run.writing():
            assert json.loads(path.read_bytes())["process"] == os.getpid()
        assert not path.exists()
        assert "taking over a stale lock" in capsys.readouterr().err
        return
    heartbeat = processes(sys.executable, "-c", BEATS, path)
    begin = time.monotonic()
    with pytest.raises(UserError) as refusal, run.writing():
        raise AssertionError("the lock was acquired")
    assert time.monotonic() - begin < 20, "a heartbeat was seen"
    heartbeat.kill()
    where = facts.get("host", platform.node())
    for text in (f"run={tmp_path / 'run'}", f"process {owner['process']} on {where}", "run=NEW", "Wait for it or stop"):
        assert text in str(refusal.value)
    assert path.read_bytes() == before
    assert sorted(path.name for path in path.parent.iterdir()) == ["lock"]


def test_lock_of_another_host_is_waited_for_until_stale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead host's lock is waited for longer than lock_wait_s, but not forever."""
    monkeypatch.setattr("mura_dist.distributed.lock.STALE_S", 2.0)
    lock(tmp_path / "run", host="elsewhere", process=1)
    begin = time.monotonic()
    with run_of(tmp_path / "run").writing():
        assert 1.5 < time.monotonic() - begin < 20
    assert "taking over a stale lock of process 1 on elsewhere" in capsys.readouterr().err


def test_old_empty_lock_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mura_dist.distributed.lock.UNVERIFIED_WAIT_S", 0.0)
    (tmp_path / "lock").touch()
    with pytest.raises(UserError, match="process 0 on unknown"), run_of(tmp_path).writing():
        raise AssertionError("the lock was acquired")
    os.utime(tmp_path / "lock", (0, 0))
    with run_of(tmp_path).writing():
        pass


def test_second_start_waits_for_the_first(
    processes: Callable[..., subprocess.Popen[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After its end or kill -9 the second start continues. It has logged once that it waits."""
    for lasts_s, killed in ((1.5, False), (60, True)):
        first = processes(sys.executable, "-c", HOLDS, tmp_path / "run", lasts_s)
        assert first.stdout is not None
        assert first.stdout.readline() == "holds\n"
        timer = threading.Timer(1.5, first.kill if killed else first.poll)
        timer.start()
        begin = time.monotonic()
        with run_of(tmp_path / "run", wait_s=30).writing():
            assert 1 < time.monotonic() - begin < 20
        timer.join()
        output = capsys.readouterr().err
        assert output.count("waiting up to 30 s for process") == 1
        assert f"process {first.pid} on {platform.node()}, which writes run={tmp_path / 'run'}" in output
        assert ("stale lock" in output) == killed


def test_wait_for_the_lock_is_limited(processes: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    first = processes(sys.executable, "-c", HOLDS, tmp_path / "run", 60)
    assert first.stdout is not None
    first.stdout.readline()
    begin = time.monotonic()
    message = f"process {first.pid} on .*waited 1 s"
    with pytest.raises(UserError, match=message), run_of(tmp_path / "run", wait_s=1.3).writing():
        raise AssertionError("the lock was acquired")
    assert 1.3 <= time.monotonic() - begin < 20


def test_signal_ends_the_wait_for_the_lock(tmp_path: Path) -> None:
    path, stop = lock(tmp_path / "run", host="elsewhere", process=1), threading.Event()
    threading.Timer(0.5, stop.set).start()
    begin = time.monotonic()
    with (
        pytest.raises(StopRequestedError, match="The same command resumes"),
        run_of(tmp_path / "run", 60).writing(stop),
    ):
        raise AssertionError("the lock was acquired")
    assert time.monotonic() - begin < 20
    assert json.loads(path.read_bytes())["host"] == "elsewhere"
    assert not (tmp_path / "run" / "status.json").exists(), "nothing was done, so nothing is written"


@pytest.mark.slow
def test_many_starts_write_one_at_a_time(processes: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """All find the same stale lock, and only one at a time holds it."""
    lock(tmp_path / "run", process=2**22 + 1)
    starts = [processes(sys.executable, "-c", IN_TURN, tmp_path / "run") for _ in range(6)]
    for start in starts:
        _, stderr = start.communicate(timeout=90)
        assert start.returncode == 0, stderr
    book = [line.split() for line in (tmp_path / "book").read_text().splitlines()]
    assert [what for what, _ in book] == ["in", "out"] * 6
    assert [who for _, who in book[::2]] == [who for _, who in book[1::2]]
    assert {int(who) for _, who in book} == {start.pid for start in starts}


@pytest.mark.parametrize("where", ["below a file", "in a folder that takes nothing"])
def test_unwritable_folder_is_refused(where: str, tmp_path: Path) -> None:
    """Even root cannot write in /proc."""
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run" if where == "below a file" else Path("/proc/run")
    message = rf"run={folder} cannot be written \(.*\)\. Make it writable, or give run= on another disk\."
    with pytest.raises(UserError, match=message), run_of(folder).writing():
        raise AssertionError("the lock was acquired")


def test_read_only_folder_is_refused_before_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.access answers as on a read-only disk, because a mount needs root."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with (
        pytest.raises(UserError, match=r"cannot be written \(read-only, or owned by another user\)"),
        run_of(tmp_path).writing(),
    ):
        raise AssertionError("the lock was acquired")
    assert list(tmp_path.iterdir()) == []


# ---- trainings under their launchers

LAUNCHERS: dict[str, Callable[[], Sequence[object]]] = {
    "torchrun": lambda: ("torchrun", "--standalone", "--nproc-per-node", 2, "-m", "mura_dist.train"),
    "deepspeed": lambda: deepspeed(2),
    "plain": lambda: ("mura-dist", "train"),
}
EPOCHS = 8
LIMIT_S = 40  # for what takes 1 to 15 s on a quiet machine; what it is told apart from takes a minute or more


def launch(
    start: Callable[..., subprocess.Popen[str]], name: str, shards: Path, run: Path, *arguments: str, warm: bool = False
):
    """Start a training in its own session, with a log file next to the run. `warm`: ranks have another parent and number."""
    script, *rest = LAUNCHERS[name]()
    launcher = [*(warm_script(script) if warm else [BIN / script]), *rest]
    settings = (*TINY, f"epochs={EPOCHS}", f"shards={shards}", f"run={run}", "--quiet", *arguments)
    with open(run.with_name("log"), "a") as log:
        how = {"PYTHON_EXEC": warm_python()} if warm else {}
        return start(*launcher, *settings, stdout=log, stderr=log, cwd=run.parent, more=how)


def log_of(run: Path) -> str:
    return run.with_name("log").read_text()


def steps(run: Path) -> int:
    """Return the number of steps in metrics.jsonl."""
    return sum(line["kind"] == "step" for line in metrics_log.read(run / "metrics.jsonl"))


def until_it_trains(run: Path, process: subprocess.Popen[str], more_than: int = 3) -> None:
    end = time.monotonic() + 120
    while steps(run) <= more_than:
        assert process.poll() is None, log_of(run)
        assert time.monotonic() < end, log_of(run)
        time.sleep(0.02)


def gone_after(pids: list[int], limit_s: float) -> float:
    """Wait until all processes have ended, at most `limit_s`, and return the seconds."""
    begin = time.monotonic()
    while alive := [pid for pid in pids if workers.process_start_time(pid) is not None]:
        assert time.monotonic() - begin < limit_s, f"{alive} still live after {limit_s} s"
        time.sleep(0.02)
    return time.monotonic() - begin


@pytest.fixture(scope="module")
def undisturbed(reference_run: Callable[..., Path]) -> Path:
    """An uninterrupted run of two ranks."""
    return reference_run(2, f"epochs={EPOCHS}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.nightly(part="kills"))])
def test_ranks_exit_after_launcher_kill_and_next_start_finishes(
    name: str, undisturbed: Path, shard_folder: Path, tmp_path: Path, processes: Callable[..., subprocess.Popen[str]]
) -> None:
    """After kill -9 of the launcher its processes exit. An immediate second start waits for them and ends bit-identical."""
    run = tmp_path / "run"
    first = launch(processes, name, shard_folder, run)
    until_it_trains(run, first)
    pids = chaos.processes_of(run)
    assert len(pids) == (3 if name == "torchrun" else 4)
    first.kill()
    second = launch(processes, name, shard_folder, run, warm=True)
    gone_after(pids, LIMIT_S)
    assert second.wait(180) == 0, log_of(run)
    assert "the launcher has ended" in log_of(run)
    assert not chaos.differences(undisturbed, run)
    assert not chaos.survivors(run)


KILLS = pytest.mark.nightly(part="kills")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stop_signal", "warm"),
    [
        ("torchrun", signal.SIGTERM, True),
        pytest.param("torchrun", signal.SIGINT, False, marks=KILLS),
        pytest.param("deepspeed", signal.SIGTERM, False, marks=KILLS),
        pytest.param("deepspeed", signal.SIGINT, False, marks=KILLS),
    ],
)
def test_stopped_launcher_leaves_a_resumable_run(
    name: str,
    stop_signal: signal.Signals,
    warm: bool,
    undisturbed: Path,
    shard_folder: Path,
    tmp_path: Path,
    processes: Callable[..., subprocess.Popen[str]],
) -> None:
    """SIGTERM goes to the launcher, as from a scheduler, SIGINT to its process group, as from Ctrl-C."""
    run = tmp_path / "run"
    first = launch(processes, name, shard_folder, run, warm=warm)
    until_it_trains(run, first)
    pids = chaos.processes_of(run)
    os.kill(first.pid, stop_signal) if stop_signal == signal.SIGTERM else os.killpg(first.pid, stop_signal)
    first.wait(LIMIT_S)
    gone_after(pids, LIMIT_S)
    assert Run.load(run).status()["state"] == "stopped", log_of(run)
    step = steps(run)
    assert max(chaos._checkpoints(run)) == f"step-{step:08d}", "the very step it was at"
    written = (run / "metrics.jsonl").read_bytes()
    second = launch(processes, name, shard_folder, run, warm=True)
    assert second.wait(180) == 0, log_of(run)
    assert (run / "metrics.jsonl").read_bytes().startswith(written), "nothing was done twice"
    assert not chaos.differences(undisturbed, run)


@pytest.mark.slow
def test_second_training_waits_then_fails_or_resumes(
    shard_folder: Path, tmp_path: Path, processes: Callable[..., subprocess.Popen[str]]
) -> None:
    run = tmp_path / "run"
    first = launch(processes, "plain", shard_folder, run, "epochs=5000")
    until_it_trains(run, first)
    refused = launch(processes, "plain", shard_folder, run, "lock_wait_s=2", warm=True)
    assert refused.wait(60) == 2, log_of(run)
    assert f"waiting up to 2 s for process {first.pid} on {platform.node()}" in log_of(run)
    assert f"is being written by process {first.pid} on {platform.node()}" in log_of(run)
    assert first.poll() is None
    interrupted, patient = (launch(processes, "plain", shard_folder, run, "epochs=5000", warm=True) for _ in range(2))
    end = time.monotonic() + 60
    while log_of(run).count("waiting up to 60 s") < 2:
        assert time.monotonic() < end, log_of(run)
        time.sleep(0.05)
    interrupted.send_signal(signal.SIGTERM)
    assert interrupted.wait(LIMIT_S) == 3, log_of(run)
    first.send_signal(signal.SIGTERM)
    assert first.wait(LIMIT_S) == 3, log_of(run)
    step = steps(run)
    until_it_trains(run, patient, more_than=step)
    assert Run.load(run).status()["state"] == "running"
    patient.send_signal(signal.SIGINT)
    assert patient.wait(LIMIT_S) == 3, log_of(run)
    assert Run.load(run).status()["state"] == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, None, pytest.param(signal.SIGINT, marks=KILLS)])
def test_waiting_ranks_exit_with_rank_0(
    stop_signal: signal.Signals | None,
    shard_folder: Path,
    tmp_path: Path,
    processes: Callable[..., subprocess.Popen[str]],
) -> None:
    """Rank 0 stops waiting for the lock, refused (None) or by a signal. The other rank, blocked in torch, exits too."""
    run = tmp_path / "run"
    processes(sys.executable, "-c", BEATS, lock(run, host="elsewhere", process=1))
    start = launch(
        processes, "torchrun", shard_folder, run, f"lock_wait_s={1 if stop_signal is None else 60}", warm=True
    )
    end = time.monotonic() + 60
    while "waiting up to" not in log_of(run):
        assert time.monotonic() < end, log_of(run)
        time.sleep(0.05)
    if stop_signal is not None:
        start.send_signal(stop_signal)
    assert start.wait(LIMIT_S) != 0
    assert ("is being written by process 1 on elsewhere" if stop_signal is None else "stopped while waiting") in log_of(
        run
    )
    assert not chaos.survivors(run, 1)
    assert sorted(path.name for path in run.iterdir()) == ["lock"]


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [15, pytest.param(16, marks=KILLS)])
def test_stop_in_the_last_step_is_not_done(
    num_steps: int, shard_folder: Path, tmp_path: Path, processes: Callable[..., subprocess.Popen[str]]
) -> None:
    """The signal comes at step `num_steps` of 16: the run is stopped or done, and done after the next start."""
    run = tmp_path / "run"
    first = launch(processes, "plain", shard_folder, run, "epochs=2", warm=True)
    while steps(run) < num_steps:
        assert first.poll() is None, log_of(run)
        time.sleep(0.0005)
    first.send_signal(signal.SIGTERM)
    status = first.wait(LIMIT_S)
    assert (status, Run.load(run).status()["state"]) in ((3, "stopped"), (0, "done")), log_of(run)
    assert status == 3 or chaos.last_line(run)["kind"] == "epoch"
    assert launch(processes, "plain", shard_folder, run, "epochs=2", warm=True).wait(60) == 0
    assert Run.load(run).status()["state"] == "done"
    assert (chaos.last_line(run)["kind"], chaos.last_line(run)["step"]) == ("epoch", 16), (
        "the last weights were evaluated"
    )


@pytest.mark.slow
@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, pytest.param(signal.SIGUSR2, marks=KILLS)])
def test_launch_script_exit_status_after_stop(stop_signal: signal.Signals, shard_folder: Path, tmp_path: Path) -> None:
    """launch/local.sh passes a signal on, and its exit status follows status.json, not torchrun."""
    run = tmp_path / "run"
    arguments = (*TINY, "epochs=5000", f"shards={shard_folder}", f"run={run}", "--quiet")
    with open(tmp_path / "log", "wb") as log:
        page = subprocess.Popen(
            ["bash", ROOT / "launch" / "local.sh", "2", *arguments],
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHON_EXEC": warm_python()},
        )
        try:
            until_it_trains(run, page)
            page.send_signal(stop_signal)
            assert page.wait(30) == 3, (tmp_path / "log").read_text()
        finally:
            for process in chaos.processes_of(run):
                os.kill(process, signal.SIGKILL)
            page.wait(10)
    assert Run.load(run).status()["state"] == "stopped"
    output = (tmp_path / "log").read_text()
    assert "the launcher has ended" not in output, "torchrun passed the signal on and survived it"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "later", "status"),
    [("kill -TERM $$", "stopped", 3), ("kill -TERM $$", "failed", 143), ("exit 1", "stopped", 1)],
)
def test_launch_script_waits_for_remaining_ranks(launcher: str, later: str, status: int, tmp_path: Path) -> None:
    """After a signal deepspeed exits at once, and its ranks save seconds later. A launcher that ends by itself has waited."""
    run = run_of(tmp_path / "run")
    run.write_status("running")
    timer = threading.Timer(60 if status == 1 else 5, run.write_status, [later])
    timer.start()
    script = 'source launch/outcome.sh; run_training bash -c "$0" -- "$@"'
    arguments = ["bash", "-c", script, launcher, f"run={run.folder}", "shards=none"]
    assert subprocess.run(arguments, cwd=ROOT, timeout=100, check=False).returncode == status
    assert timer.finished.is_set() == (status != 1)
    timer.cancel()


@KILLS
def test_training_without_launcher_survives_its_shell(
    shard_folder: Path, tmp_path: Path, processes: Callable[..., subprocess.Popen[str]]
) -> None:
    run = tmp_path / "run"
    settings = " ".join((*TINY, "epochs=5000", f"shards={shard_folder}", f"run={run}", "--quiet"))
    (tmp_path / "log").touch()
    line = f"RANK=0 nohup {BIN / 'mura-dist'} train {settings} >>{tmp_path / 'log'} 2>&1 & wait"
    shell = processes("bash", "-c", line)
    until_it_trains(run, shell)
    shell.kill()
    shell.wait()
    [training] = chaos.processes_of(run)
    step = steps(run)
    time.sleep(3 * workers.POLL_S)
    assert workers.process_start_time(training) is not None, log_of(run)
    assert steps(run) > step
    os.kill(training, signal.SIGTERM)
    gone_after([training], LIMIT_S)
