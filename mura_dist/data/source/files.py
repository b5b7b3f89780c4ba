"""The files of a folder in MURA's layout, local or behind a URL: which are radiographs, which are junk, where paths begin.

place.files() -> mura.parse -> one data set -> Tree
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mura_dist.core import storage
from mura_dist.core.errors import UserError
from mura_dist.core.storage import StoragePath
from mura_dist.data import mura
from mura_dist.data.mura import Radiograph

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".jp2", ".j2k", ".dcm", ".dicom"})
FOLDERS = ("train", "valid", "test")  # the splits that are folders


@dataclass(frozen=True)
class Tree:
    """The files of a source. Paths start at `root`, which is what precedes train/ or valid/; each list is sorted."""

    root: StoragePath
    within: str  # the source, seen from the root, where it lies below it ("train/XR_HAND"); else ""
    above: list[StoragePath]  # the folders from the root up to the source, the root first
    radiographs: list[Radiograph]
    sizes: dict[str, int]  # bytes, by path
    junk: list[str]
    strays: list[str]
    repeated: list[str]  # "link = folder": links to folders that are in the tree already, which are left out
    broken: list[str]  # links that lead nowhere

    def holds(self, path: str) -> bool:
        """Whether the source, which may be a part of the data set only, is where `path` would lie."""
        return not self.within or path.startswith(f"{self.within}/")


def walk(source: StoragePath) -> Tree:
    """Everything below `source`; nested copies of the root are found."""
    place = storage.open_storage(source)
    if not place.is_folder():
        raise UserError(f"{source}: no such folder; give the folder that holds train/ and valid/")
    start = place.url if isinstance(place, storage.RemoteStorage) else Path(source).resolve().as_posix()
    found: dict[str, list[tuple[Radiograph, int]]] = defaultdict(list)
    junk, others = [], []
    repeated: list[tuple[str, str]] = []
    for name, size in place.files(repeated):
        if name.startswith("__MACOSX") or "/__MACOSX" in name:
            continue
        whole = _joined(start, name)
        radiograph = mura.parse(whole)
        if radiograph is None:
            others.append(whole)
        elif _is_junk(name):
            junk.append(radiograph.path)
        else:
            found[whole.removesuffix(radiograph.path)].append((radiograph, size))
    prefix = _only(source, found)
    files = sorted(found[prefix], key=lambda file: file[0].path)
    root = prefix if prefix.endswith("://") else prefix.rstrip("/") or "/"
    beside = _within_splits(prefix, others)
    broken = [] if storage.is_remote(source) else [path for path in beside if _leads_nowhere(prefix + path)]
    beside = [path for path in beside if "/" in path and path not in broken]
    as_given: Callable[[str], StoragePath] = str if storage.is_remote(source) else Path
    return Tree(
        as_given(root),
        start.removeprefix(prefix) if start.startswith(prefix) else "",
        [as_given(folder) for folder in _above(root, start)],
        [radiograph for radiograph, _ in files],
        {radiograph.path: size for radiograph, size in files},
        sorted(junk + [path for path in beside if _is_junk(path)]),
        [path for path in beside if not _is_junk(path)],
        _repeated(start, prefix, repeated),
        broken,
    )


def _within_splits(prefix: str, names: Iterable[str]) -> list[str]:
    """List those below the root that are a split's folder or lie in one, from the root on, sorted."""
    paths = sorted(whole.removeprefix(prefix) for whole in names if whole.startswith(prefix))
    return [path for path in paths if path.partition("/")[0] in FOLDERS]


def _leads_nowhere(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def _repeated(start: str, prefix: str, repeated: Iterable[tuple[str, str]]) -> list[str]:
    targets = {_joined(start, link): _joined(start, folder) for link, folder in repeated}
    return [f"{link} = {targets[prefix + link].removeprefix(prefix)}" for link in _within_splits(prefix, targets)]


def _joined(folder: str, name: str) -> str:
    return f"{folder}{name}" if folder.endswith("/") else f"{folder}/{name}"  # / and memory:// end so


def _is_junk(name: str) -> bool:
    """AppleDouble (._image1.png), Thumbs.db, notes: nothing that is named as a radiograph is."""
    last = name.rpartition("/")[2]
    return last.startswith(".") or os.path.splitext(last)[1].lower() not in SUFFIXES


def _only(source: StoragePath, found: dict[str, list[tuple[Radiograph, int]]]) -> str:
    """The prefix of the one data set there."""
    if not found:
        raise UserError(
            f"{source} is not in MURA's layout: no file matches "
            "{train,valid}/XR_TYPE/patientN/studyN_{positive,negative}/imageN.png; give the folder that holds train/"
        )
    if len(found) > 1:
        first, second, *others = sorted(prefix.rstrip("/") for prefix in found)
        raise UserError(
            f"{source} holds {len(found)} data sets ({first}, {second}{', ...' if others else ''}); give one of them"
        )
    return next(iter(found))


def _above(root: str, start: str) -> list[str]:
    """root, then its parents up to `start`; the root alone where it does not lie below `start`."""
    if root == start or not root.startswith(start):
        return [root]
    parts = root.removeprefix(start).strip("/").split("/")
    return [_joined(start, "/".join(parts[:num])) for num in range(len(parts), 0, -1)] + [start]
