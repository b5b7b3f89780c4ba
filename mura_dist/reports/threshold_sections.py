"""The sections of a report on probabilities and on thresholds: calibration, the uncertain band, operating points, PPV and NPV.

A Report in, markup out; see sections.py.
"""

from collections.abc import Iterator

from mura_dist.data.mura import display_name
from mura_dist.metrics.summary import format_number, metrics_by_group
from mura_dist.reports.cells import INDEPENDENT, NOT_GIVEN, Found, Report, bullets, folds, group_cell, num
from mura_dist.reports.figures import CALIBRATION
from mura_dist.reports.findings import TITLES
from mura_dist.reports.html import Html, element, folded, join, table
from mura_dist.reports.plurals import pluralize

_RATES = ("sensitivity", "specificity", "ppv", "npv")


# ---- calibration


def calibration(report: Report) -> Iterator[Html]:
    """Yield how good the probabilities are, before and after calibration, and what was fitted."""
    names = ("scores-overall", "reliability-overall", "reliability-calibrated-overall")
    yield from report.shown(names)
    if any(name in report.pictures for name in names[1:]):
        yield element(
            "p",
            f"Dots: bins of equal number of studies. Bars: the Wilson interval of their share of abnormal ones ({INDEPENDENT}). "
            "Below: how many studies have which probability.",
            class_="soft",
        )
    parts = []
    if report.measured["overall"].get("brier") is not None:
        method = report.measured["overall"].get("calibration_error_method") or "its binning not given"
        caption = f"In small print the 95 % interval; none for the calibration error ({method}), which resamples bias."
        yield _calibration_table(report, {"overall": report.measured["overall"]}, caption)
        types = _calibration_table(report, report.measured["by_study_type"], "")
        parts.append(folded("Calibration of each study type", types))
    fitted = report.measured.get("calibration")
    if fitted and fitted.get("fitted_on") is not None:
        parts.append(_fitted(fitted, report.findings["about"].get("Split")))
    elif fitted:
        why = fitted.get("reason") or "reason not given"
        yield element("p", f"No calibration, thresholds or band were fitted: {why}.")
    if parts:
        yield folds(parts)


def _calibration_table(report: Report, named: dict[str, Found], caption: str) -> Html:
    """Return a table of a line before calibration, and below it one after, where there is one."""
    rows = []
    for name, group in named.items():
        rows.append((group_cell(name), "raw", *(_of_calibration(report, group, key) for key in CALIBRATION)))
        if after := group.get("calibrated"):
            rows.append((group_cell(name), "calibrated", *(_of_calibration(report, after, key) for key in CALIBRATION)))
    return table(("", "Probabilities", *(TITLES[key] for key in CALIBRATION)), rows, caption)


def _of_calibration(report: Report, group: Found, key: str) -> Html:
    """Return a cell; the calibration error has no interval, as the caption says, hence no footnote on it."""
    has_none = key == "calibration_error" and group.get(key) is not None
    return join((format_number(group[key]),)) if has_none else report.stacked(group, key)


def _fit_words(fitted: Found, split: str | None) -> Iterator[Html]:
    reported = "which is reported here: optimistic" if split == fitted["fitted_on"] else "never on what is reported"
    patients = fitted.get("num_patients")
    of = f" of {pluralize(patients, 'patient')}" if patients is not None else ""
    yield element(
        "p",
        f"Calibration and thresholds were fitted on {fitted['fitted_on']} "
        f"({pluralize(fitted['num_studies'], 'study')}{of}), {reported}: {fitted.get('method') or 'method not given'}.",
    )
    for note in fitted.get("notes") or []:
        yield element("p", f"{note}.", class_="soft")


def _fitted(fitted: Found, split: str | None) -> Html:
    rows, why_not = [], []
    for name, points in fitted["by_study_type"].items():
        numbers = (format_number(points.get(key)) for key in ("slope", "intercept", "odds_shift"))
        counts = (num(points[key]) for key in ("num_normal", "num_abnormal"))
        rows.append(
            (group_cell(name), *counts, *numbers, "all types pooled" if points["pooled"] else "its own studies")
        )
        why_not += [f"{display_name(name)}: {key}: {why}." for key, why in points.get("reasons", {}).items()]
    header = ("", "Normal", "Abnormal", "Slope", "Intercept", "log(N/A)", "Fitted on")
    fit_table = table(header, rows, "Studies of the tune split.")
    return folded(
        "What was fitted, by study type",
        *_fit_words(fitted, split),
        fit_table,
        *([bullets(why_not)] if why_not else []),
    )


