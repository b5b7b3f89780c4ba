"""Files that are either the old one or the new one, never half of either.

Write under a random name in the same folder, fsync, rename. A writer that is killed leaves a `.NAME.<random>.partial` file, which
nothing reads. The next process that writes into the folder deletes it, once its writer is known to have ended.

No name can be guessed, no link is followed, and two writers of one name share nothing (`O_EXCL`). A writer holds `flock` on its
file. The kernel lets go of it with the process.

What lies in a `private` folder is its owner's alone from its first byte on, whatever the umask says. What holds radiographs or
patients' paths is written so.
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

BY_UMASK, PRIVATE = 0o666, 0o600  # permissions: as any program writes; the owner's alone
_SEARCH = 0o111  # what a folder has beside them, where a file may be read
_DAY_S = 86400.0
# Of another machine's file nobody here can tell whether its writer lives: it is stale when not written for so long. A scratch
# file is written once and read for as long as the job lasts.
_STALE_S = {"partial": _DAY_S, "scratch": 30 * _DAY_S}
_UNFINISHED = re.compile(r"\..*\.(?P<machine>[0-9a-f]{8})-[0-9a-f]{16}\.(?P<kind>partial|scratch)", re.DOTALL)
MAX_DEPTH = 64  # of JSON: ours has 8
MAX_JSON_BYTES = 256 << 20
_TOO_DEEP = f"nested deeper than {MAX_DEPTH}"
_NAME_BYTES = 200  # of a file's name that its random one repeats; 255 is the limit of a name


# ---- who may read it

_private: Counter[str] = Counter()  # absolute paths of what is private now, and how many blocks say so


@contextlib.contextmanager
def private(*paths: Path) -> Iterator[None]:
    """Make what this process creates at or below `paths` in the block readable for its owner alone.

    What is there before keeps its permissions: a folder that the user made for others stays theirs to list.
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
    whole = Path(os.path.abspath(path))
    return PRIVATE if any(_private[str(each)] > 0 for each in (whole, *whole.parents)) else BY_UMASK


def make_folder(folder: Path) -> None:
    """Make `folder` and what is missing above it, with the permissions of its files. OSError where that cannot be."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    mode = mode_of(folder)
    search = _SEARCH if mode == BY_UMASK else _SEARCH & 0o700
    try:
        folder.mkdir(mode | search)
    except FileExistsError:  # another process was faster
        if not folder.is_dir():
            raise
        return
    if mode == PRIVATE:
        folder.chmod(mode | search)


# ---- whole files


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Windows cannot open folders: there the rename alone has to do."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, *, mode: int | None = None) -> Iterator[IO[bytes]]:
    """Yield a binary file that becomes `path` when the block ends well, and vanishes when it does not.

    `mode`: the file's permissions from its first byte on; None: what `mode_of` says.
    """
    with _unfinished(path, mode, "partial") as (file, partial):
        yield file
        _finish(file)
        os.replace(partial, path)
        sync_folder(path.parent)


@contextlib.contextmanager
def creating(path: Path, *, mode: int | None = None) -> Iterator[IO[bytes]]:
    """Write as `replacing`, but leave what lies at `path`: FileExistsError at the block's end. One writer is first."""
    with _unfinished(path, mode, "partial") as (file, partial):
        yield file
        _finish(file)
        if os.name == "nt":
            os.rename(partial, path)  # there it refuses what exists
        else:
            os.link(partial, path)
        sync_folder(path.parent)


@contextlib.contextmanager
def scratch(path: Path, *, mode: int | None = None) -> Iterator[Path]:
    """Yield a new empty file beside `path`, which vanishes with the block."""
    with _unfinished(path, mode, "scratch") as (_, name):
        yield name


def _finish(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    if not _LOCKS:  # Windows does not rename a file that is open; elsewhere the lock lasts longer than the name
        file.close()


@contextlib.contextmanager
def _unfinished(path: Path, mode: int | None, kind: str) -> Iterator[tuple[IO[bytes], Path]]:
    """Yield a new file of a random name beside `path`, locked, and its path. The name is gone after the block."""
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
        with contextlib.suppress(OSError):  # renamed; or its folder is gone, which is an error of its own
            name.unlink()


@functools.cache
def _machine() -> str:
    """Return eight digits that the processes of this running kernel share, also those of its containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    with contextlib.suppress(OSError):
        return hashlib.sha256(boot.read_bytes()).hexdigest()[:8]
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _create(path: Path, mode: int) -> int | None:
    """Return a descriptor of the new file `path`, locked; None where another process swept it before the lock."""
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
    """Delete the unfinished files in `folder` whose writers have ended. Once in a process and folder."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if (name := _UNFINISHED.fullmatch(entry.name)) is not None:
                with contextlib.suppress(OSError):
                    _remove_stale(Path(entry.path), name["machine"] == _machine(), _STALE_S[name["kind"]])


def _remove_stale(path: Path, here: bool, stale_s: float) -> None:
    """Delete `path` if its writer has ended. `here`: the writer is a process of this machine, and so the lock tells."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        if here and _LOCKS:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError where the writer holds it
            path.unlink()
        elif time.time() - status.st_mtime > stale_s:
            path.unlink()
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes, *, mode: int | None = None) -> None:
    with replacing(path, mode=mode) as file:
        file.write(data)


def write_text(path: Path, text: str, *, mode: int | None = None) -> None:
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"), mode=mode)


def write_json(path: Path, value: Any, *, mode: int | None = None) -> None:
    """Indented, keys in the order given, NaN refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", mode=mode)


# ---- JSON of others


def parse_json(data: bytes | str, schema: Any = Any) -> Any:
    """Return the JSON value that `data` holds, of the type `schema` (anything pydantic knows), unchanged.

    Raises:
        ValueError: one line, where it is no JSON, nests deeper than `MAX_DEPTH`, or is not of that type.
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
        at = ".".join(str(key) for key in first["loc"])[:200]
        raise ValueError(f"{f'{at}: ' if at else ''}{first['msg'][:1].lower()}{first['msg'][1:]}") from None
    return value


def read_json(path: Path, schema: Any = Any, *, remedy: str) -> Any:
    """Parse a JSON file as `parse_json`. Raises UserError where it is missing, too large or damaged, with the remedy; OSError."""
    try:
        with open(path, "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size  # a read of n bytes takes memory for all n beforehand
            data = file.read(min(num_bytes, MAX_JSON_BYTES) + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES:,} bytes")
        return parse_json(data, schema)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"{path}: {os_reason(error)}; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _check_depth(value: Any) -> None:
    """Level by level: what recurses over it later must not run out of stack."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def check_folder(folder: Path, option: str) -> None:
    """UserError where `folder` neither is nor can become one to write into: asked before the work, not after it."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"{option}: {there} is a file, {folder} has to be a folder; give another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"{option}: {there} cannot be written (read-only, or another user's); make it so, or give another place"
        )


def user_folder(variable: str, default: str) -> Path:
    """Return the folder that an environment variable names, or else `default` below the user's home.

    Raises:
        UserError: neither is known: HOME is not set, and the system does not know the user (a container's).
    """
    if named := os.environ.get(variable):
        return Path(named)
    try:
        return Path.home() / default
    except RuntimeError:
        raise UserError(
            f"HOME is not set and this user is unknown to the system; set HOME, or {variable}=FOLDER"
        ) from None


def expand_user(path: str) -> Path:
    """Return a path whose leading ~ is the user's home. Raises UserError where that is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: the home that ~ stands for is not known; write the whole path, or set HOME") from None
