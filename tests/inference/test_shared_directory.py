"""Test ranks that share a prediction through OUT: the tables equal one process, and one process writes at a time."""

import functools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.cache import Cache
from helpers.commands import killed_when, processes_of, run
from helpers.predictions import FILES, contents, draw
from helpers.ranks import LAUNCHERS, start_rank

from mura_dist.core.errors import RunError, UserError
from mura_dist.distributed import heartbeat, lock
from mura_dist.inference import output_folder
from mura_dist.inference.predict import predict

NUM, CHUNK = 300, 32
RANK = f"""
import os, signal, sys, threading, time
from mura_dist.cli.main import main
from mura_dist.distributed import heartbeat, lock
from mura_dist.inference import predict
from mura_dist.inference.engine_onnxruntime import OnnxRuntime
predict.CHUNK, heartbeat.HEARTBEAT_TIMEOUT_S, lock.HEARTBEAT_S = {CHUNK}, 1.0, 0.1
dies_at, slow_s = int(os.environ.get("DIES_AT", -1)), float(os.environ.get("SLOW_S", 0))
compute, seen, one = OnnxRuntime.run, 0, threading.Lock()  # streams are threads
def counted(self, image, outputs):
    global seen
    with one: seen += len(image)
    time.sleep(slow_s)
    if 0 <= dies_at < seen: os.kill(os.getpid(), signal.SIGKILL)
    return compute(self, image, outputs)
OnnxRuntime.run = counted
if __name__ == "__main__":
    status = main(sys.argv[1:])
    print("predicted", seen, file=sys.stderr)
    sys.exit(status)
"""


@pytest.fixture(scope="module")
def ten_chunks(cache: Cache, model: Path) -> tuple[Path, Path, Path, dict[str, bytes]]:
    """Return a script that runs a rank, a model, a directory of ten chunks, and the tables of one process."""
    folder = cache.path("ten-chunks", functools.partial(_draw_ten_chunks, model))
    return folder / "rank.py", model, folder / "in", contents(folder / "out")


def _draw_ten_chunks(model: Path, folder: Path) -> None:
    source = folder / "in"
    pictures = [draw(folder / "pictures" / f"{number}.png", number).read_bytes() for number in range(10)]
    for number in range(NUM):
        path = source / "valid" / "XR_HAND" / f"patient{number % 50:05d}" / f"study1_positive/image{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures[number % 10] if number % 7 else b"junk")
    (folder / "rank.py").write_text(RANK)
    predict(model, source, folder / "out")


