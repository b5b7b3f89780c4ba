"""Conversions on a machine that fails: reads that fail once or for long, a source that goes away, two starts, broken shards."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from helpers import laws
from helpers.commands import killed_when, processes_of, run
from helpers.ranks import DIFFERS, LAUNCHERS, start_rank
from helpers.read_faults import ReadFaults

from mura_dist.core import storage
from mura_dist.core.errors import RunError, UserError
from mura_dist.data.io_faults import MAX_CONSECUTIVE, IoFaults
from mura_dist.data.shards import convert as converter
from mura_dist.data.shards import writer
from mura_dist.data.shards.codec import Sample
from mura_dist.data.shards.convert import convert
from mura_dist.data.shards.reader import Shards
from mura_dist.data.shards.verify import verify
from mura_dist.distributed import heartbeat

RANKS = """
import sys, time
from mura_dist.data.shards import convert, writer
convert.SAMPLES_PER_SHARD, convert.SILENCE_S = 7, 1.0
pack, slow_s = writer.pack, float(__import__("os").environ.get("SLOW_S", 0))
def slowly(*arguments, **more):
    time.sleep(slow_s)
    return pack(*arguments, **more)
writer.pack = slowly
from mura_dist.cli.main import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def many_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven radiographs a shard: some twenty shards of the phantoms."""
    monkeypatch.setattr(converter, "SAMPLES_PER_SHARD", 7)


@pytest.fixture(scope="module")
def complete(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converter, "SAMPLES_PER_SHARD", 7)
        convert(phantoms, out, size=40, workers=2)
    return out


def path_of(complete: Path, row: int) -> str:
    return str(Shards.open(complete).manifest.frame["path"][row])


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}


# ---- I/O faults


@pytest.mark.parametrize(("error", "call"), [(errno.EIO, "read"), (errno.EMFILE, "open")])
def test_a_fault_that_passes_leaves_no_trace(
    error: int, call: str, phantoms: Path, complete: Path, read_faults: Callable[..., ReadFaults], tmp_path: Path
) -> None:
    faults = read_faults(path_of(complete, 9), error=error, call=call, times=2)
    with faults.in_children():
        convert(phantoms, tmp_path / "out", size=40, workers=1)
    assert faults.num_calls > 2
    laws.same_bytes(complete, tmp_path / "out", leave_out=DIFFERS)


def test_a_fault_that_lasts_is_listed_and_the_same_command_makes_that_shard_alone(
    phantoms: Path, complete: Path, read_faults: Callable[..., ReadFaults], tmp_path: Path
) -> None:
    out, path = tmp_path / "out", path_of(complete, 9)
    message = (
        rf"^1 files could not be read \(io_error\), first {path}: cannot be read: stale file handle\. .*conversion.json"
    )
    with read_faults(path, error=errno.ESTALE).in_children(), pytest.raises(RunError, match=message):
        convert(phantoms, out, size=40, workers=1)
    assert not (out / "index.json").exists()
    record = json.loads((out / "conversion.json").read_bytes())
    assert record["state"] == "incomplete"
    fault = {"row": 9, "path": path, "code": "io_error", "reason": "cannot be read: stale file handle"}
    assert record["faults"] == [fault]
    before = times(out)
    assert before.keys() == times(complete).keys() - {"train-000001.tar"}
    index = convert(phantoms, out, size=40, workers=1)
    assert index is not None
    assert index["unreadable"] == []
    assert before.items() <= times(out).items(), "finished shards are not made again"
    laws.same_bytes(complete, out, leave_out=DIFFERS)


@pytest.mark.slow
def test_a_fault_on_another_rank_lets_all_finish_and_the_first_one_says_so(
    phantoms: Path, complete: Path, read_faults: Callable[..., ReadFaults], tmp_path: Path
) -> None:
    """Under torchrun a rank that fails would take the others with it."""
    script, out = tmp_path / "shards.py", tmp_path / "out"
    script.write_text(RANKS)
    argv = ("shards", phantoms, out, "--size", 40, "--workers", 1, "--quiet")
    environment = read_faults(path_of(complete, 9)).environment
    ranks = [start_rank(script, LAUNCHERS["Slurm"](r, 2) | environment, *argv, cold=True) for r in (1, 0)]
    output = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 1], output
    assert "1 files could not be read (io_error)" in output[1][1]
    assert times(out).keys() == times(complete).keys() - {"train-000001.tar"}
    assert convert(phantoms, out, size=40, workers=1) is not None
    laws.same_bytes(complete, out, leave_out=DIFFERS)


@pytest.mark.slow
def test_a_source_behind_a_url_is_read_again_too(
    phantoms: Path, complete: Path, read_faults: Callable[..., ReadFaults], tmp_path: Path
) -> None:
    """There the main process reads."""
    script, out = tmp_path / "shards.py", tmp_path / "out"
    script.write_text(RANKS)
    argv = ("shards", f"file://{phantoms}", out, "--size", 40, "--workers", 1, "--quiet")
    for more, status in (({"times": 2}, 0), ({}, 1)):
        faults = read_faults(path_of(complete, 9), **more)
        rank = start_rank(script, faults.environment, *argv[:2], tmp_path / str(status), *argv[3:], cold=True)
        output = rank.communicate(timeout=120)
        assert rank.returncode == status, output
        assert ("1 files could not be read (io_error)" in output[1]) == bool(status)
    laws.same_bytes(complete, tmp_path / "0", leave_out=DIFFERS)


@pytest.mark.slow
def test_many_faults_in_a_row_end_the_run_early(
    phantoms: Path, complete: Path, read_faults: Callable[..., ReadFaults], tmp_path: Path
) -> None:
    message = rf"^{MAX_CONSECUTIVE} consecutive files of {phantoms} could not be read \(last: .*not connected\)\. "
    with (
        read_faults("/valid/", error=errno.ENOTCONN).in_children(),
        pytest.raises(RunError, match=message),
    ):
        convert(phantoms, tmp_path / "out", size=40, workers=8)
    assert not list((tmp_path / "out").glob("valid-*.tar"))
    assert (tmp_path / "out" / "train-000000.json").exists()


def test_faults_count_in_a_row_only(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    faults = IoFaults(tmp_path)
    for _ in range(3):
        for _ in range(MAX_CONSECUTIVE - 1):
            faults.check("io_error", "cannot be read: input/output error")
        faults.check("", "")
    for _ in range(MAX_CONSECUTIVE + 1):
        faults.check("unreadable", "its PNG data is damaged")


@pytest.mark.parametrize("remaining", ["nothing", "an empty mount point"])
def test_a_source_that_goes_away_ends_the_run_early(remaining: str, phantoms: Path, tmp_path: Path) -> None:
    """Else every file that is left would be final, as one that does not exist."""
    source = tmp_path / "source"
    shutil.copytree(phantoms, source)

    def take_away(done: int, total: int) -> None:
        if done > 0 and not (tmp_path / "away").exists():
            source.rename(tmp_path / "away")
            if remaining != "nothing":
                source.mkdir()

    with pytest.raises(RunError, match=rf"^{source} is gone or empty\. Restore it"):
        convert(source, tmp_path / "out", size=40, workers=1, progress=take_away)


# ---- two starts


HOLDS = """
import sys, threading
from pathlib import Path
from mura_dist.distributed import heartbeat, lock
with heartbeat.join_folder(Path(sys.argv[1]), 0, lock.LockOptions("", "", 0), threading.Event()):
    print("holds", flush=True)
    sys.stdin.read()
