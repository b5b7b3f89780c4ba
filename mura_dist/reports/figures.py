"""Choose and draw the pictures of a report: findings in, pictures out."""

import re
import zlib
from collections.abc import Iterator

from mura_dist.data.mura import display_name
from mura_dist.metrics.summary import format_number, metrics_by_group
from mura_dist.reports import plots
from mura_dist.reports.findings import TITLES, JsonObject, format_with_interval
from mura_dist.reports.plots import ForestRow
from mura_dist.reports.svg import Picture

CALIBRATION = ("brier", "calibration_slope", "calibration_intercept", "calibration_error")


def draw_figures(findings: JsonObject) -> Iterator[Picture]:
    """Yield the pictures of a report. findings: see findings.build_findings."""
    measured = findings["metrics"]
    for name, chance in (("kappa", 0.0), ("auroc", 0.5)):
        if any(group.get(name) is not None for group in metrics_by_group(measured).values()):
            yield _forest(findings, name, chance)
    for name, group in metrics_by_group(measured).items():
        yield from _group_pictures(name, slug(name), group, findings["plots"][name], findings["thresholds"][name])
    if measured.get("comparison"):
        yield from (_differences(measured["comparison"], name) for name in ("kappa", "auroc"))
    for index, panel in enumerate(findings["training"]["curves"]):
        series = {label: (line["step"], line["value"]) for label, line in panel["series"].items()}
        yield plots.curve_picture(f"curve-{index}", panel["title"], series, panel["scale"], panel["lines_to_a_point"])


def slug(name: str) -> str:
    """Return a name that is safe as part of a file name, and unique for each study type."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    return (
        safe
        if safe == name and 0 < len(name) <= 40
        else f"{safe[:40]}-{zlib.crc32(name.encode('utf-8', 'backslashreplace')):08x}"
    )


def _forest(findings: JsonObject, metric: str, chance: float) -> Picture:
    measured = findings["metrics"]
    published = findings["published"].get("kappa", {}) if metric == "kappa" else {}
    rows = []
    for name, group in metrics_by_group(measured).items():
        row_label = f"{'all studies' if name == 'overall' else display_name(name)} ({group['num_studies']:,})"
        rows.append(_row(row_label, group, metric, "square" if name == "overall" else "circle", published.get(name)))
    macro = measured.get("macro") or {}
    if macro.get(metric) is not None:
        rows.insert(1, _row(f"macro mean of {macro['num_study_types']}", macro, metric, "diamond"))
    title = f"{TITLES[metric]} with 95 % intervals"
    description = "; ".join(
        f"{display_name(name)} {format_with_interval(group, metric)}"
        for name, group in metrics_by_group(measured).items()
    )
    caption = f"{title}. In parentheses: the number of studies. Dotted: chance."
    caption += " Hollow: the paper's values." if published else ""
    return plots.forest(
        metric, rows, chance=chance, label=TITLES[metric], alt=f"{title}: {description}", caption=caption
    )


def _row(name: str, group: JsonObject, metric: str, mark: str, reference: float | None = None) -> ForestRow:
    return ForestRow(name, group.get(metric), group.get(f"{metric}_low"), group.get(f"{metric}_high"), mark, reference)


def _differences(comparison: JsonObject, metric: str) -> Picture:
    named = {"pooled": comparison["overall"], **comparison["by_study_type"]}
    sides = {name: difference_columns(group[metric]) if group[metric] else {} for name, group in named.items()}
    rows = [
        _row(
            f"{display_name(name)} ({named[name]['num_studies']:,})",
            side,
            "difference",
            "square" if name == "pooled" else "circle",
        )
        for name, side in sides.items()
    ]
    title = f"{TITLES[metric]}, A minus B, with 95 % intervals"
    description = "; ".join(
        f"{display_name(name)} {format_with_interval(side, 'difference')}" for name, side in sides.items()
    )
    label, caption = f"{TITLES[metric]}: A minus B", f"{title}. Dotted: no difference."
    return plots.forest(
        f"difference-{metric}", rows, chance=0.0, label=label, alt=f"{title}: {description}", caption=caption, top=None
    )


def _group_pictures(
    name: str, slug: str, group: JsonObject, plot_data: JsonObject, threshold: float | None
) -> Iterator[Picture]:
    of = "all studies" if name == "overall" else display_name(name)
    if plot_data["roc"]:
        rates = group.get("specificity"), group.get("sensitivity"), group.get("ppv")
        called = (1 - rates[0], rates[1]) if rates[0] is not None and rates[1] is not None else None
        yield plots.roc_picture(
            f"roc-{slug}", of, plot_data["roc"], called, f"AUROC {format_with_interval(group, 'auroc')}"
        )
        precise = (rates[1], rates[2]) if rates[1] is not None and rates[2] is not None else None
        area = f"Average precision {format_with_interval(group, 'average_precision')}"
        scores = plot_data["scores"]
        share = sum(scores["abnormal"]) / sum(scores["abnormal"] + scores["normal"])
        yield plots.pr_picture(f"pr-{slug}", of, plot_data["precision_recall"], precise, share, area)
    if group["confusion"] is not None:
        yield plots.confusion_picture(f"confusion-{slug}", of, group["confusion"])
    if plot_data["scores"]:
        band = tuple(plot_data["band"]) if plot_data["band"] else None
        yield plots.scores_picture(f"scores-{slug}", of, plot_data["scores"], threshold, band)
    for key, kind, when, numbers in (
        ("reliability", "reliability", "raw", group),
        ("reliability_calibrated", "reliability-calibrated", "calibrated", group.get("calibrated") or {}),
    ):
        if plot_data[key]:
            caption = f"{when.capitalize()} probabilities. {_calibration_text(numbers)}"
            yield plots.reliability_picture(
                f"{kind}-{slug}", of, plot_data[key]["bins"], plot_data[key]["scores"], when, caption
            )


def _calibration_text(group: JsonObject) -> str:
    values = [f"{TITLES[key].lower()} {format_number(group[key])}" for key in CALIBRATION if group.get(key) is not None]
    return f"{', '.join(values).capitalize()}." if values else ""


def difference_columns(side: JsonObject) -> JsonObject:
    """Return a difference and its interval under the keys that value_cell reads."""
    return {"difference": side["difference"], "difference_low": side["low"], "difference_high": side["high"]}
