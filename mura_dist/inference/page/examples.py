"""Studies to try the page on, from a folder in MURA's layout: read from disk, never written.

folder -> Example.find: a few studies of each study type -> files, when one is chosen
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mura_dist.core.errors import Refusal
from mura_dist.data import mura
from mura_dist.inference.file_list import printable
from mura_dist.inference.page.study import MAX_FILES

PER_TYPE = 4  # of each study type, by turns labelled normal and abnormal as long as there are both


@dataclass(frozen=True)
class Example:
    """A study's folder. `name`: from the study type on, its label included where MURA's folder has one."""

    name: str
    files: tuple[Path, ...]

    @classmethod
    def find(cls, folder: Path) -> Iterator["Example"]:
        """In the order of names, the same on each start. Raises Refusal where there is none."""
        layout = "give one in MURA's layout: XR_WRIST/patient00001/study1_positive"
        if not folder.is_dir():
            raise Refusal(f"--examples {folder}: no such folder; {layout}")
        by_type: dict[str, dict[str, list[Example]]] = {}
        root = Path(os.path.abspath(folder))
        for place, folders, files in os.walk(root):
            folders.sort()
            paths = tuple(Path(place, name) for name in sorted(files)[:MAX_FILES])
            name = mura.study_folder(paths[0].as_posix()) if paths else None
            if name is not None and paths[0].parent == Path(place):
                study_type, label = name.partition("/")[0], name.rpartition("/")[2].partition("_")[2]
                by_type.setdefault(study_type, {}).setdefault(label, []).append(cls(printable(name), paths))
        if not by_type:
            raise Refusal(f"--examples {folder}: no study's folder below it; {layout}")
        for _, by_label in sorted(by_type.items()):
            share = -(-PER_TYPE // len(by_label))
            yield from sorted((one for some in by_label.values() for one in some[:share]), key=lambda one: one.name)
