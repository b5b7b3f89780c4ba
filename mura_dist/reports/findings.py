"""Build the content of a report as data: report.json. The page is made from the same data.

    content of metrics.json, the table of studies, the run's context -> build_findings -> report.json, report.html

The data holds no name of a file, a study or a patient.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from mura_dist import __version__
from mura_dist.data import mura
from mura_dist.metrics.classification import CELLS
from mura_dist.metrics.intervals import WILSON
from mura_dist.metrics.summary import describe_missing, format_number, metrics_by_group
from mura_dist.reports import plots, training_curves
from mura_dist.reports.plurals import pluralize

JsonObject = dict[str, Any]

FEW_STUDIES, FEW_OF_A_CLASS = 50, 10
WIDE_BAND = 0.25  # share of uncertain studies above which the band is called wide
FEW_TUNE_OF_A_CLASS = (
    200  # tune studies of the rarer label; with fewer, a 95 % threshold leaves less than ten beyond it
)
MAX_CURVE_POINTS = 300
TITLES = {
    "kappa": "Kappa",
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "ppv": "PPV",
    "npv": "NPV",
    "f1": "F1",
    "balanced_accuracy": "Balanced accuracy",
    "brier": "Brier score",
    "calibration_slope": "Slope",
    "calibration_intercept": "Intercept",
    "calibration_error": "Calibration error",
}
# Of the 207 studies of the hidden test. The values by study type are computed from the paper's confusion matrices.
PUBLISHED = {
    "source": "arXiv 1712.06957, hidden test of 207 studies",
    "kappa": {
        "overall": 0.705,
        "XR_ELBOW": 0.710,
        "XR_FINGER": 0.389,
        "XR_FOREARM": 0.737,
        "XR_HAND": 0.851,
        "XR_HUMERUS": 0.600,
        "XR_SHOULDER": 0.729,
        "XR_WRIST": 0.931,
    },
    "best_radiologist_kappa": {"overall": 0.778},
}
NOT_COMPARABLE = (
    "The kappas of the paper and of the radiologists are not listed. They were measured on the 207 studies of the official "
    "test set, which has another gold standard. This report is of other studies, so the numbers must not be compared."
)
INTERVALS_COVER = (
    "The intervals cover the sampling of patients, but not another training run, another hospital or label errors."
)


def build_findings(metrics: dict[str, Any], studies: pd.DataFrame, context: Mapping[str, Any]) -> JsonObject:
    """Return the content of a report, as standard JSON values. Missing information is None or empty.

    Args:
        metrics: The content of metrics.json.
        studies: One row a study, as summary.compute_metrics takes it.
        context: See evaluation.write.
    """
    facts = {
        **{key: metrics.get(key) for key in _IN_METRICS},
        **{key: value for key, value in context.items() if value is not None},
    }
    missing = {name: describe_missing(group) for name, group in metrics_by_group(metrics).items()}
    return {
        "title": facts.get("title") or "Report",
        "about": {title: facts.get(key) for key, title in _ABOUT.items()},
        "stamps": list(_stamps(facts)),
        "summary": list(_summary(metrics, studies, facts)),
        "metrics": metrics,
        "notes": [facts["note"]] if facts.get("note") and facts["note"] not in _STAMPED else [],
        "thresholds": {name: _threshold(name, facts) for name in metrics_by_group(metrics)},
        "few_studies": _small_groups(metrics),
        "wide_band": _wide_band(metrics),
        "missing": {name: reasons for name, reasons in missing.items() if reasons},
        "published": dict(PUBLISHED) if _is_official_test(studies) else {"absent": NOT_COMPARABLE},
        "plots": {name: _plots(name, group, metrics) for name, group in _labeled_groups(studies, metrics)},
        "how_to_read": list(_how_to_read(facts)),
        "training": _training(facts.get("history") or []),
        "evaluation": _evaluation(studies, facts),
        "data": _data(facts),
        "roles": facts.get("roles") or {},
        "settings": facts.get("settings") or {},
        "environment": {"mura-dist": __version__, **(facts.get("environment") or {})},
        "members": facts.get("members") or [],
        "terms": facts.get("terms") or mura.TERMS,
        "licence": facts.get("licence") or mura.LICENSE,
    }


_IN_METRICS = (
    *("split", "threshold", "selected_on", "checkpoint", "members", "trained_on", "measured_on", "manifest_sha256"),
    *(
        "num_unreadable",
        "num_damaged",
        "terms",
        "note",
        "operating_point",
        "thresholds",
        "predictions",
        "labels",
        "against",
    ),
)
# Notes of metrics.json that the report shows as a stamp instead.
_STAMPED = ("optimistic: this split fitted the model", "optimistic: this split chose the model")
_ABOUT = {"split": "Split", "checkpoint": "Checkpoint", "trained_on": "Trained on"}


def _is_official_test(studies: pd.DataFrame) -> bool:
    keys = ("study_type", "label")
    return set(keys) <= set(studies.columns) and mura.is_official_test({key: studies[key] for key in keys})


def _threshold(name: str, facts: Mapping[str, Any]) -> float | None:
    """Return the threshold of a study type, or else the threshold of all studies."""
    threshold: float | None = (facts.get("thresholds") or {}).get(name, facts.get("threshold"))
    return threshold


def _labeled_groups(studies: pd.DataFrame, metrics: dict[str, Any]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each group's name and its labeled studies."""
    labeled = studies[studies["label"].notna()]
    for name in metrics_by_group(metrics):
        yield name, labeled if name == "overall" else labeled[labeled["study_type"] == name]


