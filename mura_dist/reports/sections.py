"""The sections of a report that tell results: a Report in, markup out.

by_type, curves, comparison, subgroups, each        threshold_sections.py: calibration, the uncertain band, operating points

A section that has nothing to say yields nothing, and is left out; where something was to be expected, it says what is missing.
"""

from collections.abc import Iterator
from typing import Any

from mura_dist.data.mura import display_name
from mura_dist.metrics.classification import CELLS
from mura_dist.metrics.entries import HEADLINE_METRICS
from mura_dist.metrics.summary import format_number, metrics_by_group
from mura_dist.reports.cells import INDEPENDENT, NOT_GIVEN, Found, Report, between, bullets, folds, group_cell, num
from mura_dist.reports.figures import difference, slug
from mura_dist.reports.findings import TITLES, with_words
from mura_dist.reports.html import Html, element, folded, join, table
from mura_dist.reports.plurals import pluralize
from mura_dist.reports.threshold_sections import costs

MANY_LOOKS = (
    "These are many looks at the same data: of twenty 95 % intervals, one is expected to miss its true value by chance alone. "
    "Take what stands out as a question to ask of other data, not as a finding."
)


def by_type(report: Report) -> Iterator[Html]:
    """Yield the headline numbers of every study type, as a table and as pictures."""
    measured = report.measured
    yield _metrics_table(report)
    if few := report.findings["few_studies"]:
        yield element("p", "Few studies: intervals are wide; rank no study types by these.", class_="soft")
    yield from report.shown(("kappa", "auroc"), wide=True)
    more = []
    if "f1" in measured["overall"]:
        names = ("average_precision", "f1", "balanced_accuracy")
        rows = [
            (group_cell(name), *(report.stacked(group, key) for key in names))
            for name, group in metrics_by_group(measured).items()
        ]
        header = ("", *(TITLES[name] for name in names))
        more.append(folded("Average precision, F1, balanced accuracy", table(header, rows)))
    if few:
        more.append(folded("Groups of few studies", bullets(few)))
    yield folds((*more, _other_intervals(report), _published(report)))


def _metrics_table(report: Report) -> Html:
    rows = []
    for name, group in metrics_by_group(report.measured).items():
        cells = group["confusion"] or dict.fromkeys(CELLS)
        counts = [num(value) for value in (group["num_studies"], group["num_patients"])]
        numbers = (report.stacked(group, key) for key in HEADLINE_METRICS)
        rows.append((group_cell(name), *numbers, *counts, *(num(cells[key]) for key in CELLS)))
        macro = report.measured.get("macro") or {}
        if name == "overall" and macro.get("kappa") is not None:
            macro_name = join(
                ("Macro mean", element("small", f"of {macro['num_study_types']} study types, unweighted"))
            )
            rows.append((macro_name, *(report.stacked(macro, key) for key in HEADLINE_METRICS), *([""] * 6)))
    header = ("", *(TITLES[key] for key in HEADLINE_METRICS), "Studies", "Patients", *(key.upper() for key in CELLS))
    caption = (
        "Per study. In small print the 95 % interval; a letter is a footnote. TN, FP, FN, TP count studies, positive means "
        "abnormal."
    )
    return table(header, rows, caption)


def _published(report: Report) -> Html:
    published = report.findings["published"]
    if "absent" in published:
        return folded("Why the paper's kappas are not beside these", element("p", published["absent"]))
    best = format_number(published["best_radiologist_kappa"]["overall"])
    text = f"The paper's kappas ({published['source']}) beside these; its best radiologist reached {best} overall."
    rows = [
        (group_cell(name), report.stacked(group, "kappa"), format_number(published["kappa"].get(name)))
        for name, group in metrics_by_group(report.measured).items()
    ]
    return folded("The paper's kappas beside these", element("p", text), table(("Kappa", "Here", "The paper"), rows))


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
        "The same numbers with intervals by formula, which take studies as independent, as those of one patient are not. Where "
        "one is missing, it is not to be trusted there. The other intervals of this page are the bootstrap over patients."
    )
    header = ("", *(join((TITLES[key], element("small", word))) for key, (_, word) in _FORMULAS.items()))
    caption = f"In small print the 95 % interval by formula ({INDEPENDENT})."
    return folded("Intervals by formula, beside the bootstrap", element("p", text), table(header, rows, caption))


def _by_formula(report: Report, group: Found, key: str, formula: str) -> Html:
    interval = between(group, formula)
    small = element("small", interval) if interval else report.absence(group, formula)
    return join((format_number(group.get(key)), small))


