"""Storage of files: a local folder, or a URL (s3://bucket/path, memory://path, any protocol of fsspec).

    storage = open_storage("s3://bucket/MURA-v1.1")      storage.files() -> (name, bytes) ...      storage.read(name) -> bytes

Names are relative, with "/" between their components. A write appears completely or not at all: locally by rename, in an object
store because a put is atomic. fsspec and the store find credentials and endpoints (environment, configuration files). Secrets in
a URL are masked in `str(storage)`; `RemoteStorage.url` contains them.
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

_MIN_SECRET_LENGTH = 4

StoragePath = Path | str
"""A local folder, or a URL (a str with "://")."""

RETRY_WAITS_S = (0.1, 0.2, 0.4)  # before each further attempt after an I/O fault

Result = TypeVar("Result")


def with_retries(read: Callable[[], Result]) -> Result:
    """Return the result of `read`, calling it again after an I/O fault, at most len(RETRY_WAITS_S) times.

    Raises:
        OSError: of the last call, or at once where the file itself is at fault.
    """
    for wait_s in RETRY_WAITS_S:
        try:
            return read()
        except OSError as error:
            if not is_io_fault(error):
                raise
        time.sleep(wait_s)
    return read()


def is_remote(path: StoragePath) -> bool:
    """Return whether `path` is a URL."""
    return "://" in str(path)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a local file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_storage(path: StoragePath) -> "Storage":
    """Return the storage at `path`. A local folder need not exist.

    Raises:
        UserError: the URL's protocol is unknown, or its package is missing.
    """
    return RemoteStorage(str(path)) if is_remote(path) else LocalStorage(Path(path))


class Storage(ABC):
    """A folder of files."""

    @abstractmethod
    def __str__(self) -> str:
        """Return the path or URL as the user wrote it, without secrets."""

    @abstractmethod
    def child(self, name: str) -> "Storage":
        """Return the storage of the folder `name`."""

    @abstractmethod
    def is_folder(self) -> bool:
        """Return whether the folder exists."""

    @abstractmethod
    def names(self) -> set[str]:
        """Return the names of the files and folders directly in it; empty where it does not exist."""

    @abstractmethod
    def files(self, repeated: list[tuple[str, str]] | None = None) -> Iterator[tuple[str, int]]:
        """Yield (name, size in bytes) of all files, recursively and in no particular order. Skip folders that begin with ".".

        Local links to folders are followed after all other folders, the least deep first. Each folder is listed once, so
        loops end.

        Args:
            repeated: Receives (name, name under which it was listed) of each folder that was already listed.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Return whether the file exists."""

    @abstractmethod
    def matches(self, name: str, num_bytes: int, digest: str) -> bool:
        """Return whether the file exists with this size and SHA-256. Behind a URL only the size is compared."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of a file."""

    @abstractmethod
    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Return `length` bytes of a file from `start` on."""

    @abstractmethod
    def read_many(self, names: Sequence[str]) -> list[bytes | OSError]:
        """Return the content of each file, or its error. The reads are concurrent where that is faster."""

    @abstractmethod
    def writing(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Yield a binary file that becomes `name` when the block succeeds. Two writers of one name do not interfere."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file if it exists."""

    @abstractmethod
    def copy_to(self, name: str, target: Path) -> None:
        """Copy or download a file to a local one. An interruption leaves a partial file."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file."""
        with self.writing(name) as file:
            file.write(data)


