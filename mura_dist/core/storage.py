"""A folder: on this machine, or behind a URL (s3://bucket/path, memory://path, anything fsspec knows).

    place = storage.open_storage("s3://bucket/MURA-v1.1")      place.files() -> (name, bytes) ...      place.read(name) -> bytes

Names are relative, "/" between their parts. A write appears whole or not at all: locally by rename, in an object store because a
put is atomic there. Credentials and endpoints are fsspec's and the store's own to find (environment, configuration files). Those
in a URL are masked wherever it is printed or kept: `str(place)` is for people, `RemoteStorage.url` for the store.
"""

import contextlib
import hashlib
import heapq
import os
import shutil
import stat
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import unquote

from mura_dist.core import files as atomic
from mura_dist.core.errors import MASK, RunError, StopRequestedError, UserError, install_remedy, is_io_fault, mask_url

_SHORTEST_SECRET = 4

StoragePath = Path | str
"""A local folder, or a URL (a str with "://")."""

READ_WAITS_S = (0.1, 0.2, 0.4)  # before each further attempt to read what a disk or network failed to give

Result = TypeVar("Result")


def retried(read: Callable[[], Result]) -> Result:
    """Return what `read` returns. After an I/O fault it is called again, at most len(READ_WAITS_S) times.

    Raises what the last call raises. Errors that are the file's own are raised at once.
    """
    for wait_s in READ_WAITS_S:
        try:
            return read()
        except OSError as error:
            if not is_io_fault(error):
                raise
        time.sleep(wait_s)
    return read()


def is_remote(where: StoragePath) -> bool:
    return "://" in str(where)


def sha256(path: Path) -> str:
    """Of a local file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_storage(where: StoragePath) -> "Storage":
    """UserError where the URL's protocol is unknown or its package is missing. A local folder need not exist."""
    return RemoteStorage(str(where)) if is_remote(where) else LocalStorage(Path(where))


