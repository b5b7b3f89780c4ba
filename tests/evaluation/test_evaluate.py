"""Test evaluate: metrics for any ranks and batch size, thresholds fitted on tune only, agreement with predict."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import laws
from helpers.commands import SHORT, TINY, run, torchrun
from helpers.models import with_card

from mura_dist.cli.main import DONE, main
from mura_dist.data import gate
from mura_dist.data.class_weights import compute_class_weights
from mura_dist.data.manifest import Manifest
from mura_dist.data.shards.reader import Shards
from mura_dist.evaluation.evaluate import compute_odds_shift
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.metrics import calibration
from mura_dist.metrics.operating_points import OPERATING_POINT_NAMES, STUDY_COLUMNS, FittedThresholds
from mura_dist.training.scores import Scores, study_scores
from mura_dist.training.weights import ModelWeights

EVALUATE = """
import sys
from pathlib import Path
from mura_dist.evaluation.evaluate import evaluate_target
from mura_dist.evaluation.subject import EvaluateOptions
from mura_dist.models.target import Target
run, shards, out = map(Path, sys.argv[1:4])
evaluate_target(Target.parse(run), shards, EvaluateOptions(out), which="last")
"""


def test_metrics_do_not_depend_on_ranks_or_batch(
    reference_run: Callable[..., Path], shard_folder: Path, tmp_path: Path
) -> None:
    trained = reference_run(1, *SHORT)
    script = tmp_path / "evaluate_ranks.py"
    script.write_text(EVALUATE)
    other_batch = tmp_path / "other"
    shutil.copytree(trained, other_batch)
    recipe = (other_batch / "recipe.toml").read_text()
    (other_batch / "recipe.toml").write_text(recipe.replace("micro_batch = 4", "micro_batch = 7"))
    logits = []
    for ranks, folder in ((1, trained), (2, trained), (3, other_batch)):
        out = tmp_path / str(ranks)
        result = torchrun(
            ranks, "evaluate_ranks", folder, shard_folder, out, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}
        )
        assert result.returncode == 0, result.stderr
        table = pd.read_csv(out / "predictions.csv")  # each row of the split once, in order
        assert set(table["gate"]) <= set(gate.NAMES)
        assert (
            table["path"].tolist()
            == Shards.open(shard_folder).manifest.frame.query("split == 'valid'")["path"].tolist()
        )
        logits.append(dict(enumerate(table["logit"])))
        reports = [path.name for path in sorted(out.iterdir())]
        assert {"metrics.json", "report.html", "predictions.csv", "studies.csv"} <= set(reports)
    assert "micro_batch = 7" in (other_batch / "recipe.toml").read_text()
    for logits_of_ranks in logits[1:]:
        laws.same_metrics(logits[0], logits_of_ranks)


# ---- thresholds fitted on tune


def start_run(folder: Path, shards: Path, *settings: str) -> Path:
    """Create an untrained run. With this seed, abnormal studies have slightly higher probabilities by chance."""
    arguments = (*TINY, "epochs=0", "seed=3", *settings, f"shards={shards}", f"run={folder}")
    result = run("mura-dist", "train", *arguments, "--quiet")
    assert result.returncode == 0, result.stderr
    return folder


def run_evaluation(target: Path, shards: Path, out: Path, *arguments: str) -> dict[str, Any]:
    assert main(["evaluate", str(target), str(shards), "--out", str(out), "--quiet", *arguments]) == DONE
    return json.loads((out / "metrics.json").read_bytes())


@pytest.fixture(scope="module")
def untrained_metrics(untrained: Path) -> dict[str, Any]:
    return json.loads((untrained / "metrics.json").read_bytes())


@pytest.fixture(scope="module")
def exported(untrained: Path) -> Path:
    return untrained / "model.onnx"


@pytest.fixture(scope="module")
def of_radiographs(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model with a card that states training on radiographs, since a model of drawings makes no calls."""
    card = OnnxModel.load(exported).card
    trained_on = card.trained_on.model_copy(update={"kind": "radiographs"})
    target = tmp_path_factory.mktemp("radiographs") / "model.onnx"
    return with_card(exported, card.model_copy(update={"trained_on": trained_on}), target)


