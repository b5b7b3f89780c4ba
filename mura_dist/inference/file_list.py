"""The files of a directory, or of some of its members, in bounded memory.

    list_files: directory -> a table on disk, sorted by the bytes of the paths -> FileList: digest, files chunk by chunk

A path is relative to the directory, "/" between folders, with the bytes that the system returns. `printable_path` converts it to
UTF-8 for a table.
"""

import hashlib
import itertools
import os
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mura_dist.core.errors import is_io_fault, os_reason
from mura_dist.inference import scratch_db

_FOLDERS_PER_QUERY = 64
_ROWS_PER_INSERT = 1000
# mtime_ns is text: the time of a file of the year 2300 overflows SQLite's integers.
_SCHEMA = """
CREATE TABLE file (sort_key BLOB PRIMARY KEY, path BLOB, num_bytes INTEGER, mtime_ns TEXT, code TEXT, reason TEXT) WITHOUT ROWID;
CREATE TABLE start (chunk INTEGER PRIMARY KEY, sort_key BLOB);
CREATE TABLE entered (inode TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE pending (link INTEGER, depth INTEGER, folders BLOB, PRIMARY KEY (link, depth, folders)) WITHOUT ROWID;
"""
_COLUMNS = "path, num_bytes, mtime_ns, code, reason"
_Row = tuple[bytes, int, str, str | None, str | None]


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file to predict. `failure` is (code, reason) if it, or a folder, cannot be opened."""

    path: str
    num_bytes: int = 0
    mtime_ns: int = 0
    failure: tuple[str, str] | None = None


def printable_path(path: str) -> str:
    """Return `path` as the tables spell it: bytes that are not UTF-8 are backslash-escaped."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


