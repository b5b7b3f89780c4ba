"""Map stored values to gray by the display pipeline of DICOM (PS3.3, C.11.1 and C.11.2).

    values -> modality LUT or rescale -> VOI LUT or window -> 0..255, before any inversion

Each comes from the data set or from the functional groups of its single frame. Unusable attributes are ignored and noted:
slope 0, text in place of numbers, tables that are truncated, empty, constant or outside the value range.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mura_dist.data import dicom_header
from mura_dist.data.dicom_header import Header
from mura_dist.data.grayscale import find_extent, scale

_Domain = tuple[float, float]
_FUNCTIONS = ("LINEAR", "LINEAR EXACT", "SIGMOID")


def to_display(values: np.ndarray, span: slice, domain: tuple[int, int], header: Header) -> np.ndarray:
    """Map stored values to gray.

    Args:
        values: Consecutive stored values, int64 (V,).
        span: Part of `values` that occurs in the image, without padding.
        domain: Smallest and largest value that could be stored.
        header: Header with the transforms.

    Returns:
        (V,) uint8.
    """
    modal, modal_domain = _to_modality(values, domain, header)
    gray = _to_voi(modal, modal_domain, header)
    if gray is not None:
        return gray
    of_8_bits = dicom_header.get_integer(header.dataset, "BitsStored") == 8 and values[0] >= 0 and values[-1] <= 255
    if of_8_bits and np.array_equal(modal, values):
        return values.astype(np.uint8)
    return scale(modal, *find_extent(modal[span]))


def _scopes(header: Header, macro: str) -> Iterator[Any]:
    """Yield the data set, then the functional group items of its single frame."""
    yield header.dataset
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for group in dicom_header.get_items(header.dataset, groups)[:1]:
            yield from dicom_header.get_items(group, macro)[:1]


# ---- modality


def _to_modality(values: np.ndarray, domain: tuple[int, int], header: Header) -> tuple[np.ndarray, _Domain]:
    """Apply the modality LUT or rescale, and return the values with the range they could have."""
    for scope in _scopes(header, "PixelValueTransformationSequence"):
        if (table := _find_table(scope, "ModalityLUTSequence", domain, header)) is not None:
            return table.look_up(values), (float(table.entries.min()), float(table.entries.max()))
        if (line := _find_rescale(scope, header)) is not None:
            slope, intercept = line
            low, high = sorted(slope * edge + intercept for edge in domain)
            return values * slope + intercept, (low, high)
    return values, domain


def _find_rescale(scope: Any, header: Header) -> tuple[float, float] | None:
    """Return (slope, intercept), or None where either is unusable."""
    slopes, intercepts = (
        dicom_header.get_numbers(header, scope, "RescaleSlope"),
        dicom_header.get_numbers(header, scope, "RescaleIntercept"),
    )
    if slopes and intercepts and np.isfinite([slopes[0], intercepts[0]]).all() and slopes[0]:
        return slopes[0], intercepts[0]
    if slopes and not (np.isfinite(slopes[0]) and slopes[0] and intercepts):
        header.ignore("RescaleSlope")
    if intercepts and not (np.isfinite(intercepts[0]) and slopes):
        header.ignore("RescaleIntercept")
    return None


# ---- values of interest


def _to_voi(modal: np.ndarray, domain: _Domain, header: Header) -> np.ndarray | None:
    """Apply the first usable VOI LUT or window. Return uint8 (V,), or None where there is none."""
    for scope in _scopes(header, "FrameVOILUTSequence"):
        if (table := _find_table(scope, "VOILUTSequence", domain, header)) is not None:
            # White is the largest entry, because descriptors often name more bits than tables use.
            return scale(table.look_up(modal), 0, float(table.entries.max()))
        if (window := _find_window(scope, header)) is not None:
            return _apply_window(modal, *window, _window_function(scope, header))
    return None


def _find_window(scope: Any, header: Header) -> tuple[float, float] | None:
    """Return (center, width) of the first usable window, which is the default one."""
    centers, widths = (
        dicom_header.get_numbers(header, scope, "WindowCenter"),
        dicom_header.get_numbers(header, scope, "WindowWidth"),
    )
    for center, width in zip(centers, widths, strict=False):
        if np.isfinite(center) and width > 0:
            return center, width
        if not np.isfinite(center):
            header.ignore("WindowCenter")
        if not width > 0:
            header.ignore("WindowWidth")
    for keyword, is_unpaired in (("WindowCenter", centers and not widths), ("WindowWidth", widths and not centers)):
        if is_unpaired:
            header.ignore(keyword)
    return None


def _window_function(scope: Any, header: Header) -> str:
    function = dicom_header.get_label(scope, "VOILUTFunction")
    if function and function not in _FUNCTIONS:
        header.ignore("VOILUTFunction")
    return function


def _apply_window(modal: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Map a window to 0..255 (PS3.3, C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return scale(1 / (1 + np.exp(-4 * (modal - center) / width)), 0, 1)
    if function == "LINEAR EXACT":
        return scale(modal, center - width / 2, center + width / 2)
    half = max(width - 1, 1e-3) / 2  # a width of 1 is a step
    return scale(modal, center - 0.5 - half, center - 0.5 + half)


# ---- tables


class _Table(NamedTuple):
    """A lookup table: `entries`, int64 (n,), map the values from `first` on. Values outside get the nearest entry."""

    first: int
    entries: np.ndarray

    def look_up(self, values: np.ndarray) -> np.ndarray:
        """Look up values (V,) of any dtype. Return int64 (V,)."""
        indices = np.clip(np.rint(values) - self.first, 0, len(self.entries) - 1)
        return self.entries[np.nan_to_num(indices).astype(np.int64)]


def _find_table(scope: Any, keyword: str, domain: _Domain, header: Header) -> _Table | None:
    """Return the first usable table of a sequence."""
    if keyword not in scope:
        return None
    tables = (_read_table(item, domain) for item in dicom_header.get_items(scope, keyword))
    table = next((table for table in tables if table is not None), None)
    if table is None:
        header.ignore(keyword)
    return table


def _read_table(item: Any, domain: _Domain) -> _Table | None:
    """Read a LUT item (PS3.3, C.11.1.1 and C.11.2.1.1) for values within `domain`."""
    (descriptor, order), (data, _) = (dicom_header.get_bytes(item, keyword) for keyword in ("LUTDescriptor", "LUTData"))
    if len(descriptor) < 6:
        return None
    number, first, bits = (int(word) for word in np.frombuffer(descriptor, f"{order}u2", 3))
    number = number or 0x10000
    stored_words = np.frombuffer(data, f"{order}u2", len(data) // 2)
    if len(stored_words) >= number:
        entries = stored_words[:number].astype(np.int64)
    elif bits <= 8 and len(data) >= number:  # two entries per word, the low byte first
        entries = stored_words.astype("<u2").view(np.uint8)[:number].astype(np.int64)
    else:
        return None
    start = _find_start(first, number, domain)
    return None if start is None or entries.min() == entries.max() else _Table(start, entries)


def _find_start(word: int, number: int, domain: _Domain) -> int | None:
    """Return the first value that a table of `number` entries maps, or None where it misses the domain.

    Its 16 bits are signed where values may be negative, unless the table would then lie outside the domain.
    """
    signed = word - 0x10000 if word > 0x7FFF else word
    starts = (signed, word) if domain[0] < 0 else (word, signed)
    return next((start for start in starts if start <= domain[1] and start + number > domain[0]), None)
