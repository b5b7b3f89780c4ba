"""Decode a DICOM, and read its study, body part and laterality. Only this file imports pydicom.

    bytes -> pydicom's dataset -> in scope? -> stored values -> grey image (L), a sample of its colors or None
    bytes of the header -> DicomIdentity

pydicom is imported inside the functions: a folder of PNG never loads it.
"""

import contextlib
import io
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mura_dist.data import body_parts
from mura_dist.data.grey import Unreadable, check_size, find_extent, map_blocks, sample_colors, scale

# Old DICOM without its preamble opens with an element of group 0002 or 0008, little endian.
_BARE_DICOM = re.compile(rb"\x02\0[\0\1]\0|\x08\0[\0\1\x05\x08\x16]\0")
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_BARE_SYNTAX = {(True, True): "1.2.840.10008.1.2", (False, True): "1.2.840.10008.1.2.1"}  # by (implicit, little endian)
_RLE = "1.2.840.10008.1.2.5"
_SIZ = b"\xff\x4f\xff\x51"  # JPEG 2000: start of codestream, image and tile size
_SCAN = 0xDA
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xDE, 0xF7} - {0xC4, 0xC8, 0xCC}  # JPEG, its hierarchical kind, JPEG-LS
_FOR_PROCESSING = "1.2.840.10008.5.1.4.1.1.1.1.1"
_MODALITIES = ("CR", "DX", "RG", "OT", "SC")
_SOP_CLASSES = ("1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1", "1.2.840.10008.5.1.4.1.1.7")  # CR, DX, SC
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # the single-frame one; the multi-frame ones continue it
_CAPTURED = ("SC", "OT")  # modalities
_IDENTITY_TAGS = ["SpecificCharacterSet", "StudyInstanceUID", "BodyPartExamined", "AnatomicRegionSequence"]
_IDENTITY_TAGS += ["Laterality", "ImageLaterality"]
_IDENTITY_TAGS += ["SOPClassUID", "Modality", "ConversionType", "BurnedInAnnotation"]


@dataclass(frozen=True, slots=True)
class DicomIdentity:
    """What a DICOM says of its place in the world; "" where it does not say. Body part and laterality are told alike
    whatever the device's capitals and padding; they may be free text, and hold a name.

    `may_show_text`: its pixels may hold a name too. BurnedInAnnotation is there and is not NO; or it is a secondary capture,
    whose text often is the screen's; or its header could not be read. False promises nothing: the tag is optional.
    """

    study_uid: str
    body_part: str
    laterality: str
    may_show_text: bool = False


def is_dicom(data: bytes) -> bool:
    """Decide by the first bytes, with the preamble or without."""
    return data[128:132] == b"DICM" or _BARE_DICOM.match(data) is not None


def read_identity(head: bytes, *, whole: bool) -> DicomIdentity:
    """Read the identity from the first bytes of a DICOM; `whole`: they are all of it. Raises nothing."""
    try:
        content = io.BytesIO(head)
        header = _parse_dicom(content, stop_before_pixels=True, specific_tags=_IDENTITY_TAGS)
    except Exception:
        return DicomIdentity("", "", "", may_show_text=True)
    # Where the pixels, or the end, lie beyond what was looked at, the header may go on with what matters here.
    whole = whole or content.tell() < len(head)
    return DicomIdentity(
        _safe_text(header, "StudyInstanceUID"),
        _body_part(header),
        # An image's own laterality before its series': a series of both hands has "B", or whichever came first.
        body_parts.laterality(_safe_text(header, "ImageLaterality") or _safe_text(header, "Laterality")),
        _may_show_text(header) or not whole,
    )


def _safe_text(header: Any, keyword: str) -> str:
    """As written, several values as DICOM writes them; "" where it is not there or holds what cannot be read."""
    try:
        value = header.get(keyword)
        if isinstance(value, Iterable) and not isinstance(value, str | bytes):
            return "\\".join(map(str, value))
        return str(value or "").strip(" \0")
    except Exception:  # pydicom converts when it is asked: of the wrong kind, beyond its range, in no known alphabet
        return ""


def _body_part(header: Any) -> str:
    """As written; where nothing is, by the code of the anatomic region."""
    if written := body_parts.plain(_safe_text(header, "BodyPartExamined")):
        return written
    with contextlib.suppress(Exception):  # none, several, or no sequence at all
        (region,) = header.AnatomicRegionSequence
        return body_parts.of_code(_safe_text(region, "CodingSchemeDesignator"), _safe_text(region, "CodeValue"))
    return ""