class LocalStorage(Storage):
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def child(self, name: str) -> "LocalStorage":
        """Return the storage of a subfolder."""
        return LocalStorage(self.folder / name) if name else self

    def is_folder(self) -> bool:
        """Return whether the folder exists."""
        return self.folder.is_dir()

    def names(self) -> set[str]:
        """List the folder."""
        return set(os.listdir(self.folder)) if self.folder.is_dir() else set()

    def files(self, repeated: list[tuple[str, str]] | None = None) -> Iterator[tuple[str, int]]:
        """Yield (name, size in bytes) of all files, see Storage.files."""
        folders = [""]
        links: list[tuple[int, bytes]] = []  # a heap, so that the order does not depend on the file system
        for folder in folders:  # which grows
            yield from self._list(folder, folders, links)
        listed = {_inode(self.folder / folder): folder for folder in folders} if links else {}
        while links:
            linked = [os.fsdecode(heapq.heappop(links)[1])]
            for folder in linked:
                first = listed.setdefault(_inode(self.folder / folder), folder)
                if first is folder:
                    yield from self._list(folder, linked, links)
                elif repeated is not None:
                    repeated.append((folder.rstrip("/"), first.rstrip("/")))

    def _list(self, folder: str, folders: list[str], links: list[tuple[int, bytes]]) -> Iterator[tuple[str, int]]:
        """Yield the files of one folder. Add its folders and its links to folders to the lists."""
        with os.scandir(self.folder / folder) as entries:
            for entry in entries:
                name = f"{folder}{entry.name}/"
                if not _is_folder(entry):
                    yield name[:-1], _size(entry)
                elif entry.name.startswith("."):
                    continue
                elif entry.is_symlink():
                    heapq.heappush(links, (name.count("/"), os.fsencode(name)))
                else:
                    folders.append(name)

    def exists(self, name: str) -> bool:
        """Return whether the path is a regular file. Retries I/O faults."""
        try:
            return stat.S_ISREG(with_retries((self.folder / name).stat).st_mode)
        except OSError as error:
            if is_io_fault(error):  # unknown
                raise
            return False

    def matches(self, name: str, num_bytes: int, digest: str) -> bool:
        """Compare size and SHA-256."""
        path = self.folder / name
        return self.exists(name) and path.stat().st_size == num_bytes and sha256(path) == digest

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        return (self.folder / name).read_bytes()

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Read unbuffered."""
        # A Path object and a buffer would cost more than the read.
        with open(os.path.join(self.folder, name), "rb", buffering=0) as file:
            file.seek(start)
            return file.read(length)

    def read_many(self, names: Sequence[str]) -> list[bytes | OSError]:
        """Read one file after the other."""
        return [_or_error(self.read, name) for name in names]

    def writing(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Write to a temporary name, then rename."""
        return atomic.replacing(self.folder / name)

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        (self.folder / name).unlink(missing_ok=True)

    def copy_to(self, name: str, target: Path) -> None:
        """Copy a file."""
        shutil.copyfile(self.folder / name, target)