class Storage(ABC):
    @abstractmethod
    def __str__(self) -> str:
        """Return the place as the user wrote it, without secrets."""

    @abstractmethod
    def child(self, name: str) -> "Storage":
        """The folder `name` below."""

    @abstractmethod
    def is_folder(self) -> bool: ...

    @abstractmethod
    def names(self) -> set[str]:
        """What lies directly in it, files and folders; empty where there is no such folder."""

    @abstractmethod
    def files(self, repeated: list[tuple[str, str]] | None = None) -> Iterator[tuple[str, int]]:
        """Yield (name, size in bytes) of every file below, in no particular order; folders that begin with "." are left out.

        Local links to folders are followed, the least deep first, once all other folders are listed. Each folder is listed
        once, so a loop ends. `repeated` receives (name, its name in the listing) of each folder that was listed already.
        """

    @abstractmethod
    def exists(self, name: str) -> bool: ...

    @abstractmethod
    def holds(self, name: str, num_bytes: int, digest: str) -> bool:
        """Return whether a file is there, of this size and this SHA-256. Behind a URL the size alone is compared: see RemoteStorage."""

    @abstractmethod
    def read(self, name: str) -> bytes: ...

    @abstractmethod
    def read_part(self, name: str, start: int, length: int) -> bytes: ...

    @abstractmethod
    def read_many(self, names: Sequence[str]) -> list[bytes | OSError]:
        """Several at once, where that is faster; a file that cannot be read is its error."""

    @abstractmethod
    def writing(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """A binary file that becomes `name` when the block ends well. Two writers of one name share nothing."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Nothing happens where it is not there."""

    @abstractmethod
    def copy_to(self, name: str, target: Path) -> None:
        """Download, or copy, to a local file; whoever is interrupted leaves a part of it."""

    def write(self, name: str, data: bytes) -> None:
        with self.writing(name) as file:
            file.write(data)


class LocalStorage(Storage):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def child(self, name: str) -> "LocalStorage":
        return LocalStorage(self.folder / name) if name else self

    def is_folder(self) -> bool:
        return self.folder.is_dir()

    def names(self) -> set[str]:
        return set(os.listdir(self.folder)) if self.folder.is_dir() else set()

    def files(self, repeated: list[tuple[str, str]] | None = None) -> Iterator[tuple[str, int]]:
        folders = [""]
        links: list[tuple[int, bytes]] = []  # a heap: the same order whatever the file system's
        for below in folders:  # which grows
            yield from self._list(below, folders, links)
        listed = {_inode(self.folder / below): below for below in folders} if links else {}
        while links:
            waiting = [os.fsdecode(heapq.heappop(links)[1])]
            for below in waiting:
                first = listed.setdefault(_inode(self.folder / below), below)
                if first is below:
                    yield from self._list(below, waiting, links)
                elif repeated is not None:
                    repeated.append((below.rstrip("/"), first.rstrip("/")))

    def _list(self, below: str, folders: list[str], links: list[tuple[int, bytes]]) -> Iterator[tuple[str, int]]:
        """Yield the files of one folder; add its folders and its links to folders to the lists."""
        with os.scandir(self.folder / below) as entries:
            for entry in entries:
                name = f"{below}{entry.name}/"
                if not _is_folder(entry):
                    yield name[:-1], _size(entry)
                elif entry.name.startswith("."):
                    continue
                elif entry.is_symlink():
                    heapq.heappush(links, (name.count("/"), os.fsencode(name)))
                else:
                    folders.append(name)

    def exists(self, name: str) -> bool:
        try:
            return stat.S_ISREG(retried((self.folder / name).stat).st_mode)
        except OSError as error:
            if is_io_fault(error):  # nobody knows
                raise
            return False

    def holds(self, name: str, num_bytes: int, digest: str) -> bool:
        path = self.folder / name
        return self.exists(name) and path.stat().st_size == num_bytes and sha256(path) == digest

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def read_part(self, name: str, start: int, length: int) -> bytes:
        # A Path and a buffer would cost more than the reading.
        with open(os.path.join(self.folder, name), "rb", buffering=0) as file:
            file.seek(start)
            return file.read(length)

    def read_many(self, names: Sequence[str]) -> list[bytes | OSError]:
        return [_or_error(self.read, name) for name in names]

    def writing(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        return atomic.replacing(self.folder / name)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def copy_to(self, name: str, target: Path) -> None:
        shutil.copyfile(self.folder / name, target)


class RemoteStorage(Storage):
    """Through fsspec. Whatever a store's own library raises comes out as OSError or, one line, as RunError."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") if not url.endswith("://") else url
        if any(masked in url for masked in (f"{MASK}@", f"?{MASK}", f"#{MASK}")):
            raise UserError(
                f"{url}: its credentials were masked where it was kept; give the URL with them, or let the store find them "
                "(environment, configuration files)"
            )
        with _spoken(self.url):
            import fsspec

            self.store, self.root = fsspec.core.url_to_fs(self.url)

    def __str__(self) -> str:
        return mask_url(self.url)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteStorage, (self.url,)

    def child(self, name: str) -> "RemoteStorage":
        return RemoteStorage(f"{self.url}/{name}") if name else self

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def is_folder(self) -> bool:
        with _spoken(self.url):
            return self.store.isdir(self.root)

    def names(self) -> set[str]:
        with _spoken(self.url):
            self.store.invalidate_cache()  # others write there too
            try:
                found = self.store.ls(self.root, detail=False)
            except FileNotFoundError:
                return set()
            return {path.rstrip("/").rsplit("/", 1)[-1] for path in found}

    def files(self, repeated: list[tuple[str, str]] | None = None) -> Iterator[tuple[str, int]]:
        with _spoken(self.url):
            found = self.store.find(self.root, detail=True)
        start = len(self.root.rstrip("/")) + 1
        for path, facts in found.items():
            name = path[start:]
            if not any(part.startswith(".") for part in name.split("/")[:-1]):
                yield name, int(facts.get("size") or 0)

    def exists(self, name: str) -> bool:
        with _spoken(self.url):
            self.store.invalidate_cache()
            return self.store.isfile(self._at(name))

    def holds(self, name: str, num_bytes: int, digest: str) -> bool:
        """The digest would cost a download; a store checks what is put into it by itself."""
        with _spoken(self.url):
            self.store.invalidate_cache()
            try:
                return self.store.size(self._at(name)) == num_bytes
            except FileNotFoundError:
                return False

    def read(self, name: str) -> bytes:
        with _spoken(self.url):
            return self.store.cat_file(self._at(name))

    def read_part(self, name: str, start: int, length: int) -> bytes:
        with _spoken(self.url):
            return self.store.cat_file(self._at(name), start=start, end=start + length)

    def read_many(self, names: Sequence[str]) -> list[bytes | OSError]:
        """A store that answers asynchronously is asked for all of them at once."""
        with _spoken(self.url):
            found = self.store.cat([self._at(name) for name in names], recursive=False, on_error="return")
        contents = [found.get(self._at(name), FileNotFoundError(name)) for name in names]
        contents = [
            _or_error(self.read, name) if isinstance(content, OSError) and is_io_fault(content) else content
            for name, content in zip(names, contents, strict=True)
        ]
        for one in contents:
            if isinstance(one, OSError):
                _hide(one, self.url)
            elif isinstance(one, Exception):
                raise RunError(f"{self.url}: {type(one).__name__}: {_hidden(str(one), self.url)}") from one
        return contents

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryDirectory(prefix="mura-dist-") as folder:
            local = Path(folder, Path(name).name)
            with open(local, "wb") as file:
                yield file
            with _spoken(self.url):
                self.store.put_file(str(local), self._at(name))

    def remove(self, name: str) -> None:
        with _spoken(self.url), contextlib.suppress(FileNotFoundError):
            self.store.rm_file(self._at(name))

    def copy_to(self, name: str, target: Path) -> None:
        with _spoken(self.url):
            self.store.get_file(self._at(name), str(target))


def _inode(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return retried(lambda: entry.stat().st_size)
    except OSError as error:  # a link to nowhere: whoever reads it is told why it does not open
        if is_io_fault(error):
            raise
        return 0


def _or_error(read: Any, name: str) -> bytes | OSError:
    try:
        return retried(lambda: read(name))
    except OSError as error:
        return error


@contextlib.contextmanager
def _spoken(url: str) -> Iterator[None]:
    """What goes wrong with a store, in one line: a wrong URL is the user's, everything else the work's."""
    protocol = url.partition("://")[0]
    try:
        yield
    except (UserError, RunError, StopRequestedError):
        raise
    except OSError as error:
        _hide(error, url)
        raise
    except ImportError as error:
        needed = error.name or f"fsspec's package for {protocol}://"
        raise UserError(f"{url}: needs {needed}, which is not installed; {install_remedy('remote')}") from error
    except ValueError as error:
        raise UserError(
            f"{url}: {_hidden(str(error), url)}; give a local folder, or a URL of a store fsspec knows, as s3://bucket/folder"
        ) from error
    except Exception as error:
        raise RunError(f"{url}: {type(error).__name__}: {_hidden(str(error), url)}") from error


def _hidden(text: str, url: str) -> str:
    """A store's own words without the secrets of `url`, which they may quote in any way."""
    text = mask_url(text)
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return text


def _secrets(url: str) -> set[str]:
    """User, password and the query's values, as they stand in `url` and decoded; nothing so short that it is in any text."""
    before, _, query = url.partition("://")[2].partition("?")
    user = before.rpartition("@")[0]
    words = {user, *user.split(":", 1), query, *(pair.partition("=")[2] for pair in query.split("&"))}
    return {secret for word in words for secret in (word, unquote(word)) if len(secret) >= _SHORTEST_SECRET}


def _hide(error: OSError, url: str) -> None:
    """Take the secrets of `url` out of `error`."""
    error.args = tuple(word if isinstance(word, int) else _hidden(str(word), url) for word in error.args)
    for name in ("strerror", "filename", "filename2"):
        if isinstance(word := getattr(error, name), str):
            setattr(error, name, _hidden(word, url))
