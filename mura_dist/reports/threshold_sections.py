"""Build the sections of a report on probabilities and thresholds: calibration, uncertain band, operating points, PPV, NPV.

A Report in, markup out. See sections.py.
"""

from collections.abc import Iterator

from mura_dist.data.mura import display_name
from mura_dist.metrics.summary import format_number, metrics_by_group
from mura_dist.reports.cells import INDEPENDENT, NOT_GIVEN, Report, bullet_list, details_grid, format_count, group_cell
from mura_dist.reports.figures import CALIBRATION
from mura_dist.reports.findings import TITLES, JsonObject
from mura_dist.reports.html import Html, details, element, join, table
from mura_dist.reports.plurals import pluralize

_RATES = ("sensitivity", "specificity", "ppv", "npv")


# ---- calibration


def calibration(report: Report) -> Iterator[Html]:
    """Yield the quality of the probabilities before and after calibration, and the fitted values."""
    names = ("scores-overall", "reliability-overall", "reliability-calibrated-overall")
    yield from report.picture_grid(names)
    if any(name in report.pictures for name in names[1:]):
        yield element(
            "p",
            f"Dots: bins with equal numbers of studies. Bars: Wilson interval of the share abnormal ({INDEPENDENT}). "
            "Below: histogram of the probabilities.",
            class_="soft",
        )
    parts = []
    if report.measured["overall"].get("brier") is not None:
        method = report.measured["overall"].get("calibration_error_method") or "binning not available"
        caption = (
            f"95 % intervals in small print. The calibration error ({method}) has no interval: resampling biases it."
        )
        yield _calibration_table(report, {"overall": report.measured["overall"]}, caption)
        types = _calibration_table(report, report.measured["by_study_type"], "")
        parts.append(details("Calibration of each study type", types))
    fitted = report.measured.get("calibration")
    if fitted and fitted.get("fitted_on") is not None:
        parts.append(_fit_details(fitted, report.findings["about"].get("Split")))
    elif fitted:
        reason = fitted.get("reason") or "reason not available"
        yield element("p", f"No calibration, thresholds or band were fitted: {reason}.")
    if parts:
        yield details_grid(parts)


def _calibration_table(report: Report, named: dict[str, JsonObject], caption: str) -> Html:
    """Return a table with one row per group before calibration and one after it."""
    rows = []
    for name, group in named.items():
        rows.append((group_cell(name), "raw", *(_calibration_cell(report, group, key) for key in CALIBRATION)))
        if after := group.get("calibrated"):
            rows.append(
                (group_cell(name), "calibrated", *(_calibration_cell(report, after, key) for key in CALIBRATION))
            )
    return table(("", "Probabilities", *(TITLES[key] for key in CALIBRATION)), rows, caption)


def _calibration_cell(report: Report, group: JsonObject, key: str) -> Html:
    """Return a cell. The calibration error never has an interval, so it gets no footnote."""
    without_interval = key == "calibration_error" and group.get(key) is not None
    return join((format_number(group[key]),)) if without_interval else report.value_cell(group, key)


def _fit_sentences(fitted: JsonObject, split: str | None) -> Iterator[Html]:
    reported = "which this report measures: optimistic" if split == fitted["fitted_on"] else "not on the reported split"
    patients = fitted.get("num_patients")
    of = f" of {pluralize(patients, 'patient')}" if patients is not None else ""
    yield element(
        "p",
        f"Calibration and thresholds were fitted on {fitted['fitted_on']} "
        f"({pluralize(fitted['num_studies'], 'study')}{of}), {reported}. "
        f"Method: {fitted.get('method') or 'not available'}.",
    )
    for note in fitted.get("notes") or []:
        yield element("p", f"{note}.", class_="soft")


def _fit_details(fitted: JsonObject, split: str | None) -> Html:
    rows, reasons = [], []
    for name, points in fitted["by_study_type"].items():
        numbers = (format_number(points.get(key)) for key in ("slope", "intercept", "odds_shift"))
        counts = (format_count(points[key]) for key in ("num_normal", "num_abnormal"))
        rows.append(
            (group_cell(name), *counts, *numbers, "all types pooled" if points["pooled"] else "its own studies")
        )
        reasons += [f"{display_name(name)}: {key}: {reason}." for key, reason in points.get("reasons", {}).items()]
    header = ("", "Normal", "Abnormal", "Slope", "Intercept", "log(N/A)", "Fitted on")
    fit_table = table(header, rows, "Numbers of studies are of the tune split.")
    return details(
        "Fitted values by study type",
        *_fit_sentences(fitted, split),
        fit_table,
        *([bullet_list(reasons)] if reasons else []),
    )


# ---- operating points


