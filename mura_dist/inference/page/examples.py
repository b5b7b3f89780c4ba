"""Select example studies for the page from a folder in MURA's layout. The folder is only read.

    folder -> find_examples: a few studies of each study type, numbered
    folder, examples -> drawing_digests: the SHA-256 of the files that are computer drawings

Selection and order follow the SHA-256 of the studies' paths without their labels. So neither an example's number nor a name that
the browser receives reveals its label.
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
_LAYOUT = "Give a folder in MURA's layout, such as XR_WRIST/patient00001/study1_positive."


@dataclass(frozen=True)
class Example:
    """The files of a study. number: from 1 over all examples."""

    number: int
    study_type: str
    files: tuple[Path, ...]

    def name(self, index: int) -> str:
        """Return the name of a file on the page and in tables."""
        return f"{self.study_type}/example{self.number}/image{index + 1}{self.files[index].suffix.lower()}"

    def content(self, index: int) -> bytes:
        """Return the bytes of a file, or b"" if it no longer exists."""
        try:
            return self.files[index].read_bytes()
        except OSError:
            return b""


@dataclass(frozen=True)
class _Study:
    """A study in the folder. digest: SHA-256 of its path without the label. label: "" if its folder has none."""

    digest: bytes
    study_type: str
    label: str
    files: tuple[Path, ...]


def find_examples(folder: Path) -> tuple[Example, ...]:
    """Return some studies of each study type, in alternating order. The result is the same on each start.

    Raises:
        UserError: The folder does not exist or holds no study.
    """
    if not folder.is_dir():
        raise UserError(f"--examples {folder}: no such folder. {_LAYOUT}")
    studies = sorted(_studies(Path(os.path.abspath(folder))), key=_digest)
    if not studies:
        raise UserError(f"--examples {folder}: contains no study folder. {_LAYOUT}")
    rounds = itertools.zip_longest(*_select(studies).values())
    ordered = [study for group in rounds for study in sorted(filter(None, group), key=_digest)]
    return tuple(Example(number, study.study_type, study.files) for number, study in enumerate(ordered, start=1))


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


def _digest(study: _Study) -> bytes:
    return study.digest


def _select(studies: Sequence[_Study]) -> dict[str, list[_Study]]:
    """Return the first studies of each study type. Both labels occur among them if both occur in the folder.

    The number of studies per label is not fixed, since a fixed number would reveal the last example's label.
    """
    selection: dict[str, list[_Study]] = {}
    for study in studies:
        selection.setdefault(study.study_type, []).append(study)
    selection = {study_type: of_type[:EXAMPLES_PER_TYPE] for study_type, of_type in selection.items()}
    for label in _LABELS:
        counts = Counter(study.label for of_type in selection.values() for study in of_type)
        absent = next((study for study in studies if study.label == label and not counts[label]), None)
        if absent is not None:  # its digest selects the study to replace, whose digest it takes over
            of_type = selection[absent.study_type]
            replaceable = [index for index, study in enumerate(of_type) if counts[study.label] > 1]
            index = replaceable[absent.digest[0] % len(replaceable)]
            of_type[index] = replace(absent, digest=of_type[index].digest)
    return selection


def drawing_digests(folder: Path, examples: Iterable[Example]) -> frozenset[str]:
    """Return the SHA-256 of the examples' files that are drawings of their phantom set.

    Each file is compared with a new drawing, so that a radiograph in the folder does not count.
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
    """Return a small PNG of a decoded file on a black square, or None for a file that could not be decoded."""
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
