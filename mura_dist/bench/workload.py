"""What a benchmark works on: a folder of radiographs in MURA's layout, links, as many as wanted.

    --data, or phantoms drawn for it -> scan -> evenly some, or all again and again -> links under other patients' names -> Load

Little is imported above the functions: a process whose start is measured (footprint.py) gets its Load from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mura_dist.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np

ROTATE_DEG = 30  # the paper's
_MAX_PHANTOMS, _VIEWS_PER_STUDY = 400, 2.4


@dataclass(frozen=True)
class Options:
    """What is asked for. `data`: a folder in MURA's layout, None: phantoms; size and radiographs None: by WHAT."""

    data: Path | None = None
    size: int | None = None
    radiographs: int | None = None
    rounds: int = 5
    workers: int = 2
    batch: int = 8  # the paper's
    model: Path | None = None  # of `encodings`: whose probabilities are compared
    seconds: float = 2.0  # the least a contender's turn takes
    architecture: str = "densenet169"


@dataclass(frozen=True)
class Load:
    """`folder`, in MURA's layout, holds `paths` (relative to it) and nothing else; `scratch` is for what a bench prepares.

    The first `num_files` of `paths` are files of their own, the others the same again.
    """

    folder: Path
    scratch: Path
    paths: list[str]
    num_files: int
    size: int
    workers: int
    batch: int
    architecture: str

    def pixels(self) -> list[np.ndarray]:
        """Whole batches, uint8 (B, 1, S, S) each."""
        import numpy as np

        from mura_dist.data import radiograph

        images = [radiograph.read(self.folder / path, self.size) for path in self.paths]
        starts = range(0, len(images) - self.batch + 1, self.batch)
        return [np.stack(images[i : i + self.batch])[:, None] for i in starts]


def prepare(options: Options, scratch: Path, *, size: int, number: int) -> Load:
    """`number` radiographs of --data, or of phantoms, of which no more are drawn than it takes; as links, repeated as copies.

    Raises UserError for a folder that does not serve.
    """
    from mura_dist.data.source.scan import scan

    source, folder = options.data or scratch / "phantoms", scratch / "radiographs"
    if options.data is None:
        _draw(source, number)
    scanned = scan(source)
    known = list(zip(scanned.manifest.frame["path"], scanned.manifest.frame["patient"], strict=True))
    taken = [known[place * len(known) // number] for place in range(number)] if number < len(known) else known
    usable = [(path, patient) for path, patient in taken if _everyone_reads(scanned.root / path)]
    if not usable:
        raise UserError(f"--data {source}: none of its files is a sound PNG or JPEG; give a folder that has some")
    paths = []
    for place in range(number):
        copy, (path, patient) = place // len(usable), usable[place % len(usable)]
        paths.append(path.replace(f"/{patient}/", f"/{patient}x{copy}/", 1) if copy else path)
        (folder / paths[-1]).parent.mkdir(parents=True, exist_ok=True)
        _place((scanned.root / path).resolve(), folder / paths[-1], copy)
    distinct = min(number, len(usable))
    return Load(folder, scratch, paths, distinct, size, options.workers, options.batch, options.architecture)


def _place(source: Path, target: Path, copy: int) -> None:
    """A link, or the file with some bytes behind its end, which no reader minds: a data set of equal files is none, and a
    conversion, which looks for them, would be measured at that."""
    if copy:
        target.write_bytes(source.read_bytes() + bytes(copy))
    else:
        target.symlink_to(source)


def _draw(folder: Path, number: int) -> None:
    from mura_dist.data import phantoms

    studies = round(min(number, _MAX_PHANTOMS) / _VIEWS_PER_STUDY)
    phantoms.draw(folder, studies=max(phantoms.MIN_STUDIES, studies))


def _everyone_reads(path: Path) -> bool:
    """Also the contenders that have only Pillow."""
    from mura_dist.data import radiograph

    try:
        radiograph.read(path, 32)
    except radiograph.UnreadableFileError:
        return False
    return path.suffix.lower() in (".png", ".jpg", ".jpeg")
