"""Build the page that describes a data set: dataset.py's numbers in, markup out. It holds no radiograph."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mura_dist.data import mura
from mura_dist.data.source import report
from mura_dist.reports.cells import details_grid, group_cell
from mura_dist.reports.footnotes import Footnotes
from mura_dist.reports.html import Html, banner, bars, details, element, facts_table, figure, join, section, table, tile

GRAY_EDGES = np.linspace(0, 256, 17)
_LABELS = report.LABELS
_NO_SAMPLE = "the sample contains no radiograph with this label"


def body(numbers: dict[str, Any]) -> Iterator[Html]:
    """Yield the page's elements. numbers: see dataset.describe."""
    notes = Footnotes()
    yield element("h1", f"Data set {numbers['name']}")
    if numbers["holds"] == "phantoms":
        yield banner("computer drawings from mura-dist phantoms, not radiographs")
    yield _tiles(numbers)
    yield element("p", totals_line(numbers))
    match = "match" if numbers["is_mura_v1_1"] else "do not match"
    yield element("p", f"The counts {match} MURA v1.1 ({mura.NUM_IMAGES_V1_1:,} radiographs).", class_="soft")
    if numbers["unknown_study_types"]:
        names = ", ".join(f"{mura.display_name(name)} ({name})" for name in numbers["unknown_study_types"])
        yield element("p", f"Study types that MURA does not have: {names}.", class_="soft")
    yield section("Counts", *_counts(numbers))
    yield section("Views per study", *_views(numbers))
    yield section("Sizes", *_sizes(numbers["sizes"]))
    yield section("Exposure", *_exposure(numbers["exposure"], notes))
    defects = {
        name: _defect(count, numbers["defect_examples"].get(name, [])) for name, count in numbers["defects"].items()
    }
    yield section("Defects", facts_table(defects) if defects else element("p", "None."))
    if footnotes := notes.as_list():
        yield section("Footnotes", footnotes)
    yield element("footer", element("p", "This page holds no radiograph."), element("p", f"Terms: {mura.TERMS}."))


def totals_line(numbers: dict[str, Any]) -> str:
    """Return the totals as one line."""
    return f"{numbers['name']} ({numbers['kind']}, {numbers['holds']}): {counts_line(numbers)}"


def counts_line(counts: dict[str, Any]) -> str:
    """Return counts as one line. counts: of the data set or of one split."""
    return (
        f"{counts['num_radiographs']:,} radiographs, {counts['num_studies']:,} studies "
        f"({counts['normal_studies']:,} normal, {counts['abnormal_studies']:,} abnormal), {counts['num_patients']:,} patients"
    )


def _tiles(numbers: dict[str, Any]) -> Html:
    abnormal, studies = numbers["abnormal_studies"], numbers["num_studies"]
    share = f"{100 * abnormal / studies:.0f} % abnormal" if studies else "no study"
    num_views = f"{numbers['num_radiographs'] / studies:.1f} per study" if studies else "no study"
    tiles = (
        tile("Radiographs", f"{numbers['num_radiographs']:,}", num_views),
        tile("Studies", f"{studies:,}", share),
        tile("Patients", f"{numbers['num_patients']:,}", f"in {len(numbers['splits'])} splits"),
    )
    return element("div", *tiles, class_="tiles")


def _counts(numbers: dict[str, Any]) -> Iterator[Html]:
    keys = ["num_patients", *(f"{name}_{unit}" for unit in ("studies", "radiographs") for name in _LABELS)]
    header = ("", "Patients", *(f"{unit}, {name}" for unit in ("Studies", "Radiographs") for name in _LABELS))

    def rows(named: Iterable[tuple[Any, dict[str, Any]]]) -> list[tuple[Any, ...]]:
        return [(name, *(f"{counts[key]:,}" for key in keys)) for name, counts in named]

    yield table(header, rows(numbers["splits"].items()))
    yield details_grid(
        details(
            f"{split}, by study type",
            table(
                header,
                rows(
                    (group_cell(line["study_type"]), line)
                    for line in numbers["by_study_type"]
                    if line["split"] == split
                ),
            ),
        )
        for split in numbers["splits"]
    )