@pytest.fixture
def start(
    ten_chunks: tuple[Path, Path, Path, dict[str, bytes]], tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts rank r of n with output tmp_path/out. Kill the remaining ranks at the end."""
    script, model, source, _ = ten_chunks
    started: list[subprocess.Popen[str]] = []

    def rank(
        number: int, size: int, *arguments: object, launcher: str = "Slurm", cold: bool = False, **variables: object
    ) -> subprocess.Popen[str]:
        environment = LAUNCHERS[launcher](number, size) | variables
        command = ("predict", model, source, "--out", tmp_path / "out", "--workers", 1, *arguments)
        started.append(start_rank(script, environment, *command, cold=cold))
        return started[-1]

    yield rank
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def parse_num_predicted(outputs: str) -> int:
    return int(outputs.rpartition("predicted ")[2])


NUM_RADIOGRAPHS = sum(number % 7 != 0 for number in range(NUM))


@pytest.mark.parametrize(
    ("launcher", "size", "batch_size"),
    [
        ("torchrun", 2, 5),
        pytest.param("Slurm", 3, 300, marks=pytest.mark.slow),
        pytest.param("Slurm", 2, 1, marks=pytest.mark.nightly(part="launchers")),
    ],
)
def test_tables_of_ranks_identical_to_one_process(
    launcher: str, size: int, batch_size: int, ten_chunks: Any, start: Callable[..., Any], tmp_path: Path
) -> None:
    ranks = [start(rank, size, "--batch-size", batch_size, launcher=launcher) for rank in reversed(range(size))]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, outputs
    assert contents(tmp_path / "out") == ten_chunks[3]
    assert [bool(out) for out, _ in outputs] == [False] * (size - 1) + [True], "only rank 0 prints"
    assert sum(parse_num_predicted(err) for _, err in outputs) == NUM_RADIOGRAPHS, "no radiograph is predicted twice"
    assert all(parse_num_predicted(err) > 0 for _, err in outputs)
    assert sorted(os.listdir(tmp_path / "out")) == FILES


@pytest.mark.slow
def test_killed_torchrun_ranks_resume(ten_chunks: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("-m", "mura_dist.predict", ten_chunks[1], ten_chunks[2], "--out", out, "--quiet")
    command = ("torchrun", "--standalone", "--nproc-per-node", 2, *arguments)
    killed_when(lambda: any(out.glob(".parts/*")), out, *command)
    assert not (out / "predict.json").exists()
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == ten_chunks[3]
    assert done.stdout.count("radiographs of") == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds ranks in /proc")
def test_ranks_exit_with_a_killed_launcher_and_the_next_run_resumes(
    ten_chunks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run would be refused while the former ranks live, which have 30 s of work each."""
    monkeypatch.setenv("SLOW_S", "0.3")
    out = tmp_path / "out"
    arguments = ("predict", ten_chunks[1], ten_chunks[2], "--out", out, "--batch-size", 1, "--quiet")
    command = ("torchrun", "--standalone", "--nproc-per-node", 2, ten_chunks[0], *arguments)
    chunk_files = [out / ".parts" / f"00000{number}.json" for number in (0, 1)]
    survivors = killed_when(lambda: all(path.exists() for path in chunk_files), out, *command, launcher_alone=True)
    assert len(survivors) == 3
    monkeypatch.setenv("SLOW_S", "0")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert processes_of(out) == [], "the former ranks exited"
    assert contents(out) == ten_chunks[3]


def test_rank_0_predicts_the_chunks_of_a_lost_rank(ten_chunks: Any, start: Callable[..., Any], tmp_path: Path) -> None:
    """srun does not stop the other ranks. Two chunks of the lost rank are finished."""
    first, second = start(0, 2, SLOW_S=0.05), start(1, 2, DIES_AT=2 * CHUNK)
    _, outputs = first.communicate(timeout=120)
    assert second.wait() == -signal.SIGKILL
    assert first.returncode == 0, outputs
    assert contents(tmp_path / "out") == ten_chunks[3]
    assert parse_num_predicted(outputs) < NUM_RADIOGRAPHS


def test_refused_rank_does_not_block_rank_0(ten_chunks: Any, start: Callable[..., Any], tmp_path: Path) -> None:
    first, second = start(0, 2), start(1, 2, "--study-by", "file")
    _, outputs = second.communicate(timeout=120)
    assert second.returncode == 2
    assert "mura-dist: rank 1: --out" in outputs
    assert "holds a run with study_by=auto, this one has study_by=file" in outputs
    assert first.wait(timeout=120) == 0
    assert contents(tmp_path / "out") == ten_chunks[3]


@pytest.mark.nightly(part="kills")
def test_run_resumes_with_another_world_size_after_losing_rank_0(
    ten_chunks: Any, start: Callable[..., Any], tmp_path: Path
) -> None:
    """The other ranks finish their share. The next run predicts the missing radiographs only."""
    ranks = [start(0, 3, DIES_AT=CHUNK), start(1, 3), start(2, 3)]
    outputs = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL, 0, 0]
    assert not (tmp_path / "out" / "predict.json").exists()
    parts = [json.loads(path.read_bytes()) for path in (tmp_path / "out" / ".parts").glob("0*.json")]
    num_finished = sum(len(result["predictions"]) for result in parts)
    assert num_finished >= sum(parse_num_predicted(output) for output in outputs[1:])
    ranks = [start(rank, 2) for rank in range(2)]
    outputs = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert sum(parse_num_predicted(output) for output in outputs) == NUM_RADIOGRAPHS - num_finished
    assert contents(tmp_path / "out") == ten_chunks[3]


