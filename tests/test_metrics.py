"""metrics.py against published numbers, scikit-learn, and loops that anyone can check by eye."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from mura_dist import intervals, measure, metrics

KEYS = {
    *("num_studies", "num_patients", "kappa", "kappa_low", "kappa_high", "interval_method", "num_resamples_dropped"),
    *("kappa_fce_low", "kappa_fce_high", "kappa_official_low", "kappa_official_high", "auroc", "auroc_low"),
    *("auroc_high", "sensitivity", "sensitivity_low", "sensitivity_high", "specificity", "specificity_low"),
    *("specificity_high", "confusion", "reasons"),
}
NOT_NULLABLE = {"num_studies", "interval_method", "num_resamples_dropped", "reasons"}
PAPER = (102, 13, 17, 75)  # tn, fp, fn, tp of arXiv 1712.06957 on the hidden test


def of_confusion(cells: tuple[int, int, int, int], study_type: str = "XR_WRIST") -> pd.DataFrame:
    """Studies, each of a patient of its own, that give this confusion."""
    label = np.repeat([0, 0, 1, 1], cells)
    probability = np.repeat([0.1, 0.9, 0.1, 0.9], cells)
    patient = [f"patient{i:05}" for i in range(len(label))]
    return pd.DataFrame({"study_type": study_type, "patient": patient, "label": label, "probability": probability})


def simulated(num: int, num_patients: int, seed: int = 0, noise: float = 1.3) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, num)
    logit = 2 * label - 1 + rng.normal(0, noise, num)
    return pd.DataFrame(
        {
            "study_type": rng.choice(["XR_ELBOW", "XR_HAND"], num),
            "patient": [f"patient{i:05}" for i in rng.integers(0, num_patients, num)],
            "label": label,
            "probability": np.round(1 / (1 + np.exp(-logit)), 2),  # rounded: many ties
        }
    )


def check_group(group: dict) -> None:
    """What holds for every group whatsoever."""
    assert set(group) == KEYS
    nulls = {key for key, value in group.items() if value is None}
    assert nulls == set(group["reasons"])
    assert not nulls & NOT_NULLABLE
    assert all(isinstance(reason, str) and reason for reason in group["reasons"].values())
    for name in measure.METRICS:
        low, high = group[f"{name}_low"], group[f"{name}_high"]
        assert (low is None) == (high is None)
        assert low is None or -1 <= low < high <= 1


def check(found: dict) -> dict:
    """Contract of metrics.json; returns `overall`."""
    assert set(found) == {"overall", "by_study_type"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for group in measure.groups(found).values():
        check_group(group)
    return found["overall"]


def test_official_vectors(shared: Path) -> None:
    submissions = json.loads((shared / "vectors/official_kappa.json").read_text())["submissions"]
    assert len(submissions) == 20
    for submission in submissions:
        for name, cells in submission["confusion_tn_fp_fn_tp"].items():
            group = check(measure.measure(of_confusion(cells), resamples=0))
            found = [group[key] for key in ("kappa", "kappa_official_low", "kappa_official_high")]
            assert found == pytest.approx(submission["official_kappa"][name], abs=1e-9), (submission["id"], name)


def test_validation_vectors(shared: Path) -> None:
    rows = json.loads((shared / "vectors/validation_studies.json").read_text())["rows"]
    assert len(rows) == 24
    for row in rows:
        group = check(measure.measure(of_confusion(row["tn_fp_fn_tp"]), resamples=0))
        assert group["kappa"] == pytest.approx(row["kappa"], abs=1e-9)
        balanced = (group["sensitivity"] + group["specificity"]) / 2
        assert balanced == pytest.approx(row["balanced_accuracy_reported_as_roc_auc"], abs=1e-9)
        cells = group["confusion"]
        f1 = 2 * cells["tp"] / (2 * cells["tp"] + cells["fp"] + cells["fn"])
        assert f1 == pytest.approx(row["f1"], abs=1e-9)


def test_the_paper() -> None:
    group = check(measure.measure(of_confusion(PAPER)))
    assert intervals.fce_standard_error(np.array(PAPER)) == pytest.approx(0.049683, abs=5e-7)
    assert [round(group[key], 3) for key in ("kappa", "kappa_fce_low", "kappa_fce_high")] == [0.705, 0.608, 0.803]
    assert [round(group[key], 3) for key in ("sensitivity", "specificity")] == [0.815, 0.887]
    # Each patient has one study, so the bootstrap must agree with the asymptotic interval.
    assert [group["kappa_low"], group["kappa_high"]] == pytest.approx([0.608, 0.803], abs=0.012)


def test_asymptotic_error_is_the_spread_of_kappa() -> None:
    """On tables drawn from one true table, kappa scatters as the formula says."""
    tables = np.random.default_rng(0).multinomial(600, [0.5, 0.1, 0.15, 0.25], size=20_000)
    predicted = intervals.fce_standard_error(np.array([300, 60, 90, 150]))
    assert np.std(metrics.kappa(tables)) == pytest.approx(predicted, rel=0.02)


def test_kappa_is_scikit_learns() -> None:
    studies = simulated(500, 100)
    label, call = studies["label"].to_numpy(), studies["probability"].to_numpy() > 0.5
    assert metrics.kappa(metrics.confusion(label, call)) == pytest.approx(cohen_kappa_score(label, call), abs=1e-12)
    weight = np.random.default_rng(1).integers(0, 4, (3, 500)).astype(float)
    expected = [cohen_kappa_score(label, call, sample_weight=one) for one in weight]
    assert metrics.kappa(metrics.confusion(label, call, weight)) == pytest.approx(expected, abs=1e-12)


def test_auroc_is_scikit_learns_with_ties_and_weights() -> None:
    studies = simulated(500, 100)
    label, probability = studies["label"].to_numpy(), studies["probability"].to_numpy()
    assert len(np.unique(probability)) < 120
    assert metrics.auroc(label, probability) == pytest.approx(roc_auc_score(label, probability), abs=1e-12)
    weight = np.random.default_rng(1).integers(0, 4, (3, 500)).astype(float)
    expected = [roc_auc_score(label, probability, sample_weight=one) for one in weight]
    assert metrics.auroc(label, probability, weight) == pytest.approx(expected, abs=1e-12)


def test_area_below_the_roc_curve_is_auroc() -> None:
    studies = simulated(300, 100)
    label, probability = studies["label"].to_numpy(), studies["probability"].to_numpy()
    false, true = metrics.roc(label, probability)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert np.diff(false) @ (true[1:] + true[:-1]) / 2 == pytest.approx(
        float(metrics.auroc(label, probability)), abs=1e-12
    )


def draws(num_resamples: int, num_clusters: int, seed: int) -> np.ndarray:
    """The documented draw, spelled out: the upper 32 bits of each Philox word, scaled to 0 .. num_clusters - 1."""
    raw = np.random.Philox(key=seed).random_raw(num_resamples * num_clusters)
    return np.array([(int(word) >> 32) * num_clusters >> 32 for word in raw]).reshape(num_resamples, num_clusters)


def test_bootstrap_is_the_naive_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_CELLS_AT_ONCE", 100)  # several chunks
    studies = simulated(40, 12, seed=3)
    patients = sorted(set(studies["patient"]))
    kappas, areas, dropped = [], [], 0
    for drawn in draws(60, len(patients), seed=7):
        sample = pd.concat([studies[studies["patient"] == patients[i]] for i in drawn])
        if sample["label"].nunique() < 2:
            dropped += 1
            continue
        kappas.append(cohen_kappa_score(sample["label"], sample["probability"] > 0.5))
        areas.append(roc_auc_score(sample["label"], sample["probability"]))
    group = check(measure.measure(studies, resamples=60, seed=7))
    assert [group["kappa_low"], group["kappa_high"]] == pytest.approx(np.quantile(kappas, (0.025, 0.975)), abs=1e-12)
    assert [group["auroc_low"], group["auroc_high"]] == pytest.approx(np.quantile(areas, (0.025, 0.975)), abs=1e-12)
    assert group["num_resamples_dropped"] == dropped
    assert "60 resamples of 12 patients" in group["interval_method"]


def test_one_class_resamples_are_dropped_and_counted() -> None:
    studies = of_confusion((6, 1, 1, 1))
    expected = sum((drawn < 7).all() or (drawn >= 7).all() for drawn in draws(400, 9, seed=0))
    group = check(measure.measure(studies, resamples=400))
    assert 10 < expected < 200
    assert group["num_resamples_dropped"] == expected
    assert f"{expected} resamples of one class only dropped" in group["interval_method"]
    assert group["kappa_low"] is not None


def test_deterministic_in_seed_and_free_of_order() -> None:
    studies = simulated(200, 60)
    found = measure.measure(studies, resamples=200, seed=1)
    assert measure.measure(studies.sample(frac=1, random_state=0), resamples=200, seed=1) == found
    assert measure.measure(studies, resamples=200, seed=2)["overall"]["kappa_low"] != found["overall"]["kappa_low"]


def test_clusters_widen_the_interval() -> None:
    """Every patient's studies are copies of one: the interval is that of one study each, and twice the naive."""
    one = simulated(150, 10**6)
    copies = pd.concat([one] * 4, ignore_index=True)
    naive = copies.assign(patient=None)
    width = {
        name: found["kappa_high"] - found["kappa_low"]
        for name, studies in (("one", one), ("clustered", copies), ("naive", naive))
        for found in [check(measure.measure(studies, resamples=1000))]
    }
    assert width["clustered"] == pytest.approx(width["one"], rel=1e-9)
    assert width["clustered"] / width["naive"] == pytest.approx(2, rel=0.15)


