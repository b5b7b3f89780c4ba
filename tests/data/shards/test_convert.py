"""convert.py beyond one process of one machine: shared by ranks, under limits, in bounded memory, on a disk that fills up."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import laws
from helpers.commands import ROOT, killed_when, run
from helpers.ranks import DIFFERS, LAUNCHERS, start_rank
from PIL import Image

from mura_dist.core.errors import RunError
from mura_dist.data.shards import convert as free_space
from mura_dist.data.shards import writer
from mura_dist.data.shards.convert import convert
from mura_dist.data.shards.reader import Shards
from mura_dist.data.shards.verify import verify
from mura_dist.distributed.worker_pool import PoolLimits


@pytest.fixture
def many_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven radiographs a shard: some twenty shards of the phantoms."""
    monkeypatch.setattr(free_space, "SAMPLES_PER_SHARD", 7)


RANKS = """
import sys
from mura_dist.data.shards import convert
convert.SAMPLES_PER_SHARD = 7
from mura_dist.cli.main import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("launcher", "size"),
    [
        ("Slurm", 2),
        pytest.param("torchrun", 3, marks=pytest.mark.slow),
        pytest.param("torchrun", 2, marks=pytest.mark.nightly(part="launchers")),
    ],
)
def test_ranks_share_a_conversion_with_the_same_bytes(
    launcher: str, size: int, phantoms: Path, tmp_path: Path, many_shards: None
) -> None:
    convert(phantoms, tmp_path / "alone", size=40, workers=2)
    script = tmp_path / "shards.py"
    script.write_text(RANKS)
    argv = ("shards", phantoms, tmp_path / "shared", "--size", 40, "--workers", 1, "--quiet")
    ranks = [start_rank(script, LAUNCHERS[launcher](rank, size), *argv) for rank in reversed(range(size))]
    output = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, output
    laws.same_bytes(tmp_path / "alone", tmp_path / "shared", leave_out=DIFFERS)
    assert [bool(out) for out, _ in output] == [False] * (size - 1) + [True], "the first rank speaks for all"
    assert json.loads((tmp_path / "shared" / "conversion.json").read_bytes())["ranks"] == size


@pytest.mark.slow
def test_torchrun_starts_the_ranks_killed_and_again(phantoms: Path, tmp_path: Path) -> None:
    convert(phantoms, tmp_path / "alone", size=40, workers=2)
    shared = tmp_path / "shared"
    argv = (ROOT / "tools/make_shards.py", phantoms, shared, "--size", 40, "--quiet")
    command = ("torchrun", "--standalone", "--nproc-per-node", 3, *argv)
    for _ in range(4):  # the ranks may be done before the kill
        shutil.rmtree(shared, ignore_errors=True)
        killed_when((shared / "conversion.json").exists, shared, *command)
        if not (shared / "index.json").exists():
            break
    assert not (shared / "index.json").exists()
    done = run(*command)
    assert done.returncode == 0, done.stderr
    laws.same_bytes(tmp_path / "alone", tmp_path / "shared", leave_out=DIFFERS)


@pytest.mark.parametrize(
    "requested", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.nightly(part="kills"))]
)
def test_asked_to_stop_it_says_so_and_the_same_command_goes_on(
    requested: signal.Signals, phantoms: Path, tmp_path: Path, many_shards: None
) -> None:
    """By a scheduler or a person: exit status 3, one line; then the bytes of one that was never asked."""
    convert(phantoms, tmp_path / "whole", size=40, workers=2)
    script, out = tmp_path / "shards.py", tmp_path / "out"
    script.write_text(RANKS)
    argv = ("shards", phantoms, out, "--size", 40, "--workers", 1, "--quiet")
    first = start_rank(script, {}, *argv)
    while not (out / "train-000000.json").exists():
        assert first.poll() is None
    first.send_signal(requested)
    output = first.communicate(timeout=60)
    assert first.returncode == 3, output
    assert output[1].splitlines() == ["mura-dist: stopped. Finished shards stay, and the same command resumes."]
    assert not (out / "index.json").exists()
    again = start_rank(script, {}, *argv)
    assert again.communicate(timeout=60)
    assert again.returncode == 0
    laws.same_bytes(tmp_path / "whole", out, leave_out=DIFFERS)


def test_a_batch_script_of_slurm_is_one_process(phantoms: Path, tmp_path: Path) -> None:
    """Outside srun Slurm tells of tasks that nobody started: whoever waited for them would wait for ever."""
    script = tmp_path / "shards.py"
    script.write_text(RANKS)
    argv = ("shards", phantoms, tmp_path / "out", "--size", 40, "--quiet")
    alone = start_rank(script, {"SLURM_PROCID": 0, "SLURM_NTASKS": 8}, *argv)
    assert alone.communicate(timeout=60)
    assert alone.returncode == 0


def test_what_a_silent_rank_left_undone_the_first_one_makes(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many_shards: None
) -> None:
    convert(phantoms, tmp_path / "alone", size=40, workers=2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(free_space, "SILENCE_S", 0.2)
    convert(phantoms, tmp_path / "shared", size=40, workers=2)
    laws.same_bytes(tmp_path / "alone", tmp_path / "shared", leave_out=DIFFERS)


def test_a_rank_whose_first_one_never_comes_says_so(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(free_space, "PLAN_WAIT_S", 0.3)
    with pytest.raises(RunError, match=r"rank 1 of 2 waited 0 s for rank 0 to begin in .*Check the output of rank 0"):
        convert(phantoms, tmp_path / "out", size=40)


# ---- limits


@pytest.fixture
def with_a_giant(phantoms: Path, tmp_path: Path) -> Path:
    """A few studies; one radiograph is of 48 million pixels, which is sound, but takes time and memory to read."""
    folder = tmp_path / "set"
    for study in sorted((phantoms / "train").glob("*/*/*"))[:6]:
        shutil.copytree(study, folder / study.relative_to(phantoms))
    first = sorted(folder.rglob("image1.png"))[0]
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000), np.uint8)
    Image.fromarray(np.tile(noise, (6, 8))).save(first, compress_level=1)
    return folder


def test_a_file_that_takes_too_long_or_too_much_is_one_failure_row(with_a_giant: Path, tmp_path: Path) -> None:
    complete = convert(with_a_giant, tmp_path / "whole", size=40, workers=2)
    assert complete is not None
    assert complete["unreadable"] == []
    for name, limits, code, reason in (
        ("slow", PoolLimits(processor_s=0.1), "unreadable", "its decoder did not finish within 0.1 s"),
        (
            "large",
            PoolLimits(memory_bytes=30 << 20),
            "too_large",
            "decoding this PNG needs more memory than is available",
        ),
    ):
        index = convert(with_a_giant, tmp_path / name, size=40, workers=2, limits=limits)
        assert index is not None
        assert [(item["code"], item["reason"]) for item in index["unreadable"]] == [(code, reason)]
        assert list(verify(tmp_path / name)) == []
        own, reference = Shards.open(tmp_path / name), Shards.open(tmp_path / "whole")
        for split in ("train", "tune"):
            for row in own.rows(split).tolist():
                np.testing.assert_array_equal(own.read_pixels(row), reference.read_pixels(row))


@contextlib.contextmanager
def workers_being_killed() -> Iterator[list[int]]:
    """While the block runs, somebody kills this process's worker processes, one after another."""
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        while len(killed) < 3 and not ended.wait(0.2):
            for pid in children()[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()


def children() -> list[int]:
    """This process's worker processes."""
    actual = [path.read_text().split() for path in Path(f"/proc/{os.getpid()}/task").glob("*/children")]
    commands = {int(pid): Path(f"/proc/{pid}/cmdline") for pids in actual for pid in pids}
    with contextlib.suppress(OSError):  # one has ended meanwhile
        return [pid for pid, command in commands.items() if b"spawn_main" in command.read_bytes()]
    return []


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds its workers in /proc")
def test_workers_killed_from_outside_leave_no_trace(phantoms: Path, tmp_path: Path) -> None:
    """An operator, or the kernel short of memory: the file at hand is tried again, no good radiograph becomes a failure."""
    source = tmp_path / "set"
    for copy in range(12):
        for path in phantoms.rglob("*.png"):
            name = path.relative_to(phantoms).as_posix().replace("/patient", f"/patient{copy}")
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to(path)
    convert(source, tmp_path / "alone", size=320, workers=2)
    with workers_being_killed() as killed:
        convert(source, tmp_path / "harassed", size=320, workers=2)
    laws.same_bytes(tmp_path / "alone", tmp_path / "harassed", leave_out=DIFFERS)
    assert killed, "somebody was killed"


# ---- memory, disk

PEAK = """
import json, resource, sys
from pathlib import Path
from mura_dist.data.shards import convert
convert.SAMPLES_PER_SHARD = 32
if __name__ == "__main__":
    convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), size=160, workers=2)
    kind = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    print(json.dumps([resource.getrusage(one).ru_maxrss / 1024 for one in kind]))
"""


@pytest.mark.nightly(part="files")
def test_memory_does_not_grow_with_the_number_of_radiographs(phantoms: Path, tmp_path: Path) -> None:
    """Four times the radiographs (1,300 more, of 25,600 bytes each at 160 px): 33 MB more if they were kept."""
    script = tmp_path / "peak.py"
    script.write_text(PEAK)
    peaks = {}
    for copies in (3, 12):
        source = tmp_path / f"set{copies}"
        for copy in range(copies):
            for path in phantoms.rglob("*.png"):
                name = path.relative_to(phantoms).as_posix().replace("/patient", f"/patient{copy}")
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                (source / name).symlink_to(path)
        done = run("python", script, source, tmp_path / f"out{copies}")
        assert done.returncode == 0, done.stderr
        peaks[copies] = json.loads(done.stdout)
    assert peaks[12][0] - peaks[3][0] < 12, peaks  # MiB, the process that writes
    assert peaks[12][1] - peaks[3][1] < 12, peaks  # the largest worker


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_disk_that_is_really_full(phantoms: Path, tmp_path: Path) -> None:
    """Finished shards stay, one line says why, and with room again the same command goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount")
    script = tmp_path / "shards.py"
    script.write_text(RANKS)
    argv = ("shards", phantoms, disk / "out", "--size", 100, "--workers", 2, "--quiet")
    try:
        full = run("python", script, *argv)
        assert full.returncode == 1, full.stderr
        assert "No space left on device" in full.stderr
        assert "Free some space, then run the same command." in full.stderr
        assert len(full.stderr.strip().splitlines()) == 1
        finished = {path.name: path.stat().st_mtime_ns for path in (disk / "out").glob("*-*.json")}
        assert finished
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        assert run("python", script, *argv).returncode == 0
        assert (
            finished.items() <= {path.name: path.stat().st_mtime_ns for path in (disk / "out").glob("*.json")}.items()
        )
        assert run("python", script, *argv[:2], tmp_path / "whole", *argv[3:]).returncode == 0
        laws.same_bytes(tmp_path / "whole", disk / "out", leave_out=DIFFERS)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_shard_of_nothing_but_failures_is_finished_too(phantoms: Path, tmp_path: Path, many_shards: None) -> None:
    source = tmp_path / "set"
    shutil.copytree(phantoms, source)
    # the first seven rows of the train split make the first shard
    convert(source, tmp_path / "before", size=40, workers=1)
    frame = Shards.open(tmp_path / "before").manifest.frame
    for path in frame["path"][:7]:
        (source / path).write_bytes(b"")
    index = convert(source, tmp_path / "out", size=40, workers=2)
    assert index is not None
    assert [item["row"] for item in index["unreadable"]] == list(range(7))
    mark = writer.read_mark((tmp_path / "out" / "train-000000.json").read_bytes())
    assert (mark["num_samples"], len(mark["unreadable"])) == (0, 7)
    assert not (tmp_path / "out" / "train-000000.tar").exists()
    assert list(verify(tmp_path / "out")) == []