def split_scores(model: Path, shards: Shards, split: str) -> Scores:
    rows = shards.rows(split)
    images = np.stack([shards.read_pixels(int(row)) for row in rows])[:, None]
    return Scores.from_split(rows, OnnxModel.load(model).logits(images), np.ones(len(rows), bool))


def test_thresholds_are_fitted_on_tune(exported: Path, halved: Path, untrained_metrics: dict[str, Any]) -> None:
    shards = Shards.open(halved)
    tune = study_scores(shards, split_scores(exported, shards, "tune"))
    expected = calibration.fit(tune, {}, sorted(tune["study_type"].unique()))
    metrics = FittedThresholds.model_validate(untrained_metrics["calibration"])
    assert (metrics.num_studies, metrics.num_patients) == (len(tune), tune["patient"].nunique())
    assert metrics.fitted_on == "tune"
    assert metrics.notes == []
    for name in expected.by_study_type:
        actual, reference = metrics.by_study_type[name], expected.by_study_type[name]
        assert actual.pooled
        assert actual.slope is not None
        assert (actual.slope, actual.intercept) == pytest.approx(
            (reference.slope, reference.intercept), rel=1e-2
        )  # logits agree to 1e-5
        for point in OPERATING_POINT_NAMES:
            assert metrics.thresholds(point)[name] == pytest.approx(expected.thresholds(point)[name], abs=1e-4)
    assert (
        untrained_metrics["operating_points"]["overall"]["num_studies"] == untrained_metrics["overall"]["num_studies"]
    )
    assert untrained_metrics["overall"]["calibrated"]["brier"] is not None
    assert set(untrained_metrics["subgroups"]) == {"num_views", "exposure"}


def test_valid_split_does_not_affect_the_fit(
    untrained: Path, halved: Path, untrained_metrics: dict[str, Any], tmp_path: Path
) -> None:
    """Inverted labels of valid keep the fit. An inverted tune study changes it."""
    for split, is_same_fit in (("valid", True), ("tune", False)):
        shards, folder = tmp_path / f"{split}-shards", tmp_path / f"{split}-run"
        shutil.copytree(halved, shards)
        shutil.copytree(untrained, folder)
        manifest = Manifest.load(shards / "manifest.csv")
        frame = manifest.frame
        study = frame.loc[frame["split"] == split, "study"]
        is_inverted = frame["study"].isin(study if split == "valid" else study[:1])
        frame.loc[is_inverted, "label"] = 1 - frame.loc[is_inverted, "label"]
        manifest.save(shards / "manifest.csv")
        for path in (shards / "index.json", folder / "data.json"):
            text = path.read_text().replace(untrained_metrics["manifest_sha256"], manifest.digest)
            path.write_text(text)
        metrics = run_evaluation(folder, shards, tmp_path / f"{split}-out")
        assert metrics["manifest_sha256"] == manifest.digest != untrained_metrics["manifest_sha256"]
        assert (metrics["calibration"] == untrained_metrics["calibration"]) == is_same_fit
        is_changed = metrics["overall"]["confusion"] != untrained_metrics["overall"]["confusion"]
        assert is_changed == (split == "valid")