def operating_points(report: Report) -> Iterator[Html]:
    """Yield the uncertain band, the thresholds with their metrics, PPV and NPV."""
    points, measured, parts = report.measured.get("operating_points"), report.measured, []
    if points:
        yield from _band_sentences(report, points["overall"]["band"])
        if excluded := points.get("left_out"):
            text = "; ".join(f"{display_name(name)} ({pluralize(num, 'study')})" for name, num in excluded.items())
            yield element("p", f"Excluded, because nothing was fitted for these study types: {text}.", class_="soft")
        parts.append(details("The uncertain band of each study type", _bands(report, points)))
        caption = "All study types of this split, each at its own threshold. 95 % intervals in small print."
        cost_table = operating_point_table(report, points["overall"], None, caption)
        parts.append(details("Metrics at other thresholds", cost_table))
    elif measured.get("calibration") is None:
        yield NOT_GIVEN
    if measured["overall"].get("ppv") is not None or measured["overall"].get("npv") is not None:
        parts.append(details("What a call means: PPV and NPV", *_predictive(report)))
    if parts:
        yield details_grid(parts)


def _band_sentences(report: Report, band: JsonObject) -> Iterator[Html]:
    yield element("h3", "The uncertain band")
    text = (
        "The band reaches from the threshold with sensitivity 95 % to the threshold with specificity 95 %, both measured on "
        "tune. A study in the band is uncertain."
    )
    if band.get("share_uncertain") is not None:
        text += f" In this split, {format_count(band.get('num_uncertain'))} of {pluralize(band['num_studies'], 'study')} are."
    yield element("p", text)
    if note := report.findings["wide_band"]:
        yield element("p", note)


def _bands(report: Report, points: JsonObject) -> Html:
    rows = []
    for name, group in {"overall": points["overall"], **points["by_study_type"]}.items():
        band = group["band"]
        if name == "overall":
            ends = join(("by study type",))
        elif band.get("low") is not None and band.get("high") is not None:
            ends = join((f"{format_number(band['low'])} to {format_number(band['high'])}",))
        else:
            ends = report.missing_mark(band, "low") or join(("none",))
        uncertain = f"{format_count(band.get('num_uncertain'))} of {format_count(band['num_studies'])}"
        rows.append(
            (
                group_cell(name),
                ends,
                uncertain,
                *(report.value_cell(band, key) for key in ("share_uncertain", "accuracy_outside")),
            )
        )
    return table(("", "Band", "Uncertain studies", "Share uncertain", "Accuracy outside"), rows)


def operating_point_table(report: Report, group: JsonObject, fitted: JsonObject | None, caption: str) -> Html:
    """Return a table of operating points: threshold, rates on tune, metrics on this split.

    Args:
        report: The report.
        group: The group's entry of operating_points in metrics.json.
        fitted: The calibration entry of one study type; None for all study types, which have no common threshold.
        caption: Text above the table.
    """
    rows = []
    for name, point in group["points"].items():
        on_tune = ((fitted or {}).get("operating_points") or {}).get(name) or {}
        tune: tuple[str, ...] = ()
        if fitted is not None:
            first = join((format_number(point.get("threshold")), report.missing_mark(point, "threshold")))
            tune = (first, *(format_number(on_tune.get(key)) for key in _RATES[:2]))
        rows.append((" ".join(name.split("=")), *tune, *(report.value_cell(point, key) for key in _RATES)))
    header = [join((TITLES[key],)) for key in _RATES]
    if fitted is not None:
        tune_header = [join((TITLES[key], element("small", "on tune"))) for key in _RATES[:2]]
        header = [
            join(("Threshold",)),
            *tune_header,
            *(join((word, element("small", "this split"))) for word in header),
        ]
    return table(("Operating point", *header), rows, caption)


def _predictive(report: Report) -> Iterator[Html]:
    assumed = report.measured["overall"].get("prevalence_assumed")
    names = ("ppv", "npv", *(("ppv_at_prevalence", "npv_at_prevalence") if assumed is not None else ()))
    rows = [
        (group_cell(name), format_number(group.get("prevalence")), *(report.value_cell(group, key) for key in names))
        for name, group in metrics_by_group(report.measured).items()
    ]
    at = [f"PPV at {assumed:g}", f"NPV at {assumed:g}"] if assumed is not None else []
    text = (
        "PPV is the share of abnormal studies among those called abnormal. NPV is the share of normal studies among the rest. "
        "Both hold for this split's share of abnormal studies."
    )
    if assumed is not None:
        text += f" The values at {assumed:g} are computed with Bayes' theorem from sensitivity and specificity."
    yield table(("", "Share abnormal", "PPV", "NPV", *at), rows, text)
