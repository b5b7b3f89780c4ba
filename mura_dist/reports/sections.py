"""Build the sections of a report that hold results: a Report in, markup out.

A section without content yields nothing, and the page omits it. threshold_sections.py has calibration and operating points.
"""

from collections.abc import Iterator
from typing import Any

from mura_dist.data.mura import display_name
from mura_dist.metrics.classification import CELLS
from mura_dist.metrics.entries import HEADLINE_METRICS
from mura_dist.metrics.summary import format_number, metrics_by_group
from mura_dist.reports.cells import (
    INDEPENDENT,
    NOT_GIVEN,
    Report,
    bullet_list,
    details_grid,
    format_count,
    format_interval,
    group_cell,
)
from mura_dist.reports.figures import difference_columns, slug
from mura_dist.reports.findings import TITLES, JsonObject, format_with_interval
from mura_dist.reports.html import Html, details, element, join, table
from mura_dist.reports.plurals import pluralize
from mura_dist.reports.threshold_sections import operating_point_table

MANY_LOOKS = (
    "These tables compare many groups of the same data. Of twenty 95 % intervals, one is expected to miss its true value by "
    "chance. Test a conspicuous value on other data before you rely on it."
)


def by_type(report: Report) -> Iterator[Html]:
    """Yield the main metrics of every study type, as a table and as pictures."""
    measured = report.measured
    yield _metrics_table(report)
    if few := report.findings["few_studies"]:
        yield element(
            "p",
            "Some groups are small and their intervals wide. Do not rank study types by these numbers.",
            class_="soft",
        )
    yield from report.picture_grid(("kappa", "auroc"), wide=True)
    more = []
    if "f1" in measured["overall"]:
        names = ("average_precision", "f1", "balanced_accuracy")
        rows = [
            (group_cell(name), *(report.value_cell(group, key) for key in names))
            for name, group in metrics_by_group(measured).items()
        ]
        header = ("", *(TITLES[name] for name in names))
        more.append(details("Average precision, F1, balanced accuracy", table(header, rows)))
    if few:
        more.append(details("Small groups", bullet_list(few)))
    yield details_grid((*more, _other_intervals(report), _published(report)))


def _metrics_table(report: Report) -> Html:
    rows = []
    for name, group in metrics_by_group(report.measured).items():
        cells = group["confusion"] or dict.fromkeys(CELLS)
        counts = [format_count(value) for value in (group["num_studies"], group["num_patients"])]
        numbers = (report.value_cell(group, key) for key in HEADLINE_METRICS)
        rows.append((group_cell(name), *numbers, *counts, *(format_count(cells[key]) for key in CELLS)))
        macro = report.measured.get("macro") or {}
        if name == "overall" and macro.get("kappa") is not None:
            macro_name = join(
                ("Macro mean", element("small", f"of {macro['num_study_types']} study types, unweighted"))
            )
            rows.append((macro_name, *(report.value_cell(macro, key) for key in HEADLINE_METRICS), *([""] * 6)))
    header = ("", *(TITLES[key] for key in HEADLINE_METRICS), "Studies", "Patients", *(key.upper() for key in CELLS))
    caption = (
        "Per study, with 95 % intervals in small print. A letter marks a footnote. TN, FP, FN and TP count studies; positive "
        "means abnormal."
    )
    return table(header, rows, caption)


def _published(report: Report) -> Html:
    published = report.findings["published"]
    if "absent" in published:
        return details("Why the paper's kappas are not listed", element("p", published["absent"]))
    best = format_number(published["best_radiologist_kappa"]["overall"])
    text = f"Source: {published['source']}. The best radiologist of the paper reached a kappa of {best} overall."
    rows = [
        (group_cell(name), report.value_cell(group, "kappa"), format_number(published["kappa"].get(name)))
        for name, group in metrics_by_group(report.measured).items()
    ]
    return details("The paper's kappas", element("p", text), table(("Kappa", "This report", "The paper"), rows))


_FORMULAS = {
    "kappa": ("kappa_fce", "Fleiss-Cohen-Everitt"),
    "auroc": ("auroc_delong", "DeLong"),
    **{name: (f"{name}_wilson", "Wilson") for name in ("sensitivity", "specificity", "ppv", "npv")},
}


def _other_intervals(report: Report) -> Html:
    rows = [
        (group_cell(name), *(_by_formula(report, group, key, formula) for key, (formula, _) in _FORMULAS.items()))
        for name, group in metrics_by_group(report.measured).items()
    ]
    text = (
        "The same numbers with intervals by formula. The formulas assume independent studies, but studies of one patient are "
        "not independent. An interval is missing where its formula is not valid. The other intervals of this page are "
        "from a bootstrap over patients."
    )
    header = ("", *(join((TITLES[key], element("small", word))) for key, (_, word) in _FORMULAS.items()))
    caption = f"95 % intervals by formula in small print ({INDEPENDENT})."
    return details("Intervals by formula", element("p", text), table(header, rows, caption))


def _by_formula(report: Report, group: JsonObject, key: str, formula: str) -> Html:
    interval = format_interval(group, formula)
    small = element("small", interval) if interval else report.missing_mark(group, formula)
    return join((format_number(group.get(key)), small))


def curves(report: Report) -> Iterator[Html]:
    """Yield the curves and the confusion matrix of all studies."""
    yield from report.picture_grid(("roc-overall", "pr-overall", "confusion-overall"))
    if reason := report.findings["plots"]["overall"]["absent"]:
        yield element("p", f"No curves: {reason}.", class_="soft")


