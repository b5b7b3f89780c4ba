"""Test predictions with read faults: files are retried, listed as io_error, and read again by the same command."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import run
from helpers.predictions import FILES, contents, draw, draw_dicom, rows
from helpers.ranks import LAUNCHERS, start_rank
from helpers.read_faults import ReadFaults

from mura_dist.core.errors import RunError
from mura_dist.data import io_faults
from mura_dist.inference import predict as predict_module
from mura_dist.inference import retries, tables
from mura_dist.inference.file_list import ListedFile
from mura_dist.inference.overlays import overlay_counts
from mura_dist.inference.predict import PredictOptions, predict
from mura_dist.inference.reader import ReadResult, failure_result

RANK = """
import sys
from mura_dist.cli.main import main
from mura_dist.inference import predict
predict.CHUNK = 10
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict_module, "CHUNK", 10)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create three chunks: PNGs, DICOMs of two studies, corrupt files."""
    folder = tmp_path_factory.mktemp("in")
    for number in range(28):
        path = folder / f"study{number // 7}" / f"{number:02d}"
        if number % 5 == 3:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"junk")
        elif number % 5 == 4:
            draw_dicom(path, f"1.2.3.{number // 14}", "HAND", "L", number)
        else:
            draw(path, number)
    return folder


@pytest.fixture
def reference_tables(model: Path, directory: Path, own_site_key: None, tmp_path: Path) -> dict[str, bytes]:
    predict(model, directory, tmp_path / "undisturbed")
    return contents(tmp_path / "undisturbed")


def test_transient_fault_does_not_change_the_tables(
    model: Path,
    directory: Path,
    reference_tables: dict[str, bytes],
    read_faults: Callable[..., ReadFaults],
    tmp_path: Path,
) -> None:
    faults = read_faults("study0/02", error=errno.ENOTCONN, times=3)
    with faults.in_children():
        predict(model, directory, tmp_path / "out", PredictOptions(workers=1))
    assert faults.num_calls > 3
    assert contents(tmp_path / "out") == reference_tables


def test_every_dicom_read_fault_is_reported(
    model: Path,
    directory: Path,
    reference_tables: dict[str, bytes],
    read_faults: Callable[..., ReadFaults],
    tmp_path: Path,
) -> None:
    """For a persistent fault of each read, the file has its study or is a failure."""
    reference = {row["path"]: row["study"] for row in rows(tmp_path / "undisturbed" / "predictions.csv")}
    for skip in range(3):
        out = tmp_path / str(skip)
        with read_faults("study0/04", skip=skip).in_children():
            try:
                predict(model, directory, out, PredictOptions(workers=1))
            except RunError:
                assert {row["path"]: row["code"] for row in rows(out / "failures.csv")}["study0/04"] == "io_error"
            studies = {row["path"]: row["study"] for row in rows(out / "predictions.csv")}
            assert studies.get("study0/04", reference["study0/04"]) == reference["study0/04"]


def test_rerun_reads_only_the_files_with_faults(
    model: Path,
    directory: Path,
    reference_tables: dict[str, bytes],
    read_faults: Callable[..., ReadFaults],
    tmp_path: Path,
) -> None:
    out, options = tmp_path / "out", PredictOptions(workers=1, overlays=True)
    message = (
        r"^4 files could not be read \(io_error\), the first is study1/10: .*: too many open files\. .*same command"
    )
    with (
        read_faults("study1/1", error=errno.EMFILE, call="open").in_children(),
        pytest.raises(RunError, match=message),
    ):
        predict(model, directory, out, options)
    assert not (out / "predict.json").exists()
    codes = [row["code"] for row in rows(out / "failures.csv")]
    assert codes.count("io_error") == 4
    assert len(rows(out / "predictions.csv")) + len(codes) == 28
    faults, num_opens = read_faults("study", call="open", skip=1000), [0]
    with faults.in_children():
        summary = predict(model, directory, out, options, progress=lambda done, total: total and num_opens.append(done))
    assert summary is not None
    assert contents(out) == reference_tables
    assert summary["num_overlays"] == summary["num_radiographs"]
    assert sorted(os.listdir(out)) == sorted([*FILES, "overlays"])
    assert faults.num_calls == 4
    assert num_opens[-1] == 28


def test_merged_retries_equal_one_complete_attempt() -> None:
    """Attempts that each read some files of a chunk end in the result of an attempt that reads all of them."""
    rng = np.random.default_rng(4)
    image, files = np.zeros((2, 2), np.uint8), [ListedFile(str(number)) for number in range(40)]
    outcomes = [
        ReadResult(image, None, ("", "")) if rng.random() < 0.7 else failure_result("not_image", "") for _ in files
    ]

    def attempt(before: tables.ChunkResult | None, share: float) -> tables.ChunkResult:
        pending = files if before is None else retries.select_retries(before, files)
        readings = [outcomes[int(f.path)] if rng.random() < share else failure_result("io_error", "") for f in pending]
        lines = list(zip((file.path for file in pending), readings, strict=True))
        result = {
            "predictions": [[path] for path, reading in lines if reading.image is not None],
            "failures": [[path, *reading.failure] for path, reading in lines if reading.image is None],
            "overlays": overlay_counts(sum(reading.image is not None for reading in readings), 0),
        }
        return retries.merge_retry(before, result, readings)

    for _ in range(20):
        result = attempt(None, 0.3)
        while retries.FILES in result:
            result = attempt(json.loads(json.dumps(result)), 0.3)
        assert result == attempt(None, 1.1)


@pytest.mark.slow
def test_consecutive_faults_stop_the_run_and_keep_results(
    model: Path,
    directory: Path,
    reference_tables: dict[str, bytes],
    read_faults: Callable[..., ReadFaults],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(io_faults, "MAX_CONSECUTIVE", 5)
    out = tmp_path / "out"
    with read_faults("study0/02").in_children(), pytest.raises(RunError, match=r"^1 files"):
        predict(model, directory, out, PredictOptions(workers=1))
    for result in (out / ".parts").glob("000002.json"):
        result.unlink()
    message = rf"^5 consecutive files of {directory} could not be read \(last: cannot be read: input/output error\)\. "
    with read_faults("study").in_children(), pytest.raises(RunError, match=message):
        predict(model, directory, out, PredictOptions(workers=1))
    faults = read_faults("study", call="open", skip=1000)
    with faults.in_children():
        predict(model, directory, out, PredictOptions(workers=1))
    assert faults.num_calls == 9, "one file of the first chunk, and the last chunk's eight"
    assert contents(out) == reference_tables


@pytest.mark.parametrize("remaining", ["nothing", "an empty mount point"])
def test_missing_directory_stops_the_run(remaining: str, model: Path, directory: Path, tmp_path: Path) -> None:
    """Otherwise all remaining files would be final failures."""
    source = tmp_path / "in"
    shutil.copytree(directory, source)

    def remove_directory(done: int, total: int | None) -> None:
        if total is not None and not (tmp_path / "away").exists():
            source.rename(tmp_path / "away")
            if remaining != "nothing":
                source.mkdir()

    with pytest.raises(RunError, match=rf"^{source} is gone or empty\. Restore it\. The same command resumes\.$"):
        predict(model, source, tmp_path / "out", PredictOptions(workers=1), progress=remove_directory)
    assert not (tmp_path / "out" / "predict.json").exists()


@pytest.mark.slow
def test_listing_fault_stops_the_run_with_one_line(
    model: Path, directory: Path, read_faults: Callable[..., ReadFaults], tmp_path: Path
) -> None:
    """Otherwise the tables would lack the folder's files, and the next command would be another run."""
    faults = read_faults("study2", call="list")
    done = run(
        "mura-dist", "predict", model, directory, "--out", tmp_path, "--quiet", cold=True, env=faults.environment
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"mura-dist: Input/output error: {directory}/study2. Fix this, then run the same command."
    ]


@pytest.mark.slow
def test_rank_0_reports_faults_of_another_rank(
    model: Path,
    directory: Path,
    reference_tables: dict[str, bytes],
    read_faults: Callable[..., ReadFaults],
    tmp_path: Path,
) -> None:
    script, out = tmp_path / "rank.py", tmp_path / "out"
    script.write_text(RANK)
    arguments = ("predict", model, directory, "--out", out, "--workers", 1, "--quiet")
    for environment, statuses in ((read_faults("study1/10").environment, [0, 1]), ({}, [0, 0])):
        ranks = [start_rank(script, LAUNCHERS["Slurm"](r, 2) | environment, *arguments, cold=True) for r in (1, 0)]
        outputs = [rank.communicate(timeout=120) for rank in ranks]
        assert [rank.returncode for rank in ranks] == statuses, outputs
    assert contents(out) == reference_tables
