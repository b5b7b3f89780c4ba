"""The manifest: the ordered table of all radiographs. A radiograph's row in it is its identity everywhere else.

    folder -> scan (paths, checked against the CSVs where there are any) -> cut_tune (by patient) -> manifest.csv

Rows are sorted by split, study type, patient, study, view and path, so they are the same on every machine and file
system. Nothing here opens a radiograph: what cannot be decoded is found by the conversion.
"""

import csv
import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from . import atomic, mura
from .mura import Radiograph
from .refusal import Refusal

COLUMNS = ("row", "split", "study_type", "patient", "study", "view", "label", "path")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".jp2", ".j2k", ".dcm", ".dicom"})
PHANTOMS_MARK = "phantoms.json"


@dataclass(frozen=True)
class Manifest:
    """`frame`: one line a radiograph, indexed by row (0-based, without gaps).

    Columns: split, study_type, patient, study, path (str), view (int64), label (int64, 0 or 1).
    """

    frame: pd.DataFrame

    @classmethod
    def of(cls, radiographs: Iterable[Radiograph]) -> Self:
        ordered = sorted(radiographs, key=_place)
        lines = [(r.split, r.study_type, r.patient, r.study, r.view, r.label, r.path) for r in ordered]
        frame = pd.DataFrame(lines, columns=list(COLUMNS[1:]))
        return cls(frame.astype({"view": np.int64, "label": np.int64}).rename_axis("row"))

    @classmethod
    def load(cls, path: Path) -> Self:
        text = dict.fromkeys(("split", "study_type", "patient", "study", "path"), str)
        try:
            frame = pd.read_csv(path, dtype=text, keep_default_na=False, index_col="row")
        except (OSError, ValueError, KeyError) as error:
            raise Refusal(f"{path} is not a manifest ({error}); make the shards again") from error
        if tuple(frame.columns) != COLUMNS[1:] or not np.array_equal(frame.index, np.arange(len(frame))):
            raise Refusal(f"{path}: columns or rows are not a manifest's ({','.join(COLUMNS)}); make the shards again")
        return cls(frame)

    def to_csv(self) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(self.frame.itertuples())
        return text.getvalue().encode("utf-8", errors="backslashreplace")

    def save(self, path: Path) -> None:
        atomic.write_bytes(path, self.to_csv())

    @property
    def digest(self) -> str:
        """SHA-256 of manifest.csv: which radiographs, labels and splits these are."""
        return hashlib.sha256(self.to_csv()).hexdigest()

    def rows(self, split: str) -> np.ndarray:
        """The rows of one split, ascending: int64 (n,)."""
        return self.frame.index[self.frame["split"] == split].to_numpy(dtype=np.int64)


@dataclass(frozen=True)
class Scan:
    """What a folder holds: its manifest, where its paths start, and what is wrong with it (defect -> what shows it)."""

    root: Path
    manifest: Manifest
    defects: dict[str, list[str]]
    phantoms: bool


def scan(source: Path, labels: Path | None = None) -> Scan:
    """Read a folder in MURA's layout; `labels` is an optional file of corrections (`study,label`).

    Where MURA's CSVs are present they say which files and labels count; the folders are checked against them.
    Raises Refusal where there is no such folder, nothing in it follows the layout, or it is MURA-v1.0.
    """
    root, found, junk = _walk(source)
    defects: dict[str, list[str]] = defaultdict(list)
    defects["not a radiograph"] += junk
    listed, told = _read_csvs(root)
    radiographs = list(_follow_csvs(found, listed, told, defects))
    if labels is not None:
        radiographs = _correct(radiographs, labels, defects)
    defects["no label"] += [r.path for r in radiographs if r.label is None]
    radiographs = [r for r in radiographs if r.label is not None]
    if not radiographs:
        raise Refusal(
            f"{source}: no radiograph has a label; name studies study1_positive or _negative, or give --labels"
        )
    if len(radiographs) == mura.NUM_IMAGES_V1_0:
        raise Refusal(
            f"{source} has {mura.NUM_IMAGES_V1_0} radiographs, as MURA-v1.0 had, which held patient data and was "
            "withdrawn; delete it and ask Stanford for MURA-v1.1"
        )
    defects["patient in train and valid"] += _patients_in_both(radiographs)
    phantoms = (root / PHANTOMS_MARK).is_file() or (source / PHANTOMS_MARK).is_file()
    return Scan(root, Manifest.of(radiographs), {name: seen for name, seen in defects.items() if seen}, phantoms)


