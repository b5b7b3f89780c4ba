"""Atomic writes, permissions and JSON: a file is either the old one or the new one, never partly written.

A file is written under a random name in the same folder, synced and renamed. A killed writer leaves `.NAME.<random>.partial`,
which nothing reads. The next process that writes into the folder deletes it, once the writer has ended.

Names are not predictable, links are not followed, and two writers of one name do not interfere (`O_EXCL`). A writer holds
`flock` on its file. The kernel releases it when the process ends.

In a `private` folder, files are readable by their owner alone from their first byte on, whatever the umask. Files with
radiographs or patients' paths are written this way.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import stat
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mura_dist.core.errors import UserError, os_reason

_LOCKS = os.name == "posix"  # Windows does not delete a file that is open
if _LOCKS:
    import fcntl

BY_UMASK, PRIVATE = 0o666, 0o600  # permissions: as the umask allows; owner only
_SEARCH = 0o111  # added for folders
_DAY_S = 86400.0
# Age from which another machine's file is stale: whether its writer is alive is unknown here. A scratch file is written once
# and read during the whole job.
_STALE_S = {"partial": _DAY_S, "scratch": 30 * _DAY_S}
_UNFINISHED = re.compile(r"\..*\.(?P<machine>[0-9a-f]{8})-[0-9a-f]{16}\.(?P<kind>partial|scratch)", re.DOTALL)
MAX_DEPTH = 64  # of JSON; this package writes 8 at most
MAX_JSON_BYTES = 256 << 20
_TOO_DEEP = f"nested deeper than {MAX_DEPTH}"
_NAME_BYTES = 200  # prefix of the file's name in the random one; a name has at most 255 bytes


# ---- permissions

_private: Counter[str] = Counter()  # absolute paths that are private now -> number of blocks


@contextlib.contextmanager
def private(*paths: Path) -> Iterator[None]:
    """Make everything that this process creates at or below `paths` in the block readable by its owner alone.

    Existing files and folders keep their permissions.
    """
    names = [os.path.abspath(path) for path in paths]
    _private.update(names)
    try:
        yield
    finally:
        _private.subtract(names)


def mode_of(path: Path) -> int:
    """Return the permissions of a new file at `path`."""
    if not any(_private.values()):
        return BY_UMASK
    absolute = Path(os.path.abspath(path))
    is_private = any(_private[str(parent)] > 0 for parent in (absolute, *absolute.parents))
    return PRIVATE if is_private else BY_UMASK


def make_folder(folder: Path) -> None:
    """Create `folder` and its missing parents, with the permissions of new files in it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    mode = mode_of(folder)
    search = _SEARCH if mode == BY_UMASK else _SEARCH & 0o700
    try:
        folder.mkdir(mode | search)
    except FileExistsError:  # created by another process
        if not folder.is_dir():
            raise
        return
    if mode == PRIVATE:
        folder.chmod(mode | search)


# ---- atomic writes


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Windows cannot open folders, so nothing happens there."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, *, mode: int | None = None) -> Iterator[IO[bytes]]:
    """Yield a binary file that replaces `path` when the block succeeds, and is deleted when it fails.

    Args:
        path: File to replace.
        mode: Permissions from the first byte on. Default: `mode_of(path)`.
    """
    with _unfinished(path, mode, "partial") as (file, partial):
        yield file
        _finish(file)
        os.replace(partial, path)
        sync_folder(path.parent)


@contextlib.contextmanager
def creating(path: Path, *, mode: int | None = None) -> Iterator[IO[bytes]]:
    """Write as `replacing`, but raise FileExistsError at the end of the block if `path` exists."""
    with _unfinished(path, mode, "partial") as (file, partial):
        yield file
        _finish(file)
        if os.name == "nt":
            os.rename(partial, path)  # fails there if the path exists
        else:
            os.link(partial, path)
        sync_folder(path.parent)


@contextlib.contextmanager
def scratch(path: Path, *, mode: int | None = None) -> Iterator[Path]:
    """Yield a new empty file in the folder of `path`, which is deleted after the block."""
    with _unfinished(path, mode, "scratch") as (_, name):
        yield name