def test_studies_of_predict_and_evaluate_are_equal(
    exported: Path,
    of_radiographs: Path,
    halved: Path,
    untrained: Path,
    untrained_metrics: dict[str, Any],
    phantoms: Path,
    tmp_path: Path,
) -> None:
    assert (
        main(["predict", str(of_radiographs), str(phantoms / "valid"), "--out", str(tmp_path / "p"), "--quiet"]) == DONE
    )
    onnx_metrics = run_evaluation(exported, halved, tmp_path / "e")
    assert onnx_metrics["calibration"] == untrained_metrics["calibration"]  # from the card
    predicted = pd.read_csv(tmp_path / "p" / "studies.csv", keep_default_na=False, dtype=str)
    assert tuple(predicted.columns) == (*STUDY_COLUMNS, "gate", "trained_on")
    for folder, tolerance in ((tmp_path / "e", 1e-6), (untrained, 1e-4)):  # ONNX Runtime, then torch
        table = pd.read_csv(folder / "studies.csv", keep_default_na=False, dtype=str)
        assert tuple(table.columns) == (*STUDY_COLUMNS, "label", "patient", "exposure", "gate", "trained_on")
        assert set(table["trained_on"]) == {"phantoms"}
        views = pd.read_csv(folder / "predictions.csv", keep_default_na=False)
        worst = views.groupby("study")["gate"].agg(lambda arguments: max(arguments, key=gate.NAMES.index))
        assert table["gate"].tolist() == worst[table["study"]].tolist()
        merged = table.merge(predicted, on="study", suffixes=("", "_predicted"))
        assert len(merged) == len(predicted) == len(table) > 0
        for name in ("probability", "calibrated_probability"):
            actual, reference = (merged[f"{name}{end}"].astype(float) for end in ("", "_predicted"))
            np.testing.assert_allclose(actual, reference, atol=tolerance)
        assert (merged["band"] == merged["band_predicted"]).all()
        with_calls = merged[merged["call_predicted"] != ""]
        assert len(with_calls)
        assert (with_calls["call"] == with_calls["call_predicted"]).all()
    assert {"uncertain", "negative"} <= set(predicted["band"])