"""


def test_a_share_that_another_process_has_is_refused(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "LOCK_WAIT_S", 0.1)
    out, pipe = tmp_path / "out", subprocess.PIPE
    command = [sys.executable, "-c", HOLDS, out / converter.RANKS]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "holds\n"
        message = (
            rf"^{out} is being written by process {first.pid} on .*\. Wait for it or stop it, or give another folder\.$"
        )
        with pytest.raises(UserError, match=message):
            convert(phantoms, out, size=40, workers=1)
        assert first.stdin is not None
        first.stdin.close()
    assert not out.exists(), "a refused start leaves no trace, and neither does one that made nothing"


@pytest.mark.slow
def test_a_second_start_of_the_same_share_is_refused(
    phantoms: Path, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another share is not: jobs of an array, each a rank, share a conversion."""
    monkeypatch.setattr(heartbeat, "LOCK_WAIT_S", 0.3)
    script, out = tmp_path / "shards.py", tmp_path / "out"
    script.write_text(RANKS)
    argv = ("shards", phantoms, out, "--size", 40, "--workers", 1, "--quiet")
    first = start_rank(script, {"SLOW_S": 0.2}, *argv, cold=True)
    while not (out / "train-000000.json").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    message = (
        rf"^{out} is being written by process {first.pid} on .*\. Wait for it or stop it, or give another folder\.$"
    )
    with pytest.raises(UserError, match=message):
        convert(phantoms, out, size=40, workers=1)
    assert first.poll() is None
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert convert(phantoms, out, size=40, workers=1) is None
    output = first.communicate(timeout=60)
    assert first.returncode == 0, output
    laws.same_bytes(complete, out, leave_out=DIFFERS)
    assert not (out / converter.RANKS).exists()


