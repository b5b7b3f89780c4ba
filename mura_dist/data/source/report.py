"""The audit: what a conversion found in its source, as JSON and as a page of text; and whether the source is MURA-v1.1.

    Scan, manifest (tune already cut), unreadable files -> report -> report.json, text -> the terminal

A report holds standard JSON values only, and nothing of the machine, the hour or the folder's place: the same radiographs give
the same report. Not being MURA-v1.1 is no defect, other data sets are welcome; it is told beside the defects.
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
_MAX_DIFFERENCES = 8  # told in the text; report.json has all
_MAX_WIDTH = 180
_EXAMPLES = 3

# What the defects that make a result wrong do to it.
_SERIOUS = {
    "patient in train and valid": "serious: whom a model was fitted to is scored again",
    "duplicate across splits": "serious: what a model was fitted to is scored again",
    "study under both labels": "serious: one of the two labels is wrong",
    "two labels in a CSV (folder taken)": "serious: one of the two labels is wrong",
}


def report(scan: Scan, manifest: Manifest, unreadable: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What report.json holds. `manifest` is the scan's with tune cut; `unreadable`: {"row", "path", "code", "reason"} each."""
    frame = manifest.frame
    differences = against_v1_1(frame)
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
        "defects": {name: list(seen) for name, seen in scan.defects.items()},
        "duplicates_of_train_in_tune": _cut_apart(scan, frame),
        "duplicates": _resolution(scan.resolution, frame),
        "corrections": dict(scan.corrections),
        "corrections_without_effect": list(scan.needless),
        "unreadable": [dict(item) for item in unreadable],
    }


# ---- counts


def count(part: pd.DataFrame) -> dict[str, int]:
    """How many there are; `normal_*` and `abnormal_*` by label."""
    found = {"num_patients": part["patient"].nunique()}
    for unit, lines in (("studies", part.drop_duplicates("study")), ("radiographs", part)):
        found[f"num_{unit}"] = len(lines)
        found |= {f"{name}_{unit}": int((lines["label"] == label).sum()) for label, name in enumerate(LABELS)}
    return found


def unknown_study_types(frame: pd.DataFrame) -> list[str]:
    return sorted(set(frame["study_type"]) - set(mura.STUDY_TYPES))


def _by_split(frame: pd.DataFrame) -> dict[str, Any]:
    parts = {split: frame[frame["split"] == split] for split in mura.SPLITS}
    return {
        split: count(part) | {"by_study_type": {str(name): count(one) for name, one in part.groupby("study_type")}}
        for split, part in parts.items()
        if len(part)
    }


def _cut_apart(scan: Scan, frame: pd.DataFrame) -> list[str]:
    """The duplicates within train of which the cut by patient put one into tune: tune then looks better than it is."""
    split = dict(zip(frame["path"], frame["split"], strict=True))
    return [f"{one} = {copy}" for one, copy in scan.duplicates or () if {split[one], split[copy]} == {"train", "tune"}]


def _resolution(resolution: DuplicateResolution, frame: pd.DataFrame) -> dict[str, Any]:
    """Say what --duplicates did; of the studies that lost a radiograph some have none left."""
    studies = {path.rpartition("/")[0] for path, _ in resolution.dropped}
    return {
        "policy": resolution.policy,
        "dropped_from_train": [f"{path} = {copy}" for path, copy in resolution.dropped],
        "num_studies": len(studies),
        "num_studies_without_radiographs": len(studies - set(frame["study"])),
        "patients_kept_together": [list(group) for group in resolution.groups],
    }


# ---- MURA-v1.1


def against_v1_1(frame: pd.DataFrame) -> list[str]:
    """Each count in which a manifest's frame differs from MURA-v1.1's, as a line; empty where it is MURA-v1.1, complete.

    Counted are radiographs and studies by split, study type and label, and patients by split; tune counts as train.
    """
    whole = frame.assign(split=frame["split"].replace("tune", "train"))
    units = (
        ("radiographs", whole, mura.IMAGES_V1_1),
        ("studies", whole.drop_duplicates("study"), mura.STUDIES_V1_1),
    )
    lines = [line for unit, part, expected in units for line in _differences(unit, part, expected)]
    patients = whole.groupby("split")["patient"].nunique()
    for split in _in_order(set(mura.PATIENTS_V1_1) | set(patients.index)):
        lines += _difference(split, int(patients.get(split, 0)), mura.PATIENTS_V1_1.get(split, 0), "patients")
    return lines


def _differences(unit: str, part: pd.DataFrame, expected: dict[str, dict[str, tuple[int, int]]]) -> Iterator[str]:
    counts = Counter(zip(part["split"], part["study_type"], part["label"], strict=True))
    for split in _in_order(set(expected) | set(part["split"])):
        types = expected.get(split, {})
        for study_type in sorted(set(types) | set(part.loc[part["split"] == split, "study_type"])):
            for label, name in enumerate(LABELS):
                seen, wanted = counts[split, study_type, label], types.get(study_type, (0, 0))[label]
                yield from _difference(f"{split} {study_type} {name}", seen, wanted, unit)


