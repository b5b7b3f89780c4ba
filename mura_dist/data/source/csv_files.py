"""MURA's CSVs, as they are and as they are found in the wild: which radiographs count, and what their labels are.

{split}_image_paths.csv: a path a line      {split}_labeled_studies.csv: study,label      -> Csvs
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
"""Name of what is wrong -> what shows it."""


@dataclass(frozen=True)
class MuraCsvs:
    """What MURA's CSVs say of the splits that have them."""

    listed: dict[str, set[str]]  # split -> paths
    told: dict[str, dict[str, set[int]]]  # split -> study -> its labels: one, if all is well

    def count(self, radiograph: Radiograph) -> bool:
        """Whether it is one of the data set's: what a CSV does not list is not."""
        return radiograph.split not in self.listed or radiograph.path in self.listed[radiograph.split]

    def label(self, radiograph: Radiograph) -> int | None:
        """The CSV's; the folder's where the CSV says none, or two."""
        labels = self.told.get(radiograph.split, {}).get(radiograph.study, set())
        return next(iter(labels)) if len(labels) == 1 else radiograph.label


def read(tree: Tree, defects: Defects) -> MuraCsvs:
    """{split}_image_paths.csv (a path a line) and {split}_labeled_studies.csv (study,label), beside the splits or above them."""
    folders = [(place, place.names()) for place in map(storage.open_storage, tree.above)]
    csvs = MuraCsvs({}, {})
    for split in FOLDERS:
        for name, take in ((f"{split}_image_paths.csv", _listed), (f"{split}_labeled_studies.csv", _told)):
            place = next((place for place, names in folders if name in names), None)
            if place is not None:
                take(csvs, split, name, lines_of(place.read(name), f"{place}/{name}"), tree, defects)
    return csvs


def _listed(
    csvs: MuraCsvs, split: str, name: str, lines: Iterable[tuple[int, list[str]]], tree: Tree, defects: Defects
) -> None:
    seen: Counter[str] = Counter()
    strange: list[str] = []
    spellings = Spellings([*(radiograph.path for radiograph in tree.radiographs), *tree.junk])
    for number, line in lines:
        text = path_and_rest(line)[0]
        radiograph = mura.parse(text) or mura.parse(csv_lines.parse_path(text))
        if radiograph is None or radiograph.split != split:
            strange.append(_line_told(name, number, line))
        else:
            seen[spellings.find(radiograph.path)] += 1
    if not seen and _has(tree, split):
        raise UserError(
            f"{name} names no radiograph of {split}/ ({_example(strange)}); mend it, or delete it to go by the folders"
        )
    defects["line of a CSV not understood"] += strange
    defects["listed twice in a CSV"] += sorted(path for path, count in seen.items() if count > 1)
    csvs.listed[split] = {path for path in seen if tree.holds(path)}


def _told(
    csvs: MuraCsvs, split: str, name: str, lines: Iterable[tuple[int, list[str]]], tree: Tree, defects: Defects
) -> None:
    labels: dict[str, set[int]] = defaultdict(set)
    strange: list[str] = []
    studies = sorted({radiograph.study for radiograph in tree.radiographs if radiograph.split == split})
    spellings = Spellings(studies)
    for number, line in lines:
        path, rest = path_and_rest(line)
        study, label = study_of(path) or study_of(csv_lines.parse_path(path)), csv_lines.parse_label("".join(rest[:1]))
        if study is None or not study.startswith(f"{split}/") or label is None:
            strange.append(_line_told(name, number, line))
        else:
            labels[spellings.find(study)].add(label)
    if not labels and studies:
        raise UserError(
            f"{name} labels no study of {split}/ ({_example(strange)}); a line is study,label with a label of 0 or 1, normal or "
            "abnormal; mend it, or delete it to go by the folders"
        )
    if studies and labels.keys().isdisjoint(studies):
        raise UserError(
            f"{name} labels none of the {len(studies):,} studies of {split}/ on disk: the first it names is {min(labels)}, the "
            f"first on disk {studies[0]}; mend it, or delete it to go by the folders"
        )
    defects["line of a CSV not understood"] += strange
    csvs.told[split] = {study: found for study, found in labels.items() if tree.holds(f"{study}/")}


def _has(tree: Tree, split: str) -> bool:
    return any(radiograph.split == split for radiograph in tree.radiographs)


class Spellings:
    """Names on disk, by each spelling that a table may have of them: backslashes, characters composed otherwise."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._by_path = {csv_lines.parse_path(name): name for name in sorted(self._names, reverse=True)}

    def find(self, name: str) -> str:
        """Return `name` as the disk spells it; one that is not on disk as csv_lines.parse_path does."""
        path = csv_lines.parse_path(name)
        return name if name in self._names else self._by_path.get(path, path)


def lines_of(data: bytes, name: str) -> Iterator[tuple[int, list[str]]]:
    """(number, fields) of the lines of a CSV in the wild: a header or none, LF or CRLF, a byte-order mark, quotes, empty lines.

    UTF-8, or UTF-16 with its mark; commas, semicolons or tabs. A header is a first line without a path and a label.
    """
    text = csv_lines.decode(data, name, errors="surrogateescape")
    lines = csv_lines.read_lines(text, name, "mend it, or delete it", delimiter=csv_lines.find_delimiter(text))
    for place, (number, cells) in enumerate(lines):
        fields = [cell.strip() for cell in cells]
        if place > 0 or any(_is_path(field) or csv_lines.parse_number(field) in (0, 1) for field in fields):
            yield number, fields


def path_and_rest(line: list[str]) -> tuple[str, list[str]]:
    """The field that is a path (an index may stand before it), and the fields behind it, a trailing comma's left out."""
    place = next((number for number, field in enumerate(line) if _is_path(field)), 0)
    return line[place], [field for field in line[place + 1 :] if field]


def _is_path(field: str) -> bool:
    return "/" in field or "\\" in field


def _example(strange: list[str]) -> str:
    return f"{strange[0]} is none" if strange else "it is empty"


def _line_told(name: str, number: int, line: list[str]) -> str:
    return f"{name} line {number}: {','.join(line)[:100]!r}"


def study_of(text: str) -> str | None:
    radiograph = mura.parse(text.rstrip("/\\") + "/image1.png")
    return None if radiograph is None else radiograph.study
