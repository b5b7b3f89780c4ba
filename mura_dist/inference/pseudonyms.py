"""Pseudonyms of files and studies, which only the site can map back.

    path, study, or DICOM study identifiers --- HMAC-SHA256 with the site's key ---> file-..., study-..., dicom-...
    KEYTABLE: path,pseudonym,study,study_pseudonym maps them back

The key and the key table stay on the site: either of them reveals the names in the tables. Tables are pseudonymous, not
anonymous. A file has the same pseudonym in every run of the site, and the pixels of a radiograph may identify a person.
"""

import contextlib
import csv
import hashlib
import hmac
import io
import itertools
import os
import re
import secrets
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mura_dist.core import files as atomic
from mura_dist.core.errors import RunError, StopRequestedError, UserError, os_reason
from mura_dist.data import table_names

KEY_VARIABLE = "MURA_DIST_SITE_KEY"
COLUMNS = ("path", "pseudonym", "study", "study_pseudonym")
DIGITS = 16  # 64 bits: two of 10^6 names are equal with probability 3e-8, two of 10^8 with 3e-4
_KEY_BYTES = 32
_NON_OWNER_BITS = 0o077

KeyRow = tuple[str, str, str, str]
F = TypeVar("F", bound=Callable[..., Any])


def pseudonym(key: bytes, kind: str, *parts: str) -> str:
    """Return `kind`-<16 hex digits>, a function of key, kind and parts."""
    message = "\0".join((kind, *parts)).encode("utf-8", "surrogatepass")
    return f"{kind}-{hmac.new(key, message, hashlib.sha256).hexdigest()[:DIGITS]}"


def dicom_study_pseudonym(key: bytes, study_uid: str, body_part: str, laterality: str) -> str:
    """Return a study's pseudonym. One StudyInstanceUID may hold both wrists and an elbow, which are three studies."""
    return pseudonym(key, "dicom", study_uid, body_part, laterality)


@dataclass(frozen=True)
class Pseudonymizer:
    """The names of files and studies in tables, pictures and messages. Without a key they are the original names."""

    key: bytes | None = field(default=None, repr=False)

    def file(self, path: str) -> str:
        """Return the name of a printable path. A pseudonym has no suffix, which is a part of the original name."""
        return path if self.key is None else pseudonym(self.key, "file", path)

    def study(self, study: str) -> str:
        """Return the name of a study that has the name of a folder or file."""
        return study if self.key is None else pseudonym(self.key, "study", study)

    def digest(self, sha256: str) -> str:
        """Return a digest of names that cannot be compared with guessed names without the key."""
        return sha256 if self.key is None else hmac.new(self.key, sha256.encode(), hashlib.sha256).hexdigest()

    @property
    def fingerprint(self) -> str | None:
        """A pseudonym of the key itself, by which plans with different keys differ."""
        return None if self.key is None else pseudonym(self.key, "key")


# ---- the site's key


def key_path() -> Path:
    """Return the file of the site's key: MURA_DIST_SITE_KEY, or a file in the user's configuration folder."""
    return Path(os.environ.get(KEY_VARIABLE) or _config_folder() / "site.key")


def _config_folder() -> Path:
    variable, default = ("APPDATA", "AppData/Roaming") if os.name == "nt" else ("XDG_CONFIG_HOME", ".config")
    return atomic.user_folder(variable, default) / "mura-dist"


def site_key(*key_free_folders: Path) -> bytes:
    """Return the site's key. The first call creates it, and concurrent first calls return the same key.

    Args:
        *key_free_folders: Folders that must not contain the key, since they are read or shared.

    Raises:
        UserError: the key lies in such a folder, is too short, or others than its owner may read it.
    """
    path = key_path()
    for folder in key_free_folders:
        if _inside(path, folder):
            raise UserError(
                f"site key {path} lies inside {folder}. Keep it elsewhere, and name the file with {KEY_VARIABLE}=PATH."
            )
    try:
        if not path.exists():
            _create_key(path)
        _check_mode(path, "site key")
        key = path.read_bytes()
    except OSError as error:
        raise UserError(f"site key {path}: {os_reason(error)}. Name another file with {KEY_VARIABLE}=PATH.") from error
    if len(key) < _KEY_BYTES:
        raise UserError(
            f"site key {path} holds {len(key)} bytes (at least {_KEY_BYTES}). Delete it, and the next command creates a new one."
        )
    return key


def _create_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with atomic.creating(path, mode=0o600) as file:
            file.write(secrets.token_hex(_KEY_BYTES).encode())
    except FileExistsError:  # another process was faster, and its key is the site's
        pass


def _check_mode(path: Path, label: str) -> None:
    if os.name == "nt":  # a mode does not describe the permissions
        return
    mode = path.stat().st_mode & 0o777
    if mode & _NON_OWNER_BITS:
        raise UserError(f"{label} {path} has mode {mode:04o}: others than its owner may use it. Run chmod 600 {path}")


