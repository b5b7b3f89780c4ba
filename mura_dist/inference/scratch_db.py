"""Temporary SQLite databases for tables that do not fit into memory.

Each file belongs to one process, which gets it from `core.files.scratch`, and nobody reads it after a crash. Therefore nothing is
journaled, synced or locked. Network disks often cannot lock.
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
    """Create a database. The block is one transaction. Raises OSError if the disk is full."""
    with _connect(path, "rwc&nolock=1") as database:
        database.executescript(_SETTINGS + schema)
        database.execute("BEGIN")  # a transaction per statement would write its pages each time
        yield database
        database.execute("COMMIT")


@contextlib.contextmanager
def open_readonly(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a complete database for reading. Each thread needs its own connection."""
    with _connect(path, "ro&immutable=1") as database:
        yield database


@contextlib.contextmanager
def _connect(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    try:
        # check_same_thread: a generator that reads may be closed by another thread.
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        database = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        with contextlib.closing(database):
            yield database
    except sqlite3.OperationalError as error:
        is_full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
        number, reason = (errno.ENOSPC, os.strerror(errno.ENOSPC)) if is_full else (errno.EIO, str(error))
        raise OSError(number, reason, str(path)) from error
