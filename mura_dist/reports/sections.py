"""The sections of a report that tell results: findings and pictures in, markup out.

A section that has nothing to say yields nothing, and is left out; where something was to be expected, it says what is missing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mura_dist.metrics.classification import CELLS
from mura_dist.metrics.summary import METRICS, absences, groups, number
from mura_dist.reports.figures import CALIBRATION, difference, slug
from mura_dist.reports.findings import TITLES, count, with_words
from mura_dist.reports.html import Html, element, figure, folded, join, table
from mura_dist.reports.svg import Picture

INDEPENDENT = "assumes independent studies"
NOT_GIVEN = element("p", "Not given to this report.", class_="soft")
MANY_LOOKS = (
    "These are many looks at the same data: of twenty 95 % intervals, one is expected to miss its true value by chance alone. "
    "Take what stands out as a question to ask of other data, not as a finding."
)
Found = dict[str, Any]
Pictures = Mapping[str, Picture]


def between(group: Found, name: str) -> str:
    low, high = group.get(f"{name}_low"), group.get(f"{name}_high")
    return "" if low is None or high is None else f"{number(low)} to {number(high)}"


def stacked(group: Found, name: str) -> Html:
    """The number, its interval in small print below it."""
    interval = between(group, name)
    return join((number(group.get(name)), *([element("small", interval)] if interval else [])))


def bullets(lines: Sequence[str]) -> Html:
    return element("ul", *(element("li", line) for line in lines))


def listed(title: str, lines: Sequence[str]) -> Html:
    """A titled list, folded where it is long."""
    return folded(title, bullets(lines)) if len(lines) > 7 else join((element("h3", title), bullets(lines)))


def missing(parts: Iterable[tuple[str, Found]], names: Sequence[str]) -> Iterator[Html]:
    """Why some of `names` are not in the table above, or have no interval, of each named part with `reasons`."""
    yield from reasons(f"{name}: {text}." for name, part in parts for text in absences(part, tuple(names)))


def reasons(lines: Iterable[str]) -> Iterator[Html]:
    if found := [*lines]:
        yield listed("What is missing above, and why", found)


def shown(drawn: Pictures, names: Sequence[str], wide: bool = False) -> Iterator[Html]:
    chosen = [drawn[name] for name in names if name in drawn]
    if chosen:
        figures = (figure(picture.inline(), picture.caption) for picture in chosen)
        yield element("div", *figures, class_="wide pictures" if wide else "pictures")


def by_type(found: Found, drawn: Pictures) -> Iterator[Html]:
    measured = found["metrics"]
    yield _metrics_table(measured)
    if few := found["few_studies"]:
        yield element("p", "Few studies: intervals are wide where there are any; rank no study types by these.")
        yield listed("Groups of few studies", few)
    macro = {"macro mean": measured["macro"]} if measured.get("macro") else {}
    parts = macro | measured["by_study_type"]  # what `overall` lacks stands on top of the page
    yield from missing(parts.items(), METRICS)
    yield from shown(drawn, ("kappa", "auroc"), wide=True)
    yield _published(found)
    if "f1" in measured["overall"]:
        names = ("average_precision", "f1", "balanced_accuracy")
        rows = [(name, *(stacked(group, key) for key in names)) for name, group in groups(measured).items()]
        yield folded("Average precision, F1, balanced accuracy", table(("", *(TITLES[name] for name in names)), rows))
    yield _other_intervals(measured)


def _metrics_table(measured: Found) -> Html:
    rows = []
    for name, group in groups(measured).items():
        cells = group["confusion"] or dict.fromkeys(CELLS)
        counts = [num(value) for value in (group["num_studies"], group["num_patients"])]
        shown = "overall, pooled" if name == "overall" else name
        rows.append((shown, *(stacked(group, key) for key in METRICS), *counts, *(num(cells[key]) for key in CELLS)))
    macro = measured.get("macro") or {}
    if macro.get("kappa") is not None:
        name = join(("macro mean", element("small", f"of {macro['num_study_types']} study types, unweighted")))
        rows.insert(1, (name, *(stacked(macro, key) for key in METRICS), *([""] * 6)))
    header = ("", *(TITLES[key] for key in METRICS), "Studies", "Patients", *(key.upper() for key in CELLS))
    caption = "Per study. In small print the 95 % interval; TN, FP, FN, TP count studies, positive means abnormal."
    return table(header, rows, caption)


def num(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _published(found: Found) -> Html:
    published = found["published"]
    if "absent" in published:
        return element("p", published["absent"], class_="soft")
    best = number(published["best_radiologist_kappa"]["overall"])
    text = f"The paper's kappas ({published['source']}) beside these; its best radiologist reached {best} overall."
    named = groups(found["metrics"]).items()
    rows = [(name, stacked(group, "kappa"), number(published["kappa"].get(name))) for name, group in named]
    return join((element("p", text), table(("Kappa", "Here", "The paper"), rows)))


_FORMULAS = {
    "kappa": ("kappa_fce", "Fleiss-Cohen-Everitt"),
    "auroc": ("auroc_delong", "DeLong"),
    **{name: (f"{name}_wilson", "Wilson") for name in ("sensitivity", "specificity", "ppv", "npv")},
}


def _other_intervals(measured: Found) -> Html:
    rows = []
    for name, group in groups(measured).items():
        for key, (formula, word) in _FORMULAS.items():
            if group.get(key) is not None:
                intervals = (between(group, kind) or "-" for kind in (key, formula))
                rows.append((name, TITLES[key], number(group[key]), *intervals, word))
    text = (
        "This page's intervals are the bootstrap over patients, first here. The formulas beside it take studies as independent, "
        "which those of one patient are not; where one is missing, it is not to be trusted there."
    )
    header = ("", "", "Value", "Bootstrap over patients", join(("Formula", element("small", INDEPENDENT))), "")
    return folded("Intervals by formula, which assume independent studies", element("p", text), table(header, rows))


def curves(found: Found, drawn: Pictures) -> Iterator[Html]:
    yield from shown(drawn, ("roc-overall", "pr-overall", "confusion-overall"))
    if reason := found["plots"]["overall"]["absent"]:
        yield element("p", f"No curves: {reason}.", class_="soft")


def calibration(found: Found, drawn: Pictures) -> Iterator[Html]:
    names = ("scores-overall", "reliability-overall", "reliability-calibrated-overall")
    yield from shown(drawn, names)
    if any(name in drawn for name in names[1:]):
        yield element(
            "p",
            f"Dots: bins of equal number of studies. Bars: the Wilson interval of their share of abnormal ones ({INDEPENDENT}). "
            "Below: how many studies have which probability.",
            class_="soft",
        )
    if found["metrics"]["overall"].get("brier") is not None:
        yield from _calibration_table(found["metrics"])
    yield from _fitted(found["metrics"].get("calibration"), found["about"].get("Split"))


def _calibration_table(measured: Found) -> Iterator[Html]:
    """A line before calibration, and below it one after, where there is one."""
    rows, parts = [], []
    for name, group in groups(measured).items():
        parts += [(name, group), *([(f"{name}, calibrated", group["calibrated"])] if group.get("calibrated") else [])]
        rows.append((name, "raw", *(stacked(group, key) for key in CALIBRATION)))
        if group.get("calibrated"):
            rows.append(("", "calibrated", *(stacked(group["calibrated"], key) for key in CALIBRATION)))
    method = measured["overall"].get("calibration_error_method") or "its binning not given"
    caption = f"In small print the 95 % interval; none for the calibration error ({method}), which resamples bias."
    yield table(("", "Probabilities", *(TITLES[key] for key in CALIBRATION)), rows, caption)
    yield from missing(parts, CALIBRATION)


def _fitted(calibration: Found | None, split: str | None) -> Iterator[Html]:
    if not calibration:
        return
    if calibration.get("fitted_on") is None:
        yield element(
            "p", f"No calibration, thresholds or band were fitted: {calibration.get('reason') or 'reason not given'}."
        )
        return
    reported = (
        "which is reported here: optimistic" if split == calibration["fitted_on"] else "never on what is reported"
    )
    patients = calibration.get("num_patients")
    of = f" of {count(patients, 'patient')}" if patients is not None else ""
    yield element(
        "p",
        f"Calibration and thresholds were fitted on {calibration['fitted_on']} "
        f"({count(calibration['num_studies'], 'study')}{of}), {reported}: "
        f"{calibration.get('method') or 'method not given'}.",
    )
    for note in calibration.get("notes") or []:
        yield element("p", f"{note}.", class_="soft")
    header = ("", "Normal", "Abnormal", "Slope", "Intercept", "log(N/A)", "Fitted on")
    rows, why_not = [], []
    for name, one in calibration["by_study_type"].items():
        numbers = (number(one.get(key)) for key in ("slope", "intercept", "odds_shift"))
        counts = (f"{one[key]:,}" for key in ("num_normal", "num_abnormal"))
        rows.append((name, *counts, *numbers, "all types pooled" if one["pooled"] else "its own studies"))
        why_not += [f"{name}: {key}: {why}." for key, why in one.get("reasons", {}).items()]
    yield folded(
        "What was fitted, by study type",
        table(header, rows, "Studies of the tune split."),
        *([bullets(why_not)] if why_not else []),
    )


# ---- operating points


_RATES = ("sensitivity", "specificity", "ppv", "npv")


def operating(found: Found) -> Iterator[Html]:
    points, measured = found["metrics"].get("operating_points"), found["metrics"]
    if points:
        yield from _bands(points)
        yield element("h3", "Thresholds, and what they cost")
        text = "Each study type has a threshold of its own; they, and what they have on tune, stand under "
        yield element("p", join((text, element("a", "each study type", href="#each"), ".")))
        yield from _points_of(
            points["overall"], None, "All study types, measured here. In small print the 95 % interval."
        )
        if left_out := points.get("left_out"):
            text = "; ".join(f"{name} ({count(num, 'study')})" for name, num in left_out.items())
            yield element("p", f"Left out, as nothing was fitted for them: {text}.", class_="soft")
    elif measured.get("calibration") is None:
        yield NOT_GIVEN
    if measured["overall"].get("ppv") is not None or measured["overall"].get("npv") is not None:
        yield element("h3", "What a call means: PPV and NPV")
        yield from _predictive(measured)


def _bands(points: Found) -> Iterator[Html]:
    yield element("h3", "The uncertain band")
    yield element(
        "p",
        "From the threshold of sensitivity 95 % to that of specificity 95 %, both on tune: a study in between is uncertain.",
    )
    rows, lines = [], []
    for name, group in {"overall": points["overall"], **points["by_study_type"]}.items():
        band = group["band"]
        ends = (
            "each its own"
            if name == "overall"
            else between(band | {"_low": band.get("low"), "_high": band.get("high")}, "")
        )
        uncertain = num(band.get("num_uncertain"))
        rows.append(
            (
                name,
                ends or "none",
                f"{uncertain} of {band['num_studies']:,}",
                stacked(band, "share_uncertain"),
                stacked(band, "accuracy_outside"),
            )
        )
        lines += [
            f"{name}: {key.replace('_', ' ')}: {why}."
            for key, why in _whole(band).items()
            if ends != "each its own" or key not in ("low", "high")
        ]
    yield table(("", "Band", "Uncertain studies", "Share uncertain", "Accuracy outside"), rows)
    yield from reasons(lines)


def _whole(part: Found) -> dict[str, str]:
    """Reasons, an interval's told once."""
    return {key.removesuffix("_low"): why for key, why in part.get("reasons", {}).items() if not key.endswith("_high")}