@pytest.mark.slow
def test_fitted_operating_point_makes_the_calls(
    untrained: Path, halved: Path, phantoms: Path, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(untrained, folder)
    options = ("--operating-point", "specificity=.9", "--prevalence", "0.1")
    metrics = run_evaluation(folder, halved, folder, *options)
    points = FittedThresholds.model_validate(metrics["calibration"])
    thresholds = points.thresholds("specificity=0.9")
    assert (metrics["operating_point"], metrics["threshold"]) == ("specificity=0.9", None)
    assert metrics["thresholds"] == {name: thresholds[name] for name in metrics["by_study_type"]}
    assert metrics["overall"]["prevalence_assumed"] == 0.1
    table = pd.read_csv(folder / "studies.csv")
    assert (table["threshold"] == table["study_type"].map(thresholds)).all()
    assert ((table["probability"] > table["threshold"]) == (table["call"] == 1)).all()
    assert table["call"].nunique() == 2
    confusion = metrics["overall"]["confusion"]
    assert confusion["tp"] + confusion["fp"] == table["call"].sum()
    assert confusion == metrics["operating_points"]["overall"]["points"]["specificity=0.9"]["confusion"]

    assert main(["export", str(folder)]) == DONE
    card = OnnxModel.load(folder / "model.onnx").card
    assert card.operating_point == "specificity=0.9"
    assert card.thresholds == {name: thresholds[name] for name in card.thresholds}
    assert set(card.thresholds) == {
        name for name, group in metrics["by_study_type"].items() if group["kappa"] is not None
    }
    of_card = run_evaluation(folder / "model.onnx", halved, tmp_path / "card")
    assert (of_card["operating_point"], of_card["thresholds"]) == ("specificity=0.9", metrics["thresholds"])
    of_paper = run_evaluation(folder / "model.onnx", halved, tmp_path / "paper", "--operating-point", "paper")
    assert set(of_paper["thresholds"].values()) == {0.5}


def test_missing_fit_is_reported_and_refuses_operating_points(
    untrained: Path, halved: Path, shard_folder: Path, tmp_path: Path, capsys
) -> None:
    unfitted = run_evaluation(untrained, shard_folder, tmp_path / "other")
    assert unfitted["operating_points"] is None
    assert unfitted["calibration"]["fitted_on"] is None
    assert "not the shards the model was trained on" in unfitted["calibration"]["reason"]
    arguments = [
        "evaluate",
        untrained,
        shard_folder,
        "--out",
        tmp_path / "refused",
        "--operating-point",
        "sensitivity=0.95",
    ]
    laws.refusal(capsys, arguments, "--operating-point sensitivity=0.95", "not the shards the model was trained on")
    assert not (tmp_path / "refused").exists()
    laws.refusal(
        capsys, [*arguments[:3], "--operating-point", "sensitivity=1"], "sensitivity=1 is unknown. Pass paper, ", "0.98"
    )
    laws.refusal(capsys, [*arguments[:3], "--prevalence", "30"], "--prevalence 30: must be between 0 and 1", "Omit it")
    on_tune = run_evaluation(untrained, halved, tmp_path / "tune", "--split", "tune")
    assert on_tune["calibration"]["notes"] == ["fitted on the reported split: optimistic"]


def test_other_results_are_not_overwritten(
    untrained: Path, exported: Path, halved: Path, tmp_path: Path, capsys
) -> None:
    for name, file in (("other", "recipe.toml"), ("predicted", "predict.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("")
        for target in (untrained, exported):
            arguments = ["evaluate", target, halved, "--out", tmp_path / name]
            laws.refusal(capsys, arguments, f"{name} ", "would be overwritten. Pass another folder")
        assert [path.name for path in (tmp_path / name).iterdir()] == [file]
    (tmp_path / "file").write_text("")
    for target in (untrained, exported):
        laws.refusal(capsys, ["evaluate", target, halved, "--out", tmp_path / "file"], "is a file. Pass a folder")


def test_odds_shift_of_the_weighted_loss(untrained: Path, halved: Path) -> None:
    """The shift is log(N/A) over the training radiographs that the loss weights counted."""
    weights, shards = ModelWeights.from_run(untrained, "last"), Shards.open(halved)
    train = shards.manifest.frame.query("split == 'train'")
    names = sorted(set(shards.manifest.frame["study_type"]))
    table = compute_class_weights("study_type", train["study_type"].to_numpy(), train["label"].to_numpy(), names)
    assert set(compute_odds_shift(weights, shards).values()) == {0.0}
    [only_run] = weights.runs
    weighted, unweighted = (
        dataclasses.replace(only_run, settings=only_run.settings.model_copy(update={"loss_weights": loss_weights_kind}))
        for loss_weights_kind in ("study_type", "class")
    )
    metrics = compute_odds_shift(dataclasses.replace(weights, runs=(weighted,)), shards)
    normal, abnormal = ((train[train["label"] == label].groupby("study_type").size()) for label in (0, 1))
    for name, (w0, w1) in table.items():
        has_both_labels = name in normal.index and name in abnormal.index
        assert metrics[name] == pytest.approx(np.log(normal[name] / abnormal[name]) if has_both_labels else 0)
        assert metrics[name] == pytest.approx(np.log(w1 / w0))
    of_all = np.log((train["label"] == 0).sum() / (train["label"] == 1).sum())
    assert compute_odds_shift(dataclasses.replace(weights, runs=(unweighted,)), shards) == pytest.approx(
        dict.fromkeys(names, of_all)
    )
    mixed = dataclasses.replace(weights, runs=(weighted, only_run))
    assert compute_odds_shift(mixed, shards) == pytest.approx({name: value / 2 for name, value in metrics.items()})


def test_corrupt_tune_radiographs_are_skipped_and_noted(untrained: Path, halved: Path, tmp_path: Path) -> None:
    shutil.copytree(halved, tmp_path / "shards")
    shards = Shards.open(tmp_path / "shards")
    row = int(shards.rows("tune")[0])
    laws.damage(shards, row)
    metrics = run_evaluation(untrained, tmp_path / "shards", tmp_path / "out")
    assert (metrics["num_damaged"], metrics["calibration"]["num_damaged"]) == (0, 1)
    assert metrics["calibration"]["notes"] == ["corrupt radiographs of tune, skipped: 1"]
