"""Describe a folder of radiographs or of shards: counts, sizes, exposure and defects, as JSON and as a page.

    folder -> scan (or Shards.open) -> counts by split, study type and label
           -> headers of all files -> sizes
           -> pixels of a sample -> exposure
           -> on request: a contact sheet, LOCAL ONLY

dataset_page.py builds the page. It holds no radiograph.
"""

import contextlib
import io
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from mura_dist.core import files, storage
from mura_dist.core.errors import UserError, mask_url
from mura_dist.core.storage import StoragePath
from mura_dist.data import mura, radiograph
from mura_dist.data.shards.reader import CorruptSampleError, Shards
from mura_dist.data.source import report
from mura_dist.data.source.scan import scan as scan_folder
from mura_dist.reports import contact_sheet, dataset_page
from mura_dist.reports.dataset_page import GRAY_EDGES
from mura_dist.reports.html import page

NUM_SAMPLED = 500  # radiographs whose pixels are read
_READING_THREADS = 8  # mostly waiting for the disk
_HEADER_BYTES = 1 << 16  # fetched of a remote file to read its header
_LABELS = report.LABELS
_EXAMPLES = 3


@dataclass(frozen=True)
class _Inspection:
    """The description, and access to the radiographs. See contact_sheet.Pixels for the errors of `pixels`."""

    description: dict[str, Any]
    frame: pd.DataFrame  # the readable radiographs
    pixels: contact_sheet.Pixels


def describe(
    folder: StoragePath, out: Path, *, with_contact_sheet: bool = False, seed: int = 0, shared: bool = False
) -> dict[str, Any]:
    """Describe a data set in a page, and in a JSON file next to it.

    Args:
        folder: Shards or a folder in MURA's layout, as a path or a URL.
        out: The page to write.
        with_contact_sheet: Whether to write a page of small radiographs too, LOCAL ONLY.
        seed: Selects the radiographs of the contact sheet.
        shared: Whether the umask sets the permissions of the files. By default only their owner can read them, because they
            name patients.

    Returns:
        The content of the JSON file without its terms.

    Raises:
        UserError: The folder holds neither shards nor radiographs, or `out` is not a valid name for a page.
    """
    if out.suffix.lower() == ".json" or out.is_dir():
        kind = "is a folder" if out.is_dir() else "is reserved for the numbers"
        raise UserError(f"--out {out}: this name {kind}. Name a page, such as {out.with_suffix('.html').name}.")
    is_shards = any(storage.open_storage(folder).exists(name) for name in ("index.json", "conversion.json"))
    inspection = _inspect_shards(folder) if is_shards else _inspect_folder(folder)
    description = inspection.description
    numbers, sheet = out.with_suffix(".json"), contact_sheet_path(out)
    with contextlib.nullcontext() if shared else files.private(out, numbers, sheet):
        if with_contact_sheet:
            title, drawings = f"Contact sheet of {_name(folder)}", description["holds"] == "phantoms"
            text = contact_sheet.page(title, inspection.frame, inspection.pixels, drawings=drawings, seed=seed)
            files.write_text(sheet, text)
        files.write_text(out, page(f"Data set {_name(folder)}", *dataset_page.body(description)))
        files.write_json(numbers, description | {"terms": mura.TERMS})
    return description


def contact_sheet_path(out: Path) -> Path:
    """Return the path of the contact sheet for the page `out`."""
    return out.with_name(f"{out.stem}-contact-sheet.html")


def summary_text(description: dict[str, Any]) -> str:
    """Return the summary for the terminal."""
    lines = [dataset_page.totals_line(description)]
    lines += [f"  {name}: {dataset_page.counts_line(counts)}" for name, counts in description["splits"].items()]
    lines += [f"  defect: {name}: {count:,}" for name, count in description["defects"].items()]
    return "\n".join(lines)


# ---- numbers


def _name(folder: StoragePath) -> str:
    if storage.is_remote(folder):
        return mask_url(str(folder)).rstrip("/").rpartition("/")[2]
    return Path(folder).resolve().name


def _inspect_folder(folder: StoragePath) -> _Inspection:
    scan = scan_folder(folder)
    frame = scan.manifest.frame
    paths = frame["path"].tolist()
    rows = _sample_evenly(frame.index.to_numpy())

    def pixels(row: int) -> np.ndarray:
        return radiograph.decode(_source(scan.root, paths[row]))

    gray, failures = _gray_means(rows, pixels)
    defects = {name: len(paths) for name, paths in scan.defects.items()}
    defects |= _tally(failures, f"among {len(rows)} sampled")
    with ThreadPoolExecutor(_READING_THREADS) as pool:
        headers = list(pool.map(lambda path: _header(scan.root, path), paths))
    about = {"name": _name(folder), "kind": "folder", "holds": "phantoms" if scan.phantoms else "radiographs"}
    examples = _examples(scan.defects)
    description = (
        about | _counts(frame) | {"sizes": _sizes(headers)} | _exposure(frame, gray) | {"defects": defects} | examples
    )
    return _Inspection(description, frame, pixels)


def _inspect_shards(folder: StoragePath) -> _Inspection:
    shards = Shards.open(folder)
    frame, index = shards.manifest.frame, shards.index
    unreadable = [item["row"] for item in index["unreadable"]]
    rows = _sample_evenly(np.setdiff1d(frame.index.to_numpy(), unreadable))
    gray, failures = _gray_means(rows, shards.read_pixels)
    defects = {name: len(paths) for name, paths in index["defects"].items()}
    defects |= _tally((item["code"] for item in index["unreadable"]), "not in the shards")
    defects |= _tally(failures, f"among {len(rows)} sampled")
    about = {"name": _name(folder), "kind": "shards", "holds": shards.trained_on}
    sizes = {"size_px": shards.size, "encoding": shards.encoding}
    examples = _examples(index["defects"])
    description = about | _counts(frame) | {"sizes": sizes} | _exposure(frame, gray) | {"defects": defects} | examples
    return _Inspection(description, frame.drop(index=unreadable), shards.read_pixels)


