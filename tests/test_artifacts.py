"""Test that files of version 0.1.0 are read: shards, runs, ONNX file and predictions. Its stopped jobs resume.

tests/data/v0.1.0.tar.xz holds drawn radiographs, shards of them, a finished run, one stopped at step 4, a model list, an exported
model, a finished prediction and one stopped after 256 of 345 files. It was written on a CPU by the commit before the folders.
The archive keeps modification times, which a prediction's plan knows.
"""

import csv
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from helpers.commands import ROOT, run

ARCHIVE = ROOT / "tests/data/v0.1.0.tar.xz"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the unpacked archive. No test writes into it."""
    folder = tmp_path_factory.mktemp("v0.1.0")
    with tarfile.open(ARCHIVE) as archive:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4 on
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder)
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """Copy the folder for one test, with the same modification times."""
    return Path(shutil.copytree(written, tmp_path / "v"))


def succeed(folder: Path, *arguments: str) -> str:
    """Run a command of mura-dist in `folder`, assert success, and return its stdout."""
    result = run("mura-dist", *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def metrics_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "metrics.json").read_bytes())["overall"]


def tune_losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["tune_loss"] for line in lines if line["kind"] == "epoch"]


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_archive_is_small() -> None:
    assert ARCHIVE.stat().st_size < 2_000_000


def test_shards_are_valid_and_converted_again_byte_for_byte(copy: Path) -> None:
    succeed(copy, "verify", "shards")
    succeed(copy, "shards", "set", "again", "--size", "32", "--quiet")
    for path in sorted((copy / "shards").iterdir()):
        if path.name not in ("conversion.json", "report.json"):  # they contain this machine's name and the source path
            assert (copy / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_finished_run_is_left_unchanged_and_evaluates_equally(copy: Path) -> None:
    before, evaluated = (copy / "run-done/metrics.jsonl").read_bytes(), metrics_of(copy / "run-done")
    assert "28 steps" in succeed(copy, "train", "run-done/recipe.toml", "--quiet")
    assert (copy / "run-done/metrics.jsonl").read_bytes() == before
    succeed(copy, "evaluate", "run-done", "shards", "--out", "evaluated", "--no-gallery", "--quiet")
    again = metrics_of(copy / "evaluated")
    methods = {f"{name}_interval" for name in ("sensitivity", "specificity", "ppv", "npv")}  # added later
    assert again.keys() == evaluated.keys() | methods
    for name in ("auroc", "kappa", "sensitivity", "specificity"):
        assert again[name] == pytest.approx(evaluated[name], abs=1e-6), name


def test_stopped_run_resumes(copy: Path) -> None:
    """It has the settings of the finished run and ends equal to it, except for rounding on another processor."""
    folder = copy / "run-stopped"
    before = (folder / "metrics.jsonl").read_text()
    succeed(copy, "train", "run-stopped/recipe.toml", "--quiet")
    after = (folder / "metrics.jsonl").read_text()
    assert after.startswith(before)
    steps = [line["step"] for line in map(json.loads, after.splitlines()) if line["kind"] == "step"]
    assert steps == list(range(1, 29))
    assert json.loads((folder / "status.json").read_bytes())["state"] == "done"
    assert tune_losses(folder) == pytest.approx(tune_losses(copy / "run-done"), rel=0.02)


def test_checkpoint_and_list_export(copy: Path) -> None:
    """The exported model gives the outputs of the one that version 0.1.0 exported."""
    for target, out in (("run-done", "again.onnx"), ("list.json", "list.onnx")):
        succeed(copy, "export", target, "--out", out, "--quiet")
        succeed(copy, "predict", out, "set/valid", "--out", f"{out}-predictions", "--quiet")
        calls = target == "run-done"  # the list was not evaluated, so its model has no threshold
        same_probabilities(copy / f"{out}-predictions", copy / "predictions", calls=calls)


def test_model_predicts_equally(copy: Path) -> None:
    summary = succeed(copy, "predict", "model.onnx", "set/valid", "--out", "again", "--quiet")
    assert " studies, no calls, " in summary  # trained on drawings
    same_probabilities(copy / "again", copy / "predictions")
    assert (copy / "again/failures.csv").read_bytes() == (copy / "predictions/failures.csv").read_bytes()


def test_finished_prediction_is_left_unchanged(copy: Path) -> None:
    before = {path.name: path.read_bytes() for path in (copy / "predictions").iterdir()}
    succeed(copy, "predict", "model.onnx", "set/valid", "--out", "predictions", "--overlays", "--quiet")
    assert {path.name: path.read_bytes() for path in (copy / "predictions").iterdir()} == before


def test_stopped_prediction_resumes(copy: Path) -> None:
    chunk = json.loads((copy / "predictions-half/.parts/000000.json").read_bytes())
    succeed(copy, "predict", "model.onnx", "set", "--out", "predictions-half", "--quiet")
    rows, failures = (table(copy / f"predictions-half/{name}.csv") for name in ("predictions", "failures"))
    assert (len(rows), len(failures)) == (340, 5)  # MURA's CSV files are no radiographs
    logits = {row["path"]: float(row["logit"]) for row in rows}
    assert [logits[path] for path, _, _, logit, _ in chunk["predictions"]] == pytest.approx(
        [logit for _, _, _, logit, _ in chunk["predictions"]], abs=1e-6
    )


def same_probabilities(actual: Path, expected: Path, *, calls: bool = True) -> None:
    """Assert equal columns (new ones follow), rows, thresholds and calls, and probabilities within 1e-4.

    The model is trained on drawings, so this version writes no call itself.
    """
    for name in ("predictions.csv", "studies.csv"):
        rows, expected_rows = table(actual / name), table(expected / name)
        assert list(rows[0])[: len(expected_rows[0])] == list(expected_rows[0])
        for row, expected_row in zip(rows, expected_rows, strict=True):
            assert (row.get("path"), row["study"]) == (expected_row.get("path"), expected_row["study"])
            assert float(row["probability"]) == pytest.approx(float(expected_row["probability"]), abs=1e-4)
            if calls and expected_row.get("call"):
                assert row["call"] == ""
                assert row["threshold"] == expected_row["threshold"]
                assert (float(row["probability"]) > float(row["threshold"])) == (expected_row["call"] == "1")
