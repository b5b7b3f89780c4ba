"""The study of a radiograph, and its name in the tables.

    Grouping.study_and_type: path, DICOM identity -> (study, study type)

DICOM identifiers never leave this module. A DICOM study is named by a pseudonym, whose key stays on the site.
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
    """The rules by which files become studies.

    Attributes:
        directory: Absolute path, "/" between folders, that all paths are relative to.
        study_by: One of STUDY_BY.
        override: Study type of all files, or of each by `table_names.join_key` of its printable path.
        model_types: Study types of the model.
        pseudonymizer: Names of files and studies in the tables.
        key_free_folders: Folders that must not contain the site's key.
    """

    directory: str
    study_by: str
    override: StudyTypeOverride = None
    model_types: frozenset[str] = frozenset(mura.STUDY_TYPES)
    pseudonymizer: Pseudonymizer = field(default_factory=Pseudonymizer)
    key_free_folders: tuple[Path, ...] = ()
    _key: bytes | None = field(default=None, repr=False)

    def study_and_type(self, path: str, identity: DicomIdentity | None) -> tuple[str, str]:
        """Return the study, by its name in the tables, and the study type of a radiograph."""
        return self._study(path, identity), self.study_type(path, identity)

    def public_name(self, path: str) -> str:
        """Return the name of a file in the tables."""
        return self.pseudonymizer.file(printable_path(path))

    def study_of_path(self, path: str) -> str:
        """Return the printable name of the study that follows from a path alone, without pseudonyms."""
        if self.study_by == "folder":
            return printable_path(path.rpartition("/")[0] or ".")
        if self.study_by == "file":
            return printable_path(path)
        absolute = f"{self.directory}/{path}"
        if not mura.parse(path) and (above := mura.parse(absolute)):  # the directory is a split's folder or lies in one
            return printable_path(above.study)  # the name that `evaluate` uses
        if mura.study_folder(path):  # below the directory: two copies of a data set are different studies
            return printable_path(path.rpartition("/")[0])
        return printable_path(mura.study_folder(absolute) or path)

    def _study(self, path: str, identity: DicomIdentity | None) -> str:
        in_layout = mura.study_folder(f"{self.directory}/{path}") is not None
        if self.study_by != "auto" or in_layout or identity is None or not identity.study_uid:
            return self.pseudonymizer.study(self.study_of_path(path))
        self._key = self._key or self.pseudonymizer.key or pseudonyms.site_key(*self.key_free_folders)
        return pseudonyms.dicom_study_pseudonym(self._key, identity.study_uid, identity.body_part, identity.laterality)

    def study_type(self, path: str, identity: DicomIdentity | None) -> str:
        """Return the study type from the override, a folder or DICOM, in this order, else UNKNOWN."""
        if isinstance(self.override, str):
            return self.override
        if self.override is not None and (study_type := self.override.get(table_names.join_key(printable_path(path)))):
            return study_type
        absolute, valid = f"{self.directory}/{path}", self.model_types | set(mura.STUDY_TYPES)
        if parsed := mura.parse(absolute):
            # A folder such as XR_DOE may be a person's name: a run with pseudonyms must not show it.
            is_public = self.pseudonymizer.key is None or parsed.study_type in valid
            return parsed.study_type if is_public else UNKNOWN
        if folder := next((name for name in reversed(absolute.split("/")[:-1]) if name in valid), None):
            return folder
        body_part = identity.body_part if identity is not None else ""
        # BodyPartExamined is free text in practice: only a valid study type may reach a table.
        study_type = body_parts.find_study_type(body_part) or f"XR_{body_part}"
        return study_type if study_type in valid else UNKNOWN