def _may_show_text(header: Any) -> bool:
    classes = (_safe_text(header.file_meta, "MediaStorageSOPClassUID"), _safe_text(header, "SOPClassUID"))
    if any(one.startswith(_SECONDARY_CAPTURE) for one in classes):
        return True
    # The type of conversion stands in the module of secondary captures alone: digitised films carry labels, too.
    if body_parts.plain(_safe_text(header, "Modality")) in _CAPTURED or "ConversionType" in header:
        return True
    try:
        return body_parts.plain(str(header.get("BurnedInAnnotation") or "NO")) != "NO"
    except Exception:  # it says something, and nobody knows what
        return True


def _parse_dicom(content: io.BytesIO, **options: Any) -> Any:
    """pydicom's dataset. Raises Unreadable for a deflated one: pydicom would inflate it without a bound."""
    if _DEFLATED in content.getvalue():  # which copies nothing
        raise Unreadable("out_of_scope", "a deflated DICOM; store it uncompressed or as JPEG 2000")
    import pydicom

    dataset = pydicom.dcmread(content, force=True, **options)
    if "TransferSyntaxUID" not in dataset.file_meta:  # a bare one: pydicom took the encoding from its first element
        dataset.file_meta.TransferSyntaxUID = _BARE_SYNTAX[dataset.original_encoding]
    return dataset


def _text(header: Any, keyword: str) -> str:
    return str(header.get(keyword) or "").strip()


def decode(data: bytes) -> tuple[Image.Image, np.ndarray | None]:
    """Return the grey radiograph, and a sample of the colors it had."""
    from pydicom.pixels import pixel_array

    # An empty one, but for its group 0002, if the file ends in the midst of its pixels.
    dataset = _parse_dicom(io.BytesIO(data))
    _check_scope(dataset)
    width, height, samples = int(dataset.Columns), int(dataset.Rows), int(dataset.SamplesPerPixel)
    check_size(width, height)
    if samples not in (1, 3):
        raise Unreadable("unreadable", f"{samples} samples a pixel, neither grey nor colour")
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        _check_syntax(dataset.file_meta.TransferSyntaxUID)
        _check_codestream(dataset, (width, height, samples))
    # One decoder for each syntax: lossy pixels must not depend on what else is installed.
    pixels = pixel_array(dataset, decoding_plugin="pylibjpeg")  # (H, W), or (H, W, 3) with YBR already turned into RGB
    if str(dataset.PhotometricInterpretation).startswith("MONOCHROME"):
        return Image.fromarray(_from_monochrome(pixels, dataset)), None
    return _from_colour(pixels, dataset)


def _check_syntax(syntax: Any) -> None:
    from pydicom.pixels import get_decoder

    try:
        decodes = "pylibjpeg" in get_decoder(syntax).available_plugins
    except NotImplementedError:  # video, JPEG XL, JPIP and what has been retired
        decodes = False
    if not decodes:
        raise Unreadable("out_of_scope", "a DICOM compressed as none here is; store it uncompressed or as JPEG 2000")


def _check_codestream(dataset: Any, promised: tuple[int, int, int]) -> None:
    """The decoders allocate what the codestream says: one of 60,000 x 60,000 behind a header of 64 x 64 took 14 GB."""
    from pydicom.encaps import get_frame

    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    if dataset.file_meta.TransferSyntaxUID == _RLE:
        return
    found = set(_jpeg2000_sizes(frame) if _SIZ in frame else _jpeg_sizes(frame))
    if found != {promised}:
        raise Unreadable("unreadable", "its DICOM header and the image inside differ in size")


def _jpeg2000_sizes(frame: bytes) -> Iterator[tuple[int, int, int]]:
    """(width, height, samples) of every image and tile size segment."""
    for start in (match.start() for match in re.finditer(re.escape(_SIZ), frame)):
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        yield right - left, bottom - top, struct.unpack_from(">H", frame, start + 40)[0]


def _jpeg_sizes(frame: bytes) -> Iterator[tuple[int, int, int]]:
    """(width, height, samples) of every frame header before the first scan, JPEG and JPEG-LS."""
    place = 2
    while frame[place + 1] != _SCAN:
        if frame[place + 1] in _FRAME_HEADERS:
            height, width, samples = struct.unpack_from(">HHB", frame, place + 5)
            yield width, height, samples
        place += 1 if frame[place + 1] == 0xFF else 2 + struct.unpack_from(">H", frame, place + 2)[0]


