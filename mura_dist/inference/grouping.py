"""Which study a radiograph belongs to, and what the study is called.

    Grouping.of: path, DICOM identity -> (study, study type)

DICOM's identifiers never leave this file: a study is named by a pseudonym, under a key that stays on the site.
"""

from dataclasses import dataclass, field
from pathlib import Path

from mura_dist.data import body_parts, mura, table_names
from mura_dist.data.radiograph import DicomIdentity
from mura_dist.inference import pseudonyms
from mura_dist.inference.file_list import printable_path
from mura_dist.inference.pseudonyms import Pseudonymizer
from mura_dist.inference.study_types import StudyTypeOverride

STUDY_BY = ("auto", "folder", "file")
UNKNOWN = "unknown"


@dataclass
class Grouping:
    """How files become studies, and what those are called.

    given: study type of all, or by the key of a printable path; known: the model's own types; apart: where the site's key must
    not lie.
    """

    directory: str  # absolute, "/" between its parts
    study_by: str
    given: StudyTypeOverride = None
    known: frozenset[str] = frozenset(mura.STUDY_TYPES)
    names: Pseudonymizer = field(default_factory=Pseudonymizer)
    apart: tuple[Path, ...] = ()
    _key: bytes | None = field(default=None, repr=False)

    def of(self, path: str, identity: DicomIdentity | None) -> tuple[str, str]:
        """(study, study type) of a radiograph, both printable, the study by its public name."""
        return self._study(path, identity), self.study_type(path, identity)

    def name(self, path: str) -> str:
        """Of a file, as the tables have it."""
        return self.names.file(printable_path(path))

    def place(self, path: str) -> str:
        """The study that a path alone tells of, by its own name, printable."""
        if self.study_by == "folder":
            return printable_path(path.rpartition("/")[0] or ".")
        if self.study_by == "file":
            return printable_path(path)
        whole = f"{self.directory}/{path}"
        if not mura.parse(path) and (above := mura.parse(whole)):  # the directory is, or lies within, a split's folder:
            return printable_path(above.study)  # the study is called what an evaluation calls it
        if mura.study_folder(path):  # below the directory: two copies of a data set stay two
            return printable_path(path.rpartition("/")[0])
        return printable_path(mura.study_folder(whole) or path)

    def _study(self, path: str, identity: DicomIdentity | None) -> str:
        in_layout = mura.study_folder(f"{self.directory}/{path}") is not None
        if self.study_by != "auto" or in_layout or identity is None or not identity.study_uid:
            return self.names.study(self.place(path))
        self._key = self._key or self.names.key or pseudonyms.site_key(*self.apart)
        return pseudonyms.dicom_study_pseudonym(self._key, identity.study_uid, identity.body_part, identity.laterality)

    def study_type(self, path: str, identity: DicomIdentity | None) -> str:
        """As it was given, or told by a folder or a DICOM; UNKNOWN where nothing tells."""
        if isinstance(self.given, str):
            return self.given
        if self.given is not None and (given := self.given.get(table_names.join_key(printable_path(path)))):
            return given
        whole, known = f"{self.directory}/{path}", self.known | set(mura.STUDY_TYPES)
        if parsed := mura.parse(whole):
            # A folder's name like any other, where it is no known type: XR_DOE.
            return parsed.study_type if self.names.key is None or parsed.study_type in known else UNKNOWN
        if folder := next((part for part in reversed(whole.split("/")[:-1]) if part in known), None):
            return folder
        body_part = identity.body_part if identity is not None else ""
        # Free text in practice: only what is a study type already may reach a table.
        study_type = body_parts.find_study_type(body_part) or f"XR_{body_part}"
        return study_type if study_type in known else UNKNOWN
