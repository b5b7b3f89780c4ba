"""Test the commands end to end: folder -> shards -> two ranks -> report -> ONNX -> predictions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.commands import ROOT, TINY, run, torchrun
from PIL import Image


@pytest.fixture(scope="module")
def folder(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an irregular folder.

    It is nested, without CSVs, with JPEG, RGB and upper-case files, an unknown study type, a study type with one label, and junk.
    """
    root = tmp_path_factory.mktemp("folder") / "MURA-v1.1" / "MURA-v1.1"
    for split in ("train", "valid"):
        shutil.copytree(phantoms / split, root / split)
    for split in ("train", "valid"):
        (root / split / "XR_HAND").rename(root / split / "XR_FOOT")
        for study in (root / split / "XR_ELBOW").glob("*/*_positive"):
            study.rename(study.with_name(study.name.replace("_positive", "_negative").replace("study", "study9")))
    [first, second, third, *_] = sorted((root / "train").rglob("image1.png"))
    Image.open(first).convert("RGB").save(first.with_suffix(".JPG"))
    first.unlink()
    second.rename(second.with_name("image1.PNG"))
    (third.parent / "._image1.png").write_bytes(b"\0\5\26\7")
    (third.parent / "image99.png").write_bytes(b"not an image")
    return root.parent


def arguments(*items: object) -> list[str]:
    return [str(word) for word in items]


def succeed(*command: object) -> str:
    result = run(*arguments(*command))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


@pytest.mark.slow
def test_scan_train_evaluate_export_predict(folder: Path, tmp_path: Path) -> None:
    shards, runs = tmp_path / "shards", tmp_path / "run"
    output = succeed("mura-dist", "shards", folder, shards, "--size", 64)
    assert "not a radiograph: 1" in output
    assert "image99.png" in output
    assert "all valid" in succeed("mura-dist", "verify", shards)
    assert (
        "XR_FOOT"
        in succeed("mura-dist", "describe", shards, "--out", tmp_path / "d.html") + (tmp_path / "d.html").read_text()
    )

    settings = (*TINY, f"shards={shards}", f"run={runs}")
    for epochs in (0, 1):  # as the demo does: measure the untrained model first
        result = torchrun(2, "mura_dist.train", *settings, f"epochs={epochs}", "--quiet")
        assert result.returncode == 0, result.stderr
    succeed("mura-dist", "evaluate", runs, shards, "--checkpoint", "step-0", "--out", runs / "untrained")
    table = succeed("mura-dist", "evaluate", runs, shards)
    assert "one class only" in table  # the reason for XR_ELBOW

    metrics = json.loads((runs / "metrics.json").read_bytes())
    frame = pd.read_csv(shards / "manifest.csv")
    valid = frame[frame["split"] == "valid"]
    assert metrics["overall"]["num_studies"] == valid["study"].nunique()
    assert metrics["by_study_type"]["XR_ELBOW"]["kappa"] is None
    assert metrics["by_study_type"]["XR_ELBOW"]["reasons"]["kappa"] == "one class only"
    page = (runs / "report.html").read_text()
    assert "do not hold for radiographs" not in page  # without phantoms.json they count as radiographs
    assert "not a medical device" in page

    succeed("mura-dist", "export", runs)
    succeed("mura-dist", "predict", runs / "model.onnx", folder, "--out", tmp_path / "p")
    assert "not a medical device" in (tmp_path / "p" / "README.txt").read_text()
    predicted = pd.read_csv(tmp_path / "p" / "studies.csv")
    valid_predictions = predicted[predicted["study"].str.contains("valid/")].copy()
    valid_predictions["study"] = valid_predictions["study"].str.extract(r"(valid/.*)")
    both = pd.read_csv(runs / "studies.csv").merge(valid_predictions, on="study", suffixes=("_evaluated", "_predicted"))
    assert len(both) == valid["study"].nunique()
    np.testing.assert_allclose(both["probability_evaluated"], both["probability_predicted"], atol=1e-5)
    called = both.dropna(subset=["call_predicted"])
    assert (called["call_evaluated"] == called["call_predicted"]).all()
    unmeasured = {name for name, group in metrics["by_study_type"].items() if group["kappa"] is None}
    assert "XR_ELBOW" in unmeasured
    assert set(both.loc[both["call_predicted"].isna(), "study_type_predicted"]) == unmeasured  # no threshold, no call

    files = [path for path in folder.rglob("*") if path.is_file()]
    tables = [pd.read_csv(tmp_path / "p" / name) for name in ("predictions.csv", "failures.csv")]
    assert sorted(pd.concat(tables)["path"]) == sorted(path.relative_to(folder).as_posix() for path in files)


@pytest.mark.nightly(part="system")
def test_demo_plan_fits_a_small_folder(folder: Path, tmp_path: Path) -> None:
    succeed("mura-dist", "shards", folder, tmp_path / "shards", "--size", 64)
    plan = run("python", ROOT / "tools/demo/plan.py", tmp_path / "shards", folder, cwd=ROOT)
    assert plan.returncode == 0, plan.stderr
    assert "ranks=" in plan.stdout
    assert f"valid={folder / 'MURA-v1.1' / 'valid'}" in plan.stdout
    shutil.rmtree(tmp_path / "shards")
    shutil.copytree(folder, tmp_path / "train-only")
    shutil.rmtree(tmp_path / "train-only" / "MURA-v1.1" / "valid")
    succeed("mura-dist", "shards", tmp_path / "train-only", tmp_path / "shards", "--size", 64)
    plan = run("python", ROOT / "tools/demo/plan.py", tmp_path / "shards", tmp_path / "train-only", cwd=ROOT)
    assert (plan.returncode, plan.stdout) == (2, "")
    assert "split 'valid'" in plan.stderr
    assert len(plan.stderr.strip().splitlines()) == 1