# ---- text


PHANTOM_STAMPS = {  # by (trained on drawings, measured on drawings)
    (True, True): "trained and measured on computer drawings: the numbers do not hold for radiographs",
    (True, False): "trained on computer drawings: the model was never trained on a radiograph",
    (False, True): "measured on computer drawings: the numbers do not hold for radiographs",
}


def _stamps(facts: Mapping[str, Any]) -> Iterator[str]:
    split, trained_on = facts.get("split"), facts.get("trained_on")
    measured_on = facts.get("measured_on") or trained_on
    if stamp := PHANTOM_STAMPS.get((trained_on == "phantoms", measured_on == "phantoms")):
        yield stamp
    if split is not None and split == facts.get("selected_on"):
        yield f"optimistic: this split chose the model ({split} set the learning rate and selected the checkpoint)"
    if split == "train":
        yield "optimistic: this split fitted the weights. The numbers do not hold for studies outside the training data"
    if facts.get("same_data") is False:
        yield "measured on other shards than the run was trained on. If a patient is in both, the numbers are optimistic"


def _summary(metrics: dict[str, Any], studies: pd.DataFrame, facts: Mapping[str, Any]) -> Iterator[str]:
    overall, split = metrics["overall"], facts.get("split")
    patients = "unknown patients" if overall["num_patients"] is None else pluralize(overall["num_patients"], "patient")
    role = (facts.get("roles") or {}).get(split) if split else None
    of_split = f" (split {split}{f', which {role}' if role else ''})" if split else ""
    yield f"Measured on {pluralize(overall['num_studies'], 'study')} of {patients}{of_split}. {_call_rule(studies, facts)}"
    cells = overall["confusion"]
    if cells is None:
        yield "Nothing could be measured."
        return
    abnormal, normal = cells["tp"] + cells["fn"], cells["tn"] + cells["fp"]
    yield (
        f"Of {pluralize(abnormal, 'abnormal study')}, {cells['tp']:,} were called abnormal. "
        f"Of {pluralize(normal, 'normal study')}, {cells['fp']:,} were called abnormal."
    )
    yield from _metric_sentences(metrics)
    yield f"Intervals: {overall['interval_method']}. {INTERVALS_COVER}"


def _call_rule(studies: pd.DataFrame, facts: Mapping[str, Any]) -> str:
    if has_only_calls(studies):
        return "The predictions hold a call, 0 or 1, for each study and no probability."
    threshold, name = facts.get("threshold"), facts.get("operating_point")
    limit = "its threshold (not available)" if threshold is None else f"{threshold:g}"
    if threshold is None and name:
        limit = f"the threshold of its study type (operating point {name}, fitted on tune)"
    return f"A study is called abnormal if its probability, the mean over its views, is above {limit}."


def has_only_calls(studies: pd.DataFrame) -> bool:
    """Return whether the predictions hold calls and no probability."""
    return "call" in studies and _column(studies, "probability") is None


