"""Which files a directory, or some of its members, hold: as many as it may, in bounded memory.

    find: directory -> a table on disk, sorted by the bytes of the paths -> Walk: its digest, its files chunk by chunk

A path is relative to the directory, "/" between its parts, as the system gives it; `printable` makes it UTF-8 for a table.
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

_FOLDERS = 64  # taken off the list at once
_FILES = 1000  # written at once
_SCHEMA = """
CREATE TABLE file (place BLOB PRIMARY KEY, path BLOB, num_bytes INTEGER, mtime_ns TEXT, code TEXT, reason TEXT) WITHOUT ROWID;
CREATE TABLE start (chunk INTEGER PRIMARY KEY, place BLOB);
CREATE TABLE entered (inode TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE pending (link INTEGER, depth INTEGER, parts BLOB, PRIMARY KEY (link, depth, parts)) WITHOUT ROWID;
"""
_COLUMNS = "path, num_bytes, mtime_ns, code, reason"
_Row = tuple[
    bytes, int, str, str | None, str | None
]  # mtime_ns as text: a file of the year 2300 is more than SQLite counts


@dataclass(frozen=True, slots=True)
class ListedFile:
    """One thing to account for. `failure`: (code, reason) where it cannot even be opened, a folder's too."""

    path: str
    num_bytes: int = 0
    mtime_ns: int = 0
    failure: tuple[str, str] | None = None


def printable_path(path: str) -> str:
    """`path` as the tables have it: bytes that are not UTF-8 backslash-escaped."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


@dataclass(frozen=True)
class FileList:
    """What was found. `digest`: SHA-256 over names, sizes, times of modification; `size`: files of a chunk, or fewer."""

    database: Path
    num_files: int
    digest: str
    size: int

    @property
    def num_chunks(self) -> int:
        return -(-self.num_files // self.size)

    def printable_paths(self) -> Iterator[str]:
        """Yield every file's path as the tables have it."""
        for chunk in self.chunks(range(self.num_chunks)):
            yield from (printable_path(file.path) for file in chunk)

    def chunks(self, numbers: Iterable[int]) -> Iterator[list[ListedFile]]:
        """The files of the chunks asked for; several threads may each have an iterator of their own."""
        query = f"SELECT {_COLUMNS} FROM file WHERE place >= (SELECT place FROM start WHERE chunk = ?) ORDER BY place LIMIT ?"
        with scratch_db.open_readonly(self.database) as database:
            for number in numbers:
                yield [_file(row) for row in database.execute(query, (number, self.size))]


def list_files(
    directory: Path,
    database: Path,
    *,
    members: Sequence[str] = ("",),
    size: int = 256,
    exclude: Path | None = None,
    sort_by: Callable[[bytes], bytes] = lambda path: path,
    found: Callable[[int], None] = lambda num: None,
) -> FileList:
    """List the files of `directory` in `database`, a new file.

    Args:
        directory: what paths are relative to.
        database: the file to write.
        members: files and folders of it to list, relative to it; "" is the directory itself.
        size: files of a chunk.
        leave_out: a folder not to look into.
        sort_by: of a path, what the files are in the order of.
        found: hears how many there are so far.

    Links to files are files; links to folders are followed once the real folders are done, and each folder is entered
    once however many links lead to it, so a loop ends. A folder that cannot be listed is in the result, as a failure.
    """
    with scratch_db.create(database, _SCHEMA) as table:
        if exclude is not None and exclude.is_dir():
            _enter(table, exclude)
        _fill(table, directory, members, found, sort_by)
        num_files, digest = _number(table, size)
    return FileList(database, num_files, digest, size)


def _fill(
    table: sqlite3.Connection,
    directory: Path,
    members: Sequence[str],
    found: Callable[[int], None],
    sort_by: Callable[[bytes], bytes],
) -> None:
    num = 0

    def insert(rows: Iterator[_Row]) -> None:
        nonlocal num
        while some := [(sort_by(row[0]), *row) for row in itertools.islice(rows, _FILES)]:
            table.executemany("INSERT OR IGNORE INTO file VALUES (?, ?, ?, ?, ?, ?)", some)
            num += len(some)
            found(num)

    is_folder = {member: os.path.isdir(directory / member) for member in members}
    for folder in (member for member in members if is_folder[member]):
        _put_off(table, folder, link=False)
    insert(_row(member, os.path.join(directory, member)) for member in members if not is_folder[member])
    while folders := _next(table):
        for folder in folders:
            insert(_look_into(table, directory, folder))
        found(num)


def _look_into(table: sqlite3.Connection, directory: Path, folder: str) -> Iterator[_Row]:
    """Its files; its folders are put off."""
    try:
        if not _enter(table, directory / folder):
            return
        with os.scandir(directory / folder) as listing:
            for entry in listing:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if _is_folder(entry):
                    _put_off(table, path, link=entry.is_symlink())
                else:
                    yield _row(path, entry.path)
    except OSError as error:
        if is_io_fault(error):  # its files would be missing from the tables, and the list another one next time
            raise
        reason = f"a folder that cannot be listed: {os_reason(error)}"
        yield os.fsencode(folder or "."), 0, "0", "unreadable", reason


def _enter(table: sqlite3.Connection, folder: Path) -> bool:
    """Whether it is entered for the first time."""
    status = os.stat(folder)
    inode = f"{status.st_dev} {status.st_ino}"
    return table.execute("INSERT OR IGNORE INTO entered VALUES (?)", (inode,)).rowcount > 0


def _put_off(table: sqlite3.Connection, folder: str, *, link: bool) -> None:
    parts = os.fsencode(folder).replace(b"/", b"\0")  # sorted so, folders of one depth stand as their parents do
    table.execute("INSERT OR IGNORE INTO pending VALUES (?, ?, ?)", (link, parts.count(b"\0"), parts))


def _next(table: sqlite3.Connection) -> list[str]:
    """Some folders to look into, taken off the list: real ones as long as there are any, then one link, of the least depth."""
    rows = table.execute("SELECT * FROM pending ORDER BY link, depth, parts LIMIT ?", (_FOLDERS,)).fetchall()
    rows = rows[:1] if rows and rows[0][0] else [row for row in rows if not row[0]]
    table.executemany("DELETE FROM pending WHERE link = ? AND depth = ? AND parts = ?", rows)
    return [os.fsdecode(parts.replace(b"\0", b"/")) for _, _, parts in rows]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself
        if is_io_fault(error):
            raise
        return False


def _row(path: str, whole: str) -> _Row:
    name = os.fsencode(path)
    try:
        status = os.stat(whole)
    except OSError as error:
        if is_io_fault(error):
            raise
        return name, 0, "0", "unreadable", f"cannot be opened: {os_reason(error)}"
    if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for ever
        return name, 0, "0", "not_image", "a pipe, socket or device, not a file"
    return name, status.st_size, str(status.st_mtime_ns), None, None


def _file(row: _Row) -> ListedFile:
    path, num_bytes, mtime_ns, code, reason = row
    return ListedFile(os.fsdecode(path), num_bytes, int(mtime_ns), _failure(code, reason))


def _failure(code: str | None, reason: str | None) -> tuple[str, str] | None:
    return None if code is None or reason is None else (code, reason)


def _number(table: sqlite3.Connection, size: int) -> tuple[int, str]:
    """Remember where each chunk starts; how many files there are, and their digest."""
    sha256, num = hashlib.sha256(), 0
    query = f"SELECT place, {_COLUMNS} FROM file ORDER BY place"
    for place, path, num_bytes, mtime_ns, code, reason in table.execute(query):
        if num % size == 0:
            table.execute("INSERT INTO start VALUES (?, ?)", (num // size, place))
        sha256.update(path + f"\0{num_bytes} {mtime_ns} {_failure(code, reason)}\n".encode())
        num += 1
    return num, sha256.hexdigest()
