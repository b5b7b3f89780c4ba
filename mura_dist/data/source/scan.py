"""A folder in MURA's layout, looked through: what it holds, and everything that is wrong with it.

    folder or URL -> walk -> follow the CSVs, where there are any -> correct by --labels -> defects      = a Scan

Nothing here decodes a radiograph: what cannot be read is found by the conversion. Of a file's bytes a scan looks only at
those it takes to tell a copy from another file of the same size.
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
from mura_dist.data.source.csv_files import Defects, MuraCsvs, Spellings, lines_of, path_and_rest, study_of
from mura_dist.data.source.files import Tree, walk

PHANTOMS_MARK = "phantoms.json"
_MURA_VIEW = re.compile(r"image([0-9]{1,9})\.[^.]+")

# What a scan may find wrong, in the order in which it is told: what makes a result wrong, then what the labels say, then what
# the files are.
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
    """The policy on duplicates (duplicate_policy.py), and what it changed."""

    policy: str = "keep"
    dropped: tuple[tuple[str, str], ...] = ()  # (a radiograph of train, its copy in another split)
    groups: tuple[tuple[str, ...], ...] = ()  # patients of train who share a radiograph; the cut of tune parts none


@dataclass(frozen=True)
class Scan:
    """What a folder holds, where its paths start, and what is wrong with it.

    `defects`: name (of DEFECTS, in that order, those seen only) -> what shows it, sorted. `corrections`: the labels that a file
    of corrections changed, by study; `needless`: the studies it names whose label was so already. `duplicates`: pairs of paths,
    byte for byte the same, each copy named once; None where they were not looked for.
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
    """Read a folder in MURA's layout, local or behind a URL; `labels` is an optional local file of corrections (`study,label`).

    Where MURA's CSVs are present they say which files and labels count; the folders are checked against them. `duplicates`:
    also look for files that are byte for byte the same. Raises UserError where there is no
    such folder, nothing in it follows the layout, or it is MURA-v1.0.
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
    radiographs = [replace(r, label=csvs.label(r)) for r in tree.radiographs if csvs.count(r)]
    radiographs, corrections, needless = _correct(radiographs, labels)
    defects["no label"] += [r.path for r in radiographs if r.label is None]
    radiographs = [r for r in radiographs if r.label is not None]
    _refuse(source, radiographs, csvs)
    defects["patient in train and valid"] += _patients_in_both(radiographs)
    phantoms = any(
        place.exists(PHANTOMS_MARK) for place in (storage.open_storage(tree.root), storage.open_storage(source))
    )
    sizes = {r.path: tree.sizes[r.path] for r in radiographs}
    found = Scan(
        tree.root, Manifest.from_radiographs(radiographs), _told(defects), phantoms, corrections, needless, None, sizes
    )
    return with_duplicates(found) if duplicates else found


def with_duplicates(scan: Scan) -> Scan:
    """The same, looked through for files that are byte for byte the same: the only part that opens radiographs."""
    if scan.duplicates is not None:
        return scan
    return with_pairs(scan, duplicate_search.find_pairs(storage.open_storage(scan.root), scan.sizes, list(scan.sizes)))


def with_pairs(scan: Scan, pairs: list[tuple[str, str]]) -> Scan:
    """The same with these duplicates, among the defects too."""
    across, within = "duplicate across splits", "duplicate within a split"
    defects = defaultdict(list, {name: seen for name, seen in scan.defects.items() if name not in (across, within)})
    for first, copy in pairs:
        defects[across if first.partition("/")[0] != copy.partition("/")[0] else within].append(f"{first} = {copy}")
    return replace(scan, defects=_told(defects), duplicates=pairs)


def _told(defects: Defects) -> Defects:
    return {name: defects[name] for name in DEFECTS if defects.get(name)}


def _check_files(tree: Tree, csvs: MuraCsvs, defects: Defects) -> None:
    """The folders against the lists of images; then the views' numbers, as the lists have them."""
    present = {radiograph.path for radiograph in tree.radiographs}
    listed = {path for paths in csvs.listed.values() for path in paths}
    missing = sorted(listed - present - set(tree.junk))
    defects["listed in a CSV, missing on disk"] += missing
    defects["on disk, listed in no CSV"] += [r.path for r in tree.radiographs if not csvs.count(r)]
    _check_numbers([r.path for r in tree.radiographs if csvs.count(r)] + missing, defects)


def _check_numbers(paths: Iterable[str], defects: Defects) -> None:
    """Views that are named as MURA names them, image<k>, are 1 to n, each once."""
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
    """What is missing between 1 and the last of `numbers`, ascending and distinct."""
    gaps = []
    for before, number in zip([0, *numbers], numbers, strict=False):
        if number == before + 2:
            gaps.append(f"image{before + 1}")
        elif number > before + 2:
            gaps.append(f"image{before + 1} to image{number - 1}")
    return gaps


