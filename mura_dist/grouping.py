"""Which study a radiograph belongs to.

    Grouping.of: path, DICOM identity -> (study, study type)

DICOM's identifiers never leave this file: a study is named by a keyed digest of them, under a key that stays on the site.
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from . import mura
from .radiograph import DicomIdentity
from .refusal import Refusal
from .walk import printable, why

STUDY_BY = ("auto", "folder", "file")
UNKNOWN = "unknown"
# BodyPartExamined (DICOM PS3.16, annex L) where it is another word than MURA's.
_BODY_PARTS = {"THUMB": "FINGER", "UPPERARM": "HUMERUS", "UPPER ARM": "HUMERUS", "RADIUS": "FOREARM", "ULNA": "FOREARM"}
_KEY_BYTES = 32


@dataclass
class Grouping:
    """How files become studies. `given`: study type of all, or by printable path; `known`: the model's own types."""

    directory: str  # absolute, "/" between its parts
    study_by: str
    given: str | Mapping[str, str] | None = None
    known: frozenset[str] = frozenset(mura.STUDY_TYPES)
    _key: bytes | None = field(default=None, repr=False)

    def of(self, path: str, identity: DicomIdentity | None) -> tuple[str, str]:
        """(study, study type) of a radiograph, both printable."""
        return printable(self._study(path, identity)), self._study_type(path, identity)

    def _study(self, path: str, identity: DicomIdentity | None) -> str:
        if self.study_by == "folder":
            return path.rpartition("/")[0] or "."
        if self.study_by == "file":
            return path
        if mura.parse(path):  # the split lies below the directory: two copies of a data set stay two
            return path.rpartition("/")[0]
        if above := mura.parse(f"{self.directory}/{path}"):
            return above.study
        if identity is not None and identity.study_uid:
            self._key = self._key or site_key()
            return _dicom_study(identity, self._key)
        return path

    def _study_type(self, path: str, identity: DicomIdentity | None) -> str:
        if isinstance(self.given, str):
            return self.given
        if self.given is not None and (given := self.given.get(printable(path))):
            return given
        whole = f"{self.directory}/{path}"
        if parsed := mura.parse(whole):
            return parsed.study_type
        known = self.known | set(mura.STUDY_TYPES)
        if folder := next((part for part in reversed(whole.split("/")[:-1]) if part in known), None):
            return folder
        body_part = identity.body_part.upper() if identity is not None else ""
        # Free text in practice: only what is a study type already may reach a table.
        study_type = f"XR_{_BODY_PARTS.get(body_part, body_part)}"
        return study_type if study_type in known else UNKNOWN


def _dicom_study(identity: DicomIdentity, key: bytes) -> str:
    message = "\0".join((identity.study_uid, identity.body_part.upper(), identity.laterality.upper()))
    return "dicom-" + hmac.new(key, message.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[:16]


def site_key() -> bytes:
    """The secret that names DICOM studies, made when first needed; MURA_DIST_SITE_KEY is the path of another one."""
    path = Path(os.environ.get("MURA_DIST_SITE_KEY") or _configuration() / "site.key")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        key = path.read_bytes()
    else:
        key = secrets.token_hex(_KEY_BYTES).encode()
        with open(descriptor, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(descriptor)
    if len(key) < _KEY_BYTES:
        raise Refusal(
            f"site key {path} holds {len(key)} bytes, at least {_KEY_BYTES} are needed; delete it and a new one is made"
        )
    return key


def _configuration() -> Path:
    if os.name == "nt":
        return Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming") / "mura-dist"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "mura-dist"


def study_types(given: str | None) -> str | dict[str, str] | None:
    """What --study-type means: a study type, or the CSV of path,study_type that lies there. Raises Refusal."""
    if given is None:
        return None
    if not (given.lower().endswith(".csv") or os.path.isfile(given)):
        return _normal(given)
    try:
        table = pd.read_csv(given, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        pairs = zip(table["path"], table["study_type"].map(_normal), strict=True)
    except OSError as error:
        raise Refusal(f"--study-type {given}: {why(error)}; give a study type, or a CSV of path,study_type") from error
    except (KeyError, ValueError) as error:
        raise Refusal(
            f"--study-type {given}: not a CSV with the columns path and study_type; its first line names them"
        ) from error
    types: dict[str, str] = {}
    for path, study_type in pairs:
        if types.setdefault(path, study_type) != study_type:
            raise Refusal(
                f"--study-type {given}: {path} is both {types[path]} and {study_type}; leave one of the lines"
            )
    return types


def _normal(study_type: str) -> str:
    """`hand` and `XR_HAND` are one study type; what MURA does not know stays as written."""
    name = study_type.strip()
    full = f"XR_{name.upper().removeprefix('XR_')}"
    return full if full in mura.STUDY_TYPES else name
