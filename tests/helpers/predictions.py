"""Draw radiographs to predict; read the tables that predict writes."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from mura_dist.data.folder_kind import PREDICT_SUMMARY
from mura_dist.inference import tables
from mura_dist.inference.output_folder import README

TABLES = [f"{name}.csv" for name in tables.NAMES]
FILES = sorted([*TABLES, README, PREDICT_SUMMARY])  # all files of a finished prediction


def draw(path: Path, seed: int = 0) -> Path:
    """Draw a PNG whose content depends on the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (3 + seed % 5, 4), dtype=np.uint8)
    Image.fromarray(coarse).resize((48, 40)).save(path, format="PNG")
    return path


def draw_dicom(path: Path, study_uid: str, body_part: str = "", laterality: str = "", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.1"
    dicom = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    dicom.SOPClassUID, dicom.SOPInstanceUID, dicom.Modality = meta.MediaStorageSOPClassUID, generate_uid(), "CR"
    dicom.StudyInstanceUID, dicom.BodyPartExamined, dicom.Laterality = study_uid, body_part, laterality
    dicom.PatientName, dicom.PatientID = "Doe^Jane", "PID-4711"
    dicom.Rows, dicom.Columns, dicom.SamplesPerPixel, dicom.PhotometricInterpretation = 40, 48, 1, "MONOCHROME2"
    dicom.BitsAllocated, dicom.BitsStored, dicom.HighBit, dicom.PixelRepresentation = 8, 8, 7, 0
    dicom.PixelData = np.random.default_rng(seed).integers(0, 256, (40, 48), dtype=np.uint8).tobytes()
    dicom.save_as(path, enforce_file_format=True)
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(out: Path) -> dict[str, bytes]:
    """Return the content of the files that do not depend on interruptions of the command."""
    return {name: (out / name).read_bytes() for name in (*TABLES, README)}