@pytest.mark.slow
def test_a_second_start_that_waits_finds_the_conversion_finished(
    phantoms: Path, complete: Path, tmp_path: Path
) -> None:
    script, out = tmp_path / "shards.py", tmp_path / "out"
    script.write_text(RANKS)
    argv = ("shards", phantoms, out, "--size", 40, "--workers", 1, "--quiet")
    starts = [start_rank(script, {"SLOW_S": 0.05}, *argv, cold=True) for _ in range(3)]
    output = [start.communicate(timeout=120) for start in starts]
    assert [start.returncode for start in starts] == [0, 0, 0], output
    assert sum("waiting up to" in err for _, err in output) == 2
    laws.same_bytes(complete, out, leave_out=DIFFERS)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds ranks in /proc")
def test_ranks_end_with_a_killed_launcher_and_the_next_start_waits_for_them(
    phantoms: Path, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Had they gone on, it would be refused before they end: 6 s a shard, ten shards each."""
    monkeypatch.setenv("SLOW_S", "6")
    script, out = tmp_path / "shards.py", tmp_path / "out"
    script.write_text(RANKS)
    command = (
        "torchrun",
        "--standalone",
        "--nproc-per-node",
        2,
        script,
        "shards",
        phantoms,
        out,
        "--size",
        40,
        "--quiet",
    )
    remaining = killed_when((out / "train-000001.json").exists, out, *command, launcher_alone=True)
    assert len(remaining) == 3
    monkeypatch.setenv("SLOW_S", "0")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert processes_of(out) == [], "the former ranks left by themselves"
    laws.same_bytes(complete, out, leave_out=DIFFERS)


# ---- shards that are not what their marks say


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def punch(path: Path) -> None:
    """A hole, as two writers of one file leave it: the size is right."""
    size = path.stat().st_size
    os.truncate(path, 512)
    os.truncate(path, size)


BROKEN: dict[str, Callable[[Path], None]] = {
    "train-000001.tar": cut,
    "valid-000000.tar": punch,
    "train-000002.tar": Path.unlink,
    "train-000003.idx": Path.unlink,
    "tune-000000.json": lambda path: path.write_bytes(b"{"),
}


@pytest.mark.parametrize("finished", [True, False])
def test_a_shard_that_is_not_what_its_mark_says_is_made_anew(
    finished: bool, phantoms: Path, complete: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(complete, out)
    before = times(out)
    for name, damage in BROKEN.items():
        damage(out / name)
    if not finished:
        (out / "index.json").unlink()
    convert(phantoms, out, size=40, workers=1)
    laws.same_bytes(complete, out, leave_out=DIFFERS)
    assert list(verify(out)) == []
    same = [name for name, time_ns in times(out).items() if before[name] == time_ns]
    assert len(same) == len(before) - len(BROKEN)


class Meddled(storage.LocalStorage):
    """A folder in which another program shortens each tar that was written."""

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        with super().writing(name) as file:
            yield file
        if name.endswith(".tar"):
            cut(self.folder / name)


def test_a_tar_is_compared_with_what_was_written_before_its_mark_is_there(tmp_path: Path) -> None:
    samples = [Sample(row, b"pixels", "", "") for row in range(3)]
    with pytest.raises(RunError, match=r"train-000000\.tar differs from what was written"):
        writer.pack(Meddled(tmp_path), "train-000000.tar", samples, [0, 1, 0], encoding="raw")()
    assert not (tmp_path / "train-000000.json").exists()
