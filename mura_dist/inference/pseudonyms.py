"""Names by which a site knows whose radiograph it is, and nobody else does.

    path, study, or what a DICOM says of its study --- HMAC-SHA256 under the site's key ---> file-..., study-..., dicom-...
    KEYTABLE: path,pseudonym,study,study_pseudonym: the way back

The key is a file that stays on the site, and so does the key table: whoever has either can put the names back into the
tables. Pseudonymous, not anonymous: the same file has the same name in every run of the site, and a radiograph is itself.
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
DIGITS = 16  # 64 bits: of 10^6 names two are alike with probability 3e-8, of 10^8 with 3e-4
_KEY_BYTES = 32
_OTHERS = 0o077  # permissions of anybody but the owner

KeyRow = tuple[str, str, str, str]
F = TypeVar("F", bound=Callable[..., Any])


def pseudonym(key: bytes, kind: str, *parts: str) -> str:
    """`kind`-<16 hex digits>; the same of the same parts under the same key. Kinds never share a name."""
    message = "\0".join((kind, *parts)).encode("utf-8", "surrogatepass")
    return f"{kind}-{hmac.new(key, message, hashlib.sha256).hexdigest()[:DIGITS]}"


def dicom_study_pseudonym(key: bytes, study_uid: str, body_part: str, laterality: str) -> str:
    """A study's name: one StudyInstanceUID can hold both wrists and an elbow, which are three studies."""
    return pseudonym(key, "dicom", study_uid, body_part, laterality)


@dataclass(frozen=True)
class Pseudonymizer:
    """What tables, pictures and messages of a run call things. Without a key: by their own names."""

    key: bytes | None = field(default=None, repr=False)

    def file(self, path: str) -> str:
        """Of a path as the tables have it. It has no suffix, for that is a part of a name too."""
        return path if self.key is None else pseudonym(self.key, "file", path)

    def study(self, study: str) -> str:
        """Of a study that is called after folders or files; a DICOM's is a pseudonym already."""
        return study if self.key is None else pseudonym(self.key, "study", study)

    def digest(self, sha256: str) -> str:
        """A digest of names that nobody without the key can compare with that of names they guess."""
        return sha256 if self.key is None else hmac.new(self.key, sha256.encode(), hashlib.sha256).hexdigest()

    @property
    def fingerprint(self) -> str | None:
        """Tells keys apart, and nothing of them."""
        return None if self.key is None else pseudonym(self.key, "key")


# ---- the site's key


def key_path() -> Path:
    """Where the site's key lies, or will: MURA_DIST_SITE_KEY, or the user's own configuration."""
    return Path(os.environ.get(KEY_VARIABLE) or _configuration() / "site.key")


def _configuration() -> Path:
    place = ("APPDATA", "AppData/Roaming") if os.name == "nt" else ("XDG_CONFIG_HOME", ".config")
    return atomic.user_folder(*place) / "mura-dist"


def site_key(*apart: Path) -> bytes:
    """The site's secret, made when first needed; two processes that need it at once get the same. Raises UserError.

    apart: folders it must not lie in, for they are given away or read.
    """
    path = key_path()
    for folder in apart:
        if _inside(path, folder):
            raise UserError(
                f"site key {path} lies inside {folder}; keep it elsewhere: {KEY_VARIABLE}=PATH names the file"
            )
    try:
        if not path.exists():
            _make_key(path)
        _check_mode(path, "site key")
        key = path.read_bytes()
    except OSError as error:
        raise UserError(f"site key {path}: {os_reason(error)}; {KEY_VARIABLE}=PATH names another file") from error
    if len(key) < _KEY_BYTES:
        raise UserError(
            f"site key {path} holds {len(key)} bytes, at least {_KEY_BYTES} are needed; delete it and a new one is made"
        )
    return key


def _make_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with atomic.creating(path, mode=0o600) as file:
            file.write(secrets.token_hex(_KEY_BYTES).encode())
    except FileExistsError:  # another process was first: its key is the site's
        pass


