"""Read MURA's CSVs, also as other programs rewrite them: which radiographs count, and their labels.

{split}_image_paths.csv: one path per line      {split}_labeled_studies.csv: study,label      -> MuraCsvs
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mura_dist.core import storage
from mura_dist.core.errors import UserError
from mura_dist.data import csv_lines, mura
from mura_dist.data.mura import Radiograph
from mura_dist.data.source.files import FOLDERS, Tree

Defects = dict[str, list[str]]
"""Name of a defect -> examples."""


@dataclass(frozen=True)
class MuraCsvs:
    """Content of MURA's CSVs, for the splits that have them."""

    listed: dict[str, set[str]]  # split -> paths
    labels: dict[str, dict[str, set[int]]]  # split -> study -> its labels, normally one

    def includes(self, radiograph: Radiograph) -> bool:
        """Return whether a radiograph counts. If its split has a CSV, that must list it."""
        return radiograph.split not in self.listed or radiograph.path in self.listed[radiograph.split]

    def label(self, radiograph: Radiograph) -> int | None:
        """Return the label of the CSV, or of the folder where the CSV has none or two."""
        labels = self.labels.get(radiograph.split, {}).get(radiograph.study, set())
        return next(iter(labels)) if len(labels) == 1 else radiograph.label


def read(tree: Tree, defects: Defects) -> MuraCsvs:
    """Read the CSVs in or above the splits' folder, and record their defects.

    Raises:
        UserError: A CSV is unreadable, or matches no radiograph or study of its split.
    """
    folders = [(folder, folder.names()) for folder in map(storage.open_storage, tree.above)]
    csvs = MuraCsvs({}, {})
    for split in FOLDERS:
        for name, read_file in (
            (f"{split}_image_paths.csv", _read_paths),
            (f"{split}_labeled_studies.csv", _read_labels),
        ):
            folder = next((folder for folder, names in folders if name in names), None)
            if folder is not None:
                read_file(csvs, split, name, read_rows(folder.read(name), f"{folder}/{name}"), tree, defects)
    return csvs


def _read_paths(
    csvs: MuraCsvs, split: str, name: str, lines: Iterable[tuple[int, list[str]]], tree: Tree, defects: Defects
) -> None:
    counts: Counter[str] = Counter()
    invalid: list[str] = []
    spellings = Spellings([*(radiograph.path for radiograph in tree.radiographs), *tree.junk])
    for number, line in lines:
        text = split_path(line)[0]
        radiograph = mura.parse(text) or mura.parse(csv_lines.parse_path(text))
        if radiograph is None or radiograph.split != split:
            invalid.append(_quote_line(name, number, line))
        else:
            counts[spellings.find(radiograph.path)] += 1
    if not counts and _has(tree, split):
        raise UserError(
            f"{name} names no radiograph of {split}/ ({_example(invalid)}). Fix it, or delete it to use the folders."
        )
    defects["line of a CSV not understood"] += invalid
    defects["listed twice in a CSV"] += sorted(path for path, count in counts.items() if count > 1)
    csvs.listed[split] = {path for path in counts if tree.holds(path)}


def _read_labels(
    csvs: MuraCsvs, split: str, name: str, lines: Iterable[tuple[int, list[str]]], tree: Tree, defects: Defects
) -> None:
    labels: dict[str, set[int]] = defaultdict(set)
    invalid: list[str] = []
    studies = sorted({radiograph.study for radiograph in tree.radiographs if radiograph.split == split})
    spellings = Spellings(studies)
    for number, line in lines:
        path, rest = split_path(line)
        study, label = (
            parse_study(path) or parse_study(csv_lines.parse_path(path)),
            csv_lines.parse_label("".join(rest[:1])),
        )
        if study is None or not study.startswith(f"{split}/") or label is None:
            invalid.append(_quote_line(name, number, line))
        else:
            labels[spellings.find(study)].add(label)
    if not labels and studies:
        raise UserError(
            f"{name} labels no study of {split}/ ({_example(invalid)}). Fix its lines (study,label with a label of 0 or 1, "
            "normal or abnormal), or delete it to use the folders."
        )
    if studies and labels.keys().isdisjoint(studies):
        raise UserError(
            f"{name} labels none of the {len(studies):,} studies of {split}/ on disk (first in the file: {min(labels)}, "
            f"first on disk: {studies[0]}). Fix it, or delete it to use the folders."
        )
    defects["line of a CSV not understood"] += invalid
    csvs.labels[split] = {study: values for study, values in labels.items() if tree.holds(f"{study}/")}


def _has(tree: Tree, split: str) -> bool:
    return any(radiograph.split == split for radiograph in tree.radiographs)


class Spellings:
    """Names on disk, found by other spellings in tables: backslashes, decomposed characters."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._by_path = {csv_lines.parse_path(name): name for name in sorted(self._names, reverse=True)}

    def find(self, name: str) -> str:
        """Return a name in the disk's spelling, or normalized by csv_lines.parse_path where it is not on disk."""
        path = csv_lines.parse_path(name)
        return name if name in self._names else self._by_path.get(path, path)


def read_rows(data: bytes, name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, fields) of a CSV of paths.

    A header is optional: it is a first line without path and label. Line ends, byte-order marks, quotes, empty lines, UTF-16 and
    the delimiters `,` `;` and tab are recognized.
    """
    text = csv_lines.decode(data, name, errors="surrogateescape")
    lines = csv_lines.read_lines(text, name, "Fix or delete the file.", delimiter=csv_lines.find_delimiter(text))
    for position, (number, cells) in enumerate(lines):
        fields = [cell.strip() for cell in cells]
        if position > 0 or any(_is_path(field) or csv_lines.parse_number(field) in (0, 1) for field in fields):
            yield number, fields


def split_path(line: list[str]) -> tuple[str, list[str]]:
    """Return the first field that is a path (an index may precede it), and the nonempty fields after it."""
    index = next((number for number, field in enumerate(line) if _is_path(field)), 0)
    return line[index], [field for field in line[index + 1 :] if field]


def _is_path(field: str) -> bool:
    return "/" in field or "\\" in field


def _example(invalid: list[str]) -> str:
    return f"{invalid[0]} is invalid" if invalid else "it is empty"


def _quote_line(name: str, number: int, line: list[str]) -> str:
    return f"{name} line {number}: {','.join(line)[:100]!r}"


def parse_study(text: str) -> str | None:
    """Return the study of a study folder's path, or None outside MURA's layout."""
    radiograph = mura.parse(text.rstrip("/\\") + "/image1.png")
    return None if radiograph is None else radiograph.study
