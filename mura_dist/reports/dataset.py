"""What a folder of radiographs, or of shards, holds: counts, sizes, exposure, defects; as numbers and as a page.

    folder -> scan (or Shards.open) -> counts by split, study type and label
           -> headers of all files -> sizes      -> pixels of some, evenly chosen -> exposure      -> one page of HTML, JSON
           -> on request only: a contact sheet, apart, LOCAL ONLY

The page holds no radiograph.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from mura_dist.core import files
from mura_dist.core import storage as places
from mura_dist.core.errors import Refusal, mask_url
from mura_dist.core.storage import Where
from mura_dist.data import mura, radiograph
from mura_dist.data.shards.reader import Damaged, Shards
from mura_dist.data.source import report
from mura_dist.data.source.scan import scan as look_through
from mura_dist.reports import contact_sheet
from mura_dist.reports.html import Html, banner, bars, element, facts, figure, join, page, section, table

NUM_SAMPLED = 500  # radiographs whose pixels are looked at
_READING_THREADS = 8  # they wait for the disk most of the time
_HEADER_BYTES = 1 << 16  # what is fetched of a file behind a URL to find its header in
_GREY_EDGES = np.linspace(0, 256, 17)
_LABELS = report.LABELS
_EXAMPLES = 3


@dataclass(frozen=True)
class _Looked:
    """What was found, and the way to more: `pixels` of a row may raise what contact_sheet says."""

    found: dict[str, Any]
    frame: pd.DataFrame  # of the radiographs that may be looked at
    pixels: Callable[[int], np.ndarray]


def describe(
    folder: Where, out: Path, *, with_contact_sheet: bool = False, seed: int = 0, shared: bool = False
) -> dict[str, Any]:
    """Describe `folder` (shards, or MURA's layout; a path or a URL) in a page at `out` and in JSON beside it; returns that.

    with_contact_sheet: also a page of small radiographs, LOCAL ONLY; `seed` chooses them. shared: others may
    read the pages too, as the umask says; else their owner alone, for they name patients. Raises Refusal where the folder is
    neither, or `out` cannot be a page.
    """
    if out.suffix.lower() == ".json" or out.is_dir():
        what = "a folder" if out.is_dir() else "where the numbers go"
        raise Refusal(f"--out {out}: {what}; name a page, such as {out.with_suffix('.html').name}")
    is_shards = any(places.of(folder).exists(name) for name in ("index.json", "conversion.json"))
    looked = _shards(folder) if is_shards else _folder(folder)
    found = looked.found
    numbers, sheet = out.with_suffix(".json"), contact_sheet_path(out)
    with contextlib.nullcontext() if shared else files.private(out, numbers, sheet):
        if with_contact_sheet:
            title, drawings = f"Contact sheet of {_name(folder)}", found["holds"] == "phantoms"
            text = contact_sheet.page(title, looked.frame, looked.pixels, drawings=drawings, seed=seed)
            files.write_text(sheet, text)
        files.write_text(out, page(f"What {_name(folder)} holds", *_body(found)))
        files.write_json(numbers, found | {"terms": mura.TERMS})
    return found


def contact_sheet_path(out: Path) -> Path:
    """Where the contact sheet beside the page `out` goes."""
    return out.with_name(f"{out.stem}-contact-sheet.html")


def summary_text(found: dict[str, Any]) -> str:
    """The few lines for the terminal."""
    lines = [_totals(found)]
    lines += [f"  {name}: {_line(part)}" for name, part in found["splits"].items()]
    lines += [f"  defect: {name}: {count:,}" for name, count in found["defects"].items()]
    return "\n".join(lines)


# ---- numbers


def _name(folder: Where) -> str:
    if places.is_remote(folder):
        return mask_url(str(folder)).rstrip("/").rpartition("/")[2]
    return Path(folder).resolve().name


def _folder(folder: Where) -> _Looked:
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


def _shards(folder: Where) -> _Looked:
    shards = Shards.open(folder)
    frame, index = shards.manifest.frame, shards.index
    unreadable = [item["row"] for item in index["unreadable"]]
    rows = _evenly(np.setdiff1d(frame.index.to_numpy(), unreadable))
    grey, failures = _means(rows, shards.pixels)
    defects = {name: len(seen) for name, seen in index["defects"].items()}
    defects |= _tally((item["code"] for item in index["unreadable"]), "left out of the shards")
    defects |= _tally(failures, f"among {len(rows)} that were read")
    about = {"name": _name(folder), "kind": "shards", "holds": shards.trained_on}
    sizes = {"size_px": shards.size, "encoding": shards.encoding}
    examples = _examples(index["defects"])
    found = about | _counts(frame) | {"sizes": sizes} | _exposure(frame, grey) | {"defects": defects} | examples
    return _Looked(found, frame.drop(index=unreadable), shards.pixels)


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


def _source(root: Where, path: str, num_bytes: int | None = None) -> Path | io.BytesIO:
    """A file as Pillow and radiograph take it; `num_bytes`: no more of it need be fetched."""
    if not places.is_remote(root):
        return Path(root, path)
    place = places.of(root)
    return io.BytesIO(place.read(path) if num_bytes is None else place.read_part(path, 0, num_bytes))


def _header(root: Where, path: str) -> tuple[int, int, str] | None:
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
        except radiograph.Unreadable as error:
            failures.append(error.code)
        except (OSError, ValueError, Damaged):  # of a damaged shard
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
        found[f"{name}_histogram"] = np.histogram(values, _GREY_EDGES)[0].tolist()
        found[f"{name}_mean"] = float(values.mean()) if len(values) else None
    return found


# ---- page


def _body(found: dict[str, Any]) -> Iterator[Html]:
    yield element("h1", f"What {found['name']} holds")
    if found["holds"] == "phantoms":
        yield banner("these are drawings, made by mura-dist phantoms: no radiographs")
    yield element("p", _totals(found))
    counted = "are" if found["is_mura_v1_1"] else "are not"
    yield element(
        "p", f"The counts {counted} those of MURA v1.1 ({mura.NUM_IMAGES_V1_1:,} radiographs).", class_="soft"
    )
    if found["unknown_study_types"]:
        yield element("p", f"Study types unknown to MURA: {', '.join(found['unknown_study_types'])}.", class_="soft")
    yield section("Counts", _counts_table(found))
    views = found["views_per_study"]
    chart = bars(
        list(views), {"studies": list(views.values())}, f"Studies by number of views, {_spoken(views, views.values())}"
    )
    by_type = [
        (name, f"{part['num_studies']:,}", f"{part['mean']:.2f}", part["most"])
        for name, part in found["views_by_study_type"].items()
    ]
    yield section(
        "Views of a study",
        element("div", figure(chart, "Studies, by how many views they have."), class_="wide pictures"),
        table(("", "Studies", "Views, mean", "most"), by_type),
    )
    yield section("Sizes", *_sizes_part(found["sizes"]))
    yield section("Exposure", *_exposure_part(found["exposure"]))
    defects = {name: _defect(count, found["defect_examples"].get(name, [])) for name, count in found["defects"].items()}
    yield section("Defects", facts(defects) if defects else element("p", "None found."))
    yield element("footer", element("p", "This page holds no radiograph."), element("p", f"Terms: {mura.TERMS}."))


def _defect(count: int, examples: list[str]) -> Html:
    more = [f"and {count - len(examples):,} more"] if examples and count > len(examples) else []
    return join((f"{count:,}", *(element("small", line) for line in [*examples, *more])))


def _totals(found: dict[str, Any]) -> str:
    return f"{found['name']} ({found['kind']}, {found['holds']}): {_line(found)}"


def _line(part: dict[str, Any]) -> str:
    return (
        f"{part['num_radiographs']:,} radiographs, {part['num_studies']:,} studies "
        f"({part['normal_studies']:,} normal, {part['abnormal_studies']:,} abnormal), {part['num_patients']:,} patients"
    )


def _counts_table(found: dict[str, Any]) -> Html:
    keys = ["num_patients", *(f"{name}_{unit}" for unit in ("studies", "radiographs") for name in _LABELS)]
    lines = [(f"{line['split']} {line['study_type']}", line) for line in found["by_study_type"]]
    lines += [(f"{name}, all", part) for name, part in found["splits"].items()]
    header = ("", "Patients", "Studies, normal", "abnormal", "Radiographs, normal", "abnormal")
    return table(header, [(name, *(f"{part[key]:,}" for key in keys)) for name, part in lines])


def _sizes_part(sizes: dict[str, Any]) -> Iterator[Html]:
    if "size_px" in sizes:
        yield element(
            "p", f"Every radiograph is {sizes['size_px']} x {sizes['size_px']} pixels, stored as {sizes['encoding']}."
        )
        return
    if sizes["num_untold"]:
        yield element(
            "p", f"{sizes['num_untold']:,} files have a header that Pillow does not read (DICOM, or damaged)."
        )
    if not sizes["num_told"]:
        return
    rows = [
        (name, *(f"{sizes[f'{name}_px'][key]:g}" for key in ("min", "median", "max")))
        for name in ("width", "height", "longest")
    ]
    yield table(
        ("Pixels", "least", "median", "most"),
        rows,
        f"Of {sizes['num_told']:,} files; the smallest is {sizes['smallest']}.",
    )
    yield element(
        "p", f"Kinds (Pillow's modes): {', '.join(f'{mode} {count:,}' for mode, count in sizes['modes'].items())}."
    )
    edges, counts = sizes["longest_histogram"]["edges_px"], sizes["longest_histogram"]["counts"]
    chart = bars(
        [str(edge) for edge in edges[:-1]], {"files": counts}, f"Files by longest side: {_spoken(edges, counts)}"
    )
    yield element(
        "div",
        figure(chart, "Files, by their longest side in pixels, from the number below on."),
        class_="wide pictures",
    )


def _exposure_part(exposure: dict[str, Any]) -> Iterator[Html]:
    yield element(
        "p",
        f"Mean grey level (0 black, 255 white) of {exposure['num_radiographs']:,} radiographs, evenly chosen. Where "
        "normal and abnormal differ, exposure alone tells something of the label: a shortcut a network will find.",
    )
    named = [("all", exposure["overall"]), *exposure["split"].items(), *exposure["study_type"].items()]
    rows = [
        (name, part["num_radiographs"], *(_mean(part[f"{label}_mean"]) for label in _LABELS)) for name, part in named
    ]
    yield table(("", "Radiographs", "Normal, mean", "Abnormal, mean"), rows)
    charts = (figure(_grey_chart(part), f"{name}: radiographs, by their mean grey level") for name, part in named)
    yield element("div", *charts, class_="wide pictures")


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _grey_chart(part: dict[str, Any]) -> Html:
    series = {name: part[f"{name}_histogram"] for name in _LABELS}
    edges = _GREY_EDGES.astype(int).tolist()
    said = "; ".join(f"{name} {_spoken(edges, counts)}" for name, counts in series.items())
    return bars([str(edge) for edge in edges[:-1]], series, f"Radiographs by mean grey level, {said}")


def _spoken(names: Iterable[Any], counts: Iterable[int]) -> str:
    """A chart's bars in words, for those who cannot see them; the empty ones left out."""
    return ", ".join(f"{name}: {count}" for name, count in zip(names, counts, strict=False) if count) or "none"