@pytest.mark.nightly(part="launchers")
def test_ranks_of_a_finished_run_predict_nothing(ten_chunks: Any, start: Callable[..., Any], tmp_path: Path) -> None:
    predict(ten_chunks[1], ten_chunks[2], tmp_path / "out")
    ranks = [start(rank, 2) for rank in range(2)]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [(rank.returncode, parse_num_predicted(err)) for rank, (_, err) in zip(ranks, outputs, strict=True)] == [
        (0, 0)
    ] * 2
    assert sorted(os.listdir(tmp_path / "out")) == FILES


def test_rank_without_rank_0_raises_run_error(ten_chunks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(output_folder, "PLAN_WAIT_S", 0.3)
    with pytest.raises(
        RunError, match=r"rank 1 of 2 waited 0 s for rank 0 to begin in .*\. Look at the output of rank 0"
    ):
        predict(ten_chunks[1], ten_chunks[2], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- one writer


def test_second_process_is_refused_while_the_first_runs(
    ten_chunks: Any, start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "LOCK_WAIT_S", 0.5)
    first = start(0, 1, SLOW_S=0.1, cold=True)
    while not (tmp_path / "out" / ".parts" / "plan.json").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    start_s = time.monotonic()
    message = rf"^--out .*out is being written by process {first.pid} on .*\. Wait for it or stop it, or give another --out\.$"
    with pytest.raises(UserError, match=message):
        predict(ten_chunks[1], ten_chunks[2], tmp_path / "out")
    assert time.monotonic() - start_s < 15
    _, outputs = first.communicate(timeout=120)
    assert first.returncode == 0, outputs
    assert contents(tmp_path / "out") == ten_chunks[3]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds children in /proc")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.nightly(part="kills"))]
)
def test_child_processes_exit_with_their_parent(
    ten_chunks: Any, start: Callable[..., Any], tmp_path: Path, number: signal.Signals
) -> None:
    first = start(0, 1, SLOW_S=0.1, cold=True)
    while not list((tmp_path / "out" / ".parts").glob("0*.json")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    outputs = [path.read_text().split() for path in Path(f"/proc/{first.pid}/task").glob("*/children")]
    children = [int(pid) for pids in outputs for pid in pids]
    assert children
    first.send_signal(number)
    _, message = first.communicate(timeout=60)
    if number == signal.SIGINT:
        assert first.returncode == 3
        assert message.startswith("mura-dist: stopped after ")
        assert len(message.splitlines()) == 2  # and the line of the script
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children):
        assert time.monotonic() < end
        time.sleep(0.1)


# ---- heartbeats


def test_heartbeat_age_uses_the_local_clock(tmp_path: Path) -> None:
    path, monitor = tmp_path / "rank-1", heartbeat.HeartbeatMonitor()
    path.touch()
    os.utime(path, (0, 0))  # clocks of machines differ
    assert monitor.seconds_since_beat(path) < 0.1
    time.sleep(0.3)
    assert monitor.seconds_since_beat(path) >= 0.3
    os.utime(path, (1, 1))
    assert monitor.seconds_since_beat(path) < 0.1
    path.unlink()
    time.sleep(0.2)
    assert monitor.seconds_since_beat(path) >= 0.2


def test_heartbeat_file_is_updated_and_deleted_at_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    folder = tmp_path / "new" / "out" / ".parts"
    with heartbeat.join_folder(folder, 3, lock.LockOptions("", "", 0), threading.Event()):
        path = heartbeat.heartbeat_path(folder, 3)
        before = path.stat().st_mtime_ns
        time.sleep(0.3)
        assert path.stat().st_mtime_ns > before
    assert os.listdir(tmp_path) == []