def _check_scope(header: Any) -> None:
    modality = _text(header, "Modality")
    sop_class = _text(header.file_meta, "MediaStorageSOPClassUID") or _text(header, "SOPClassUID")
    if not (modality or sop_class) or ("Rows" not in header and sop_class in _SOP_CLASSES):
        raise Unreadable("unreadable", "its DICOM header is damaged or cut short")
    if modality not in _MODALITIES and (modality or sop_class not in _SOP_CLASSES):
        raise Unreadable("out_of_scope", "its DICOM modality is none of CR, DX, RG or a secondary capture")
    if "Rows" not in header:
        raise Unreadable("out_of_scope", "a DICOM without an image, a report for instance")
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise Unreadable("out_of_scope", "a DICOM of several frames")
    if sop_class == _FOR_PROCESSING or _text(header, "PresentationIntentType") == "FOR PROCESSING":
        raise Unreadable("out_of_scope", "raw detector data 'for processing'; send the image 'for presentation'")


def _from_monochrome(stored: np.ndarray, dataset: Any) -> np.ndarray:
    """stored (H, W) of up to 16 bits -> grey (H, W) uint8, by a table over every value between the extremes."""
    first, last = int(stored.min()), int(stored.max())
    if stored.ndim != 2 or stored.dtype.kind not in "iu" or last - first > 0xFFFF:
        raise Unreadable("unreadable", "its DICOM pixels are not grey integers of up to 16 bits")
    low, high = _padding(dataset)
    image = stored[(stored < low) | (stored > high)] if low <= high else stored
    span = slice(int(image.min()) - first, int(image.max()) - first + 1) if image.size else slice(0)
    values = np.arange(first, last + 1)  # (V,) int64
    table = _presented(values, span, dataset)  # (V,) uint8
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        table = 255 - table
    table[(values >= low) & (values <= high)] = 0
    return map_blocks(lambda block: table[np.subtract(block, first, dtype=np.int32)], stored)


def _padding(dataset: Any) -> tuple[int, int]:
    """First and last stored value that mean "no image here"; (1, 0) where there is none."""
    edge = dataset.get("PixelPaddingValue")
    if edge is None:
        return 1, 0
    low, high = sorted((int(edge), int(dataset.get("PixelPaddingRangeLimit", edge))))
    return low, high


def _presented(values: np.ndarray, span: slice, dataset: Any) -> np.ndarray:
    """Stored values (V,) -> grey (V,) uint8, before any inversion; `span` is where the image, not its padding, lies."""
    from pydicom.pixels import apply_modality_lut

    modal = apply_modality_lut(values, dataset)
    if dataset.get("VOILUTSequence"):
        return _looked_up(modal, dataset)
    centre, width = _first_number(dataset, "WindowCenter"), _first_number(dataset, "WindowWidth")
    if centre is not None and width is not None and width > 0:
        return _windowed(modal, centre, width, _text(dataset, "VOILUTFunction"))
    if dataset.BitsStored == 8 and values[0] >= 0 and np.array_equal(modal, values):
        return values.astype(np.uint8)
    return scale(modal, *find_extent(modal[span]))


def _looked_up(modal: np.ndarray, dataset: Any) -> np.ndarray:
    """By the VOI LUT. White is the largest entry: descriptors often promise more bits than their tables use."""
    from pydicom.pixels import apply_voi

    entries, first, _ = dataset.VOILUTSequence[0].LUTDescriptor
    last = first + (entries or 0x10000) - 1
    table = apply_voi(np.arange(first, last + 1), dataset)
    return scale(table[np.clip(np.rint(modal), first, last).astype(np.int64) - first], 0, float(table.max()))


def _windowed(modal: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, onto 0..255."""
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return scale(1 / (1 + np.exp(-4 * (modal - centre) / width)), 0, 1)
    if function == "LINEAR_EXACT":
        return scale(modal, centre - width / 2, centre + width / 2)
    half = max(width - 1, 1e-3) / 2  # a width of 1 is a step
    return scale(modal, centre - 0.5 - half, centre - 0.5 + half)


def _first_number(dataset: Any, keyword: str) -> float | None:
    """A dataset may offer several windows; the first is the one to show first."""
    value = dataset.get(keyword)
    if value is None or value == "":
        return None
    return float(np.ravel(value)[0])


def _from_colour(pixels: np.ndarray, dataset: Any) -> tuple[Image.Image, np.ndarray | None]:
    from pydicom.pixels import apply_color_lut

    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
    if pixels.dtype == np.uint8:
        colour = Image.fromarray(pixels[..., :3])
        return colour.convert("L"), sample_colors(colour)
    luma = np.zeros(pixels.shape[:2], np.float32)  # (H, W)
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        luma += np.multiply(pixels[..., channel], weight, dtype=np.float32)
    return Image.fromarray(scale(luma, *find_extent(luma))), None