# ---- comparison and subgroups


def comparison(report: Report) -> Iterator[Html]:
    """Yield the comparison with a second file of predictions, if there is one."""
    comparison = report.measured.get("comparison")
    if not comparison:
        return
    overall = comparison["overall"]
    files = [(report.measured.get(key) or {}).get("file") for key in ("predictions", "against")]
    yield element("p", f"{'' if None in files else f'A is {files[0]}, B is {files[1]}. '}It {comparison['note']}.")
    if overall["kappa"] is None:
        yield element("p", f"No difference in kappa: {overall['reasons']['kappa']}.")
    else:
        sides = (format_number(overall["kappa"][side]) for side in ("a", "b"))
        text = "Confirmatory comparison: the overall kappa is {} (A) and {} (B). A minus B is {}."
        yield element(
            "p", text.format(*sides, format_with_interval(difference_columns(overall["kappa"]), "difference"))
        )
    yield element("p", f"Exploratory: {comparison['exploratory']}. Intervals: {overall['interval_method']}.")
    yield from report.picture_grid(("difference-kappa", "difference-auroc"), wide=True)
    named = {"overall": overall, **comparison["by_study_type"]}
    rows = [
        (
            group_cell(name),
            format_count(group["num_studies"]),
            *(cell for key in ("kappa", "auroc") for cell in _sides(report, group, key)),
        )
        for name, group in named.items()
    ]
    header = ("", "Studies", *(word for name in ("Kappa", "AUROC") for word in (f"{name}, A", f"{name}, B", "A - B")))
    tests = [(group_cell(name), *_tests(report, group)) for name, group in named.items()]
    test_header = ("", "Only A correct", "Only B correct", "McNemar's p", "AUROC, A - B (DeLong)", "DeLong's p")
    yield details_grid(
        (
            details("Differences by study type", table(header, rows, "Differences with 95 % intervals.")),
            details(
                "McNemar's test and paired DeLong test (both assume independent studies)", table(test_header, tests)
            ),
        )
    )


def _sides(report: Report, group: JsonObject, name: str) -> tuple[Any, ...]:
    side = group[name]
    if side is None:
        return "-", "-", join(("-", report.missing_mark(group, name)))
    reason = group["reasons"].get(f"{name}_low", "")
    difference_entry = difference_columns(side) | {"reasons": {"difference_low": reason}}
    return format_number(side["a"]), format_number(side["b"]), report.value_cell(difference_entry, "difference")


def _tests(report: Report, group: JsonObject) -> Iterator[Any]:
    for key, names in (("mcnemar", ("a_only_right", "b_only_right")), ("delong", ())):
        test = group[key] or {}
        yield from (format_count(test.get(name)) for name in names)
        if key == "delong":
            yield (
                report.value_cell(difference_columns(test), "difference")
                if test
                else join(("-", report.missing_mark(group, key)))
            )
        yield _p_value(test.get("p_value"))


def _p_value(value: float | None) -> str:
    return "below 0.001" if value is not None and value < 0.001 else format_number(value)


_DIMENSIONS = {"num_views": "By number of views", "exposure": "By exposure: mean gray level of a study's views"}


def subgroups(report: Report) -> Iterator[Html]:
    """Yield the main metrics by number of views and by exposure, which should not affect them."""
    subgroups = report.measured.get("subgroups")
    if not subgroups:
        yield NOT_GIVEN
        return
    yield element("p", MANY_LOOKS)
    header = ("", "Studies", "Patients", *(TITLES[key] for key in HEADLINE_METRICS))
    parts = []
    for name, subgroup in subgroups.items():
        rows = [
            (
                word,
                format_count(group["num_studies"]),
                format_count(group["num_patients"]),
                *(report.value_cell(group, key) for key in HEADLINE_METRICS),
            )
            for word, group in subgroup.items()
        ]
        parts.append(details(_DIMENSIONS.get(name, name), table(header, rows)))
    yield details_grid(parts)


def study_type_details(report: Report) -> Iterator[Html]:
    """Yield a collapsible block for each study type: its pictures, its thresholds and their metrics."""
    calibration = (report.measured.get("calibration") or {}).get("by_study_type") or {}
    points = (report.measured.get("operating_points") or {}).get("by_study_type") or {}
    parts = []
    for name, group in report.measured["by_study_type"].items():
        kinds = ("roc", "pr", "confusion", "scores", "reliability", "reliability-calibrated")
        content = [*report.picture_grid([f"{kind}-{slug(name)}" for kind in kinds])]
        if reason := report.findings["plots"][name]["absent"]:
            content.append(element("p", f"No curves: {reason}.", class_="soft"))
        if name in points:
            caption = (
                "Operating points: the threshold fitted on tune, its rates on tune, and its metrics on this split."
            )
            content.append(operating_point_table(report, points[name], calibration.get(name, {}), caption))
        numbers = (f"{word} {format_number(group[key])}" for word, key in (("kappa", "kappa"), ("AUROC", "auroc")))
        text = ", ".join((pluralize(group["num_studies"], "study"), *numbers))
        type_name = display_name(name)
        code = [" ", element("small", name)] if type_name != name else []
        parts.append(details(join((element("strong", type_name), *code, f": {text}")), *content))
    yield details_grid(parts)