def _finish(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    if not _LOCKS:  # Windows cannot rename an open file; elsewhere the lock outlives the name
        file.close()


@contextlib.contextmanager
def _unfinished(path: Path, mode: int | None, kind: str) -> Iterator[tuple[IO[bytes], Path]]:
    """Yield a new locked file with a random name in the folder of `path`, and its path. Delete the name after the block."""
    make_folder(path.parent)
    sweep(path.parent.absolute())
    start = os.fsencode(path.name)[:_NAME_BYTES].decode("utf-8", errors="ignore")
    while True:
        name = path.with_name(f".{start}.{_machine()}-{secrets.token_hex(8)}.{kind}")
        if (descriptor := _create(name, mode_of(path) if mode is None else mode)) is not None:
            break
    try:
        with open(descriptor, "wb") as file:
            yield file, name
    finally:
        with contextlib.suppress(OSError):  # renamed, or its folder was deleted
            name.unlink()


@functools.cache
def _machine() -> str:
    """Return eight hexadecimal digits that identify the running kernel, also in its containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    with contextlib.suppress(OSError):
        return hashlib.sha256(boot.read_bytes()).hexdigest()[:8]
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _create(path: Path, mode: int) -> int | None:
    """Return the descriptor of the new locked file `path`, or None where another process deleted it before the lock."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, mode)
    if not _LOCKS:
        return descriptor
    try:
        if mode != BY_UMASK:
            os.fchmod(descriptor, mode)
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


@functools.lru_cache(maxsize=4096)
def sweep(folder: Path) -> None:
    """Delete the unfinished files in `folder` whose writers have ended. Runs once per process and folder."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if (name := _UNFINISHED.fullmatch(entry.name)) is not None:
                with contextlib.suppress(OSError):
                    _remove_stale(Path(entry.path), name["machine"] == _machine(), _STALE_S[name["kind"]])


def _remove_stale(path: Path, is_local: bool, stale_s: float) -> None:
    """Delete `path` if its writer has ended: by the lock if the writer `is_local`, else by the file's age."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        if is_local and _LOCKS:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError where the writer holds it
            path.unlink()
        elif time.time() - status.st_mtime > stale_s:
            path.unlink()
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Write a file atomically, see `replacing`."""
    with replacing(path, mode=mode) as file:
        file.write(data)


def write_text(path: Path, text: str, *, mode: int | None = None) -> None:
    """Write a text file in UTF-8 atomically, see `replacing`."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"), mode=mode)


def write_json(path: Path, value: Any, *, mode: int | None = None) -> None:
    """Write indented JSON atomically, see `replacing`. NaN raises ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", mode=mode)


def json_sha256(value: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---- untrusted JSON


def parse_json(data: bytes | str, schema: Any = Any) -> Any:
    """Return the JSON value of `data`, validated against the type `schema` (any that pydantic supports).

    Raises:
        ValueError: not JSON, nested deeper than `MAX_DEPTH`, or not of that type; one line.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(value)
    try:
        TypeAdapter(schema).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        location = ".".join(str(key) for key in first["loc"])[:200]
        raise ValueError(f"{f'{location}: ' if location else ''}{first['msg'][:1].lower()}{first['msg'][1:]}") from None
    return value


def read_json(path: Path, schema: Any = Any, *, remedy: str) -> Any:
    """Parse a JSON file as `parse_json`.

    Raises:
        UserError: missing, too large or invalid; the text ends with `remedy`.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size  # a read of n bytes allocates n bytes first
            data = file.read(min(num_bytes, MAX_JSON_BYTES) + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES:,} bytes")
        return parse_json(data, schema)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"{path}: {os_reason(error)}. {_sentence(remedy)}") from None
    except ValueError as error:
        raise UserError(f"{path} is invalid ({error}). {_sentence(remedy)}") from None


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].removesuffix('.')}."


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _check_depth(value: Any) -> None:
    """Raise ValueError beyond MAX_DEPTH. Iterates by level, so that deep nesting cannot overflow the stack."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def check_folder(folder: Path, option: str) -> None:
    """Raise UserError if `folder` is not a writable folder and cannot become one. Called before the work begins."""
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(f"{option}: {existing} is a file, but {folder} must be a folder. Give another path.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"{option}: {existing} is not writable (read-only, or another user's). Make it writable, or give another path."
        )


def user_folder(variable: str, default: str) -> Path:
    """Return the folder in an environment variable, or else `default` in the user's home.

    Raises:
        UserError: the home is unknown, as for some users of containers.
    """
    if value := os.environ.get(variable):
        return Path(value)
    try:
        return Path.home() / default
    except RuntimeError:
        raise UserError(
            f"HOME is not set and the system does not know this user. Set HOME, or {variable}=FOLDER."
        ) from None


def expand_user(path: str) -> Path:
    """Return a path with a leading ~ replaced by the user's home. Raises UserError where that is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: the home directory of ~ is unknown. Write the absolute path, or set HOME.") from None