def _difference(what: str, seen: int, wanted: int, unit: str) -> list[str]:
    return [f"{what}: {seen} {unit}, v1.1 has {wanted} ({seen - wanted:+d})"] if seen != wanted else []


def _in_order(splits: set[str]) -> list[str]:
    return sorted(splits, key=mura.SPLITS.index)


def _summary(frame: pd.DataFrame, differences: list[str]) -> str:
    if not differences:
        return COMPLETE
    seen = f"{len(frame):,} radiographs, v1.1 has {mura.NUM_IMAGES_V1_1:,}"
    if not _resembles_v1_1(frame):
        unknown = unknown_study_types(frame)
        return f"not MURA-v1.1: {seen}" + (f"; study types unknown to MURA: {', '.join(unknown)}" if unknown else "")
    differ = "1 count differs" if len(differences) == 1 else f"{len(differences)} counts differ"
    return f"not MURA-v1.1 as it was published, {differ}: {seen}"


def _resembles_v1_1(frame: pd.DataFrame) -> bool:
    """Worth a list of what differs: nothing foreign in it, and at least half of it there."""
    return not unknown_study_types(frame) and 2 * len(frame) >= mura.NUM_IMAGES_V1_1


# ---- text


def text(report: dict[str, Any]) -> str:
    """What is printed: at most about MAX_LINES lines, with as many examples of each defect as these allow."""
    for examples in range(_EXAMPLES, -1, -1):
        lines = list(_lines(report, examples))
        if len(lines) <= MAX_LINES:
            break
    return "\n".join(_printable(line) for line in [*lines, "all of it: report.json"])


def _lines(report: dict[str, Any], examples: int) -> Iterator[str]:
    for split, part in report["counts"]["splits"].items():
        yield f"{split}: {_counted(part)}"
    yield from _v1_1_lines(report["mura_v1_1"])
    for name, seen in report["defects"].items():
        why = f" ({_SERIOUS[name]})" if name in _SERIOUS else ""
        yield from _told(f"{name}: {len(seen):,}{why}", seen, examples)
    apart = report["duplicates_of_train_in_tune"]
    if apart:
        yield from _told(f"duplicates of which tune has one and train the other: {len(apart):,}", apart, examples)
    if not report["defects"]:
        yield "no defects"
    yield from _duplicate_lines(report, examples)
    yield from _correction_lines(report, examples)
    if unreadable := report["unreadable"]:
        seen = [f"{item['path']}: {item['reason']} ({item['code']})" for item in unreadable]
        yield from _told(f"unreadable, left out: {len(seen):,}", seen, examples)


def _counted(part: dict[str, Any]) -> str:
    return (
        f"{part['num_radiographs']:,} radiographs of {part['num_studies']:,} studies ({part['normal_studies']:,} normal, "
        f"{part['abnormal_studies']:,} abnormal), {part['num_patients']:,} patients"
    )


def _v1_1_lines(told: dict[str, Any]) -> Iterator[str]:
    yield from _told(told["summary"], told["differences"] if told["resembles"] else [], _MAX_DIFFERENCES)


def _duplicate_lines(report: dict[str, Any], examples: int) -> Iterator[str]:
    resolution = report.get("duplicates", {"policy": "keep"})  # a report of an earlier version has none
    choice = f"(--duplicates {resolution['policy']})"
    if resolution["policy"] == "drop-train":
        dropped, num = resolution["dropped_from_train"], resolution["num_studies"]
        without = resolution["num_studies_without_radiographs"]
        what = f"radiographs of {num:,} studies, {without:,} of which have no other"
        yield from _told(f"duplicates dropped from train {choice}: {len(dropped):,} {what}", dropped, examples)
    elif resolution["policy"] == "group":
        groups = resolution["patients_kept_together"]
        num = sum(map(len, groups))
        what = f"{num:,} of train in {len(groups):,} groups"
        yield from _told(f"patients kept together {choice}: {what}", [", ".join(group) for group in groups], examples)
    elif any(name.startswith("duplicate") for name in report["defects"]):
        yield f"duplicates kept {choice}; drop-train drops train's copies of valid's, group cuts tune by who shares one"


def _correction_lines(report: dict[str, Any], examples: int) -> Iterator[str]:
    corrections, needless = report["corrections"], report["corrections_without_effect"]
    if corrections or needless:
        seen = [f"{study} is {LABELS[label]}" for study, label in corrections.items()]
        without = f" ({len(needless):,} more named a label that was so already)" if needless else ""
        yield from _told(f"studies corrected by --labels: {len(corrections):,}{without}", seen, examples)


def _told(headline: str, seen: Sequence[str], examples: int) -> Iterator[str]:
    """A line, and below it the first of what it counts."""
    yield headline
    yield from (f"  {item}" for item in seen[:examples])
    if 0 < examples < len(seen):
        yield f"  and {len(seen) - examples:,} more"


def _printable(line: str) -> str:
    """A file's name may hold anything: what would steer a terminal, or is no character, is escaped; long lines are cut."""
    safe = "".join(_escaped(line))
    return safe if len(safe) <= _MAX_WIDTH else f"{safe[: _MAX_WIDTH - 3]}..."


def _escaped(line: str) -> Iterator[str]:
    yield from (c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
