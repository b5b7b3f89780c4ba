"""Scan a folder in MURA's layout: its radiographs, labels and defects.

    folder or URL -> walk -> apply the CSVs, if any -> correct by --labels -> defects      = a Scan

A scan decodes no radiograph, because the conversion reports unreadable files. It reads only the bytes that distinguish
copies from other files of the same size.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from mura_dist.core import storage
from mura_dist.core.errors import UserError
from mura_dist.core.storage import StoragePath
from mura_dist.data import mura
from mura_dist.data.csv_lines import parse_label, parse_path
from mura_dist.data.manifest import Manifest
from mura_dist.data.mura import Radiograph
from mura_dist.data.source import csv_files
from mura_dist.data.source import duplicates as duplicate_search
from mura_dist.data.source.csv_files import Defects, MuraCsvs, Spellings, parse_study, read_rows, split_path
from mura_dist.data.source.files import Tree, walk

PHANTOMS_MARK = "phantoms.json"
_MURA_VIEW = re.compile(r"image([0-9]{1,9})\.[^.]+")

# All defects, in the order of reports: those that make results wrong, then labels, then files.
DEFECTS = (
    "patient in train and valid",
    "duplicate across splits",
    "study under both labels",
    "label differs between CSV and folder (CSV taken)",
    "two labels in a CSV (folder taken)",
    "no label in the CSV (folder taken)",
    "no label",
    "listed in a CSV, missing on disk",
    "labelled in a CSV, no files",
    "on disk, listed in no CSV",
    "listed twice in a CSV",
    "line of a CSV not understood",
    "gap in image numbers",
    "view number used twice",
    "duplicate within a split",
    "link to a folder that is there already (left out)",
    "link that leads nowhere",
    "outside MURA's layout",
    "not a radiograph",
)


@dataclass(frozen=True)
class DuplicateResolution:
    """The policy on duplicates (duplicate_policy.py), and its effect."""

    policy: str = "keep"
    dropped: tuple[tuple[str, str], ...] = ()  # (a radiograph of train, its copy in another split)
    groups: tuple[tuple[str, ...], ...] = ()  # train patients who share a radiograph and stay together


@dataclass(frozen=True)
class Scan:
    """The content of a folder, where its paths start, and its defects.

    `defects` maps names, in the order of DEFECTS, to sorted examples. `corrections` are the labels that a file of corrections
    changed, by study, and `needless` the studies whose label it already had. `duplicates` are pairs of paths of identical files,
    each copy named once, or None where they were not searched.
    """

    root: StoragePath
    manifest: Manifest
    defects: dict[str, list[str]]
    phantoms: bool
    corrections: dict[str, int]
    needless: list[str]
    duplicates: list[tuple[str, str]] | None
    sizes: dict[str, int]  # bytes of each radiograph's file, by path
    resolution: DuplicateResolution = DuplicateResolution()


def scan(source: StoragePath, labels: Path | None = None, *, duplicates: bool = True) -> Scan:
    """Scan a folder or URL in MURA's layout.

    If MURA's CSVs are present, they decide which files count and their labels, and the folders are checked against them.

    Args:
        source: Folder or URL.
        labels: CSV of corrected labels (`study,label`).
        duplicates: Search for identical files.

    Raises:
        UserError: No such folder, nothing in MURA's layout, an invalid CSV, or MURA-v1.0.
    """
    tree = walk(source)
    defects: Defects = defaultdict(list)
    defects["not a radiograph"] += tree.junk
    defects["outside MURA's layout"] += tree.strays
    defects["link to a folder that is there already (left out)"] += tree.repeated
    defects["link that leads nowhere"] += tree.broken
    csvs = csv_files.read(tree, defects)
    _check_files(tree, csvs, defects)
    _check_labels(tree, csvs, defects)
    radiographs = [replace(r, label=csvs.label(r)) for r in tree.radiographs if csvs.includes(r)]
    radiographs, corrections, needless = _correct(radiographs, labels)
    defects["no label"] += [r.path for r in radiographs if r.label is None]
    radiographs = [r for r in radiographs if r.label is not None]
    _refuse(source, radiographs, csvs)
    defects["patient in train and valid"] += _patients_in_both(radiographs)
    phantoms = any(
        folder.exists(PHANTOMS_MARK) for folder in (storage.open_storage(tree.root), storage.open_storage(source))
    )
    sizes = {r.path: tree.sizes[r.path] for r in radiographs}
    result = Scan(
        tree.root,
        Manifest.from_radiographs(radiographs),
        _in_order(defects),
        phantoms,
        corrections,
        needless,
        None,
        sizes,
    )
    return with_duplicates(result) if duplicates else result


def with_duplicates(scan: Scan) -> Scan:
    """Return a scan with its duplicates searched, which is the only step that opens radiographs."""
    if scan.duplicates is not None:
        return scan
    return with_pairs(scan, duplicate_search.find_pairs(storage.open_storage(scan.root), scan.sizes, list(scan.sizes)))


def with_pairs(scan: Scan, pairs: list[tuple[str, str]]) -> Scan:
    """Return a scan with these duplicates, among its defects too."""
    across, within = "duplicate across splits", "duplicate within a split"
    defects = defaultdict(
        list, {name: examples for name, examples in scan.defects.items() if name not in (across, within)}
    )
    for first, copy in pairs:
        defects[across if first.partition("/")[0] != copy.partition("/")[0] else within].append(f"{first} = {copy}")
    return replace(scan, defects=_in_order(defects), duplicates=pairs)


def _in_order(defects: Defects) -> Defects:
    return {name: defects[name] for name in DEFECTS if defects.get(name)}


def _check_files(tree: Tree, csvs: MuraCsvs, defects: Defects) -> None:
    """Compare the folders with the lists of images, and check view numbers."""
    present = {radiograph.path for radiograph in tree.radiographs}
    listed = {path for paths in csvs.listed.values() for path in paths}
    missing = sorted(listed - present - set(tree.junk))
    defects["listed in a CSV, missing on disk"] += missing
    defects["on disk, listed in no CSV"] += [r.path for r in tree.radiographs if not csvs.includes(r)]
    _check_numbers([r.path for r in tree.radiographs if csvs.includes(r)] + missing, defects)


def _check_numbers(paths: Iterable[str], defects: Defects) -> None:
    """Check that views named as in MURA, image<k>, are numbered 1 to n, each once."""
    views: dict[str, list[int]] = defaultdict(list)
    for path in paths:
        folder, _, name = path.rpartition("/")
        if number := _MURA_VIEW.fullmatch(name):
            views[folder].append(int(number[1]))
    for study, numbers in sorted(views.items()):
        if gaps := _gaps(sorted(set(numbers))):
            defects["gap in image numbers"].append(f"{study}: no {', '.join(gaps)}")
        if twice := sorted(number for number, count in Counter(numbers).items() if count > 1):
            defects["view number used twice"].append(f"{study}: {', '.join(f'image{number}' for number in twice)}")


def _gaps(numbers: list[int]) -> list[str]:
    """Return the missing numbers between 1 and the last of `numbers`, which are ascending and distinct."""
    gaps = []
    for before, number in zip([0, *numbers], numbers, strict=False):
        if number == before + 2:
            gaps.append(f"image{before + 1}")
        elif number > before + 2:
            gaps.append(f"image{before + 1} to image{number - 1}")
    return gaps


def _check_labels(tree: Tree, csvs: MuraCsvs, defects: Defects) -> None:
    """Compare the labels of the folders with those of the CSVs."""
    present = {r.study: r for r in tree.radiographs}
    csv_labels = {study: labels for studies in csvs.labels.values() for study, labels in studies.items()}
    defects["labelled in a CSV, no files"] += sorted(csv_labels.keys() - present.keys())
    defects["two labels in a CSV (folder taken)"] += sorted(
        study for study, labels in csv_labels.items() if len(labels) > 1
    )
    counted = {r.study: r for r in tree.radiographs if csvs.includes(r)}
    for study, radiograph in sorted(counted.items()):
        if radiograph.split in csvs.labels and study not in csv_labels and radiograph.label is not None:
            defects["no label in the CSV (folder taken)"].append(study)
        if radiograph.label is not None and csvs.label(radiograph) != radiograph.label:
            defects["label differs between CSV and folder (CSV taken)"].append(study)
    listed = {path.rpartition("/")[0] for paths in csvs.listed.values() for path in paths}
    defects["study under both labels"] += _under_both(present.keys() | csv_labels.keys() | listed)


def _under_both(studies: Iterable[str]) -> list[str]:
    """Return the studies that exist as study<k>_positive and as study<k>_negative, without that suffix."""
    ends: dict[str, set[str]] = defaultdict(set)
    for study in studies:
        name, _, end = study.rpartition("_")
        ends[name].add(end)
    return sorted(name for name, labels in ends.items() if labels >= {"positive", "negative"})


def _patients_in_both(radiographs: list[Radiograph]) -> list[str]:
    splits_of: dict[str, set[str]] = defaultdict(set)
    for radiograph in radiographs:
        splits_of[radiograph.patient].add(radiograph.split)
    return sorted(patient for patient, splits in splits_of.items() if len(splits & {"train", "valid"}) == 2)


def _refuse(source: StoragePath, radiographs: list[Radiograph], csvs: MuraCsvs) -> None:
    """Raise UserError for MURA-v1.0, and for data sets without any labeled radiograph."""
    listed = sum(len(paths) for paths in csvs.listed.values())
    if mura.NUM_IMAGES_V1_0 in (len(radiographs), listed):
        raise UserError(
            f"{source} has {mura.NUM_IMAGES_V1_0} radiographs, as MURA-v1.0 had, which contained patient data and was "
            "withdrawn. Delete it and ask Stanford for MURA-v1.1."
        )
    if not radiographs and csvs.listed:
        raise UserError(
            f"{source}: no file on disk is listed in its CSVs ({', '.join(f'{s}_image_paths.csv' for s in csvs.listed)}), "
            f"which name {listed}. Fix the CSVs, or delete them to use the folders."
        )
    if not radiographs:
        raise UserError(
            f"{source}: no radiograph has a label. Name studies study1_positive or _negative, or give --labels."
        )


def _correct(radiographs: list[Radiograph], labels: Path | None) -> tuple[list[Radiograph], dict[str, int], list[str]]:
    """Return radiographs with corrected labels, the labels that changed, and the corrected studies that did not change."""
    before = {radiograph.study: radiograph.label for radiograph in radiographs}
    new_labels = {} if labels is None else _read_corrections(labels, Spellings(before))
    unknown = sorted(new_labels.keys() - before.keys())
    if unknown:
        raise UserError(
            f"--labels {labels}: {len(unknown)} studies are not in the data (first: {unknown[0]}). Fix or remove these lines."
        )
    changed = {study: label for study, label in sorted(new_labels.items()) if before[study] != label}
    corrected = [replace(r, label=changed.get(r.study, r.label)) for r in radiographs]
    return corrected, changed, sorted(new_labels.keys() - changed.keys())


def _read_corrections(labels: Path, spellings: Spellings) -> dict[str, int]:
    if not labels.is_file():
        raise UserError(f"--labels {labels}: no such file. Give a CSV of study,label lines.")
    new_labels: dict[str, int] = {}
    for number, line in read_rows(labels.read_bytes(), f"--labels {labels}"):
        path, rest = split_path(line)
        label = parse_label("".join(rest[:1]))
        if label is None:
            raise UserError(
                f"--labels {labels} line {number}: {','.join(line)!r} is not study,label with a label of 0 or 1, normal or "
                "abnormal. Fix the line."
            )
        study = spellings.find(parse_study(path) or parse_study(parse_path(path)) or path.rstrip("/"))
        if new_labels.setdefault(study, label) != label:
            raise UserError(
                f"--labels {labels} line {number}: {study} has label 0 and label 1. Remove one of the lines."
            )
    if not new_labels:
        raise UserError(f"--labels {labels} labels no study. Give a CSV of study,label lines, or omit --labels.")
    return new_labels
