"""Test the metrics summary and its intervals against published numbers, scikit-learn and plain loops."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.studies import simulated
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from mura_dist.metrics import classification, intervals, summary
from mura_dist.metrics.entries import HEADLINE_METRICS

NAMES = (
    *("kappa", "sensitivity", "specificity", "ppv", "npv", "f1", "balanced_accuracy"),
    *("auroc", "average_precision", "brier", "calibration_intercept", "calibration_slope"),
    *("ppv_at_prevalence", "npv_at_prevalence"),
)
ASYMPTOTIC_NAMES = (
    *("kappa_fce", "kappa_official", "auroc_delong"),
    *("sensitivity_wilson", "specificity_wilson", "ppv_wilson", "npv_wilson"),
)
NOT_NULLABLE = {"num_studies", "interval_method", "num_resamples_dropped", "reasons"}
KEYS = {
    *NAMES,
    *(f"{name}_{end}" for name in (*NAMES, *ASYMPTOTIC_NAMES) for end in ("low", "high")),
    *("num_patients", "confusion", "prevalence", "prevalence_assumed"),
    *("calibration_error", "calibration_error_method", "calibrated"),
    *(f"{name}_interval" for name in ("sensitivity", "specificity", "ppv", "npv")),
    *NOT_NULLABLE,
}
PAPER = (102, 13, 17, 75)  # tn, fp, fn, tp of arXiv 1712.06957 on the hidden test


def studies_of_confusion(cells: tuple[int, int, int, int], study_type: str = "XR_WRIST") -> pd.DataFrame:
    """Return studies with this confusion matrix, each of its own patient."""
    label = np.repeat([0, 0, 1, 1], cells)
    probability = np.repeat([0.1, 0.9, 0.1, 0.9], cells)
    patient = [f"patient{i:05}" for i in range(len(label))]
    return pd.DataFrame({"study_type": study_type, "patient": patient, "label": label, "probability": probability})


def check_group(group: dict) -> None:
    """Check the rules that hold for every group of metrics.json."""
    assert set(group) == KEYS
    nulls = {key for key, value in group.items() if value is None}
    assert nulls == set(group["reasons"])
    assert not nulls & NOT_NULLABLE
    assert all(isinstance(reason, str) and reason for reason in group["reasons"].values())
    for name in (*NAMES, *ASYMPTOTIC_NAMES):
        low, high = group[f"{name}_low"], group[f"{name}_high"]
        assert (low is None) == (high is None)
        assert low is None or low <= high
    for name in ("sensitivity", "specificity", "ppv", "npv"):
        ends = [group[f"{name}_{end}"] for end in ("low", "high")]
        assert (group[f"{name}_interval"] is None) == (group[name] is None) == (None in ends)
        if group[f"{name}_interval"] == "wilson":
            assert ends == [group[f"{name}_wilson_{end}"] for end in ("low", "high")]
    for name in HEADLINE_METRICS:  # no interval has width 0
        assert group[f"{name}_low"] is None or -1 <= group[f"{name}_low"] < group[f"{name}_high"] <= 1


def check_metrics(metrics: dict) -> dict:
    """Check the rules of metrics.json, and return the group `overall`."""
    assert set(metrics) == {"overall", "by_study_type", "macro", "interval_kinds"}
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    for group in summary.metrics_by_group(metrics).values():
        check_group(group)
    return metrics["overall"]


def test_official_kappa_of_vectors(shared: Path) -> None:
    submissions = json.loads((shared / "vectors/official_kappa.json").read_text())["submissions"]
    assert len(submissions) == 20
    for submission in submissions:
        for name, cells in submission["confusion_tn_fp_fn_tp"].items():
            group = check_metrics(summary.compute_metrics(studies_of_confusion(cells), resamples=0))
            metrics = [group[key] for key in ("kappa", "kappa_official_low", "kappa_official_high")]
            assert metrics == pytest.approx(submission["official_kappa"][name], abs=1e-9), (submission["id"], name)


def test_kappa_of_validation_vectors(shared: Path) -> None:
    rows = json.loads((shared / "vectors/validation_studies.json").read_text())["rows"]
    assert len(rows) == 24
    for row in rows:
        group = check_metrics(summary.compute_metrics(studies_of_confusion(row["tn_fp_fn_tp"]), resamples=0))
        assert group["kappa"] == pytest.approx(row["kappa"], abs=1e-9)
        assert group["balanced_accuracy"] == pytest.approx(row["balanced_accuracy_reported_as_roc_auc"], abs=1e-9)
        assert group["f1"] == pytest.approx(row["f1"], abs=1e-9)


def test_kappa_and_interval_of_the_paper() -> None:
    group = check_metrics(summary.compute_metrics(studies_of_confusion(PAPER)))
    assert intervals.compute_fce_standard_error(np.array(PAPER)) == pytest.approx(0.049683, abs=5e-7)
    assert [round(group[key], 3) for key in ("kappa", "kappa_fce_low", "kappa_fce_high")] == [0.705, 0.608, 0.803]
    assert [round(group[key], 3) for key in ("sensitivity", "specificity")] == [0.815, 0.887]
    # Each patient has one study, so the bootstrap must agree with the asymptotic interval.
    assert [group["kappa_low"], group["kappa_high"]] == pytest.approx([0.608, 0.803], abs=0.012)


def test_asymptotic_error_is_the_spread_of_kappa() -> None:
    """The standard deviation of kappa over sampled tables equals the formula."""
    tables = np.random.default_rng(0).multinomial(600, [0.5, 0.1, 0.15, 0.25], size=20_000)
    predicted = intervals.compute_fce_standard_error(np.array([300, 60, 90, 150]))
    assert np.std(classification.compute_kappa(tables)) == pytest.approx(predicted, rel=0.02)


def resample_indices(num_resamples: int, num_clusters: int, seed: int) -> np.ndarray:
    """Return the documented resamples: the upper 32 bits of each Philox word, scaled to 0 .. num_clusters - 1."""
    raw = np.random.Philox(key=seed).random_raw(num_resamples * num_clusters)
    return np.array([(int(word) >> 32) * num_clusters >> 32 for word in raw]).reshape(num_resamples, num_clusters)


def test_bootstrap_equals_naive_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_MAX_WEIGHTS_PER_CHUNK", 100)  # several chunks
    studies = simulated(40, 12, seed=3)
    patients = sorted(set(studies["patient"]))
    kappas, areas, dropped = [], [], 0
    for indices in resample_indices(60, len(patients), seed=7):
        sample = pd.concat([studies[studies["patient"] == patients[i]] for i in indices])
        if sample["label"].nunique() < 2:
            dropped += 1
            continue
        kappas.append(cohen_kappa_score(sample["label"], sample["probability"] > 0.5))
        areas.append(roc_auc_score(sample["label"], sample["probability"]))
    group = check_metrics(summary.compute_metrics(studies, resamples=60, seed=7))
    assert [group["kappa_low"], group["kappa_high"]] == pytest.approx(np.quantile(kappas, (0.025, 0.975)), abs=1e-12)
    assert [group["auroc_low"], group["auroc_high"]] == pytest.approx(np.quantile(areas, (0.025, 0.975)), abs=1e-12)
    assert group["num_resamples_dropped"] == dropped
    assert "60 resamples of 12 patients" in group["interval_method"]


def test_one_class_resamples_are_dropped_and_counted() -> None:
    studies = studies_of_confusion((6, 1, 1, 1))
    expected = sum((indices < 7).all() or (indices >= 7).all() for indices in resample_indices(400, 9, seed=0))
    group = check_metrics(summary.compute_metrics(studies, resamples=400))
    assert 10 < expected < 200
    assert group["num_resamples_dropped"] == expected
    assert f"{expected} resamples of one class only dropped" in group["interval_method"]
    assert group["kappa_low"] is not None


def test_metrics_depend_on_seed_and_not_on_order() -> None:
    studies = simulated(200, 60)
    metrics = summary.compute_metrics(studies, resamples=200, seed=1)
    assert summary.compute_metrics(studies.sample(frac=1, random_state=0), resamples=200, seed=1) == metrics
    assert (
        summary.compute_metrics(studies, resamples=200, seed=2)["overall"]["kappa_low"]
        != metrics["overall"]["kappa_low"]
    )


def test_clusters_widen_the_interval() -> None:
    """All studies of a patient are copies. The interval equals that of one study each, twice the naive one."""
    first = simulated(150, 10**6)
    copies = pd.concat([first] * 4, ignore_index=True)
    naive = copies.assign(patient=None)
    width = {
        name: metrics["kappa_high"] - metrics["kappa_low"]
        for name, studies in (("one", first), ("clustered", copies), ("naive", naive))
        for metrics in [check_metrics(summary.compute_metrics(studies, resamples=1000))]
    }
    assert width["clustered"] == pytest.approx(width["one"], rel=1e-9)
    assert width["clustered"] / width["naive"] == pytest.approx(2, rel=0.15)


def test_unknown_patients_are_reported() -> None:
    studies = simulated(100, 50)
    group = check_metrics(summary.compute_metrics(studies.assign(patient=None), resamples=100))
    assert group["num_patients"] is None
    assert "100 studies, clustering unknown" in group["interval_method"]
    studies.loc[:9, "patient"] = None
    group = check_metrics(summary.compute_metrics(studies, resamples=100))
    assert group["num_patients"] == studies["patient"].nunique()
    assert "10 studies name none" in group["interval_method"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("cells", "rate"), [((5, 2, 0, 0), "specificity"), ((0, 0, 1, 0), "sensitivity")])
def test_metrics_of_one_class(cells: tuple[int, int, int, int], rate: str) -> None:
    group = check_metrics(summary.compute_metrics(studies_of_confusion(cells), resamples=50))
    assert group["kappa"] is group["auroc"] is None
    assert group["reasons"]["auroc"] == "one class only"
    assert group[rate] == pytest.approx(cells[0] / sum(cells) if rate == "specificity" else 0)
    assert sum(group["confusion"].values()) == sum(cells)
    assert group[f"{rate}_interval"] == "wilson"
    successes, trials = (5, 7) if rate == "specificity" else (0, 1)
    assert (group[f"{rate}_low"], group[f"{rate}_high"]) == intervals.compute_wilson_interval(successes, trials)


@pytest.mark.filterwarnings("error")
def test_empty_and_unlabeled_studies() -> None:
    empty = check_metrics(summary.compute_metrics(studies_of_confusion((0, 0, 0, 0))))
    assert (empty["num_studies"], empty["num_patients"], empty["confusion"]) == (0, 0, None)
    assert empty["reasons"]["kappa"] == "no labeled studies"
    studies = pd.concat(
        [studies_of_confusion((3, 1, 1, 3)), studies_of_confusion((2, 0, 0, 2), "XR_LEG").assign(label=None)]
    )
    metrics = summary.compute_metrics(studies, resamples=10)
    assert check_metrics(metrics)["num_studies"] == 8
    assert metrics["by_study_type"]["XR_LEG"]["num_studies"] == 0


@pytest.mark.filterwarnings("error")
def test_nan_probabilities_are_not_measured() -> None:
    """NaN > threshold is False, which would count as a normal call."""
    studies = studies_of_confusion((20, 5, 5, 20))
    studies.loc[3, "probability"] = np.nan
    group = check_metrics(summary.compute_metrics(studies, resamples=10))
    assert group["kappa"] is None
    assert group["reasons"]["kappa"] == "1 of 50 studies have no finite probability"


@pytest.mark.filterwarnings("error")
def test_perfect_calls_have_no_zero_width_interval() -> None:
    group = check_metrics(summary.compute_metrics(studies_of_confusion((20, 0, 0, 20)), resamples=100))
    assert group["kappa"] == group["auroc"] == 1
    assert group["kappa_low"] is group["kappa_fce_low"] is None
    assert "exactly 1" in group["reasons"]["kappa_fce_low"]
    assert "every resample gave the same value" in group["reasons"]["kappa_low"]
    assert group["kappa_official_low"] == 1
    for name in ("sensitivity", "specificity", "ppv", "npv"):  # 20 of 20: Newcombe 1998, formula of his method 3
        assert group[name] == 1
        assert [group[f"{name}_low"], group[f"{name}_high"]] == pytest.approx([0.8389, 1], abs=5e-5)
        assert group[f"{name}_interval"] == "wilson"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("probability", "missing"),
    [
        (np.full(60, 0.7), {"kappa_fce": 0, "auroc_delong": 0.5}),  # all called abnormal, with equal probabilities
        (np.tile(np.linspace(0.1, 0.4, 30), 2), {"kappa_fce": 0}),  # nothing called abnormal
        (np.repeat([0.8, 0.2], 30), {"kappa_fce": -1, "auroc_delong": 0}),  # all wrong
    ],
)
def test_asymptotic_interval_of_zero_width_is_missing(probability: np.ndarray, missing: dict[str, float]) -> None:
    studies = studies_of_confusion((30, 0, 0, 30)).assign(probability=probability)
    group = check_metrics(summary.compute_metrics(studies, resamples=20))
    for kind in ("kappa_fce", "auroc_delong"):
        if kind in missing:
            assert group[f"{kind}_low"] is group[f"{kind}_high"] is None
            reason = f"is exactly {missing[kind]:g}: its asymptotic standard error is 0"
            assert group["reasons"][f"{kind}_low"] == f"{kind.partition('_')[0]} {reason}"
        else:
            assert group[f"{kind}_low"] < group[f"{kind}_high"]


def test_few_studies_of_a_class_have_no_asymptotic_interval() -> None:
    assert check_metrics(summary.compute_metrics(studies_of_confusion((30, 5, 3, 6))))["reasons"][
        "kappa_fce_low"
    ].startswith("9 studies")
    assert check_metrics(summary.compute_metrics(studies_of_confusion((30, 5, 3, 7))))["kappa_fce_low"] is not None


def test_asymptotic_interval_is_clipped() -> None:
    assert check_metrics(summary.compute_metrics(studies_of_confusion((10, 0, 1, 9))))["kappa_fce_high"] == 1


def test_one_patient_has_no_interval() -> None:
    group = check_metrics(
        summary.compute_metrics(studies_of_confusion((5, 2, 2, 5)).assign(patient="patient00001"), resamples=20)
    )
    assert group["kappa"] is not None
    assert group["reasons"]["kappa_low"] == "one patient only"
    assert (group["sensitivity_low"], group["sensitivity_high"]) == intervals.compute_wilson_interval(5, 7)


def test_call_is_strictly_above_the_threshold() -> None:
    studies = pd.DataFrame(
        {"study_type": "XR_HAND", "patient": ["a", "b"], "label": [0, 1], "probability": [0.5, 0.500001]}
    )
    assert summary.compute_metrics(studies)["overall"]["confusion"] == {"tn": 1, "fp": 0, "fn": 0, "tp": 1}
    cells = summary.compute_metrics(studies, threshold=0.4)["overall"]["confusion"]
    assert cells == {"tn": 0, "fp": 1, "fn": 0, "tp": 1}


def test_summary_table_fits_the_terminal() -> None:
    studies = pd.concat([simulated(300, 100), studies_of_confusion((0, 0, 2, 1), "XR_SOMETHING_VERY_LONG")])
    text = summary.format_summary_table(summary.compute_metrics(studies, resamples=50))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines[1:5]] == ["overall", "XR_ELBOW", "XR_HAND", "XR_SOMETHING_VER"]
    assert lines[4].split()[1:] == ["3", "-", "-", "0.333", "-"]
    assert lines[-2:] == [
        "1 number has no bootstrap interval: too few studies, or all right or all wrong; see the report",
        "3 numbers are missing (-): see the report",
    ]
    assert len(lines) <= 9  # one line per group, the header, at most two lines on the method, the notes
    assert "303" in lines[1]


# ---- further metrics


@pytest.mark.filterwarnings("error")
def test_calls_only_have_no_probability_metrics() -> None:
    studies = simulated(200, 80)
    calls = studies.assign(call=(studies["probability"] > 0.5).astype(int)).drop(columns="probability")
    metrics, with_probability = (
        check_metrics(summary.compute_metrics(calls, resamples=50)),
        check_metrics(summary.compute_metrics(studies, resamples=50)),
    )
    for name in ("auroc", "average_precision", "brier", "calibration_intercept", "calibration_slope"):
        assert metrics[name] is metrics[f"{name}_low"] is None
        assert metrics["reasons"][name] == "calls only: no probabilities"
    assert metrics["calibration_error"] is metrics["auroc_delong_low"] is None
    for name in ("kappa", "kappa_low", "ppv", "npv_high", "kappa_fce_low", "f1"):
        assert metrics[name] == with_probability[name]


def test_calls_in_the_table_override_the_threshold() -> None:
    studies = simulated(200, 80)
    metrics = check_metrics(summary.compute_metrics(studies.assign(call=1 - studies["label"]), resamples=0))
    assert metrics["kappa"] < -0.9
    assert metrics["auroc"] == check_metrics(summary.compute_metrics(studies, resamples=0))["auroc"]


@pytest.mark.parametrize("prevalence", [0.01, 0.1, 0.5])
def test_predictive_values_follow_bayes(prevalence: float) -> None:
    """PPV and NPV at a prevalence equal those of a set with that prevalence and the same rates."""
    studies = simulated(400, 150)
    own = check_metrics(summary.compute_metrics(studies, resamples=100, prevalence=float(studies["label"].mean())))
    for name in ("ppv", "npv"):
        assert own[f"{name}_at_prevalence"] == pytest.approx(own[name], abs=1e-12)
    metrics = check_metrics(summary.compute_metrics(studies, resamples=100, prevalence=prevalence))
    abnormal, normal = 1e6 * prevalence, 1e6 * (1 - prevalence)
    right, wrong = abnormal * metrics["sensitivity"], normal * (1 - metrics["specificity"])
    assert metrics["ppv_at_prevalence"] == pytest.approx(right / (right + wrong), abs=1e-12)
    assert metrics["ppv_at_prevalence_low"] < metrics["ppv_at_prevalence"] < metrics["ppv_at_prevalence_high"]
    assert metrics["prevalence_assumed"] == prevalence
    assert metrics["prevalence"] == studies["label"].mean()


def test_nothing_called_abnormal_has_no_ppv() -> None:
    metrics = check_metrics(summary.compute_metrics(studies_of_confusion((30, 0, 20, 0)), resamples=50))
    assert metrics["ppv"] is metrics["ppv_low"] is metrics["ppv_wilson_low"] is None
    assert metrics["reasons"]["ppv"] == "nothing was called abnormal"
    assert metrics["npv"] == 0.6


def test_metric_undefined_in_many_resamples_has_no_bootstrap() -> None:
    """With one abnormal call among many patients, a third of the resamples have no PPV."""
    metrics = check_metrics(
        summary.compute_metrics(studies_of_confusion((30, 0, 19, 1)), resamples=400, prevalence=0.1)
    )
    assert metrics["ppv"] == metrics["ppv_at_prevalence"] == 1
    assert metrics["reasons"]["ppv_at_prevalence_low"].startswith("undefined in ")
    assert (metrics["ppv_interval"], metrics["ppv_low"], metrics["ppv_high"]) == (
        "wilson",
        *intervals.compute_wilson_interval(1, 1),
    )


def test_calibrated_probabilities_have_metrics() -> None:
    studies = simulated(400, 150)
    logit = classification.logit(np.clip(studies["probability"].to_numpy(), 0.01, 0.99))
    studies["probability"] = classification.sigmoid(3 * logit + 1)
    metrics = check_metrics(
        summary.compute_metrics(studies.assign(calibrated_probability=classification.sigmoid(logit)), resamples=200)
    )
    recomputed = check_metrics(
        summary.compute_metrics(studies.assign(probability=classification.sigmoid(logit)), resamples=200)
    )
    assert metrics["calibrated"]["auroc"] == pytest.approx(metrics["auroc"], abs=1e-12)
    for name in ("brier", "calibration_slope", "calibration_intercept", "calibration_error", "brier_low", "brier_high"):
        assert metrics["calibrated"][name] == pytest.approx(recomputed[name], abs=1e-9)
    assert metrics["calibrated"]["brier"] < metrics["brier"]
    assert metrics["calibration_slope"] < metrics["calibrated"]["calibration_slope"]
    incomplete = studies.assign(calibrated_probability=classification.sigmoid(logit))
    incomplete.loc[3, "calibrated_probability"] = np.nan
    assert check_metrics(summary.compute_metrics(incomplete, resamples=0))["calibrated"] is None
    one_class = studies_of_confusion((4, 5, 0, 0)).assign(calibrated_probability=np.linspace(0.1, 0.9, 9))
    reasons = check_metrics(summary.compute_metrics(one_class, resamples=20))["calibrated"]["reasons"]
    assert {reasons[f"calibration_{name}"] for name in ("slope", "intercept")} == {"one class only"}


def test_macro_is_the_mean_over_types_with_both_labels() -> None:
    studies = pd.concat([simulated(300, 100), studies_of_confusion((0, 0, 3, 4), "XR_HIP")])
    metrics = summary.compute_metrics(studies, resamples=200)
    check_metrics(metrics)
    types = [metrics["by_study_type"][name] for name in ("XR_ELBOW", "XR_HAND")]
    for name in HEADLINE_METRICS:
        macro = metrics["macro"]
        assert macro[name] == pytest.approx(sum(group[name] for group in types) / 2, abs=1e-12)
        assert macro[f"{name}_low"] < macro[name] < macro[f"{name}_high"]
    assert (macro["num_study_types"], macro["left_out"]) == (2, ["XR_HIP"])
    assert macro["method"] == "unweighted mean over study types"
    assert not [key for key in macro if key.endswith("_interval")], "a mean of rates has no Wilson interval"
    none = summary.compute_metrics(studies_of_confusion((0, 0, 3, 4)), resamples=10)["macro"]
    assert none["kappa"] is None
    assert none["reasons"]["kappa"] == "no study type has studies of both labels"


def test_subgroups_partition_the_studies() -> None:
    studies = simulated(400, 150)
    rng = np.random.default_rng(5)
    studies = studies.assign(num_views=rng.integers(1, 8, 400), exposure=rng.normal(60, 15, 400))
    metrics = summary.compute_subgroup_metrics(studies, resamples=20)
    assert list(metrics["num_views"]) == ["1", "2", "3", "4 or more"]
    assert [name.split(" (")[0] for name in metrics["exposure"]] == ["darkest third", "middle third", "brightest third"]
    for groups in metrics.values():
        assert sum(group["num_studies"] for group in groups.values()) == 400
    of_two_views = check_metrics(summary.compute_metrics(studies[studies["num_views"] == 2], resamples=20))
    for key in ("kappa", "kappa_low", "auroc", "auroc_high", "sensitivity"):
        assert metrics["num_views"]["2"][key] == of_two_views[key]
    assert summary.compute_subgroup_metrics(studies.drop(columns=["num_views", "exposure"])) == {}
    constant = summary.compute_subgroup_metrics(studies.assign(exposure=7.0), resamples=0)["exposure"]
    assert [group["num_studies"] for group in constant.values()] == [400]


# ---- intervals


def test_delong_equals_double_loop_over_placements() -> None:
    studies = simulated(90, 90)
    label, first = studies["label"].to_numpy(), studies["probability"].to_numpy()
    second = np.round(np.clip(first + np.random.default_rng(2).normal(0, 0.2, 90), 0, 1), 1)
    areas, covariance = intervals.compute_delong_covariance(label, np.stack([first, second]))
    above, below = [], []
    for score in (first, second):
        p, q = score[label == 1], score[label == 0]
        wins = (p[:, None] > q).astype(float) + (p[:, None] == q) / 2
        above.append(wins.mean(axis=1))
        below.append(wins.mean(axis=0))
        assert areas[len(above) - 1] == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    expected = np.cov(above) / len(above[0]) + np.cov(below) / len(below[0])
    np.testing.assert_allclose(covariance, expected, atol=1e-14)


def test_delong_and_bootstrap_agree_for_independent_studies() -> None:
    metrics = check_metrics(summary.compute_metrics(simulated(500, 10**6), resamples=2000))
    bootstrap_width = metrics["auroc_high"] - metrics["auroc_low"]
    assert metrics["auroc_delong_high"] - metrics["auroc_delong_low"] == pytest.approx(bootstrap_width, rel=0.06)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (3, 9), (40, 61)])
def test_mcnemar_equals_binomial_test(first: int, second: int) -> None:
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert intervals.compute_mcnemar_p_value(first, second) == pytest.approx(expected, abs=1e-12)


def test_bootstrap_interval_coverage() -> None:
    """About 95 % of the bootstrap intervals contain the true sensitivity, of 80 sets. Wilson's contain it less often."""
    rng = np.random.default_rng(0)
    num_covered = {"": 0, "_wilson": 0}
    for _ in range(80):
        patient = np.repeat(np.arange(80), 4)
        easy = rng.beta(2, 0.5, 80)[patient]  # sensitivity differs from patient to patient, 0.8 on average
        label = np.tile([1, 1, 1, 0], 80)
        call = np.where(label == 1, rng.random(320) < easy, rng.random(320) < 0.2).astype(int)
        names = [f"patient{first}" for first in patient]
        studies = pd.DataFrame({"study_type": "XR_HAND", "patient": names, "label": label, "call": call})
        metrics = summary.compute_metrics(studies, resamples=200)["overall"]
        for kind in num_covered:
            num_covered[kind] += metrics[f"sensitivity{kind}_low"] <= 0.8 <= metrics[f"sensitivity{kind}_high"]
    assert 70 <= num_covered[""] <= 80
    assert num_covered["_wilson"] < num_covered[""] - 3