class RemoteStorage(Storage):
    """A folder behind a URL, through fsspec. Errors of a store's library are raised as OSError or as RunError with one line."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") if not url.endswith("://") else url
        if any(masked in url for masked in (f"{MASK}@", f"?{MASK}", f"#{MASK}")):
            raise UserError(
                f"{url}: the credentials are masked. Give the URL with its credentials, or configure them for the store "
                "(environment, configuration files)."
            )
        with _one_line_errors(self.url):
            import fsspec

            self.store, self.root = fsspec.core.url_to_fs(self.url)

    def __str__(self) -> str:
        return mask_url(self.url)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteStorage, (self.url,)

    def child(self, name: str) -> "RemoteStorage":
        """Return the storage of a subfolder."""
        return RemoteStorage(f"{self.url}/{name}") if name else self

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def is_folder(self) -> bool:
        """Return whether the folder exists."""
        with _one_line_errors(self.url):
            return self.store.isdir(self.root)

    def names(self) -> set[str]:
        """List the folder, without the cache of a former listing."""
        with _one_line_errors(self.url):
            self.store.invalidate_cache()  # other processes write there too
            try:
                paths = self.store.ls(self.root, detail=False)
            except FileNotFoundError:
                return set()
            return {path.rstrip("/").rsplit("/", 1)[-1] for path in paths}

    def files(self, repeated: list[tuple[str, str]] | None = None) -> Iterator[tuple[str, int]]:
        """Yield (name, size in bytes) of all files, see Storage.files."""
        with _one_line_errors(self.url):
            listing = self.store.find(self.root, detail=True)
        start = len(self.root.rstrip("/")) + 1
        for path, info in listing.items():
            name = path[start:]
            if not any(folder.startswith(".") for folder in name.split("/")[:-1]):
                yield name, int(info.get("size") or 0)

    def exists(self, name: str) -> bool:
        """Return whether the file exists, without the cache of a former listing."""
        with _one_line_errors(self.url):
            self.store.invalidate_cache()
            return self.store.isfile(self._path(name))

    def matches(self, name: str, num_bytes: int, digest: str) -> bool:
        """Compare the size only: the digest would cost a download, and a store verifies uploads itself."""
        with _one_line_errors(self.url):
            self.store.invalidate_cache()
            try:
                return self.store.size(self._path(name)) == num_bytes
            except FileNotFoundError:
                return False

    def read(self, name: str) -> bytes:
        """Download a file."""
        with _one_line_errors(self.url):
            return self.store.cat_file(self._path(name))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Download a range of a file."""
        with _one_line_errors(self.url):
            return self.store.cat_file(self._path(name), start=start, end=start + length)

    def read_many(self, names: Sequence[str]) -> list[bytes | OSError]:
        """Read concurrently where the store is asynchronous."""
        with _one_line_errors(self.url):
            results = self.store.cat([self._path(name) for name in names], recursive=False, on_error="return")
        contents = [results.get(self._path(name), FileNotFoundError(name)) for name in names]
        contents = [
            _or_error(self.read, name) if isinstance(content, OSError) and is_io_fault(content) else content
            for name, content in zip(names, contents, strict=True)
        ]
        for content in contents:
            if isinstance(content, OSError):
                _mask_error(content, self.url)
            elif isinstance(content, Exception):
                reason = _mask_secrets(str(content), self.url)
                raise RunError(f"{self.url}: {type(content).__name__}: {reason}") from content
        return contents

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """Write to a local temporary file, then upload it."""
        with tempfile.TemporaryDirectory(prefix="mura-dist-") as folder:
            local = Path(folder, Path(name).name)
            with open(local, "wb") as file:
                yield file
            with _one_line_errors(self.url):
                self.store.put_file(str(local), self._path(name))

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        with _one_line_errors(self.url), contextlib.suppress(FileNotFoundError):
            self.store.rm_file(self._path(name))

    def copy_to(self, name: str, target: Path) -> None:
        """Download a file."""
        with _one_line_errors(self.url):
            self.store.get_file(self._path(name), str(target))


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
        return with_retries(lambda: entry.stat().st_size)
    except OSError as error:  # a broken link; reading it raises the reason
        if is_io_fault(error):
            raise
        return 0


def _or_error(read: Any, name: str) -> bytes | OSError:
    try:
        return with_retries(lambda: read(name))
    except OSError as error:
        return error


@contextlib.contextmanager
def _one_line_errors(url: str) -> Iterator[None]:
    """Raise errors of a store with one line: UserError for a wrong URL, else OSError or RunError."""
    protocol = url.partition("://")[0]
    try:
        yield
    except (UserError, RunError, StopRequestedError):
        raise
    except OSError as error:
        _mask_error(error, url)
        raise
    except ImportError as error:
        package = error.name or f"fsspec's package for {protocol}://"
        raise UserError(f"{url}: needs {package}, which is not installed. Run {install_remedy('remote')}.") from error
    except ValueError as error:
        raise UserError(
            f"{url}: {_mask_secrets(str(error), url)}. Give a local folder, or a URL that fsspec supports, such as s3://bucket/folder."
        ) from error
    except Exception as error:
        raise RunError(f"{url}: {type(error).__name__}: {_mask_secrets(str(error), url)}") from error


def _mask_secrets(text: str, url: str) -> str:
    """Return a store's message without the secrets of `url`, in whatever form it quotes them."""
    text = mask_url(text)
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return text


def _secrets(url: str) -> set[str]:
    """Return user, password and the query's values, encoded and decoded, except texts too short to be distinctive."""
    before, _, query = url.partition("://")[2].partition("?")
    user = before.rpartition("@")[0]
    texts = {user, *user.split(":", 1), query, *(pair.partition("=")[2] for pair in query.split("&"))}
    return {secret for text in texts for secret in (text, unquote(text)) if len(secret) >= _MIN_SECRET_LENGTH}


def _mask_error(error: OSError, url: str) -> None:
    """Mask the secrets of `url` in `error`."""
    error.args = tuple(arg if isinstance(arg, int) else _mask_secrets(str(arg), url) for arg in error.args)
    for name in ("strerror", "filename", "filename2"):
        if isinstance(text := getattr(error, name), str):
            setattr(error, name, _mask_secrets(text, url))
