"""Studies to try the page on, from a folder in MURA's layout: read from disk, never written.

    folder -> find: a few studies of each study type, numbered -> files, when one is chosen
    folder, examples -> drawings: the SHA-256 of those files that are computer drawings

An example's number says nothing about its label, and neither does a name that a browser sees.
"""

import hashlib
import io
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mura_dist.core.errors import Refusal
from mura_dist.data import mura
from mura_dist.data.phantoms import DrawnSet
from mura_dist.data.source.scan import PHANTOMS_MARK
from mura_dist.inference.page.study import MAX_FILES, Upload

PER_TYPE = 4  # of each study type, by turns labelled normal and abnormal as long as there are both
THUMBNAIL_PX = 240
_LAYOUT = "give one in MURA's layout: XR_WRIST/patient00001/study1_positive"


@dataclass(frozen=True)
class Example:
    """A study's files. `number`: from 1 over all examples."""

    number: int
    study_type: str
    files: tuple[Path, ...]

    def name(self, index: int) -> str:
        """Return what a file is called on the page and in tables."""
        return f"{self.study_type}/example{self.number}/image{index + 1}{self.files[index].suffix.lower()}"

    def content(self, index: int) -> bytes:
        """Return a file's bytes; none where it has gone since the start."""
        try:
            return self.files[index].read_bytes()
        except OSError:
            return b""


def find(folder: Path) -> tuple[Example, ...]:
    """Return some studies of each study type, in turns, the same on each start. Raises Refusal where there is none."""
    if not folder.is_dir():
        raise Refusal(f"--examples {folder}: no such folder; {_LAYOUT}")
    by_type: dict[str, dict[str, list[tuple[str, tuple[Path, ...]]]]] = {}
    for name, paths in _studies(Path(os.path.abspath(folder))):
        study_type, label = name.partition("/")[0], name.rpartition("/")[2].partition("_")[2]
        by_type.setdefault(study_type, {}).setdefault(label, []).append((name, paths))
    if not by_type:
        raise Refusal(f"--examples {folder}: no study's folder below it; {_LAYOUT}")
    selection = {study_type: _select(by_label) for study_type, by_label in sorted(by_type.items())}
    turns = itertools.zip_longest(
        *([(study_type, paths) for paths in files] for study_type, files in selection.items())
    )
    pairs = [pair for turn in turns for pair in turn if pair is not None]
    return tuple(Example(number, *pair) for number, pair in enumerate(pairs, start=1))


def _studies(root: Path) -> Iterator[tuple[str, tuple[Path, ...]]]:
    """Yield each study's name, from the study type on, and its files."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        paths = tuple(Path(folder, name) for name in sorted(files)[:MAX_FILES])
        name = mura.study_folder(paths[0].as_posix()) if paths else None
        if name is not None and paths[0].parent == Path(folder):
            yield name, paths


def _select(by_label: dict[str, list[tuple[str, tuple[Path, ...]]]]) -> list[tuple[Path, ...]]:
    """Return the files of a study type's examples, in the order of patients: it tells no label."""
    share = -(-PER_TYPE // len(by_label))
    return [paths for _, paths in sorted(study for studies in by_label.values() for study in studies[:share])]


def drawings(folder: Path, examples: Iterable[Example]) -> frozenset[str]:
    """Return the SHA-256 of the examples' files that are drawings of the phantom set they lie in.

    Each is drawn anew and compared: a radiograph that was put among them is none.
    """
    absolute = Path(os.path.abspath(folder))
    root = next((above for above in (absolute, *absolute.parents[:3]) if (above / PHANTOMS_MARK).is_file()), None)
    drawn_set = DrawnSet.of(root) if root is not None else None
    if root is None or drawn_set is None:
        return frozenset()
    digests = set()
    for example in examples:
        for index, path in enumerate(example.files):
            data = example.content(index)
            if drawn_set.holds(path.relative_to(root).as_posix(), data):
                digests.add(hashlib.sha256(data).hexdigest())
    return frozenset(digests)


def thumbnail(upload: Upload) -> bytes | None:
    """Return a small PNG of a file that was read, on a square of black; None of another file."""
    if upload.shown is None:
        return None
    picture = Image.fromarray(np.ascontiguousarray(upload.shown))
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    square, data = Image.new("L", (THUMBNAIL_PX, THUMBNAIL_PX)), io.BytesIO()
    scale = THUMBNAIL_PX / max(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BILINEAR)
    square.paste(picture, ((THUMBNAIL_PX - picture.width) // 2, (THUMBNAIL_PX - picture.height) // 2))
    square.save(data, "PNG")
    return data.getvalue()