def cut_tune(manifest: Manifest, fraction: float, seed: int) -> Manifest:
    """Move `fraction` of the train patients, whole, to the split `tune`, proportionally over study types and labels.

    Patients are sorted by (their first study type, whether any study is positive, a hash of seed and name), and every
    1/fraction-th is taken: the choice depends on no library's random numbers.
    """
    if not 0 <= fraction <= 0.5:
        raise Refusal(f"--tune {fraction}: must lie between 0 (no tune split) and 0.5; the default is 0.1")
    train = manifest.frame[manifest.frame["split"] == "train"]
    patients = train.groupby("patient", sort=True).agg(study_type=("study_type", "min"), positive=("label", "max"))
    patients["hash"] = [
        hashlib.sha256(f"{seed}:{name}".encode(errors="replace")).hexdigest() for name in patients.index
    ]
    names = patients.sort_values(["study_type", "positive", "hash"]).index.to_numpy()
    # The middle of each stride, so that a fraction of 0.1 of 5 patients still takes one.
    place = np.floor(np.arange(len(names) + 1) * fraction + 0.5)
    chosen = set(names[np.diff(place) > 0])
    if fraction > 0 and len(names) > 1 and not chosen:
        chosen = {names[0]}
    frame = manifest.frame.copy()
    frame.loc[(frame["split"] == "train") & frame["patient"].isin(chosen), "split"] = "tune"
    return Manifest.of(Radiograph(*line) for line in frame[list(_FIELDS)].itertuples(index=False))


def class_weights(study_type: np.ndarray, label: np.ndarray) -> dict[str, tuple[float, float]]:
    """Study type -> (w0, w1): w1 = N/(A+N) weighs positives, w0 = A/(A+N) negatives (arXiv 1712.06957).

    A abnormal, N normal, counted in radiographs. With one class only the formula would give that class no weight at all
    and the other all of it; such a study type gets (1/2, 1/2).
    """
    weights = {}
    for name in sorted(set(study_type.tolist())):
        abnormal = float(label[study_type == name].mean())
        weights[name] = (abnormal, 1 - abnormal) if 0 < abnormal < 1 else (0.5, 0.5)
    return weights


_FIELDS = ("split", "study_type", "patient", "study", "view", "label", "path")


def _place(radiograph: Radiograph) -> tuple:
    r = radiograph
    return (mura.SPLITS.index(r.split), r.study_type, r.patient, r.study, r.view, os.fsencode(r.path))