def _views(numbers: dict[str, Any]) -> Iterator[Html]:
    views = numbers["views_per_study"]
    alt = f"Studies by number of views: {_describe_bars(views, views.values())}"
    chart = bars(list(views), {"studies": list(views.values())}, alt)
    yield element("div", figure(chart, "Number of studies by number of views."), class_="wide pictures")
    rows = [
        (group_cell(name), f"{views['num_studies']:,}", f"{views['mean']:.2f}", f"{views['most']}")
        for name, views in numbers["views_by_study_type"].items()
    ]
    yield details_grid([details("By study type", table(("", "Studies", "Views, mean", "Views, max"), rows))])


def _sizes(sizes: dict[str, Any]) -> Iterator[Html]:
    if "size_px" in sizes:
        yield element(
            "p", f"Every radiograph is {sizes['size_px']} x {sizes['size_px']} pixels, stored as {sizes['encoding']}."
        )
        return
    if sizes["num_untold"]:
        yield element("p", f"{sizes['num_untold']:,} files have a header that Pillow cannot read (DICOM or corrupt).")
    if not sizes["num_told"]:
        return
    rows = [
        (name, *(f"{sizes[f'{name}_px'][key]:g}" for key in ("min", "median", "max")))
        for name in ("width", "height", "longest")
    ]
    yield table(
        ("Pixels", "Min", "Median", "Max"),
        rows,
        f"Sizes of {sizes['num_told']:,} files. The smallest is {sizes['smallest']}.",
    )
    yield element(
        "p",
        f"Pixel formats (Pillow's modes): {', '.join(f'{mode} {count:,}' for mode, count in sizes['modes'].items())}.",
    )
    edges, counts = sizes["longest_histogram"]["edges_px"], sizes["longest_histogram"]["counts"]
    chart = bars(
        [str(edge) for edge in edges[:-1]], {"files": counts}, f"Files by longest side: {_describe_bars(edges, counts)}"
    )
    yield element(
        "div",
        figure(chart, "Number of files by longest side. Each number is the lower edge of its bin, in pixels."),
        class_="wide pictures",
    )


def _exposure(exposure: dict[str, Any], notes: Footnotes) -> Iterator[Html]:
    yield element(
        "p",
        f"Mean gray level (0 black, 255 white) of a sample of {exposure['num_radiographs']:,} radiographs. If normal and "
        "abnormal radiographs differ, exposure alone predicts the label to some degree, and a network will use it.",
    )
    exposure_by_split = {"All radiographs": exposure["overall"], **exposure["split"]}
    yield _gray_table(exposure_by_split, notes)
    yield _gray_charts({"All radiographs": exposure["overall"]})
    yield details_grid(
        [
            details("By split", _gray_charts(exposure["split"])),
            details("By study type", _gray_table(exposure["study_type"], notes), _gray_charts(exposure["study_type"])),
        ]
    )


def _gray_table(named: dict[str, dict[str, Any]], notes: Footnotes) -> Html:
    rows = [
        (group_cell(name), f"{gray['num_radiographs']:,}", *(_mean(gray[f"{label}_mean"], notes) for label in _LABELS))
        for name, gray in named.items()
    ]
    return table(("", "Radiographs", "Normal, mean", "Abnormal, mean"), rows)


def _mean(value: float | None, notes: Footnotes) -> Any:
    return join(("-", notes.mark(_NO_SAMPLE))) if value is None else f"{value:.1f}"


def _gray_charts(named: dict[str, dict[str, Any]]) -> Html:
    charts = []
    edges = GRAY_EDGES.astype(int).tolist()
    for name, gray in named.items():
        series = {label: gray[f"{label}_histogram"] for label in _LABELS}
        description = "; ".join(f"{label} {_describe_bars(edges, counts)}" for label, counts in series.items())
        chart = bars([str(edge) for edge in edges[:-1]], series, f"Radiographs by mean gray level: {description}")
        charts.append(figure(chart, f"{mura.display_name(name)} by mean gray level."))
    return element("div", *charts, class_="wide pictures")


def _defect(count: int, examples: list[str]) -> Html:
    more = [f"and {count - len(examples):,} more"] if examples and count > len(examples) else []
    return join((f"{count:,}", *(element("small", line) for line in [*examples, *more])))


def _describe_bars(names: Iterable[Any], counts: Iterable[int]) -> str:
    """Return the text of a bar chart for screen readers, without empty bars."""
    return ", ".join(f"{name}: {count}" for name, count in zip(names, counts, strict=False) if count) or "none"
