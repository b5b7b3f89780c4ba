"""Report what a conversion found in its source, as JSON and text, and whether the source is MURA-v1.1.

    Scan, manifest (with tune), unreadable files -> report -> report.json, text -> the terminal

A report has standard JSON values only, and nothing of the machine, the time or the folder's path: equal radiographs give equal
reports. A data set other than MURA-v1.1 is no defect.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from mura_dist.data import mura
from mura_dist.data.manifest import Manifest
from mura_dist.data.source.scan import DuplicateResolution, Scan

LABELS = ("normal", "abnormal")
COMPLETE = "this is MURA-v1.1, complete"
MAX_LINES = 40  # of a report's text
_MAX_DIFFERENCES = 8  # in the text; report.json has all
_MAX_WIDTH = 180
_EXAMPLES = 3

# Effect of the defects that make results wrong.
_SERIOUS = {
    "patient in train and valid": "serious: valid contains patients of train",
    "duplicate across splits": "serious: valid contains radiographs of train",
    "study under both labels": "serious: one of the two labels is wrong",
    "two labels in a CSV (folder taken)": "serious: one of the two labels is wrong",
}


def report(scan: Scan, manifest: Manifest, unreadable: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of report.json.

    Args:
        scan: Scan of the source.
        manifest: The scan's manifest, with tune.
        unreadable: {"row", "path", "code", "reason"} of each unreadable file.
    """
    frame = manifest.frame
    differences = differences_from_v1_1(frame)
    return {
        "what": "what a conversion found in its source, by mura-dist",
        "holds": "phantoms" if scan.phantoms else "radiographs",
        "counts": {**count(frame), "splits": _by_split(frame)},
        "unknown_study_types": unknown_study_types(frame),
        "mura_v1_1": {
            "complete": not differences,
            "resembles": _resembles_v1_1(frame),
            "summary": _summary(frame, differences),
            "differences": differences,
        },
        "defects": {name: list(examples) for name, examples in scan.defects.items()},
        "duplicates_of_train_in_tune": _separated_copies(scan, frame),
        "duplicates": _resolution(scan.resolution, frame),
        "corrections": dict(scan.corrections),
        "corrections_without_effect": list(scan.needless),
        "unreadable": [dict(item) for item in unreadable],
    }


# ---- counts


def count(frame: pd.DataFrame) -> dict[str, int]:
    """Count patients, studies and radiographs, the latter two also by label."""
    counts = {"num_patients": frame["patient"].nunique()}
    for unit, lines in (("studies", frame.drop_duplicates("study")), ("radiographs", frame)):
        counts[f"num_{unit}"] = len(lines)
        counts |= {f"{name}_{unit}": int((lines["label"] == label).sum()) for label, name in enumerate(LABELS)}
    return counts


def unknown_study_types(frame: pd.DataFrame) -> list[str]:
    """Return the study types that MURA does not have, sorted."""
    return sorted(set(frame["study_type"]) - set(mura.STUDY_TYPES))


def _by_split(frame: pd.DataFrame) -> dict[str, Any]:
    by_split = {split: frame[frame["split"] == split] for split in mura.SPLITS}
    return {
        split: count(lines)
        | {"by_study_type": {str(name): count(group) for name, group in lines.groupby("study_type")}}
        for split, lines in by_split.items()
        if len(lines)
    }


def _separated_copies(scan: Scan, frame: pd.DataFrame) -> list[str]:
    """Return the duplicates of which tune has one and train the other, which makes tune look better than it is."""
    split = dict(zip(frame["path"], frame["split"], strict=True))
    return [
        f"{path} = {copy}" for path, copy in scan.duplicates or () if {split[path], split[copy]} == {"train", "tune"}
    ]


def _resolution(resolution: DuplicateResolution, frame: pd.DataFrame) -> dict[str, Any]:
    """Return the effect of --duplicates."""
    studies = {path.rpartition("/")[0] for path, _ in resolution.dropped}
    return {
        "policy": resolution.policy,
        "dropped_from_train": [f"{path} = {copy}" for path, copy in resolution.dropped],
        "num_studies": len(studies),
        "num_studies_without_radiographs": len(studies - set(frame["study"])),
        "patients_kept_together": [list(group) for group in resolution.groups],
    }


# ---- MURA-v1.1


def differences_from_v1_1(frame: pd.DataFrame) -> list[str]:
    """Return a line for each count in which a manifest's frame differs from MURA-v1.1.

    Radiographs and studies are counted by split, study type and label, patients by split. Tune counts as train.
    """
    untuned = frame.assign(split=frame["split"].replace("tune", "train"))
    units = (
        ("radiographs", untuned, mura.IMAGES_V1_1),
        ("studies", untuned.drop_duplicates("study"), mura.STUDIES_V1_1),
    )
    lines = [line for unit, table, expected in units for line in _differences(unit, table, expected)]
    patients = untuned.groupby("split")["patient"].nunique()
    for split in _in_order(set(mura.PATIENTS_V1_1) | set(patients.index)):
        lines += _difference(split, int(patients.get(split, 0)), mura.PATIENTS_V1_1.get(split, 0), "patients")
    return lines


def _differences(unit: str, frame: pd.DataFrame, expected: dict[str, dict[str, tuple[int, int]]]) -> Iterator[str]:
    counts = Counter(zip(frame["split"], frame["study_type"], frame["label"], strict=True))
    for split in _in_order(set(expected) | set(frame["split"])):
        types = expected.get(split, {})
        for study_type in sorted(set(types) | set(frame.loc[frame["split"] == split, "study_type"])):
            for label, name in enumerate(LABELS):
                num, num_expected = counts[split, study_type, label], types.get(study_type, (0, 0))[label]
                yield from _difference(f"{split} {study_type} {name}", num, num_expected, unit)