def _examples(defects: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    examples = {name: [str(path) for path in itertools.islice(paths, _EXAMPLES)] for name, paths in defects.items()}
    return {"defect_examples": examples}


def _tally(codes: Iterable[str], scope: str) -> dict[str, int]:
    return {f"{code}, {scope}": count for code, count in sorted(Counter(codes).items())}


def _counts(frame: pd.DataFrame) -> dict[str, Any]:
    of_study = frame.groupby("study").agg(study_type=("study_type", "first"), num=("view", "size"))
    views = of_study["num"].value_counts().sort_index()
    by_name = of_study.groupby("study_type")["num"]
    by_type = [
        {"split": split, "study_type": study_type} | report.count(group)
        for split in mura.SPLITS
        for study_type, group in frame[frame["split"] == split].groupby("study_type")
    ]
    return {
        **report.count(frame),
        "splits": {
            name: report.count(frame[frame["split"] == name]) for name in mura.SPLITS if (frame["split"] == name).any()
        },
        "by_study_type": by_type,
        "views_per_study": {str(num): int(count) for num, count in views.items()},
        "views_by_study_type": {
            str(name): {"num_studies": len(nums), "mean": float(nums.mean()), "most": int(nums.max())}
            for name, nums in by_name
        },
        "unknown_study_types": report.unknown_study_types(frame),
        "is_mura_v1_1": not report.differences_from_v1_1(frame),
    }


def _source(root: StoragePath, path: str, num_bytes: int | None = None) -> Path | io.BytesIO:
    """Return a local path, or the content of a remote file: its first `num_bytes`, or all of it."""
    if not storage.is_remote(root):
        return Path(root, path)
    remote = storage.open_storage(root)
    return io.BytesIO(remote.read(path) if num_bytes is None else remote.read_range(path, 0, num_bytes))


def _header(root: StoragePath, path: str) -> tuple[int, int, str] | None:
    """Return width, height and Pillow's mode, or None where Pillow cannot read the file (DICOM, corrupt)."""
    try:
        with Image.open(_source(root, path, _HEADER_BYTES)) as image:
            return *image.size, image.mode
    except Exception:  # Pillow raises many kinds; radiograph.read reports what is wrong with a file
        return None


def _sizes(headers: list[tuple[int, int, str] | None]) -> dict[str, Any]:
    readable = [header for header in headers if header is not None]
    sizes: dict[str, Any] = {"num_told": len(readable), "num_untold": len(headers) - len(readable)}
    if readable:
        sides = np.array([header[:2] for header in readable])  # (n, 2): width, height
        longest = sides.max(axis=1)
        for name, values in (("width_px", sides[:, 0]), ("height_px", sides[:, 1]), ("longest_px", longest)):
            sizes[name] = dict(zip(("min", "median", "max"), np.quantile(values, (0, 0.5, 1)).tolist(), strict=True))
        sizes["smallest"] = " x ".join(map(str, min(readable, key=lambda header: header[0] * header[1])[:2]))
        sizes["modes"] = dict(Counter(header[2] for header in readable).most_common())
        counts, edges = np.histogram(longest, bins=12, range=(longest.min(), max(longest.max(), longest.min() + 12)))
        sizes["longest_histogram"] = {"edges_px": np.rint(edges).astype(int).tolist(), "counts": counts.tolist()}
    return sizes


def _sample_evenly(rows: np.ndarray) -> np.ndarray:
    """Return at most NUM_SAMPLED of the rows at even distances, so that splits and study types stay in proportion."""
    indices = np.linspace(0, len(rows) - 1, min(len(rows), NUM_SAMPLED))
    return rows[np.rint(indices).astype(np.int64)]


def _gray_means(rows: np.ndarray, pixels: contact_sheet.Pixels) -> tuple[pd.Series, list[str]]:
    """Return the mean gray level by row, and the error codes of the radiographs that could not be read."""
    means: dict[int, float] = {}
    failures: list[str] = []
    for row in rows.tolist():
        try:
            means[row] = float(pixels(row).mean())
        except radiograph.UnreadableFileError as error:
            failures.append(error.code)
        except (OSError, ValueError, CorruptSampleError):  # of a corrupt shard
            failures.append("corrupt, see mura-dist verify")
    return pd.Series(means, dtype=np.float64), failures


def _exposure(frame: pd.DataFrame, gray: pd.Series) -> dict[str, Any]:
    """Return mean gray levels (0 black .. 255 white) by split and by study type. gray: by row, of the sample."""
    sample = frame.loc[gray.index].assign(gray=gray)
    by_group = {
        unit: {str(name): _gray_statistics(group) for name, group in sample.groupby(unit, sort=False)}
        for unit in ("split", "study_type")
    }
    return {"exposure": {"num_radiographs": len(gray), "overall": _gray_statistics(sample), **by_group}}


def _gray_statistics(frame: pd.DataFrame) -> dict[str, Any]:
    statistics: dict[str, Any] = {"num_radiographs": len(frame)}
    for label, name in enumerate(_LABELS):
        values = frame.loc[frame["label"] == label, "gray"]
        statistics[f"{name}_histogram"] = np.histogram(values, GRAY_EDGES)[0].tolist()
        statistics[f"{name}_mean"] = float(values.mean()) if len(values) else None
    return statistics
