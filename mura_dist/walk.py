"""Which files a directory holds, and which study each belongs to.

    find: directory -> files, sorted        Grouping.of: path, DICOM identity -> (study, study type)

A path is relative to the directory, "/" between its parts, as the system gives it; `printable` makes it UTF-8 for a
table. DICOM's identifiers never leave this file: a study is named by a pseudonym, under a key that stays on the site.
"""

import hashlib
import os
import stat
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from . import anatomy, mura, pseudonyms
from .pseudonyms import Names
from .radiograph import DicomIdentity
from .study_types import Given

STUDY_BY = ("auto", "folder", "file")
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class File:
    """One thing to account for. `failure`: (code, reason) where it cannot even be opened, a folder's too."""

    path: str
    num_bytes: int = 0
    mtime_ns: int = 0
    failure: tuple[str, str] | None = None


def printable(path: str) -> str:
    """`path` as the tables have it: bytes that are not UTF-8 backslash-escaped."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def find(directory: Path, leave_out: Path | None = None) -> list[File]:
    """Every file below `directory`, sorted by the bytes of its path. `leave_out` is a folder not to look into.

    Links to files are files; links to folders are followed once the real folders are done, and each folder is entered
    once however many links lead to it, so a loop ends. A folder that cannot be listed is in the result, as a failure.
    """
    entered = {_inode(leave_out)} if leave_out is not None and leave_out.is_dir() else set()
    files: list[File] = []
    folders, links = deque([""]), deque[str]()
    while folders or links:
        folder = (folders or links).popleft()
        try:
            if (inode := _inode(directory / folder)) in entered:
                continue
            entered.add(inode)
            with os.scandir(directory / folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            files.append(File(folder or ".", failure=("unreadable", f"a folder that cannot be listed: {_why(error)}")))
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(path)
            else:
                files.append(_file(directory, path))
    return sorted(files, key=lambda file: os.fsencode(file.path))


def _inode(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _file(directory: Path, path: str) -> File:
    try:
        status = os.stat(directory / path)
    except OSError as error:
        return File(path, failure=("unreadable", f"cannot be opened: {_why(error)}"))
    if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for ever
        return File(path, failure=("not_image", "a pipe, socket or device, not a file"))
    return File(path, status.st_size, status.st_mtime_ns)


def _why(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()


def digest(files: list[File]) -> str:
    """SHA-256 over names, sizes and times of modification."""
    sha256 = hashlib.sha256()
    for file in files:
        sha256.update(os.fsencode(file.path) + f"\0{file.num_bytes} {file.mtime_ns} {file.failure}\n".encode())
    return sha256.hexdigest()


@dataclass
class Grouping:
    """How files become studies, and what those are called.

    given: study type of all, or by printable path; known: the model's own types; apart: where the site's key must not lie.
    """

    directory: str  # absolute, "/" between its parts
    study_by: str
    given: Given = None
    known: frozenset[str] = frozenset(mura.STUDY_TYPES)
    names: Names = field(default_factory=Names)
    apart: tuple[Path, ...] = ()
    _key: bytes | None = field(default=None, repr=False)

    def of(self, path: str, identity: DicomIdentity | None) -> tuple[str, str]:
        """(study, study type) of a radiograph, both printable, the study by its public name."""
        return self._study(path, identity), self._study_type(path, identity)

    def place(self, path: str) -> str:
        """The study that a path alone tells of, by its own name, printable."""
        if self.study_by == "folder":
            return printable(path.rpartition("/")[0] or ".")
        if self.study_by == "file":
            return printable(path)
        if mura.parse(path):  # the split lies below the directory: two copies of a data set stay two
            return printable(path.rpartition("/")[0])
        above = mura.parse(f"{self.directory}/{path}")
        return printable(above.study if above else path)

    def _study(self, path: str, identity: DicomIdentity | None) -> str:
        in_layout = mura.parse(f"{self.directory}/{path}") is not None
        if self.study_by != "auto" or in_layout or identity is None or not identity.study_uid:
            return self.names.study(self.place(path))
        self._key = self._key or self.names.key or pseudonyms.site_key(*self.apart)
        return pseudonyms.of_dicom(self._key, identity.study_uid, identity.body_part, identity.laterality)

    def _study_type(self, path: str, identity: DicomIdentity | None) -> str:
        if isinstance(self.given, str):
            return self.given
        if self.given is not None and (given := self.given.get(printable(path))):
            return given
        whole, known = f"{self.directory}/{path}", self.known | set(mura.STUDY_TYPES)
        if parsed := mura.parse(whole):
            # A folder's name like any other, where it is no known type: XR_DOE.
            return parsed.study_type if self.names.key is None or parsed.study_type in known else UNKNOWN
        if folder := next((part for part in reversed(whole.split("/")[:-1]) if part in known), None):
            return folder
        body_part = identity.body_part if identity is not None else ""
        # Free text in practice: only what is a study type already may reach a table.
        study_type = anatomy.study_type(body_part) or f"XR_{body_part}"
        return study_type if study_type in known else UNKNOWN
