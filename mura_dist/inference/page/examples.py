"""Studies to try the page on, from a folder in MURA's layout: read from disk, never written.

    folder -> find: a few studies of each study type, numbered -> files, when one is chosen
    folder, examples -> drawings: the SHA-256 of those files that are computer drawings

The order is that of the SHA-256 of the studies' paths without their labels, and so is the choice. An example's number therefore
says nothing about its label, and neither does a name that a browser sees.
"""

import hashlib
import io
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from mura_dist.core.errors import UserError
from mura_dist.data import mura
from mura_dist.data.phantoms import PhantomSet
from mura_dist.data.source.scan import PHANTOMS_MARK
from mura_dist.inference.page.study import MAX_FILES, Upload

EXAMPLES_PER_TYPE = 4  # of each study type
THUMBNAIL_PX = 240
_LABELS = ("negative", "positive")  # as a study's folder ends
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


@dataclass(frozen=True)
class _Study:
    """A study in the folder. `rank`: SHA-256 of its path without the label; `label`: "" where its folder names none."""

    rank: bytes
    study_type: str
    label: str
    files: tuple[Path, ...]


def find_examples(folder: Path) -> tuple[Example, ...]:
    """Return some studies of each study type, in turns, the same on each start. Raises UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"--examples {folder}: no such folder; {_LAYOUT}")
    studies = sorted(_studies(Path(os.path.abspath(folder))), key=_rank)
    if not studies:
        raise UserError(f"--examples {folder}: no study's folder below it; {_LAYOUT}")
    turns = itertools.zip_longest(*_select(studies).values())
    in_order = [study for turn in turns for study in sorted(filter(None, turn), key=_rank)]
    return tuple(Example(number, study.study_type, study.files) for number, study in enumerate(in_order, start=1))


def _studies(root: Path) -> Iterator[_Study]:
    """Yield each study in MURA's layout below a folder."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        paths = tuple(Path(folder, name) for name in sorted(files)[:MAX_FILES])
        name = mura.study_folder(paths[0].as_posix()) if paths else None
        if name is not None and paths[0].parent == Path(folder):
            label = next((label for label in _LABELS if name.endswith(f"_{label}")), "")
            digest = hashlib.sha256(os.fsencode(name.removesuffix(f"_{label}"))).digest()
            yield _Study(digest, name.partition("/")[0], label, paths)


def _rank(study: _Study) -> bytes:
    return study.rank


def _select(studies: Sequence[_Study]) -> dict[str, list[_Study]]:
    """Return the first studies of each study type, in the order given, and both labels among all of them where there are both.

    How many have which label is left to the folder: a fixed number would let the last example be worked out from the others.
    """
    selection: dict[str, list[_Study]] = {}
    for study in studies:
        selection.setdefault(study.study_type, []).append(study)
    selection = {study_type: of_type[:EXAMPLES_PER_TYPE] for study_type, of_type in selection.items()}
    for label in _LABELS:
        counts = Counter(study.label for of_type in selection.values() for study in of_type)
        absent = next((study for study in studies if study.label == label and not counts[label]), None)
        if absent is not None:  # it takes the rank of the study that it replaces, and its digest chooses which
            of_type = selection[absent.study_type]
            replaceable = [index for index, study in enumerate(of_type) if counts[study.label] > 1]
            index = replaceable[absent.rank[0] % len(replaceable)]
            of_type[index] = replace(absent, rank=of_type[index].rank)
    return selection


def drawing_digests(folder: Path, examples: Iterable[Example]) -> frozenset[str]:
    """Return the SHA-256 of the examples' files that are drawings of the phantom set they lie in.

    Each is drawn anew and compared: a radiograph that was put among them is none.
    """
    absolute = Path(os.path.abspath(folder))
    root = next((above for above in (absolute, *absolute.parents[:3]) if (above / PHANTOMS_MARK).is_file()), None)
    drawn_set = PhantomSet.open(root) if root is not None else None
    if root is None or drawn_set is None:
        return frozenset()
    digests = set()
    for example in examples:
        for index, path in enumerate(example.files):
            data = example.content(index)
            if drawn_set.holds(path.relative_to(root).as_posix(), data):
                digests.add(hashlib.sha256(data).hexdigest())
    return frozenset(digests)


def render_thumbnail(upload: Upload) -> bytes | None:
    """Return a small PNG of a file that was read, on a square of black; None of another file."""
    if upload.preview is None:
        return None
    picture = Image.fromarray(np.ascontiguousarray(upload.preview))
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    square, data = Image.new("L", (THUMBNAIL_PX, THUMBNAIL_PX)), io.BytesIO()
    scale = THUMBNAIL_PX / max(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BILINEAR)
    square.paste(picture, ((THUMBNAIL_PX - picture.width) // 2, (THUMBNAIL_PX - picture.height) // 2))
    square.save(data, "PNG")
    return data.getvalue()