def _points_of(group: Found, fitted: Found | None, caption: str) -> Iterator[Html]:
    """Wanted on tune -> threshold, what it has on tune (`fitted`: of one study type), what it has here."""
    rows = []
    for name, point in group["points"].items():
        on_tune = ((fitted or {}).get("operating_points") or {}).get(name) or {}
        tune = [number(value) for value in (point.get("threshold"), *(on_tune.get(key) for key in _RATES[:2]))]
        rows.append((_wanted(name), *(tune if fitted is not None else []), *(stacked(point, key) for key in _RATES)))
    header = [TITLES[key] for key in _RATES]
    if fitted is not None:
        tune = [join((TITLES[key], element("small", "on tune"))) for key in _RATES[:2]]
        header = ["Threshold", *tune, *(join((word, element("small", "here"))) for word in header)]
    yield table(("Wanted on tune", *header), rows, caption)
    yield from missing(((_wanted(name), point) for name, point in group["points"].items()), _RATES)


def _wanted(name: str) -> str:
    rate, _, value = name.partition("=")
    return f"{rate} {value}"


def _predictive(measured: Found) -> Iterator[Html]:
    assumed = measured["overall"].get("prevalence_assumed")
    rows = []
    for name, group in groups(measured).items():
        more = [stacked(group, f"{key}_at_prevalence") for key in ("ppv", "npv")] if assumed is not None else []
        rows.append((name, number(group.get("prevalence")), stacked(group, "ppv"), stacked(group, "npv"), *more))
    at = [f"PPV at {assumed:g}", f"NPV at {assumed:g}"] if assumed is not None else []
    text = (
        "PPV is the share of abnormal studies among those called abnormal, NPV that of normal ones among the others; here at "
        "this set's share of abnormal studies."
    )
    text += f" At {assumed:g}: worked out by Bayes from sensitivity and specificity." if assumed is not None else ""
    yield table(("", "Share abnormal", "PPV", "NPV", *at), rows, text)
    names = ("ppv", "npv", *(("ppv_at_prevalence", "npv_at_prevalence") if assumed is not None else ()))
    yield from missing(groups(measured).items(), names)


