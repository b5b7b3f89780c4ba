"""What a prediction reads: the files and folders of a command line, below one directory.

    FILE_OR_FOLDER ... -> Inputs.parse: DIRECTORY, and the members of it that are read

DIRECTORY is the folder, if only one is given, else the deepest folder that holds all that is given. Paths in the tables are
relative to it, so that no two files have the same.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mura_dist.core.errors import UserError
from mura_dist.data.folder_kind import find_output_kinds

_MAX_NAMED = 3  # missing paths in a message


@dataclass(frozen=True)
class Inputs:
    """Files and folders of one directory.

    members: their paths relative to it, "/" between the parts, each once; "" is the directory itself, which holds all others.
    """

    directory: Path
    members: tuple[str, ...] = ("",)

    @classmethod
    def parse(cls, paths: Sequence[Path | str]) -> "Inputs":
        """Return the inputs that these paths name. Raises UserError for a URL, a missing path, a folder that cannot be listed."""
        if remote := next((path for path in paths if "://" in str(path)), None):
            raise UserError(
                f"{remote}: predict reads files of this machine alone; copy them here, then give their folder"
            )
        if missing := [str(path) for path in paths if not os.path.exists(path)]:
            more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
            raise UserError(
                f"{', '.join(missing[:_MAX_NAMED])}{more}: no such file or folder; give radiographs, or folders of them"
            )
        for path in filter(os.path.isdir, paths):
            try:
                os.scandir(path).close()  # os.access knows nothing of a process's capabilities
            except PermissionError:
                raise UserError(f"{path} cannot be listed: permission denied; give a folder you may read") from None
        if len(paths) == 1 and os.path.isdir(paths[0]):
            return cls(Path(paths[0]))
        absolute_paths = sorted({_absolute(path) for path in paths})
        try:
            directory = os.path.commonpath(
                [path if os.path.isdir(path) else os.path.dirname(path) for path in absolute_paths]
            )
        except ValueError:  # Windows
            raise UserError(
                f"{paths[0]} and {paths[-1]} lie on different drives; predict each drive by itself"
            ) from None
        if directory in absolute_paths:
            return cls(Path(directory))
        return cls(
            Path(directory), tuple(os.path.relpath(path, directory).replace(os.sep, "/") for path in absolute_paths)
        )

    @property
    def folders(self) -> list[Path]:
        """The members that are folders."""
        return [path for member in self.members if (path := self.directory / member).is_dir()]


def without_output(paths: Sequence[Path | str], out: Path) -> Sequence[Path | str]:
    """Return `paths` without `out`, if that holds a prediction: a shell's `*` names the output folder from the second start on.

    It stays among them where no other path would be left, or where another path lies in it.
    """
    if "prediction" not in find_output_kinds(out):
        return paths
    inputs = [path for path in paths if not (os.path.isdir(path) and os.path.samefile(path, out))]
    root = os.path.realpath(out)
    holds_input = any(Path(os.path.realpath(path)).is_relative_to(root) for path in inputs)
    return paths if holds_input or not inputs else inputs


def _absolute(path: Path | str) -> str:
    """Return `path` as an absolute one without `..`, which after a link leads elsewhere than it reads. Links stay."""
    if ".." not in Path(path).parts:
        return os.path.abspath(path)
    folder, name = os.path.split(path)
    return os.path.realpath(path) if name in ("", ".", "..") else os.path.join(os.path.realpath(folder), name)
