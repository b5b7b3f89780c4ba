"""List the files of a folder or URL in MURA's layout: radiographs, junk, and where paths begin.

storage files -> mura.parse -> the one data set -> Tree
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
    """The files of a source.

    Paths start at `root`, the folder that contains train/ or valid/. Lists are sorted.
    """

    root: StoragePath
    within: str  # path of the source below the root ("train/XR_HAND"), else ""
    above: list[StoragePath]  # the root and its parents up to the source
    radiographs: list[Radiograph]
    sizes: dict[str, int]  # bytes of each radiograph, by path
    junk: list[str]
    strays: list[str]
    repeated: list[str]  # "link = folder": skipped links to folders that are in the tree already
    broken: list[str]  # dangling links

    def holds(self, path: str) -> bool:
        """Return whether `path` would lie within the source, which may be one folder of the data set."""
        return not self.within or path.startswith(f"{self.within}/")


def walk(source: StoragePath) -> Tree:
    """List everything below a folder or URL. A data set that contains copies of MURA's root is refused.

    Raises:
        UserError: No such folder, no file in MURA's layout, or several data sets.
    """
    folder = storage.open_storage(source)
    if not folder.is_folder():
        raise UserError(f"{source}: no such folder. Give the folder that holds train/ and valid/.")
    start = folder.url if isinstance(folder, storage.RemoteStorage) else Path(source).resolve().as_posix()
    radiographs: dict[str, list[tuple[Radiograph, int]]] = defaultdict(list)  # by prefix
    junk, strays = [], []
    repeated: list[tuple[str, str]] = []
    for name, size in folder.files(repeated):
        if name.startswith("__MACOSX") or "/__MACOSX" in name:
            continue
        full_path = _join(start, name)
        radiograph = mura.parse(full_path)
        if radiograph is None:
            strays.append(full_path)
        elif _is_junk(name):
            junk.append(radiograph.path)
        else:
            radiographs[full_path.removesuffix(radiograph.path)].append((radiograph, size))
    prefix = _only_prefix(source, radiographs)
    files = sorted(radiographs[prefix], key=lambda file: file[0].path)
    root = prefix if prefix.endswith("://") else prefix.rstrip("/") or "/"
    strays = _within_splits(prefix, strays)
    broken = [] if storage.is_remote(source) else [path for path in strays if _is_dangling(prefix + path)]
    strays = [path for path in strays if "/" in path and path not in broken]
    to_path: Callable[[str], StoragePath] = str if storage.is_remote(source) else Path
    return Tree(
        to_path(root),
        start.removeprefix(prefix) if start.startswith(prefix) else "",
        [to_path(folder) for folder in _above(root, start)],
        [radiograph for radiograph, _ in files],
        {radiograph.path: size for radiograph, size in files},
        sorted(junk + [path for path in strays if _is_junk(path)]),
        [path for path in strays if not _is_junk(path)],
        _repeated(start, prefix, repeated),
        broken,
    )


def _within_splits(prefix: str, names: Iterable[str]) -> list[str]:
    """Return the paths, from the root on, of names that are or lie in a split's folder, sorted."""
    paths = sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return [path for path in paths if path.partition("/")[0] in FOLDERS]


def _is_dangling(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def _repeated(start: str, prefix: str, repeated: Iterable[tuple[str, str]]) -> list[str]:
    targets = {_join(start, link): _join(start, folder) for link, folder in repeated}
    return [f"{link} = {targets[prefix + link].removeprefix(prefix)}" for link in _within_splits(prefix, targets)]


def _join(folder: str, name: str) -> str:
    return f"{folder}{name}" if folder.endswith("/") else f"{folder}/{name}"  # as / and memory:// do


def _is_junk(name: str) -> bool:
    """Return whether a file name is not that of a radiograph: AppleDouble (._image1.png), Thumbs.db, notes."""
    last = name.rpartition("/")[2]
    return last.startswith(".") or os.path.splitext(last)[1].lower() not in SUFFIXES


def _only_prefix(source: StoragePath, radiographs: dict[str, list[tuple[Radiograph, int]]]) -> str:
    """Return the prefix of the only data set. Raises UserError where there is none, or several."""
    if not radiographs:
        raise UserError(
            f"{source} is not in MURA's layout: no file matches "
            "{train,valid}/XR_TYPE/patientN/studyN_{positive,negative}/imageN.png. Give the folder that holds train/."
        )
    if len(radiographs) > 1:
        first, second, *remaining = sorted(prefix.rstrip("/") for prefix in radiographs)
        raise UserError(
            f"{source} holds {len(radiographs)} data sets ({first}, {second}{', ...' if remaining else ''}). Give one of them."
        )
    return next(iter(radiographs))


def _above(root: str, start: str) -> list[str]:
    """Return the root and its parents up to `start`, or the root alone where it is not below `start`."""
    if root == start or not root.startswith(start):
        return [root]
    parts = root.removeprefix(start).strip("/").split("/")
    return [_join(start, "/".join(parts[:num])) for num in range(len(parts), 0, -1)] + [start]