def _check_mode(path: Path, what: str) -> None:
    if os.name == "nt":  # permissions are not kept in a mode there
        return
    mode = path.stat().st_mode & 0o777
    if mode & _OTHERS:
        raise UserError(f"{what} {path} has mode {mode:04o}, others than its owner may use it; chmod 600 {path}")


def _inside(path: Path, folder: Path) -> bool:
    """Whether `path` lies below `folder`, by whatever names; neither has to be there."""
    folder = folder.resolve()
    return any(parent == folder or _same(parent, folder) for parent in path.resolve().parents)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


# ---- the way back


def check_keytable(keytable: Path, out: Path, folders: Iterable[Path]) -> None:
    """UserError where `keytable` cannot be written, or lies where it would be given away."""
    option = f"--pseudonyms {keytable}"
    for name, folder in (("--out", out), *(("DIRECTORY", folder) for folder in folders)):
        if _inside(keytable, folder):
            raise UserError(f"{option} lies inside {name} ({folder}), whose names it undoes; give a file elsewhere")
    if keytable.is_dir():
        raise UserError(f"{option} is a folder; give a file")
    if not keytable.parent.is_dir():
        raise UserError(f"{option}: no folder {keytable.parent}; make it first")
    if not os.access(keytable.parent, os.W_OK | os.X_OK):
        raise UserError(f"{option}: permission denied; give a file in a folder you may write to")
    if keytable.exists():
        _check_mode(keytable, "--pseudonyms")


def check_keytable_files(keytable: Path, files: Iterable[tuple[str, str]]) -> None:
    """UserError where `keytable` is there and does not name these very files, (path, pseudonym) each: before any work."""
    if keytable.exists():
        _compare(keytable, (line[:2] for line in _read(keytable)), files)


def write_keytable(keytable: Path, rows: Callable[[], Iterable[KeyRow]]) -> None:
    """Write `rows()`; whole, or not at all. What lies there is never overwritten: it is these rows, or UserError."""
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
    """The lines below the header, as names; what is no table of ours has one line that equals none."""
    try:
        with open(keytable, newline="", encoding="utf-8") as file:
            lines = csv.reader(file)
            if tuple(next(lines, ())) != COLUMNS:
                yield ()
                return
            yield from (tuple(map(table_names.unescape, line)) for line in lines)
    except (ValueError, csv.Error):
        yield ()


def _compare(keytable: Path, found: Iterable[tuple[str, ...]], wanted: Iterable[tuple[str, ...]]) -> None:
    for number, (there, ours) in enumerate(itertools.zip_longest(found, wanted), start=2):
        if there != ours:
            raise UserError(f"--pseudonyms {keytable}, line {number}: not of this run's names; give another file")


# ---- what is said


@contextlib.contextmanager
def redact_paths(inputs: Sequence[Path | str], keytable: Path | None) -> Iterator[None]:
    """Keep the inputs, and what lies in them, out of the messages of errors in the block, where there is a key table."""
    try:
        yield
    except Exception as error:
        if keytable is None or isinstance(
            error, ImportError
        ):  # that names a package; the command line knows the remedy
            raise
        if isinstance(error, UserError | RunError | StopRequestedError):
            raise type(error)(_without(inputs, str(error))) from None
        if isinstance(error, OSError) and error.strerror:
            raise OSError(error.errno, error.strerror, _outside(error.filename, inputs)) from None
        place = traceback.extract_tb(error.__traceback__)[-1]  # a traceback quotes what it stumbled over
        raise RunError(
            f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}; without --pseudonyms, where nobody "
            "else reads it, the same command says more"
        ) from None


def _outside(name: Any, inputs: Sequence[Path | str]) -> str | None:
    """Return the file an error is about, where it is none of the inputs and lies in none of them."""
    if not isinstance(name, str | bytes):
        return None
    path = Path(os.fsdecode(name))
    inside = any(path.resolve() == Path(each).resolve() or _inside(path, Path(each)) for each in inputs)
    return None if inside else os.fsdecode(name)


def _folder(path: Path | str) -> Path:
    return Path(path) if os.path.isdir(path) else Path(path).parent


def _without(inputs: Sequence[Path | str], text: str) -> str:
    """Return `text` with `input 1` in place of the first input, and so on, and DIRECTORY for the folder they have in common."""
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