@dataclass(frozen=True)
class FileList:
    """A list of files on disk.

    Attributes:
        database: File of the list.
        num_files: Number of files.
        digest: SHA-256 over paths, sizes and modification times.
        chunk_size: Files per chunk. The last chunk may be smaller.
    """

    database: Path
    num_files: int
    digest: str
    chunk_size: int

    @property
    def num_chunks(self) -> int:
        """Number of chunks."""
        return -(-self.num_files // self.chunk_size)

    def printable_paths(self) -> Iterator[str]:
        """Yield the printable path of every file."""
        for chunk in self.chunks(range(self.num_chunks)):
            yield from (printable_path(file.path) for file in chunk)

    def chunks(self, numbers: Iterable[int]) -> Iterator[list[ListedFile]]:
        """Yield the files of each chunk. Every thread may have its own iterator."""
        start = "(SELECT sort_key FROM start WHERE chunk = ?)"
        query = f"SELECT {_COLUMNS} FROM file WHERE sort_key >= {start} ORDER BY sort_key LIMIT ?"
        with scratch_db.open_readonly(self.database) as database:
            for number in numbers:
                yield [_file(row) for row in database.execute(query, (number, self.chunk_size))]


def list_files(
    directory: Path,
    database: Path,
    *,
    members: Sequence[str] = ("",),
    chunk_size: int = 256,
    exclude: Path | None = None,
    sort_by: Callable[[bytes], bytes] = lambda path: path,
    progress: Callable[[int], None] = lambda num_files: None,
) -> FileList:
    """List the files of `directory` in the new file `database`.

    Links to files are files. Links to folders are followed after the real folders. Each folder is entered once, however many
    links lead to it, so that loops end. A folder that cannot be listed is listed as a failure.

    Args:
        directory: Folder that paths are relative to.
        database: File to write.
        members: Relative paths of the files and folders to list. "" is the directory itself.
        chunk_size: Files per chunk.
        exclude: Folder to skip.
        sort_by: Sort key of a path.
        progress: Called with the number of files so far.

    Raises:
        OSError: an I/O fault, which would make the list incomplete, or the disk is full.
    """
    with scratch_db.create(database, _SCHEMA) as table:
        if exclude is not None and exclude.is_dir():
            _enter(table, exclude)
        _fill(table, directory, members, progress, sort_by)
        num_files, digest = _index_chunks(table, chunk_size)
    return FileList(database, num_files, digest, chunk_size)


def _fill(
    table: sqlite3.Connection,
    directory: Path,
    members: Sequence[str],
    progress: Callable[[int], None],
    sort_by: Callable[[bytes], bytes],
) -> None:
    num_files = 0

    def insert(rows: Iterator[_Row]) -> None:
        nonlocal num_files
        while block := [(sort_by(row[0]), *row) for row in itertools.islice(rows, _ROWS_PER_INSERT)]:
            table.executemany("INSERT OR IGNORE INTO file VALUES (?, ?, ?, ?, ?, ?)", block)
            num_files += len(block)
            progress(num_files)

    is_folder = {member: os.path.isdir(directory / member) for member in members}
    for folder in (member for member in members if is_folder[member]):
        _add_pending(table, folder, link=False)
    insert(_row(member, os.path.join(directory, member)) for member in members if not is_folder[member])
    while folders := _pop_pending(table):
        for folder in folders:
            insert(_list_folder(table, directory, folder))
        progress(num_files)


def _list_folder(table: sqlite3.Connection, directory: Path, folder: str) -> Iterator[_Row]:
    """Yield the files of a folder, and add its folders to the pending ones."""
    try:
        if not _enter(table, directory / folder):
            return
        with os.scandir(directory / folder) as listing:
            for entry in listing:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if _is_folder(entry):
                    _add_pending(table, path, link=entry.is_symlink())
                else:
                    yield _row(path, entry.path)
    except OSError as error:
        if is_io_fault(error):  # its files would be missing from the tables, and the next list would differ
            raise
        reason = f"a folder that cannot be listed: {os_reason(error)}"
        yield os.fsencode(folder or "."), 0, "0", "unreadable", reason


def _enter(table: sqlite3.Connection, folder: Path) -> bool:
    """Record that a folder is listed. Return whether this is the first time."""
    status = os.stat(folder)
    inode = f"{status.st_dev} {status.st_ino}"
    return table.execute("INSERT OR IGNORE INTO entered VALUES (?)", (inode,)).rowcount > 0


def _add_pending(table: sqlite3.Connection, folder: str, *, link: bool) -> None:
    folders = os.fsencode(folder).replace(b"/", b"\0")  # sorts folders of one depth in the order of their parents
    table.execute("INSERT OR IGNORE INTO pending VALUES (?, ?, ?)", (link, folders.count(b"\0"), folders))


def _pop_pending(table: sqlite3.Connection) -> list[str]:
    """Remove and return pending folders: real ones while there are any, then one link of the least depth."""
    query = "SELECT * FROM pending ORDER BY link, depth, folders LIMIT ?"
    rows = table.execute(query, (_FOLDERS_PER_QUERY,)).fetchall()
    rows = rows[:1] if rows and rows[0][0] else [row for row in rows if not row[0]]
    table.executemany("DELETE FROM pending WHERE link = ? AND depth = ? AND folders = ?", rows)
    return [os.fsdecode(folders.replace(b"\0", b"/")) for _, _, folders in rows]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself
        if is_io_fault(error):
            raise
        return False


def _row(path: str, location: str) -> _Row:
    name = os.fsencode(path)
    try:
        status = os.stat(location)
    except OSError as error:
        if is_io_fault(error):
            raise
        return name, 0, "0", "unreadable", f"cannot be opened: {os_reason(error)}"
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
        return name, 0, "0", "not_image", "a pipe, socket or device, not a file"
    return name, status.st_size, str(status.st_mtime_ns), None, None


def _file(row: _Row) -> ListedFile:
    path, num_bytes, mtime_ns, code, reason = row
    return ListedFile(os.fsdecode(path), num_bytes, int(mtime_ns), _failure(code, reason))


def _failure(code: str | None, reason: str | None) -> tuple[str, str] | None:
    return None if code is None or reason is None else (code, reason)


def _index_chunks(table: sqlite3.Connection, chunk_size: int) -> tuple[int, str]:
    """Store the first file of each chunk. Return the number of files and their digest."""
    sha256, num_files = hashlib.sha256(), 0
    query = f"SELECT sort_key, {_COLUMNS} FROM file ORDER BY sort_key"
    for sort_key, path, num_bytes, mtime_ns, code, reason in table.execute(query):
        if num_files % chunk_size == 0:
            table.execute("INSERT INTO start VALUES (?, ?)", (num_files // chunk_size, sort_key))
        sha256.update(path + f"\0{num_bytes} {mtime_ns} {_failure(code, reason)}\n".encode())
        num_files += 1
    return num_files, sha256.hexdigest()