def _metric_sentences(metrics: dict[str, Any]) -> Iterator[str]:
    """Yield sentences on kappa, calibration and the uncertain band, where they were measured."""
    overall, macro = metrics["overall"], metrics.get("macro") or {}
    if overall["kappa"] is not None:
        text = f"Kappa over all studies is {format_with_interval(overall, 'kappa')}."
        if macro.get("kappa") is not None and macro["num_study_types"] > 1:
            text += f" The unweighted mean over {macro['num_study_types']} study types is "
            text += f"{format_with_interval(macro, 'kappa')}."
        yield text
    error, after = overall.get("calibration_error"), overall.get("calibrated")
    if error is not None:
        text = f"The calibration error is {format_number(error)}"
        text += f", and {format_number(after['calibration_error'])} after calibration" if after else ""
        text += f" ({overall['calibration_error_method']})."
        yield f"{text} It is the mean difference between the probability and the share of abnormal studies."
    band = ((metrics.get("operating_points") or {}).get("overall") or {}).get("band") or {}
    if band.get("share_uncertain") is not None:
        text = f"The uncertain band contains {band['num_uncertain']:,} of {pluralize(band['num_studies'], 'study')}, a share of "
        text += f"{format_with_interval(band, 'share_uncertain')}."
        if band.get("accuracy_outside") is not None:
            text += f" Outside the band, the accuracy is {format_with_interval(band, 'accuracy_outside')}."
        yield text


def format_with_interval(group: Mapping[str, Any], name: str) -> str:
    """Return `0.651 (0.605 to 0.694)`, or the value alone where there is no interval. A Wilson interval is named."""
    low, high = group.get(f"{name}_low"), group.get(f"{name}_high")
    value, kind = format_number(group.get(name)), ", Wilson" if group.get(f"{name}_interval") == WILSON else ""
    return value if low is None or high is None else f"{value} ({format_number(low)} to {format_number(high)}{kind})"


def _group_name(name: str) -> str:
    return "all studies" if name == "overall" else mura.display_name(name)


def _small_groups(metrics: dict[str, Any]) -> list[str]:
    small = []
    for name, group in metrics_by_group(metrics).items():
        cells = group["confusion"] or dict.fromkeys(CELLS, 0)
        rarer = min(cells["tp"] + cells["fn"], cells["tn"] + cells["fp"])
        if group["num_studies"] < FEW_STUDIES or rarer < FEW_OF_A_CLASS:
            small.append(
                f"{_group_name(name)} ({pluralize(group['num_studies'], 'study')}, {rarer} of the rarer label)"
            )
    return small


def _wide_band(metrics: dict[str, Any]) -> str | None:
    """Return a note on a wide uncertain band that was fitted on few tune studies, or None."""
    band = ((metrics.get("operating_points") or {}).get("overall") or {}).get("band") or {}
    fitted = metrics.get("calibration") or {}
    rarer = min(fitted.get("num_normal", 0), fitted.get("num_abnormal", 0))
    if (band.get("share_uncertain") or 0.0) <= WIDE_BAND or not 0 < rarer < FEW_TUNE_OF_A_CLASS:
        return None
    counts = f"{fitted['num_normal']:,} normal, {fitted['num_abnormal']:,} abnormal"
    return (
        f"The band is wide: it contains {100 * band['share_uncertain']:.0f} % of the studies. It was fitted on only "
        f"{pluralize(fitted['num_studies'], 'tune study')} ({counts}), so a few studies set its limits. "
        "More tune studies (shards --tune) would narrow it."
    )


def _how_to_read(facts: Mapping[str, Any]) -> Iterator[str]:
    yield "Kappa is the agreement of calls with labels beyond chance: 0 is chance, 1 is perfect agreement."
    yield (
        "AUROC is the probability that an abnormal study scores higher than a normal study. It does not depend on the "
        "threshold. Kappa, sensitivity, specificity, PPV and NPV do."
    )
    yield (
        "PPV and NPV depend on the share of abnormal studies. Where fewer studies are abnormal than in this set, PPV is "
        "lower and NPV is higher."
    )
    yield (
        "Calibrated means: of the studies with a probability near 0.3, three in ten are abnormal. A slope below 1 means that "
        "the probabilities are too extreme. An intercept below 0 means that they are too high."
    )
    yield "A study that is not called abnormal may still be abnormal. The summary above counts the missed studies."
    if "radiographs" in (facts.get("trained_on"), facts.get("measured_on")):
        yield (
            "MURA's labels are noisy, and about half of its positive studies show hardware or plaster. A model that is trained "
            "on MURA therefore learns in part to detect metal. The paper's kappa of 0.705 was measured on other studies with "
            "another gold standard. Do not compare it with this report."
        )


# ---- plots


