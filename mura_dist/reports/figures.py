"""Which pictures a report has, and what they are of: findings in, pictures out."""

import re
import zlib
from collections.abc import Iterator
from typing import Any

from mura_dist.data.mura import display_name
from mura_dist.metrics.summary import format_number, metrics_by_group
from mura_dist.reports import plots as pictures
from mura_dist.reports.findings import TITLES, with_words
from mura_dist.reports.plots import Row
from mura_dist.reports.svg import Picture

CALIBRATION = ("brier", "calibration_slope", "calibration_intercept", "calibration_error")
Found = dict[str, Any]


def figures(found: Found) -> Iterator[Picture]:
    measured = found["metrics"]
    for name, chance in (("kappa", 0.0), ("auroc", 0.5)):
        if any(group.get(name) is not None for group in metrics_by_group(measured).values()):
            yield _forest(found, name, chance)
    for name, group in metrics_by_group(measured).items():
        yield from _of_group(name, slug(name), group, found["plots"][name], found["thresholds"][name])
    if measured.get("comparison"):
        yield from (_differences(measured["comparison"], name) for name in ("kappa", "auroc"))
    for place, panel in enumerate(found["training"]["curves"]):
        series = {label: (line["step"], line["value"]) for label, line in panel["series"].items()}
        yield pictures.curve_picture(
            f"curve-{place}", panel["title"], series, panel["scale"], panel["lines_to_a_point"]
        )


def slug(name: str) -> str:
    """Part of a file's name, whatever a study type is called."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    return (
        safe
        if safe == name and 0 < len(name) <= 40
        else f"{safe[:40]}-{zlib.crc32(name.encode('utf-8', 'backslashreplace')):08x}"
    )


def _forest(found: Found, metric: str, chance: float) -> Picture:
    measured, others = found["metrics"], (found["published"].get("kappa", {}) if metric == "kappa" else {})
    rows = []
    for name, group in metrics_by_group(measured).items():
        row_label = f"{'all studies' if name == 'overall' else display_name(name)} ({group['num_studies']:,})"
        rows.append(_row(row_label, group, metric, "square" if name == "overall" else "circle", others.get(name)))
    macro = measured.get("macro") or {}
    if macro.get(metric) is not None:
        rows.insert(1, _row(f"macro mean of {macro['num_study_types']}", macro, metric, "diamond"))
    title = f"{TITLES[metric]} with 95 % intervals"
    description = "; ".join(
        f"{display_name(name)} {with_words(group, metric)}" for name, group in metrics_by_group(measured).items()
    )
    caption = f"{title}; in brackets the studies. Dotted: chance." + (" Hollow: the paper's." if others else "")
    return pictures.forest(
        metric, rows, chance=chance, label=TITLES[metric], alt=f"{title}: {description}", caption=caption
    )


def _row(name: str, group: Found, metric: str, mark: str, other: float | None = None) -> Row:
    return Row(name, group.get(metric), group.get(f"{metric}_low"), group.get(f"{metric}_high"), mark, other)


def _differences(comparison: Found, metric: str) -> Picture:
    named = {"pooled": comparison["overall"], **comparison["by_study_type"]}
    sides = {name: difference(one[metric]) if one[metric] else {} for name, one in named.items()}
    rows = [
        _row(
            f"{display_name(name)} ({named[name]['num_studies']:,})",
            side,
            "difference",
            "square" if name == "pooled" else "circle",
        )
        for name, side in sides.items()
    ]
    title = f"{TITLES[metric]}, A less B, with 95 % intervals"
    description = "; ".join(f"{display_name(name)} {with_words(side, 'difference')}" for name, side in sides.items())
    label, caption = f"{TITLES[metric]}: A less B", f"{title}. Dotted: no difference."
    return pictures.forest(
        f"difference-{metric}", rows, chance=0.0, label=label, alt=f"{title}: {description}", caption=caption, top=None
    )


def _of_group(name: str, slug: str, group: Found, plots: Found, threshold: float | None) -> Iterator[Picture]:
    of = "all studies" if name == "overall" else display_name(name)
    if plots["roc"]:
        rates = group.get("specificity"), group.get("sensitivity"), group.get("ppv")
        called = (1 - rates[0], rates[1]) if rates[0] is not None and rates[1] is not None else None
        yield pictures.roc_picture(f"roc-{slug}", of, plots["roc"], called, f"AUROC {with_words(group, 'auroc')}")
        precise = (rates[1], rates[2]) if rates[1] is not None and rates[2] is not None else None
        area = f"Average precision {with_words(group, 'average_precision')}"
        scores = plots["scores"]
        share = sum(scores["abnormal"]) / sum(scores["abnormal"] + scores["normal"])
        yield pictures.pr_picture(f"pr-{slug}", of, plots["precision_recall"], precise, share, area)
    if group["confusion"] is not None:
        yield pictures.confusion_picture(f"confusion-{slug}", of, group["confusion"])
    if plots["scores"]:
        band = tuple(plots["band"]) if plots["band"] else None
        yield pictures.scores_picture(f"scores-{slug}", of, plots["scores"], threshold, band)
    for key, kind, when, numbers in (
        ("reliability", "reliability", "raw", group),
        ("reliability_calibrated", "reliability-calibrated", "calibrated", group.get("calibrated") or {}),
    ):
        if plots[key]:
            caption = f"Probabilities, {when}. {_calibration_words(numbers)}"
            yield pictures.reliability_picture(
                f"{kind}-{slug}", of, plots[key]["bins"], plots[key]["scores"], when, caption
            )


def _calibration_words(group: Found) -> str:
    words = [f"{TITLES[key].lower()} {format_number(group[key])}" for key in CALIBRATION if group.get(key) is not None]
    return f"{', '.join(words).capitalize()}." if words else ""


def difference(side: Found) -> Found:
    return {"difference": side["difference"], "difference_low": side["low"], "difference_high": side["high"]}
