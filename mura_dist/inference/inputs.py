"""The inputs of a prediction: the files and folders of a command line, relative to one directory.

    FILE_OR_FOLDER ... -> Inputs.parse: DIRECTORY and its members to read

DIRECTORY is the folder itself for a single folder, else the deepest folder that contains all inputs. Paths in the tables are
relative to it, so that they are unique.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mura_dist.core.errors import UserError
from mura_dist.data.folder_kind import find_output_kinds

_MAX_NAMED = 3  # paths in a message


@dataclass(frozen=True)
class Inputs:
    """Files and folders below one directory.

    Attributes:
        directory: Folder that all paths are relative to.
        members: Unique relative paths with "/" between folders. "" is the directory itself.
    """

    directory: Path
    members: tuple[str, ...] = ("",)

    @classmethod
    def parse(cls, paths: Sequence[Path | str]) -> "Inputs":
        """Return the inputs for the paths of a command line.

        Raises:
            UserError: a path is a URL or missing, or a folder cannot be listed.
        """
        if remote := next((path for path in paths if "://" in str(path)), None):
            raise UserError(
                f"{remote}: predict reads only files of this machine. Copy them here, then give their folder."
            )
        if missing := [str(path) for path in paths if not os.path.exists(path)]:
            more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
            raise UserError(
                f"{', '.join(missing[:_MAX_NAMED])}{more}: no such file or folder. Give radiographs, or folders of them."
            )
        for path in filter(os.path.isdir, paths):
            try:
                os.scandir(path).close()  # os.access ignores the process's capabilities
            except PermissionError:
                raise UserError(f"{path} cannot be listed: permission denied. Give a readable folder.") from None
        if len(paths) == 1 and os.path.isdir(paths[0]):
            return cls(Path(paths[0]))
        absolute_paths = sorted({_absolute(path) for path in paths})
        try:
            directory = os.path.commonpath(
                [path if os.path.isdir(path) else os.path.dirname(path) for path in absolute_paths]
            )
        except ValueError:  # Windows
            raise UserError(
                f"{paths[0]} and {paths[-1]} are on different drives. Predict each drive separately."
            ) from None
        if directory in absolute_paths:
            return cls(Path(directory))
        return cls(
            Path(directory), tuple(os.path.relpath(path, directory).replace(os.sep, "/") for path in absolute_paths)
        )

    @property
    def folders(self) -> list[Path]:
        """Absolute or relative paths of the members that are folders."""
        return [path for member in self.members if (path := self.directory / member).is_dir()]


def exclude_output(paths: Sequence[Path | str], out: Path) -> Sequence[Path | str]:
    """Return `paths` without the output folder `out`, which a shell's `*` includes from the second start on.

    `out` is removed only if it holds a prediction, other paths remain, and none of these lies in it.
    """
    if "prediction" not in find_output_kinds(out):
        return paths
    inputs = [path for path in paths if not (os.path.isdir(path) and os.path.samefile(path, out))]
    root = os.path.realpath(out)
    holds_input = any(Path(os.path.realpath(path)).is_relative_to(root) for path in inputs)
    return paths if holds_input or not inputs else inputs


def _absolute(path: Path | str) -> str:
    """Return an absolute path without `..`. Links stay, except before a `..`, which follows them."""
    if ".." not in Path(path).parts:
        return os.path.abspath(path)
    folder, name = os.path.split(path)
    return os.path.realpath(path) if name in ("", ".", "..") else os.path.join(os.path.realpath(folder), name)