def _plots(name: str, studies: pd.DataFrame, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return a group's curves and counts. A missing one is None; `absent` is the reason."""
    data: dict[str, Any] = dict.fromkeys(("roc", "precision_recall", "scores", "reliability", "reliability_calibrated"))
    data["band"] = _band(name, metrics)
    label = studies["label"].to_numpy(dtype=np.int64)
    probability = _column(studies, "probability")
    if not len(studies):
        return data | {"absent": "no labeled studies"}
    if probability is None:
        return data | {"absent": "no probabilities"}
    finite = np.isfinite(probability)
    label, probability = label[finite], probability[finite]
    if not len(label):
        return data | {"absent": "no finite probabilities"}
    data["scores"] = plots.score_histogram(label, probability)
    if len(set(label.tolist())) < 2:
        return data | {"absent": "one class only"}
    data["roc"] = plots.roc_points(label, probability)
    data["precision_recall"] = plots.pr_points(label, probability)
    data["reliability"] = _reliability(label, probability)
    calibrated = _column(studies, "calibrated_probability")
    if calibrated is not None and np.isfinite(calibrated[finite]).all():
        data["reliability_calibrated"] = _reliability(label, calibrated[finite])
    return data | {"absent": None}


def _reliability(label: np.ndarray, probability: np.ndarray) -> dict[str, Any]:
    return {"bins": plots.reliability_bins(label, probability), "scores": plots.score_histogram(label, probability)}


def _column(studies: pd.DataFrame, name: str) -> np.ndarray | None:
    """Return a column as float64 (n,), or None where it is missing or empty."""
    if name not in studies:
        return None
    values = studies[name].to_numpy(dtype=np.float64)
    return None if np.isnan(values).all() else values


def _band(name: str, metrics: dict[str, Any]) -> list[float] | None:
    group = ((metrics.get("operating_points") or {}).get("by_study_type") or {}).get(name) or {}
    band = group.get("band") or {}
    return None if band.get("low") is None else [band["low"], band["high"]]


# ---- origin of the numbers


def _training(history: training_curves.History) -> dict[str, Any]:
    curves = []
    for title, series, scale in training_curves.panels(history):
        if series:
            means, steps_per_point = training_curves.downsample(series, MAX_CURVE_POINTS)
            lines = {label: {"step": steps, "value": values} for label, (steps, values) in means.items()}
            curves.append({"title": title, "scale": scale, "lines_to_a_point": steps_per_point, "series": lines})
    return {"curves": curves, "ledger": training_curves.ledger(history) if history else None}


def _evaluation(studies: pd.DataFrame, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    seconds = facts.get("seconds")
    if not isinstance(seconds, int | float):
        return None
    views = int(studies["num_views"].sum()) if "num_views" in studies else None
    num = facts.get("num_scored", views)  # includes the tune split where the same pass scored it
    return {
        "seconds": seconds,
        "num_radiographs": num,
        "radiographs_per_s": num / seconds if num is not None and seconds > 0 else None,
    }


def _data(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return names and values from the shards' index and the data check."""
    conversion = dict(facts.get("conversion") or {})
    entries: dict[str, Any] = {}
    for name in ("predictions", "against", "labels"):
        if file := facts.get(name):
            entries |= {name: file["file"], f"{name}, SHA-256": file["sha256"]}
    if facts.get("manifest_sha256"):
        entries["manifest.csv, SHA-256"] = facts["manifest_sha256"]
    for split, counts in dict(conversion.pop("splits", {})).items():
        entries[f"split {split}"] = (
            f"{counts['num_studies']:,} studies, {counts['num_radiographs']:,} readable radiographs"
        )
    defects, unreadable = dict(conversion.pop("defects", {})), conversion.pop("unreadable", facts.get("num_unreadable"))
    entries |= {str(key).replace("_", " "): value for key, value in conversion.items()}
    if unreadable is not None:
        entries["unreadable files"] = len(unreadable) if isinstance(unreadable, list) else unreadable
    if isinstance(unreadable, list):
        codes = Counter(item["code"] for item in unreadable if isinstance(item, dict) and "code" in item)
        entries |= {f"unreadable: {code}": num for code, num in sorted(codes.items())}
    if facts.get("num_damaged") is not None:
        entries["corrupt samples in this split, skipped"] = facts["num_damaged"]
    entries |= {f"defect: {name}": len(item) if isinstance(item, list) else item for name, item in defects.items()}
    if conversion and not defects:
        entries["defects"] = "none found"
    return entries