def _walk(source: Path) -> tuple[Path, list[Radiograph], list[str]]:
    """(root, radiographs by path, junk). A root is what precedes train/ or valid/; nested copies of the root are found."""
    if not source.is_dir():
        raise Refusal(f"{source}: no such folder; give the folder that holds train/ and valid/")
    start = source.resolve()
    found: dict[Path, list[Radiograph]] = defaultdict(list)
    junk = []
    for folder, folders, files in os.walk(start, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(files):
            path = Path(folder, name).as_posix()
            radiograph = mura.parse(path)
            if radiograph is None:
                continue
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in SUFFIXES:
                junk.append(radiograph.path)
            else:
                found[Path(path.removesuffix(radiograph.path))].append(radiograph)
    if not found:
        raise Refusal(
            f"{source} is not in MURA's layout: no file matches "
            "{train,valid}/XR_TYPE/patientN/studyN_{positive,negative}/imageN.png; give the folder that holds train/"
        )
    if len(found) > 1:
        first, second, *others = sorted(str(root) for root in found)
        raise Refusal(
            f"{source} holds {len(found)} data sets ({first}, {second}{', ...' if others else ''}); give one of them"
        )
    [(root, radiographs)] = found.items()
    return root, radiographs, junk


def _read_csvs(root: Path) -> tuple[dict[str, set[str]], dict[str, dict[str, int]]]:
    """MURA's CSVs below `root`: split -> listed image paths, split -> {study: label}; only for splits that have them."""
    listed, told = {}, {}
    for split in ("train", "valid"):
        images, studies = root / f"{split}_image_paths.csv", root / f"{split}_labeled_studies.csv"
        if images.is_file():
            parsed = [mura.parse(line[0].strip()) for line in _csv_lines(images)]
            listed[split] = {radiograph.path for radiograph in parsed if radiograph is not None}
        if studies.is_file():
            lines = [line for line in _csv_lines(studies) if len(line) > 1 and line[1].strip() in ("0", "1")]
            told[split] = {_study_of(line[0]): int(line[1]) for line in lines}
    return listed, told


def _csv_lines(path: Path) -> Iterator[list[str]]:
    """Lines of a CSV in the wild: a header or none, LF or CRLF, perhaps a byte-order mark and a trailing comma."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        yield from (line for line in csv.reader(file) if line and line[0].strip())


def _study_of(text: str) -> str:
    radiograph = mura.parse(text.strip().rstrip("/") + "/image1.png")
    return radiograph.study if radiograph is not None else text.strip().rstrip("/")


def _follow_csvs(
    found: list[Radiograph], listed: dict[str, set[str]], told: dict[str, dict[str, int]], defects: dict[str, list[str]]
) -> Iterator[Radiograph]:
    """The radiographs that count, labelled as the CSVs say; what disagrees goes to `defects`."""
    present = {radiograph.path for radiograph in found}
    for split, paths in listed.items():
        defects["listed in a CSV, missing on disk"] += sorted(paths - present)
        defects["on disk, listed in no CSV"] += sorted(p for p in present - paths if p.startswith(f"{split}/"))
    for radiograph in found:
        if radiograph.path not in listed.get(radiograph.split, {radiograph.path}):
            continue
        label = told.get(radiograph.split, {}).get(radiograph.study, radiograph.label)
        if radiograph.label is not None and label != radiograph.label:
            defects["label differs between CSV and folder (CSV taken)"].append(radiograph.path)
        yield replace(radiograph, label=label)


def _correct(radiographs: list[Radiograph], labels: Path, defects: dict[str, list[str]]) -> list[Radiograph]:
    """Apply a file of `study,label` lines; every study named must exist."""
    if not labels.is_file():
        raise Refusal(f"--labels {labels}: no such file; give a CSV of study,label lines")
    wanted: dict[str, int] = {}
    for number, line in enumerate(_csv_lines(labels), start=1):
        if number == 1 and line[0].strip().lower() in ("study", "path", "img_path"):
            continue
        if len(line) < 2 or line[1].strip() not in ("0", "1"):
            raise Refusal(
                f"--labels {labels} line {number}: {','.join(line)!r} is not study,label with a label of 0 or 1"
            )
        wanted[_study_of(line[0])] = int(line[1])
    unknown = sorted(set(wanted) - {radiograph.study for radiograph in radiographs})
    if unknown:
        raise Refusal(
            f"--labels {labels}: {len(unknown)} studies are not in the data, the first is {unknown[0]}; mend or drop them"
        )
    changed = [r for r in radiographs if wanted.get(r.study, r.label) != r.label]
    defects["label corrected by --labels"] += [r.path for r in changed]
    return [replace(r, label=wanted.get(r.study, r.label)) for r in radiographs]


def _patients_in_both(radiographs: list[Radiograph]) -> list[str]:
    seen: dict[str, set[str]] = defaultdict(set)
    for radiograph in radiographs:
        seen[radiograph.patient].add(radiograph.split)
    return sorted(patient for patient, splits in seen.items() if len(splits & {"train", "valid"}) == 2)