def _difference(group: str, num: int, num_expected: int, unit: str) -> list[str]:
    return [f"{group}: {num} {unit}, v1.1 has {num_expected} ({num - num_expected:+d})"] if num != num_expected else []


def _in_order(splits: set[str]) -> list[str]:
    return sorted(splits, key=mura.SPLITS.index)


def _summary(frame: pd.DataFrame, differences: list[str]) -> str:
    if not differences:
        return COMPLETE
    counts = f"{len(frame):,} radiographs, v1.1 has {mura.NUM_IMAGES_V1_1:,}"
    if not _resembles_v1_1(frame):
        unknown = unknown_study_types(frame)
        return f"not MURA-v1.1: {counts}" + (f"; study types unknown to MURA: {', '.join(unknown)}" if unknown else "")
    differ = "1 count differs" if len(differences) == 1 else f"{len(differences)} counts differ"
    return f"not MURA-v1.1 as it was published, {differ}: {counts}"


def _resembles_v1_1(frame: pd.DataFrame) -> bool:
    """Return whether to list differences: all study types are MURA's, and at least half of its radiographs exist."""
    return not unknown_study_types(frame) and 2 * len(frame) >= mura.NUM_IMAGES_V1_1


# ---- text


def text(report: dict[str, Any]) -> str:
    """Format a report as at most about MAX_LINES lines, with as many examples as fit."""
    for examples in range(_EXAMPLES, -1, -1):
        lines = list(_lines(report, examples))
        if len(lines) <= MAX_LINES:
            break
    return "\n".join(_printable(line) for line in [*lines, "details: report.json"])


def _lines(report: dict[str, Any], examples: int) -> Iterator[str]:
    for split, counts in report["counts"]["splits"].items():
        yield f"{split}: {_format_counts(counts)}"
    yield from _v1_1_lines(report["mura_v1_1"])
    for name, examples_of_defect in report["defects"].items():
        why = f" ({_SERIOUS[name]})" if name in _SERIOUS else ""
        yield from _with_examples(f"{name}: {len(examples_of_defect):,}{why}", examples_of_defect, examples)
    separated = report["duplicates_of_train_in_tune"]
    if separated:
        yield from _with_examples(
            f"duplicates of which tune has one and train the other: {len(separated):,}", separated, examples
        )
    if not report["defects"]:
        yield "no defects"
    yield from _duplicate_lines(report, examples)
    yield from _correction_lines(report, examples)
    if unreadable := report["unreadable"]:
        files = [f"{item['path']}: {item['reason']} ({item['code']})" for item in unreadable]
        yield from _with_examples(f"unreadable, skipped: {len(files):,}", files, examples)


def _format_counts(counts: dict[str, Any]) -> str:
    return (
        f"{counts['num_radiographs']:,} radiographs of {counts['num_studies']:,} studies ({counts['normal_studies']:,} normal, "
        f"{counts['abnormal_studies']:,} abnormal), {counts['num_patients']:,} patients"
    )


def _v1_1_lines(comparison: dict[str, Any]) -> Iterator[str]:
    yield from _with_examples(
        comparison["summary"], comparison["differences"] if comparison["resembles"] else [], _MAX_DIFFERENCES
    )


def _duplicate_lines(report: dict[str, Any], examples: int) -> Iterator[str]:
    resolution = report.get("duplicates", {"policy": "keep"})  # a report of an earlier version has none
    choice = f"(--duplicates {resolution['policy']})"
    if resolution["policy"] == "drop-train":
        dropped, num = resolution["dropped_from_train"], resolution["num_studies"]
        without = resolution["num_studies_without_radiographs"]
        what = f"radiographs of {num:,} studies, {without:,} of which have no other"
        yield from _with_examples(f"duplicates dropped from train {choice}: {len(dropped):,} {what}", dropped, examples)
    elif resolution["policy"] == "group":
        groups = resolution["patients_kept_together"]
        num = sum(map(len, groups))
        what = f"{num:,} of train in {len(groups):,} groups"
        yield from _with_examples(
            f"patients kept together {choice}: {what}", [", ".join(group) for group in groups], examples
        )
    elif any(name.startswith("duplicate") for name in report["defects"]):
        yield f"duplicates kept {choice}; drop-train drops train's copies of valid's, group keeps their patients together"


def _correction_lines(report: dict[str, Any], examples: int) -> Iterator[str]:
    corrections, needless = report["corrections"], report["corrections_without_effect"]
    if corrections or needless:
        changes = [f"{study} is {LABELS[label]}" for study, label in corrections.items()]
        without = f" ({len(needless):,} more already had that label)" if needless else ""
        yield from _with_examples(f"studies corrected by --labels: {len(corrections):,}{without}", changes, examples)


def _with_examples(headline: str, items: Sequence[str], examples: int) -> Iterator[str]:
    """Yield a headline, and its first items below it."""
    yield headline
    yield from (f"  {item}" for item in items[:examples])
    if 0 < examples < len(items):
        yield f"  and {len(items) - examples:,} more"


def _printable(line: str) -> str:
    """Escape control characters of file names, and truncate long lines."""
    safe = "".join(_escape(line))
    return safe if len(safe) <= _MAX_WIDTH else f"{safe[: _MAX_WIDTH - 3]}..."


def _escape(line: str) -> Iterator[str]:
    yield from (c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