def test_unknown_patients_are_said() -> None:
    studies = simulated(100, 50)
    group = check(measure.measure(studies.assign(patient=None), resamples=100))
    assert group["num_patients"] is None
    assert "100 studies, clustering unknown" in group["interval_method"]
    studies.loc[:9, "patient"] = None
    group = check(measure.measure(studies, resamples=100))
    assert group["num_patients"] == studies["patient"].nunique()
    assert "10 studies name none" in group["interval_method"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("cells", "known"), [((5, 2, 0, 0), "specificity"), ((0, 0, 1, 0), "sensitivity")])
def test_one_class(cells: tuple[int, int, int, int], known: str) -> None:
    group = check(measure.measure(of_confusion(cells), resamples=50))
    assert group["kappa"] is group["auroc"] is None
    assert group["reasons"]["auroc"] == "one class only"
    assert group[known] == pytest.approx(cells[0] / sum(cells) if known == "specificity" else 0)
    assert sum(group["confusion"].values()) == sum(cells)
    assert group[f"{known}_low"] is None


@pytest.mark.filterwarnings("error")
def test_empty_and_unlabelled() -> None:
    empty = check(measure.measure(of_confusion((0, 0, 0, 0))))
    assert (empty["num_studies"], empty["num_patients"], empty["confusion"]) == (0, 0, None)
    assert empty["reasons"]["kappa"] == "no labelled studies"
    studies = pd.concat([of_confusion((3, 1, 1, 3)), of_confusion((2, 0, 0, 2), "XR_LEG").assign(label=None)])
    found = measure.measure(studies, resamples=10)
    assert check(found)["num_studies"] == 8
    assert found["by_study_type"]["XR_LEG"]["num_studies"] == 0