def curves(report: Report) -> Iterator[Html]:
    """Yield the curves and the confusion of all studies."""
    yield from report.shown(("roc-overall", "pr-overall", "confusion-overall"))
    if reason := report.findings["plots"]["overall"]["absent"]:
        yield element("p", f"No curves: {reason}.", class_="soft")


# ---- comparison and subgroups


def comparison(report: Report) -> Iterator[Html]:
    """Yield the comparison with another file of predictions, where there is one."""
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
        text = "Confirmatory, the one comparison made to decide: overall kappa is {} (A) and {} (B); A less B is {}."
        yield element("p", text.format(*sides, with_words(difference(overall["kappa"]), "difference")))
    yield element("p", f"Exploratory: {comparison['exploratory']}. Intervals: {overall['interval_method']}.")
    yield from report.shown(("difference-kappa", "difference-auroc"), wide=True)
    named = {"overall": overall, **comparison["by_study_type"]}
    rows = [
        (
            group_cell(name),
            num(part["num_studies"]),
            *(cell for key in ("kappa", "auroc") for cell in _sides(report, part, key)),
        )
        for name, part in named.items()
    ]
    header = ("", "Studies", *(word for name in ("Kappa", "AUROC") for word in (f"{name}, A", f"{name}, B", "A - B")))
    tests = [(group_cell(name), *_tests(report, part)) for name, part in named.items()]
    test_header = ("", "Only A right", "Only B right", "McNemar's p", "AUROC, A - B (DeLong)", "DeLong's p")
    yield folds(
        (
            folded("Differences by study type", table(header, rows, "Differences with their 95 % interval.")),
            folded("McNemar's test and paired DeLong: both assume independent studies", table(test_header, tests)),
        )
    )


def _sides(report: Report, part: Found, name: str) -> tuple[Any, ...]:
    side = part[name]
    if side is None:
        return "-", "-", join(("-", report.absence(part, name)))
    difference_entry = difference(side) | {"reasons": {"difference_low": part["reasons"].get(f"{name}_low", "")}}
    return format_number(side["a"]), format_number(side["b"]), report.stacked(difference_entry, "difference")


def _tests(report: Report, part: Found) -> Iterator[Any]:
    for key, names in (("mcnemar", ("a_only_right", "b_only_right")), ("delong", ())):
        test = part[key] or {}
        yield from (num(test.get(name)) for name in names)
        if key == "delong":
            yield report.stacked(difference(test), "difference") if test else join(("-", report.absence(part, key)))
        yield _p_value(test.get("p_value"))


def _p_value(value: float | None) -> str:
    return "below 0.001" if value is not None and value < 0.001 else format_number(value)


_DIMENSIONS = {"num_views": "By number of views", "exposure": "By exposure: mean grey level of a study's views"}


def subgroups(report: Report) -> Iterator[Html]:
    """Yield the headline numbers by what should not matter."""
    subgroups = report.measured.get("subgroups")
    if not subgroups:
        yield NOT_GIVEN
        return
    yield element("p", MANY_LOOKS)
    header = ("", "Studies", "Patients", *(TITLES[key] for key in HEADLINE_METRICS))
    parts = []
    for name, part in subgroups.items():
        rows = [
            (
                word,
                num(group["num_studies"]),
                num(group["num_patients"]),
                *(report.stacked(group, key) for key in HEADLINE_METRICS),
            )
            for word, group in part.items()
        ]
        parts.append(folded(_DIMENSIONS.get(name, name), table(header, rows)))
    yield folds(parts)


def each(report: Report) -> Iterator[Html]:
    """Yield a folded part for each study type: its pictures, its thresholds and what they cost."""
    calibration = (report.measured.get("calibration") or {}).get("by_study_type") or {}
    points = (report.measured.get("operating_points") or {}).get("by_study_type") or {}
    parts = []
    for name, group in report.measured["by_study_type"].items():
        kinds = ("roc", "pr", "confusion", "scores", "reliability", "reliability-calibrated")
        content = [*report.shown([f"{kind}-{slug(name)}" for kind in kinds])]
        if reason := report.findings["plots"][name]["absent"]:
            content.append(element("p", f"No curves: {reason}.", class_="soft"))
        if name in points:
            caption = "Thresholds wanted on tune, what they have there, and what they cost here."
            content.append(costs(report, points[name], calibration.get(name, {}), caption))
        numbers = (f"{word} {format_number(group[key])}" for word, key in (("kappa", "kappa"), ("AUROC", "auroc")))
        text = ", ".join((pluralize(group["num_studies"], "study"), *numbers))
        type_name = display_name(name)
        code = [" ", element("small", name)] if type_name != name else []
        parts.append(folded(join((element("strong", type_name), *code, f": {text}")), *content))
    yield folds(parts)
