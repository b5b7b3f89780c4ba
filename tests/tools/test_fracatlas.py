"""tools/bench/fracatlas.py: the cut, the statistics of its tables, and (nightly) its trainings, stopped and resumed."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.commands import ROOT, run
from helpers.tools import tool
from sklearn.metrics import average_precision_score, roc_auc_score

from mura_dist.core.errors import UserError
from mura_dist.data.shards.reader import Shards
from mura_dist.metrics.comparison import compare_predictions

fracatlas = tool("bench/fracatlas")
SCRIPT = ROOT / "tools/bench/fracatlas.py"
TINY = ("architecture=tiny", "epochs=1", "warmup_steps=2", "tensorboard=false")


@pytest.fixture
def studies() -> pd.DataFrame:
    """Return a cut of 600 studies, one a patient, a fifth of them valid."""
    rng = np.random.default_rng(0)
    names = [f"XR_{'HAND' if index % 3 else 'LEG'}/patient{index:05}/study1" for index in range(600)]
    table = pd.DataFrame({"study": names, "study_type": [name[:7].rstrip("/") for name in names]})
    label = rng.random(600) < np.where(table["study_type"] == "XR_HAND", 0.4, 0.1)
    patient = [name.split("/")[1] for name in names]
    return table.assign(patient=patient, label=label.astype(int), fold=np.arange(600) % 6 - 1)


def line_of(studies: pd.DataFrame, key: dict[str, Any], quality: float, seed: int) -> dict[str, Any]:
    """Return a line of the results file whose scores are `quality` x label + noise."""
    score = quality * studies["label"] + np.random.default_rng(seed).normal(size=len(studies))
    probability = 1 / (1 + np.exp(-score))
    metrics = {
        "AUROC": roc_auc_score(studies["label"], probability),
        "average precision": average_precision_score(studies["label"], probability),
    }
    return {
        "key": key,
        "settings": {},
        **metrics,
        "seconds": 10.0,
        "probability": dict(zip(studies["study"], probability, strict=True)),
    }


def cells(report: str, start: str) -> list[str]:
    """Return the cells of the line of a table that starts with `start`."""
    return next(line for line in report.splitlines() if line.startswith(f"| {start} |")).strip("| ").split(" | ")


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?\d\.\d+", cell)]


def test_a_cut_keeps_patients_together_and_can_be_repeated(phantoms: Path, tmp_path: Path) -> None:
    studies = fracatlas.cut(phantoms, tmp_path)
    assert (studies.groupby("patient")["fold"].nunique() == 1).all()
    assert set(studies["fold"]) == set(range(-1, fracatlas.NUM_FOLDS))
    for split, is_valid in (("valid", True), ("train", False)):
        copied = {
            path.relative_to(tmp_path / "files" / split).parent.as_posix()
            for path in tmp_path.rglob(f"{split}/**/*.png")
        }
        assert copied == set(studies["study"][(studies["fold"] < 0) == is_valid])
    assert fracatlas.cut(phantoms, tmp_path).equals(studies)
    with pytest.raises(UserError, match=r"holds the cut of another folder\. Give another OUT\."):
        fracatlas.cut(tmp_path / "files" / "valid", tmp_path)


@pytest.mark.slow
def test_shards_of_a_fold_hold_the_fold_as_valid_and_no_study_of_valid(phantoms: Path, tmp_path: Path) -> None:
    studies = fracatlas.cut(phantoms, tmp_path).set_index("study")["fold"]
    for fold in (None, 2):
        manifest = Shards.open(fracatlas.make_shards(tmp_path, 32, fold)).manifest.frame
        by_split = {name: set(group["study"].str.partition("/")[2]) for name, group in manifest.groupby("split")}
        assert by_split["valid"] == set(studies.index[studies == (-1 if fold is None else fold)])
        rest = studies.index[(studies >= 0) & (studies != fold)]
        assert by_split["train"] | by_split["tune"] == set(rest)


@pytest.mark.shared
def test_the_cut_of_fracatlas_is_fixed(shared: Path) -> None:
    folder = shared / "radiographs" / "fracatlas-train"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    frame = fracatlas.assign_folds(folder)
    assert len(frame) == frame["patient"].nunique() == 3123
    counts = frame.groupby("fold")["label"].agg(["count", "sum"])
    assert [tuple(row) for row in counts.to_numpy()] == [
        (595, 102),
        (498, 88),
        (516, 92),
        (521, 99),
        (501, 101),
        (492, 80),
    ]


def test_folds_are_compared_with_the_baseline_over_patients(studies: pd.DataFrame) -> None:
    lines = [
        line_of(
            studies[studies["fold"] == fold],
            {"kind": "fold", "variant": variant, "fold": fold, "seed": 0},
            quality,
            seed,
        )
        for variant, quality, seed in (("baseline", 0.5, 1), ("better", 3.0, 2), ("same", 0.5, 3))
        for fold in range(5)
    ]
    report = fracatlas.report_folds(studies, lines)
    rest = studies[studies["fold"] >= 0]
    sides = {
        name: rest.assign(
            probability=rest["study"].map(
                {
                    key: value
                    for line in lines
                    if line["key"]["variant"] == name
                    for key, value in line["probability"].items()
                }
            )
        )
        for name in ("baseline", "better")
    }
    expected = compare_predictions(sides["better"], sides["baseline"])["overall"]["auroc"]
    row = cells(report, "better")
    assert numbers(row[4]) == pytest.approx([expected[key] for key in ("difference", "low", "high")], abs=0.011)
    assert numbers(row[4])[0] == pytest.approx(expected["difference"], abs=6e-4)
    folds = [line["AUROC"] for line in lines if line["key"]["variant"] == "better"]
    assert numbers(row[2]) == pytest.approx([np.mean(folds), np.std(folds, ddof=1)], abs=6e-4)
    baseline = [line["AUROC"] for line in lines if line["key"]["variant"] == "baseline"]
    assert numbers(row[5])[0] == pytest.approx(np.mean(folds) - np.mean(baseline), abs=6e-4)
    assert row[7] == "resolved"
    assert cells(report, "same")[7] == "not resolved"
    partial = fracatlas.report_folds(studies, [line for line in lines if line["key"]["fold"] < 2])
    assert cells(partial, "better")[7] == "resolved (2 folds)"


def test_valid_alone_is_reported_with_the_shortcuts(studies: pd.DataFrame, tmp_path: Path) -> None:
    valid = studies[studies["fold"] < 0]
    lines = [
        line_of(valid, {"kind": "final", "contender": name, "seed": seed}, quality, 10 * seed + index)
        for index, (name, quality) in enumerate((("plain fp32", 0.0), ("mura_dist", 2.0)))
        for seed in (0, 1, 2)
    ]
    flag = (studies["label"] == 1) & (studies.index % 2 == 0)
    hardware = tmp_path / "hardware.csv"
    studies.assign(hardware=flag.astype(int))[["patient", "hardware"]].to_csv(hardware, index=False)
    report = fracatlas.report_final(studies, lines, hardware)
    mean = {
        name: np.mean([line["AUROC"] for line in lines if line["key"]["contender"] == name])
        for name in ("mura_dist", "plain fp32")
    }
    assert numbers(cells(report, "mura_dist | mean over 3 seeds")[2])[0] == pytest.approx(mean["mura_dist"], abs=6e-4)
    low, high = numbers(cells(report, "plain fp32 | mean over 3 seeds")[2])[1:]
    assert low < mean["plain fp32"] < high
    differences = next(line for line in report.partition("the plain loop:")[2].splitlines() if "mean over 3" in line)
    assert numbers(differences)[0] == pytest.approx(mean["mura_dist"] - mean["plain fp32"], abs=2e-3)
    label, valid_flag = valid["label"].to_numpy(), flag[valid.index].to_numpy()
    row = cells(report, f"hardware ({valid_flag.sum()} studies, {valid_flag.sum()} positive)")
    assert numbers(row[1])[0] == pytest.approx(roc_auc_score(label, valid_flag), abs=6e-4)
    share = studies[studies["fold"] >= 0].groupby("study_type")["label"].mean()
    by_type = roc_auc_score(label, valid["study_type"].map(share))
    assert numbers(cells(report, "study type")[1])[0] == pytest.approx(by_type, abs=6e-4)
    assert cells(report, "without hardware")[1:3] == [str((~valid_flag).sum()), str(label[~valid_flag].sum())]


def test_other_settings_and_unusable_lines_are_refused(studies: pd.DataFrame, tmp_path: Path) -> None:
    results = fracatlas.Results(tmp_path / "results.jsonl")
    group = studies[studies["fold"] == 0]
    probability = line_of(group, {}, 1.0, 0)["probability"]
    key = {"kind": "fold", "variant": "baseline", "fold": 0, "seed": 0}
    training = fracatlas.Training(key, {"epochs": 3}, 128)
    results.add(training, group, probability, fracatlas.Cost(12.0, 2), threads=2)
    later = fracatlas.Training({**key, "fold": 1}, {"epochs": 3}, 128)
    assert results.pending([training, later]) == [later]
    with pytest.raises(
        UserError, match=r"epochs=3, this command has epochs=4\. Restore the value, or give another --results\."
    ):
        results.pending([fracatlas.Training({**key, "fold": 1}, {"epochs": 4}, 128)])
    with pytest.raises(UserError, match=r"1 studies of the cut have no prediction"):
        fracatlas.align(group, dict(list(probability.items())[1:]))
    results.path.write_text(results.path.read_text() + '{"key"')
    with pytest.raises(UserError, match=r"line 2 is not JSON\. Delete the line"):
        results.lines("fold")


@pytest.mark.parametrize("text", ["", "baseline ema=0", "no-ema ema", "ema=0"])
def test_a_variant_without_a_name_of_its_own_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a new NAME and key=value arguments\. Write 'no-ema ema=0'\."):
        fracatlas.parse_variants([text], [], 128)


def test_size_is_taken_from_a_variant() -> None:
    variants = fracatlas.parse_variants(["large size=160 ema=0"], ["epochs=2"], 128)
    assert variants == {"baseline": (128, ["epochs=2"]), "large": (160, ["epochs=2", "ema=0"])}


@pytest.mark.parametrize("text", ["", "0,5", "0;1", "-1"])
def test_folds_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=rf"--folds {text} is not a list of numbers below 5\. Write --folds 0,1\."):
        fracatlas.parse_numbers("--folds", text, 5)
    assert fracatlas.parse_numbers("--folds", "3,4", 5) == [3, 4]


@pytest.mark.slow
def test_the_plain_loop_resumes_with_the_same_numbers(phantoms: Path, tmp_path: Path) -> None:
    fracatlas.cut(phantoms, tmp_path)
    manifest = fracatlas.make_shards(tmp_path, 32) / "manifest.csv"

    def train(name: str, epochs: int) -> dict[str, Any]:
        options = ("--architecture=tiny", "--size=32", f"--epochs={epochs}", "--threads=1", "--workers=1")
        result = run(
            "python", ROOT / "tools/bench/plain_loop.py", tmp_path / "files", manifest, tmp_path / name, *options
        )
        assert result.returncode == 0, result.stderr
        return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)

    first, resumed, uninterrupted = train("resumed", 1), train("resumed", 2), train("uninterrupted", 2)
    names = [name for name, tensor in uninterrupted["network"].items() if not tensor.equal(first["network"][name])]
    assert len(names) > 20
    assert all(tensor.equal(resumed["network"][name]) for name, tensor in uninterrupted["network"].items())
    assert (resumed["epoch"], resumed["best"]["loss"]) == (2, uninterrupted["best"]["loss"])


@pytest.mark.nightly(part="system")
def test_trainings_are_stopped_resumed_and_reported(phantoms: Path, tmp_path: Path) -> None:
    fracatlas.cut(phantoms, tmp_path)
    options = ("--size", "32", "--threads", "1")
    folds = [
        sys.executable,
        SCRIPT,
        "folds",
        tmp_path,
        *options,
        "--folds",
        "0,1,2",
        "--variant",
        "no-ema ema=0",
        "--set",
        *TINY,
    ]
    results = tmp_path / "results.jsonl"
    with subprocess.Popen(list(map(str, folds)), stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 200
        while len(list(tmp_path.glob("runs/*.cost.json"))) == 0 or not results.is_file():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == 3
    first = results.read_text().splitlines()
    result = run("python", *folds[1:], timeout_s=600)
    assert result.returncode == 0, result.stderr
    lines = results.read_text().splitlines()
    assert lines[: len(first)] == first
    keys = [json.loads(line)["key"] for line in lines]
    assert sorted((key["variant"], key["fold"]) for key in keys) == [
        (v, f) for v in ("baseline", "no-ema") for f in range(3)
    ]
    assert not list((tmp_path / "runs").iterdir())
    final = (SCRIPT, "final", tmp_path, *options, "--seeds", "0", "--set", *TINY)
    result = run("python", *final, timeout_s=300)
    assert result.returncode == 0, result.stderr
    assert len(numbers(cells(result.stdout, "mura_dist | seed 0")[2])) == 3
    again = run("python", *final)
    assert (again.returncode, again.stdout) == (0, result.stdout)
    assert len(results.read_text().splitlines()) == len(lines) + 2