def _check_labels(tree: Tree, csvs: MuraCsvs, defects: Defects) -> None:
    """The folders' labels against the CSVs', study by study."""
    present = {r.study: r for r in tree.radiographs}
    told = {study: labels for studies in csvs.told.values() for study, labels in studies.items()}
    defects["labelled in a CSV, no files"] += sorted(told.keys() - present.keys())
    defects["two labels in a CSV (folder taken)"] += sorted(study for study, labels in told.items() if len(labels) > 1)
    counted = {r.study: r for r in tree.radiographs if csvs.count(r)}
    for study, radiograph in sorted(counted.items()):
        if radiograph.split in csvs.told and study not in told and radiograph.label is not None:
            defects["no label in the CSV (folder taken)"].append(study)
        if radiograph.label is not None and csvs.label(radiograph) != radiograph.label:
            defects["label differs between CSV and folder (CSV taken)"].append(study)
    listed = {path.rpartition("/")[0] for paths in csvs.listed.values() for path in paths}
    defects["study under both labels"] += _under_both(present.keys() | told.keys() | listed)


def _under_both(studies: Iterable[str]) -> list[str]:
    """The studies that are there as study1_positive and as study1_negative, without their label."""
    ends: dict[str, set[str]] = defaultdict(set)
    for study in studies:
        name, _, end = study.rpartition("_")
        ends[name].add(end)
    return sorted(name for name, seen in ends.items() if seen >= {"positive", "negative"})


def _patients_in_both(radiographs: list[Radiograph]) -> list[str]:
    seen: dict[str, set[str]] = defaultdict(set)
    for radiograph in radiographs:
        seen[radiograph.patient].add(radiograph.split)
    return sorted(patient for patient, splits in seen.items() if len(splits & {"train", "valid"}) == 2)


def _refuse(source: StoragePath, radiographs: list[Radiograph], csvs: MuraCsvs) -> None:
    """What is no data set to train on, or must not be."""
    listed = sum(len(paths) for paths in csvs.listed.values())
    if mura.NUM_IMAGES_V1_0 in (len(radiographs), listed):
        raise UserError(
            f"{source} has {mura.NUM_IMAGES_V1_0} radiographs, as MURA-v1.0 had, which held patient data and was "
            "withdrawn; delete it and ask Stanford for MURA-v1.1"
        )
    if not radiographs and csvs.listed:
        raise UserError(
            f"{source}: no file on disk is listed in its CSVs ({', '.join(f'{s}_image_paths.csv' for s in csvs.listed)}), "
            f"which name {listed}; mend the CSVs, or delete them to go by the folders"
        )
    if not radiographs:
        raise UserError(
            f"{source}: no radiograph has a label; name studies study1_positive or _negative, or give --labels"
        )


def _correct(radiographs: list[Radiograph], labels: Path | None) -> tuple[list[Radiograph], dict[str, int], list[str]]:
    """(radiographs as the file of `study,label` lines has them, the labels it changed, the studies it did not change)."""
    before = {radiograph.study: radiograph.label for radiograph in radiographs}
    wanted = {} if labels is None else _read_corrections(labels, Spellings(before))
    unknown = sorted(wanted.keys() - before.keys())
    if unknown:
        raise UserError(
            f"--labels {labels}: {len(unknown)} studies are not in the data, the first is {unknown[0]}; mend or drop them"
        )
    changed = {study: label for study, label in sorted(wanted.items()) if before[study] != label}
    corrected = [replace(r, label=changed.get(r.study, r.label)) for r in radiographs]
    return corrected, changed, sorted(wanted.keys() - changed.keys())


def _read_corrections(labels: Path, spellings: Spellings) -> dict[str, int]:
    if not labels.is_file():
        raise UserError(f"--labels {labels}: no such file; give a CSV of study,label lines")
    wanted: dict[str, int] = {}
    for number, line in lines_of(labels.read_bytes(), f"--labels {labels}"):
        path, rest = path_and_rest(line)
        label = parse_label("".join(rest[:1]))
        if label is None:
            raise UserError(
                f"--labels {labels} line {number}: {','.join(line)!r} is not study,label with a label of 0 or 1, normal or "
                "abnormal; mend the line"
            )
        study = spellings.find(study_of(path) or study_of(parse_path(path)) or path.rstrip("/"))
        if wanted.setdefault(study, label) != label:
            raise UserError(f"--labels {labels} line {number}: {study} has label 0 and label 1; leave one of the lines")
    if not wanted:
        raise UserError(f"--labels {labels} labels no study; give a CSV of study,label lines, or leave --labels out")
    return wanted