@pytest.mark.filterwarnings("error")
def test_a_diverged_network_measures_nothing() -> None:
    """NaN > threshold is False: left alone, it would count as a call of normal."""
    studies = of_confusion((20, 5, 5, 20))
    studies.loc[3, "probability"] = np.nan
    group = check(measure.measure(studies, resamples=10))
    assert group["kappa"] is None
    assert group["reasons"]["kappa"] == "1 of 50 studies have no finite probability"


@pytest.mark.filterwarnings("error")
def test_perfect_calls_claim_no_certainty() -> None:
    group = check(measure.measure(of_confusion((20, 0, 0, 20)), resamples=100))
    assert group["kappa"] == group["auroc"] == 1
    assert group["kappa_low"] is group["kappa_fce_low"] is None
    assert "exactly 1" in group["reasons"]["kappa_fce_low"]
    assert "every resample gave the same value" in group["reasons"]["kappa_low"]
    assert group["kappa_official_low"] == 1


def test_few_of_a_class_have_no_asymptotic_interval() -> None:
    assert check(measure.measure(of_confusion((30, 5, 3, 6))))["reasons"]["kappa_fce_low"].startswith("9 studies")
    assert check(measure.measure(of_confusion((30, 5, 3, 7))))["kappa_fce_low"] is not None


