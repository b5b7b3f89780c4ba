"""Tables too long for memory, on disk while a process needs them: sqlite3 without journal, without locks, without trust.

What a killed process leaves is no state: nobody reads it. So nothing is synced, and nothing is locked (network disks often
cannot): each file has one process, which gets it from `core.files.scratch`.
"""

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

_CACHE_KIB = 16 << 10
_SETTINGS = f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -{_CACHE_KIB};"


@contextlib.contextmanager
def create(path: Path, schema: str) -> Iterator[sqlite3.Connection]:
    """A new database in one transaction, which ends with the block. Raises OSError where the disk is full."""
    with _opened(path, "rwc&nolock=1") as database:
        database.executescript(_SETTINGS + schema)
        database.execute("BEGIN")  # else every statement would write its pages out
        yield database
        database.execute("COMMIT")


@contextlib.contextmanager
def open_readonly(path: Path) -> Iterator[sqlite3.Connection]:
    """A database that is made, for a reader of its own: a connection serves one thread."""
    with _opened(path, "ro&immutable=1") as database:
        yield database


@contextlib.contextmanager
def _opened(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    try:
        # Another thread closes it where a reader was left in the middle.
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        database = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        with contextlib.closing(database):
            yield database
    except sqlite3.OperationalError as error:
        full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
        number, said = (errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else (errno.EIO, str(error))
        raise OSError(number, said, str(path)) from error