# ---- comparison and subgroups


def comparison(found: Found, drawn: Pictures) -> Iterator[Html]:
    comparison = found["metrics"].get("comparison")
    if not comparison:
        return
    overall = comparison["overall"]
    files = [(found["metrics"].get(key) or {}).get("file") for key in ("predictions", "against")]
    yield element("p", f"{'' if None in files else f'A is {files[0]}, B is {files[1]}. '}It {comparison['note']}.")
    if overall["kappa"] is None:
        yield element("p", f"No difference in kappa: {overall['reasons']['kappa']}.")
    else:
        sides = (number(overall["kappa"][side]) for side in ("a", "b"))
        text = "Confirmatory, the one comparison made to decide: overall kappa is {} (A) and {} (B); A less B is {}."
        yield element("p", text.format(*sides, with_words(difference(overall["kappa"]), "difference")))
    yield element("p", f"Exploratory: {comparison['exploratory']}. Intervals: {overall['interval_method']}.")
    named = {"overall": overall, **comparison["by_study_type"]}
    rows = [
        (name, num(one["num_studies"]), *_sides(one["kappa"]), *_sides(one["auroc"])) for name, one in named.items()
    ]
    header = ("", "Studies", *(word for name in ("Kappa", "AUROC") for word in (f"{name}, A", "B", "A - B")))
    yield table(header, rows, "Differences with their 95 % interval.")
    yield from missing(named.items(), ("kappa", "auroc"))
    yield from shown(drawn, ("difference-kappa", "difference-auroc"), wide=True)
    rows = [(name, *_tests(one)) for name, one in named.items()]
    header = ("", "Only A right", "Only B right", "McNemar's p", "AUROC, A - B (DeLong)", "p")
    yield folded(
        "McNemar's test and paired DeLong: both assume independent studies",
        table(header, rows),
        *missing(named.items(), ("delong",)),
    )