# ---- operating points


def operating(report: Report) -> Iterator[Html]:
    """Yield the uncertain band, the thresholds and what they cost, PPV and NPV."""
    points, measured, parts = report.measured.get("operating_points"), report.measured, []
    if points:
        yield from _band_words(report, points["overall"]["band"])
        if left_out := points.get("left_out"):
            text = "; ".join(f"{display_name(name)} ({pluralize(num, 'study')})" for name, num in left_out.items())
            yield element("p", f"Left out, as nothing was fitted for them: {text}.", class_="soft")
        parts.append(folded("The uncertain band of each study type", _bands(report, points)))
        caption = "All study types, measured here; each has a threshold of its own. In small print the 95 % interval."
        cost_table = costs(report, points["overall"], None, caption)
        parts.append(folded("Thresholds, and what they cost", cost_table))
    elif measured.get("calibration") is None:
        yield NOT_GIVEN
    if measured["overall"].get("ppv") is not None or measured["overall"].get("npv") is not None:
        parts.append(folded("What a call means: PPV and NPV", *_predictive(report)))
    if parts:
        yield folds(parts)


def _band_words(report: Report, band: Found) -> Iterator[Html]:
    yield element("h3", "The uncertain band")
    text = "From the threshold of sensitivity 95 % to that of specificity 95 %, both on tune: a study in between is uncertain."
    if band.get("share_uncertain") is not None:
        text += f" Here these are {num(band.get('num_uncertain'))} of {pluralize(band['num_studies'], 'study')}."
    yield element("p", text)
    if note := report.findings["wide_band"]:
        yield element("p", note)


def _bands(report: Report, points: Found) -> Html:
    rows = []
    for name, group in {"overall": points["overall"], **points["by_study_type"]}.items():
        band = group["band"]
        if name == "overall":
            ends = join(("each its own",))
        elif band.get("low") is not None and band.get("high") is not None:
            ends = join((f"{format_number(band['low'])} to {format_number(band['high'])}",))
        else:
            ends = report.absence(band, "low") or join(("none",))
        uncertain = f"{num(band.get('num_uncertain'))} of {num(band['num_studies'])}"
        rows.append(
            (
                group_cell(name),
                ends,
                uncertain,
                *(report.stacked(band, key) for key in ("share_uncertain", "accuracy_outside")),
            )
        )
    return table(("", "Band", "Uncertain studies", "Share uncertain", "Accuracy outside"), rows)


def costs(report: Report, group: Found, fitted: Found | None, caption: str) -> Html:
    """Return a table of operating points: threshold, what it has on tune (`fitted`: of one study type), what it has here."""
    rows = []
    for name, point in group["points"].items():
        on_tune = ((fitted or {}).get("operating_points") or {}).get(name) or {}
        tune: tuple[str, ...] = ()
        if fitted is not None:
            first = join((format_number(point.get("threshold")), report.absence(point, "threshold")))
            tune = (first, *(format_number(on_tune.get(key)) for key in _RATES[:2]))
        rows.append((" ".join(name.split("=")), *tune, *(report.stacked(point, key) for key in _RATES)))
    header = [join((TITLES[key],)) for key in _RATES]
    if fitted is not None:
        tune_header = [join((TITLES[key], element("small", "on tune"))) for key in _RATES[:2]]
        header = [join(("Threshold",)), *tune_header, *(join((word, element("small", "here"))) for word in header)]
    return table(("Wanted on tune", *header), rows, caption)


def _predictive(report: Report) -> Iterator[Html]:
    assumed = report.measured["overall"].get("prevalence_assumed")
    names = ("ppv", "npv", *(("ppv_at_prevalence", "npv_at_prevalence") if assumed is not None else ()))
    rows = [
        (group_cell(name), format_number(group.get("prevalence")), *(report.stacked(group, key) for key in names))
        for name, group in metrics_by_group(report.measured).items()
    ]
    at = [f"PPV at {assumed:g}", f"NPV at {assumed:g}"] if assumed is not None else []
    text = (
        "PPV is the share of abnormal studies among those called abnormal, NPV that of normal ones among the others; here at "
        "this set's share of abnormal studies."
    )
    text += f" At {assumed:g}: worked out by Bayes from sensitivity and specificity." if assumed is not None else ""
    yield table(("", "Share abnormal", "PPV", "NPV", *at), rows, text)