def _inside(path: Path, folder: Path) -> bool:
    """Return whether `path` lies below `folder`, after resolving links. Neither has to exist."""
    folder = folder.resolve()
    return any(parent == folder or _is_same_file(parent, folder) for parent in path.resolve().parents)


def _is_same_file(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return False


# ---- the key table


def check_keytable(keytable: Path, out: Path, folders: Iterable[Path]) -> None:
    """Raise UserError if `keytable` cannot be written, or lies in `out` or one of `folders`."""
    option = f"--pseudonyms {keytable}"
    for name, folder in (("--out", out), *(("DIRECTORY", folder) for folder in folders)):
        if _inside(keytable, folder):
            raise UserError(f"{option} lies inside {name} ({folder}), whose names it reveals. Give a file elsewhere.")
    if keytable.is_dir():
        raise UserError(f"{option} is a folder. Give a file.")
    if not keytable.parent.is_dir():
        raise UserError(f"{option}: no folder {keytable.parent}. Create it first.")
    if not os.access(keytable.parent, os.W_OK | os.X_OK):
        raise UserError(f"{option}: permission denied. Give a file in a folder that you may write to.")
    if keytable.exists():
        _check_mode(keytable, "--pseudonyms")


def check_keytable_files(keytable: Path, files: Iterable[tuple[str, str]]) -> None:
    """Raise UserError if `keytable` exists and does not name these `files`, (path, pseudonym) each."""
    if keytable.exists():
        _compare(keytable, (line[:2] for line in _read(keytable)), files)


def write_keytable(keytable: Path, rows: Callable[[], Iterable[KeyRow]]) -> None:
    """Write the key table atomically. An existing one is never overwritten.

    Raises:
        UserError: an existing key table has other rows.
    """
    try:
        with atomic.creating(keytable, mode=0o600) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
            table = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
            table.writerow(COLUMNS)
            table.writerows(map(table_names.escape_formula, row) for row in rows())
            text.detach()
    except FileExistsError:
        _compare(keytable, _read(keytable), rows())


def _read(keytable: Path) -> Iterator[tuple[str, ...]]:
    """Yield the lines below the header. A file that is no key table yields an empty line, which equals no row."""
    try:
        with open(keytable, newline="", encoding="utf-8") as file:
            lines = csv.reader(file)
            if tuple(next(lines, ())) != COLUMNS:
                yield ()
                return
            yield from (tuple(map(table_names.unescape, line)) for line in lines)
    except (ValueError, csv.Error):
        yield ()


def _compare(keytable: Path, lines: Iterable[tuple[str, ...]], rows: Iterable[tuple[str, ...]]) -> None:
    for number, (line, row) in enumerate(itertools.zip_longest(lines, rows), start=2):
        if line != row:
            raise UserError(f"--pseudonyms {keytable}, line {number}: names of another run. Give another file.")


# ---- messages


@contextlib.contextmanager
def redact_paths(inputs: Sequence[Path | str], keytable: Path | None) -> Iterator[None]:
    """With a key table, remove the inputs and paths below them from the messages of errors in the block."""
    try:
        yield
    except Exception as error:
        # An ImportError names a package, and the command line adds the remedy.
        if keytable is None or isinstance(error, ImportError):
            raise
        if isinstance(error, UserError | RunError | StopRequestedError):
            raise type(error)(_without(inputs, str(error))) from None
        if isinstance(error, OSError) and error.strerror:
            raise OSError(error.errno, error.strerror, _outside(error.filename, inputs)) from None
        frame = traceback.extract_tb(error.__traceback__)[-1]  # a whole traceback would quote names
        raise RunError(
            f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}. To see more, run the command without "
            "--pseudonyms where nobody else reads its output."
        ) from None


def _outside(name: Any, inputs: Sequence[Path | str]) -> str | None:
    """Return the file of an error unless it is an input or lies in one."""
    if not isinstance(name, str | bytes):
        return None
    path = Path(os.fsdecode(name))
    is_input = any(path.resolve() == Path(root).resolve() or _inside(path, Path(root)) for root in inputs)
    return None if is_input else os.fsdecode(name)


def _folder(path: Path | str) -> Path:
    return Path(path) if os.path.isdir(path) else Path(path).parent


def _without(inputs: Sequence[Path | str], text: str) -> str:
    """Return `text` with `input 1` for the first input, and so on, and DIRECTORY for their common folder."""
    aliases = {Path(path): "DIRECTORY" if len(inputs) == 1 else f"input {n}" for n, path in enumerate(inputs, start=1)}
    with contextlib.suppress(ValueError):  # Windows: on different drives
        common = os.path.commonpath([os.path.abspath(_folder(path)) for path in inputs])
        aliases.setdefault(Path(common), "DIRECTORY")
    names = {
        name: alias
        for path, alias in aliases.items()
        for name in (os.path.abspath(path), str(path.resolve()), str(path))
    }
    for name in sorted(names, key=len, reverse=True):
        if name.strip("./\\"):
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", names[name], text)
    return text
