"""The workload of a benchmark: a folder with a given number of radiographs in MURA's layout.

    --data, or phantoms -> scan -> an even selection, or all repeatedly -> links under new patients' names -> Load

Imports at module level stay few: processes whose start is measured (footprint.py) import this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mura_dist.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np

ROTATE_DEG = 30  # as in the MURA paper
_MAX_PHANTOMS, _VIEWS_PER_STUDY = 400, 2.4


@dataclass(frozen=True)
class Options:
    """Options of the command. data: None for phantoms; size, radiographs: None for the default of WHAT."""

    data: Path | None = None
    size: int | None = None
    radiographs: int | None = None
    rounds: int = 5
    workers: int = 2
    batch: int = 8  # as in the MURA paper
    model: Path | None = None  # for `encodings`: compare its probabilities
    seconds: float = 2.0  # shortest turn of a contender
    architecture: str = "densenet169"


@dataclass(frozen=True)
class Load:
    """Radiographs and parameters of a benchmark.

    Attributes:
        folder: Folder in MURA's layout that contains `paths` only.
        scratch: Folder for files that the benchmark prepares.
        paths: Radiographs, relative to `folder`.
        num_files: Number of distinct files; they are the first ones of `paths`, the others repeat them.
        size: Pixels per side.
        workers: Number of loading processes or threads.
        batch: Radiographs per batch.
        architecture: Network.
    """

    folder: Path
    scratch: Path
    paths: list[str]
    num_files: int
    size: int
    workers: int
    batch: int
    architecture: str

    def pixels(self, limit: int | None = None) -> list[np.ndarray]:
        """Return full batches, uint8 (B, 1, S, S) each, of at most `limit` radiographs."""
        import numpy as np

        from mura_dist.data import radiograph

        images = [radiograph.read(self.folder / path, self.size) for path in self.paths[:limit]]
        starts = range(0, len(images) - self.batch + 1, self.batch)
        return [np.stack(images[i : i + self.batch])[:, None] for i in starts]


def prepare(options: Options, scratch: Path, *, size: int, number: int) -> Load:
    """Prepare `number` radiographs of --data or of phantoms: links to distinct files, then copies.

    Raises:
        UserError: the folder has no readable PNG or JPEG file.
    """
    from mura_dist.data.source.scan import scan

    source, folder = options.data or scratch / "phantoms", scratch / "radiographs"
    if options.data is None:
        _draw(source, number)
    scanned = scan(source)
    scanned_files = list(zip(scanned.manifest.frame["path"], scanned.manifest.frame["patient"], strict=True))
    num_scanned = len(scanned_files)
    selected = [scanned_files[index * num_scanned // number] for index in range(min(number, num_scanned))]
    selected = selected if number < num_scanned else scanned_files
    usable = [(path, patient) for path, patient in selected if _is_readable(scanned.root / path)]
    if not usable:
        raise UserError(f"--data {source}: none of its files is a valid PNG or JPEG. Give a folder that has some.")
    paths = []
    for index in range(number):
        copy, (path, patient) = index // len(usable), usable[index % len(usable)]
        paths.append(path.replace(f"/{patient}/", f"/{patient}x{copy}/", 1) if copy else path)
        (folder / paths[-1]).parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy((scanned.root / path).resolve(), folder / paths[-1], copy)
    distinct = min(number, len(usable))
    return Load(folder, scratch, paths, distinct, size, options.workers, options.batch, options.architecture)


def _link_or_copy(source: Path, target: Path, copy: int) -> None:
    """Link the file, or copy it with some bytes appended, which readers ignore.

    Copies differ, since the conversion searches for identical files.
    """
    if copy:
        target.write_bytes(source.read_bytes() + bytes(copy))
    else:
        target.symlink_to(source)


def _draw(folder: Path, number: int) -> None:
    from mura_dist.data import phantoms

    studies = round(min(number, _MAX_PHANTOMS) / _VIEWS_PER_STUDY)
    phantoms.draw(folder, studies=max(phantoms.MIN_STUDIES, studies))


def _is_readable(path: Path) -> bool:
    """Return whether all contenders can read a file, also those that use Pillow."""
    from mura_dist.data import radiograph

    try:
        radiograph.read(path, 32)
    except radiograph.UnreadableFileError:
        return False
    return path.suffix.lower() in (".png", ".jpg", ".jpeg")