def test_asymptotic_interval_is_clipped() -> None:
    assert check(measure.measure(of_confusion((10, 0, 1, 9))))["kappa_fce_high"] == 1


def test_one_patient_has_no_interval() -> None:
    group = check(measure.measure(of_confusion((5, 2, 2, 5)).assign(patient="patient00001"), resamples=20))
    assert group["kappa"] is not None
    assert group["reasons"]["kappa_low"] == "one patient only"


def test_call_is_strictly_above_the_threshold() -> None:
    studies = pd.DataFrame(
        {"study_type": "XR_HAND", "patient": ["a", "b"], "label": [0, 1], "probability": [0.5, 0.500001]}
    )
    assert measure.measure(studies)["overall"]["confusion"] == {"tn": 1, "fp": 0, "fn": 0, "tp": 1}
    cells = measure.measure(studies, threshold=0.4)["overall"]["confusion"]
    assert cells == {"tn": 0, "fp": 1, "fn": 0, "tp": 1}


def manifest_frame() -> pd.DataFrame:
    """Three studies of two, one and three views."""
    study = ["a", "a", "b", "c", "c", "c"]
    patient = ["p", "p", "p", "q", "q", "q"]
    frame = pd.DataFrame({"split": "valid", "study_type": "XR_HAND", "patient": patient, "study": study, "view": 1})
    return frame.assign(label=[0, 0, 1, 1, 1, 1], path="").rename_axis("row")


def test_study_table_means_views_in_any_order() -> None:
    rows, probability = np.array([5, 0, 3, 1, 4, 2]), np.array([0.9, 0.2, 0.6, 0.4, 0.3, 0.7])
    table = metrics.study_table(rows, probability, manifest_frame())
    assert list(table.columns) == ["study", "study_type", "patient", "label", "num_views", "probability"]
    assert table["study"].tolist() == ["a", "b", "c"]
    assert table["num_views"].tolist() == [2, 1, 3]
    assert table["label"].tolist() == [0, 1, 1]
    assert table["probability"].tolist() == pytest.approx([0.3, 0.7, 0.6])
    order = np.random.default_rng(0).permutation(6)
    pd.testing.assert_frame_equal(
        metrics.study_table(rows[order], probability[order], manifest_frame()), table, check_exact=True
    )


def test_study_table_keeps_nan_and_refuses_a_row_twice() -> None:
    table = metrics.study_table(np.array([0, 1, 3]), np.array([0.2, np.nan, 0.5]), manifest_frame())
    assert np.isnan(table["probability"][0])
    assert table["num_views"].tolist() == [2, 1]
    with pytest.raises(AssertionError, match="twice"):
        metrics.study_table(np.array([0, 0]), np.array([0.1, 0.2]), manifest_frame())


def test_summary_table_fits_the_terminal() -> None:
    studies = pd.concat([simulated(300, 100), of_confusion((0, 0, 2, 1), "XR_SOMETHING_VERY_LONG")])
    text = measure.summary_table(measure.measure(studies, resamples=50))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines[1:5]] == ["overall", "XR_ELBOW", "XR_HAND", "XR_SOMETHING_VER"]
    assert lines[4].split()[1:] == ["3", "-", "-", "0.333", "-"]
    assert "XR_SOMETHING_VERY_LONG: kappa, auroc, specificity: one class only" in lines
    assert "303" in lines[1]