def _sides(side: Found | None) -> tuple[Any, ...]:
    if side is None:
        return "-", "-", "-"
    return number(side["a"]), number(side["b"]), stacked(difference(side), "difference")


def _tests(one: Found) -> Iterator[Any]:
    for key, names in (("mcnemar", ("a_only_right", "b_only_right")), ("delong", ())):
        test = one[key] or {}
        yield from (num(test.get(name)) for name in names)
        if key == "delong":
            yield stacked(difference(test), "difference") if test else "-"
        yield _p_value(test.get("p_value"))


def _p_value(value: float | None) -> str:
    return "below 0.001" if value is not None and value < 0.001 else number(value)


_DIMENSIONS = {"num_views": "Number of views", "exposure": "Exposure: mean grey level of a study's views"}


def subgroups(found: Found) -> Iterator[Html]:
    subgroups = found["metrics"].get("subgroups")
    if not subgroups:
        yield NOT_GIVEN
        return
    yield element("p", MANY_LOOKS)
    for name, parts in subgroups.items():
        rows = [
            (word, num(group["num_studies"]), num(group["num_patients"]), *(stacked(group, key) for key in METRICS))
            for word, group in parts.items()
        ]
        yield element("h3", _DIMENSIONS.get(name, name))
        yield table(("", "Studies", "Patients", *(TITLES[key] for key in METRICS)), rows)
        yield from missing(parts.items(), METRICS)
    yield element("p", join((element("a", "By study type", href="#by-type"), " is above.")), class_="soft")


def each(found: Found, drawn: Pictures) -> Iterator[Html]:
    measured, calibration = found["metrics"], (found["metrics"].get("calibration") or {}).get("by_study_type") or {}
    points = (measured.get("operating_points") or {}).get("by_study_type") or {}
    for name, group in measured["by_study_type"].items():
        kinds = ("roc", "pr", "confusion", "scores", "reliability", "reliability-calibrated")
        content = [*shown(drawn, [f"{kind}-{slug(name)}" for kind in kinds])]
        if reason := found["plots"][name]["absent"]:
            content.append(element("p", f"No curves: {reason}.", class_="soft"))
        if name in points:
            caption = "Thresholds wanted on tune, what they have there, and what they cost here."
            content += _points_of(points[name], calibration.get(name, {}), caption)
        numbers = (f"{word} {with_words(group, key)}" for word, key in (("kappa", "kappa"), ("AUROC", "auroc")))
        words = f"{name}: {', '.join((count(group['num_studies'], 'study'), *numbers))}"
        yield folded(words, *content)
