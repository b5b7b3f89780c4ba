"""What a report says, as data: report.json. The page is made of this and of nothing else, so the two cannot differ.

    metrics.json's content, the table of studies, what is known of the run -> findings -> report.json, report.html

Numbers are as measured, sentences as a person reads them. No file's, study's or patient's name is in it.
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
from mura_dist.reports import plots as pictures
from mura_dist.reports import training_curves
from mura_dist.reports.plurals import pluralize

FEW_STUDIES, FEW_OF_A_CLASS = 50, 10
WIDE_BAND = 0.25  # share of the reported studies in the uncertain band, above which it is called wide
FEW_TUNE_OF_A_CLASS = 200  # tune studies of the rarer label: of fewer, less than ten lie beyond a threshold of 95 %
POINTS_OF_A_CURVE = 300
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
# Of the hidden test's 207 studies. By study type: worked out from the paper's confusions.
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
    "The paper's kappas and the radiologists' are left out: they are of the 207 studies of the official test, which has "
    "another gold standard; these are other studies, and the numbers must not be compared."
)
INTERVALS_COVER = (
    "The intervals cover which patients happened to be in the data; they do not cover another training run, another hospital, "
    "or wrong labels."
)


def findings(metrics: dict[str, Any], studies: pd.DataFrame, context: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the report says; standard JSON values. What nobody told is None, or empty."""
    known = {
        **{key: metrics.get(key) for key in _IN_METRICS},
        **{key: value for key, value in context.items() if value is not None},
    }
    plots = {name: _plots(name, part, metrics) for name, part in _parts(studies, metrics)}
    return {
        "title": known.get("title") or "Report",
        "about": {word: known.get(key) for key, word in _ABOUT.items()},
        "stamps": list(_stamps(known)),
        "summary": list(_summary(metrics, studies, known)),
        "metrics": metrics,
        "notes": [known["note"]] if known.get("note") and known["note"] not in _STAMPED else [],
        "thresholds": {name: _threshold(name, known) for name in metrics_by_group(metrics)},
        "few_studies": _few(metrics),
        "wide_band": _wide_band(metrics),
        "missing": {
            name: found for name, group in metrics_by_group(metrics).items() if (found := describe_missing(group))
        },
        "published": dict(PUBLISHED) if _is_official_test(studies) else {"absent": NOT_COMPARABLE},
        "plots": plots,
        "how_to_read": list(_reading(known)),
        "training": _training(known.get("history") or []),
        "evaluation": _evaluation(studies, known),
        "data": _data(known),
        "roles": known.get("roles") or {},
        "settings": known.get("settings") or {},
        "environment": {"mura-dist": __version__, **(known.get("environment") or {})},
        "members": known.get("members") or [],
        "terms": known.get("terms") or mura.TERMS,
        "licence": known.get("licence") or mura.LICENSE,
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
# What metrics.json calls a note is a stamp here.
_STAMPED = ("optimistic: this split fitted the model", "optimistic: this split chose the model")
_ABOUT = {"split": "Split", "checkpoint": "Checkpoint", "trained_on": "Trained on"}


def _is_official_test(studies: pd.DataFrame) -> bool:
    keys = ("study_type", "label")
    return set(keys) <= set(studies.columns) and mura.is_official_test({key: studies[key] for key in keys})


def _threshold(name: str, known: Mapping[str, Any]) -> float | None:
    """A study type's own, or the one of all."""
    threshold: float | None = (known.get("thresholds") or {}).get(name, known.get("threshold"))
    return threshold


def _parts(studies: pd.DataFrame, metrics: dict[str, Any]) -> Iterator[tuple[str, pd.DataFrame]]:
    """The labelled studies of every group."""
    labelled = studies[studies["label"].notna()]
    for name in metrics_by_group(metrics):
        yield name, labelled if name == "overall" else labelled[labelled["study_type"] == name]


# ---- words


def _stamps(known: Mapping[str, Any]) -> Iterator[str]:
    split, trained_on = known.get("split"), known.get("trained_on")
    measured_on = known.get("measured_on") or trained_on
    if trained_on == measured_on == "phantoms":
        yield "trained and measured on drawings: says nothing about radiographs"
    elif trained_on == "phantoms":
        yield "trained on drawings: the model has never seen a radiograph"
    elif measured_on == "phantoms":
        yield "measured on drawings: says nothing about radiographs"
    if split is not None and split == known.get("selected_on"):
        yield f"optimistic: this split chose the model ({split} drove the learning rate and picked the checkpoint)"
    if split == "train":
        yield "optimistic: this split fitted the weights; it says nothing about studies the model has not seen"
    if known.get("same_data") is False:
        yield "these are not the shards the run was trained on; if a patient is in both, the numbers are optimistic"


def _summary(metrics: dict[str, Any], studies: pd.DataFrame, known: Mapping[str, Any]) -> Iterator[str]:
    overall, split = metrics["overall"], known.get("split")
    patients = "unknown patients" if overall["num_patients"] is None else pluralize(overall["num_patients"], "patient")
    role = (known.get("roles") or {}).get(split) if split else None
    of_split = f", the split {split}{f', which {role}' if role else ''}" if split else ""
    yield f"Measured on {pluralize(overall['num_studies'], 'study')} of {patients}{of_split}. {_how_called(studies, known)}"
    cells = overall["confusion"]
    if cells is None:
        yield "Nothing could be measured."
        return
    abnormal, normal = cells["tp"] + cells["fn"], cells["tn"] + cells["fp"]
    yield (
        f"Of {pluralize(abnormal, 'abnormal study')}, {cells['tp']:,} were called abnormal; of {pluralize(normal, 'normal study')}, "
        f"{cells['tn']:,} were not."
    )
    yield from _in_words(metrics)
    yield f"Intervals: {overall['interval_method']}. {INTERVALS_COVER}"


def _how_called(studies: pd.DataFrame, known: Mapping[str, Any]) -> str:
    if calls_only(studies):
        return "Each study came with a call, 0 or 1, and no probability."
    threshold, name = known.get("threshold"), known.get("operating_point")
    cut = "its threshold (not given)" if threshold is None else f"{threshold:g}"
    if threshold is None and name:
        cut = f"the threshold of its study type (operating point {name}, fitted on tune)"
    return f"A study is called abnormal where its probability, the mean over its views, is above {cut}."


def calls_only(studies: pd.DataFrame) -> bool:
    return "call" in studies and _column(studies, "probability") is None


def _in_words(metrics: dict[str, Any]) -> Iterator[str]:
    """Kappa pooled and averaged, calibration, the uncertain band: what of it there is."""
    overall, macro = metrics["overall"], metrics.get("macro") or {}
    if overall["kappa"] is not None:
        text = f"Pooled over all studies, calls agree with labels at a kappa of {with_words(overall, 'kappa')}"
        if macro.get("kappa") is not None and macro["num_study_types"] > 1:
            text += f"; the macro mean, where each of {macro['num_study_types']} study types counts the same, is "
            text += with_words(macro, "kappa")
        yield text + "."
    error, after = overall.get("calibration_error"), overall.get("calibrated")
    if error is not None:
        text = f"Probabilities and shares of abnormal studies differ by {format_number(error)} on average"
        text += f"; by {format_number(after['calibration_error'])} after calibration" if after else ""
        yield f"{text} (calibration error, {overall['calibration_error_method']})."
    band = ((metrics.get("operating_points") or {}).get("overall") or {}).get("band") or {}
    if band.get("share_uncertain") is not None:
        text = f"In the uncertain band lie {band['num_uncertain']:,} of {pluralize(band['num_studies'], 'study')}, a share of "
        text += with_words(band, "share_uncertain")
        if band.get("accuracy_outside") is not None:
            text += f"; outside it the accuracy is {with_words(band, 'accuracy_outside')}"
        yield text + "."


def with_words(group: Mapping[str, Any], name: str) -> str:
    """Return `0.651 (0.605 to 0.694)`, without brackets where there is no interval; Wilson's is named."""
    low, high = group.get(f"{name}_low"), group.get(f"{name}_high")
    value, kind = format_number(group.get(name)), ", Wilson" if group.get(f"{name}_interval") == WILSON else ""
    return value if low is None or high is None else f"{value} ({format_number(low)} to {format_number(high)}{kind})"


def _group_words(name: str) -> str:
    return "all studies" if name == "overall" else mura.display_name(name)


def _few(metrics: dict[str, Any]) -> list[str]:
    """Groups too small to say much about."""
    found = []
    for name, group in metrics_by_group(metrics).items():
        cells = group["confusion"] or dict.fromkeys(CELLS, 0)
        rarer = min(cells["tp"] + cells["fn"], cells["tn"] + cells["fp"])
        if group["num_studies"] < FEW_STUDIES or rarer < FEW_OF_A_CLASS:
            found.append(
                f"{_group_words(name)} ({pluralize(group['num_studies'], 'study')}, {rarer} of the rarer label)"
            )
    return found


def _wide_band(metrics: dict[str, Any]) -> str | None:
    """Return a sentence on an uncertain band that is wide, and on the tune studies it was fitted on, where these are few."""
    band = ((metrics.get("operating_points") or {}).get("overall") or {}).get("band") or {}
    fitted = metrics.get("calibration") or {}
    rarer = min(fitted.get("num_normal", 0), fitted.get("num_abnormal", 0))
    if (band.get("share_uncertain") or 0.0) <= WIDE_BAND or not 0 < rarer < FEW_TUNE_OF_A_CLASS:
        return None
    return (
        f"The band is wide: {100 * band['share_uncertain']:.0f} % of the studies lie in it. It was fitted on "
        f"{pluralize(fitted['num_studies'], 'tune study')} ({fitted['num_normal']:,} normal, {fitted['num_abnormal']:,} abnormal), "
        "so that a handful of them decide where it begins and ends. With more tune studies (shards --tune) the band would narrow."
    )


def _reading(known: Mapping[str, Any]) -> Iterator[str]:
    yield "Kappa is the agreement of calls with labels beyond chance: 0 is chance, 1 is perfect."
    yield (
        "AUROC is the chance that an abnormal study gets a higher probability than a normal one. It does not depend on "
        "the threshold; kappa, sensitivity, specificity, PPV and NPV do."
    )
    yield "PPV and NPV hold where as many studies are abnormal as here; with fewer abnormal ones, PPV falls and NPV rises."
    yield (
        "Probabilities are calibrated where, of studies with a probability near 0.3, three in ten are abnormal. A slope below 1 "
        "says they are too extreme; an intercept below 0, too high."
    )
    yield "A study that was not called abnormal is not thereby normal: some abnormal studies are missed, as counted above."
    if "radiographs" in (known.get("trained_on"), known.get("measured_on")):
        yield (
            "Where these are MURA's: its labels are noisy, and about half of its positives show hardware or plaster, "
            "so part of what is learned is to see metal. The paper's kappa of 0.705 is of other studies with another "
            "gold standard: do not compare it with numbers of another set of studies."
        )


# ---- plots


def _plots(name: str, studies: pd.DataFrame, metrics: dict[str, Any]) -> dict[str, Any]:
    """A group's curves and counts, None where they cannot be had; `absent` says why."""
    found: dict[str, Any] = dict.fromkeys(
        ("roc", "precision_recall", "scores", "reliability", "reliability_calibrated")
    )
    found["band"] = _band(name, metrics)
    label = studies["label"].to_numpy(dtype=np.int64)
    probability = _column(studies, "probability")
    if not len(studies):
        return found | {"absent": "no labelled studies"}
    if probability is None:
        return found | {"absent": "no probabilities"}
    finite = np.isfinite(probability)
    label, probability = label[finite], probability[finite]
    if not len(label):
        return found | {"absent": "no finite probabilities"}
    found["scores"] = pictures.score_counts(label, probability)
    if len(set(label.tolist())) < 2:
        return found | {"absent": "one class only"}
    found["roc"] = pictures.roc_points(label, probability)
    found["precision_recall"] = pictures.pr_points(label, probability)
    found["reliability"] = _reliability(label, probability)
    calibrated = _column(studies, "calibrated_probability")
    if calibrated is not None and np.isfinite(calibrated[finite]).all():
        found["reliability_calibrated"] = _reliability(label, calibrated[finite])
    return found | {"absent": None}


def _reliability(label: np.ndarray, probability: np.ndarray) -> dict[str, Any]:
    return {"bins": pictures.reliability(label, probability), "scores": pictures.score_counts(label, probability)}


def _column(studies: pd.DataFrame, name: str) -> np.ndarray | None:
    """float64 (n,); None where it is not there, or nothing is in it."""
    if name not in studies:
        return None
    values = studies[name].to_numpy(dtype=np.float64)
    return None if np.isnan(values).all() else values


def _band(name: str, metrics: dict[str, Any]) -> list[float] | None:
    group = ((metrics.get("operating_points") or {}).get("by_study_type") or {}).get(name) or {}
    band = group.get("band") or {}
    return None if band.get("low") is None else [band["low"], band["high"]]


# ---- where it comes from


def _training(history: training_curves.History) -> dict[str, Any]:
    found = []
    for title, series, scale in training_curves.panels(history):
        if series:
            thin, together = training_curves.thinned(series, POINTS_OF_A_CURVE)
            lines = {label: {"step": steps, "value": values} for label, (steps, values) in thin.items()}
            found.append({"title": title, "scale": scale, "lines_to_a_point": together, "series": lines})
    return {"curves": found, "ledger": training_curves.ledger(history) if history else None}


def _evaluation(studies: pd.DataFrame, known: Mapping[str, Any]) -> dict[str, Any] | None:
    seconds = known.get("seconds")
    if not isinstance(seconds, int | float):
        return None
    views = int(studies["num_views"].sum()) if "num_views" in studies else None
    num = known.get("num_scored", views)  # with tune's, where these were scored in the same pass
    return {
        "seconds": seconds,
        "num_radiographs": num,
        "radiographs_per_s": num / seconds if num is not None and seconds > 0 else None,
    }


def _data(known: Mapping[str, Any]) -> dict[str, Any]:
    """What the shards' index and the data check say, names and values."""
    conversion = dict(known.get("conversion") or {})
    found: dict[str, Any] = {}
    for name in ("predictions", "against", "labels"):
        if file := known.get(name):
            found |= {name: file["file"], f"{name}, SHA-256": file["sha256"]}
    if known.get("manifest_sha256"):
        found["manifest.csv, SHA-256"] = known["manifest_sha256"]
    for split, part in dict(conversion.pop("splits", {})).items():
        found[f"split {split}"] = f"{part['num_studies']:,} studies, {part['num_radiographs']:,} readable radiographs"
    defects, unreadable = dict(conversion.pop("defects", {})), conversion.pop("unreadable", known.get("num_unreadable"))
    found |= {str(key).replace("_", " "): value for key, value in conversion.items()}
    if unreadable is not None:
        found["unreadable files"] = len(unreadable) if isinstance(unreadable, list) else unreadable
    if isinstance(unreadable, list):
        codes = Counter(item["code"] for item in unreadable if isinstance(item, dict) and "code" in item)
        found |= {f"unreadable: {code}": num for code, num in sorted(codes.items())}
    if known.get("num_damaged") is not None:
        found["damaged samples in this split, left out"] = known["num_damaged"]
    found |= {f"defect: {name}": len(seen) if isinstance(seen, list) else seen for name, seen in defects.items()}
    if conversion and not defects:
        found["defects"] = "none found"
    return found
