"""What a folder of radiographs, or of shards, holds: counts, sizes, exposure, defects; as numbers and as a page.

    folder -> scan (or Shards.open) -> counts by split, study type and label
           -> headers of all files -> sizes      -> pixels of some, evenly chosen -> exposure      -> one page of HTML, JSON
           -> on request only: a contact sheet, apart, LOCAL ONLY

dataset_page.py makes the page, which holds no radiograph.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
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
from mura_dist.data.source.scan import scan as look_through
from mura_dist.reports import contact_sheet, dataset_page
from mura_dist.reports.dataset_page import GRAY_EDGES
from mura_dist.reports.html import page

NUM_SAMPLED = 500  # radiographs whose pixels are looked at
_READING_THREADS = 8  # they wait for the disk most of the time
_HEADER_BYTES = 1 << 16  # what is fetched of a file behind a URL to find its header in
_LABELS = report.LABELS
_EXAMPLES = 3


@dataclass(frozen=True)
class _Looked:
    """What was found, and the way to more: `pixels` of a row may raise what contact_sheet says."""

    found: dict[str, Any]
    frame: pd.DataFrame  # of the radiographs that may be looked at
    pixels: Callable[[int], np.ndarray]


def describe(
    folder: StoragePath, out: Path, *, with_contact_sheet: bool = False, seed: int = 0, shared: bool = False
) -> dict[str, Any]:
    """Describe `folder` (shards, or MURA's layout; a path or a URL) in a page at `out` and in JSON beside it; returns that.

    with_contact_sheet: also a page of small radiographs, LOCAL ONLY; `seed` chooses them. shared: others may
    read the pages too, as the umask says; else their owner alone, for they name patients. Raises UserError where the folder is
    neither, or `out` cannot be a page.
    """
    if out.suffix.lower() == ".json" or out.is_dir():
        what = "a folder" if out.is_dir() else "where the numbers go"
        raise UserError(f"--out {out}: {what}; name a page, such as {out.with_suffix('.html').name}")
    is_shards = any(storage.open_storage(folder).exists(name) for name in ("index.json", "conversion.json"))
    looked = _shards(folder) if is_shards else _folder(folder)
    found = looked.found
    numbers, sheet = out.with_suffix(".json"), contact_sheet_path(out)
    with contextlib.nullcontext() if shared else files.private(out, numbers, sheet):
        if with_contact_sheet:
            title, drawings = f"Contact sheet of {_name(folder)}", found["holds"] == "phantoms"
            text = contact_sheet.page(title, looked.frame, looked.pixels, drawings=drawings, seed=seed)
            files.write_text(sheet, text)
        files.write_text(out, page(f"What {_name(folder)} holds", *dataset_page.body(found)))
        files.write_json(numbers, found | {"terms": mura.TERMS})
    return found


def contact_sheet_path(out: Path) -> Path:
    """Where the contact sheet beside the page `out` goes."""
    return out.with_name(f"{out.stem}-contact-sheet.html")


def summary_text(found: dict[str, Any]) -> str:
    """The few lines for the terminal."""
    lines = [dataset_page.totals(found)]
    lines += [f"  {name}: {dataset_page.counts_line(part)}" for name, part in found["splits"].items()]
    lines += [f"  defect: {name}: {count:,}" for name, count in found["defects"].items()]
    return "\n".join(lines)


# ---- numbers


def _name(folder: StoragePath) -> str:
    if storage.is_remote(folder):
        return mask_url(str(folder)).rstrip("/").rpartition("/")[2]
    return Path(folder).resolve().name


def _folder(folder: StoragePath) -> _Looked:
    scan = look_through(folder)
    frame = scan.manifest.frame
    paths = frame["path"].tolist()
    rows = _evenly(frame.index.to_numpy())

    def pixels(row: int) -> np.ndarray:
        return radiograph.decode(_source(scan.root, paths[row]))

    grey, failures = _means(rows, pixels)
    defects = {name: len(seen) for name, seen in scan.defects.items()}
    defects |= _tally(failures, f"among {len(rows)} that were read")
    with ThreadPoolExecutor(_READING_THREADS) as pool:
        headers = list(pool.map(lambda path: _header(scan.root, path), paths))
    about = {"name": _name(folder), "kind": "folder", "holds": "phantoms" if scan.phantoms else "radiographs"}
    examples = _examples(scan.defects)
    found = (
        about | _counts(frame) | {"sizes": _sizes(headers)} | _exposure(frame, grey) | {"defects": defects} | examples
    )
    return _Looked(found, frame, pixels)


def _shards(folder: StoragePath) -> _Looked:
    shards = Shards.open(folder)
    frame, index = shards.manifest.frame, shards.index
    unreadable = [item["row"] for item in index["unreadable"]]
    rows = _evenly(np.setdiff1d(frame.index.to_numpy(), unreadable))
    grey, failures = _means(rows, shards.read_pixels)
    defects = {name: len(seen) for name, seen in index["defects"].items()}
    defects |= _tally((item["code"] for item in index["unreadable"]), "left out of the shards")
    defects |= _tally(failures, f"among {len(rows)} that were read")
    about = {"name": _name(folder), "kind": "shards", "holds": shards.trained_on}
    sizes = {"size_px": shards.size, "encoding": shards.encoding}
    examples = _examples(index["defects"])
    found = about | _counts(frame) | {"sizes": sizes} | _exposure(frame, grey) | {"defects": defects} | examples
    return _Looked(found, frame.drop(index=unreadable), shards.read_pixels)


def _examples(defects: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    return {"defect_examples": {name: [str(one) for one in list(seen)[:_EXAMPLES]] for name, seen in defects.items()}}


def _tally(codes: Iterable[str], where: str) -> dict[str, int]:
    return {f"{code}, {where}": count for code, count in sorted(Counter(codes).items())}


def _counts(frame: pd.DataFrame) -> dict[str, Any]:
    of_study = frame.groupby("study").agg(study_type=("study_type", "first"), num=("view", "size"))
    views = of_study["num"].value_counts().sort_index()
    by_name = of_study.groupby("study_type")["num"]
    by_type = [
        {"split": split, "study_type": study_type} | report.count(part)
        for split in mura.SPLITS
        for study_type, part in frame[frame["split"] == split].groupby("study_type")
    ]
    return {
        **report.count(frame),
        "splits": {
            name: report.count(frame[frame["split"] == name]) for name in mura.SPLITS if (frame["split"] == name).any()
        },
        "by_study_type": by_type,
        "views_per_study": {str(num): int(count) for num, count in views.items()},
        "views_by_study_type": {
            str(name): {"num_studies": len(part), "mean": float(part.mean()), "most": int(part.max())}
            for name, part in by_name
        },
        "unknown_study_types": report.unknown_study_types(frame),
        "is_mura_v1_1": not report.against_v1_1(frame),
    }


def _source(root: StoragePath, path: str, num_bytes: int | None = None) -> Path | io.BytesIO:
    """A file as Pillow and radiograph take it; `num_bytes`: no more of it need be fetched."""
    if not storage.is_remote(root):
        return Path(root, path)
    place = storage.open_storage(root)
    return io.BytesIO(place.read(path) if num_bytes is None else place.read_part(path, 0, num_bytes))


def _header(root: StoragePath, path: str) -> tuple[int, int, str] | None:
    """Width, height and Pillow's mode; None where Pillow cannot tell (a DICOM, a damaged file)."""
    try:
        with Image.open(_source(root, path, _HEADER_BYTES)) as image:
            return *image.size, image.mode
    except Exception:  # Pillow raises many kinds; radiograph.read says properly what is wrong with a file
        return None


def _sizes(headers: list[tuple[int, int, str] | None]) -> dict[str, Any]:
    told = [header for header in headers if header is not None]
    found: dict[str, Any] = {"num_told": len(told), "num_untold": len(headers) - len(told)}
    if told:
        sides = np.array([header[:2] for header in told])  # (n, 2): width, height
        longest = sides.max(axis=1)
        for name, values in (("width_px", sides[:, 0]), ("height_px", sides[:, 1]), ("longest_px", longest)):
            found[name] = dict(zip(("min", "median", "max"), np.quantile(values, (0, 0.5, 1)).tolist(), strict=True))
        found["smallest"] = " x ".join(map(str, min(told, key=lambda header: header[0] * header[1])[:2]))
        found["modes"] = dict(Counter(header[2] for header in told).most_common())
        counts, edges = np.histogram(longest, bins=12, range=(longest.min(), max(longest.max(), longest.min() + 12)))
        found["longest_histogram"] = {"edges_px": np.rint(edges).astype(int).tolist(), "counts": counts.tolist()}
    return found


def _evenly(rows: np.ndarray) -> np.ndarray:
    """At most NUM_SAMPLED of `rows`, at even distances: every split and study type in proportion."""
    places = np.linspace(0, len(rows) - 1, min(len(rows), NUM_SAMPLED))
    return rows[np.rint(places).astype(np.int64)]


def _means(rows: np.ndarray, pixels: Any) -> tuple[pd.Series, list[str]]:
    """Mean grey level by row, and the codes of those that could not be read."""
    means: dict[int, float] = {}
    failures: list[str] = []
    for row in rows.tolist():
        try:
            means[row] = float(pixels(row).mean())
        except radiograph.UnreadableFileError as error:
            failures.append(error.code)
        except (OSError, ValueError, CorruptSampleError):  # of a damaged shard
            failures.append("damaged, see mura-dist verify")
    return pd.Series(means, dtype=np.float64), failures


def _exposure(frame: pd.DataFrame, grey: pd.Series) -> dict[str, Any]:
    """Mean grey level (0 black .. 255 white) by split and by study type, of the radiographs looked at."""
    looked_at = frame.loc[grey.index].assign(grey=grey)
    by = {
        unit: {str(name): _grey(part) for name, part in looked_at.groupby(unit, sort=False)}
        for unit in ("split", "study_type")
    }
    return {"exposure": {"num_radiographs": len(grey), "overall": _grey(looked_at), **by}}


def _grey(part: pd.DataFrame) -> dict[str, Any]:
    found: dict[str, Any] = {"num_radiographs": len(part)}
    for label, name in enumerate(_LABELS):
        values = part.loc[part["label"] == label, "grey"]
        found[f"{name}_histogram"] = np.histogram(values, GRAY_EDGES)[0].tolist()
        found[f"{name}_mean"] = float(values.mean()) if len(values) else None
    return found
