"""One file in, one grey picture out: the only code that decodes and resizes a radiograph.

    path or file -> bytes -> what it is, by its first bytes -> Pillow or pydicom -> grey uint8 (H, W) -> (size, size)

The converter stores what `read` gives; predict and the page call the very same function: nothing can drift between
training and serving. The rules, in the order in which they apply:

- size: a header that promises more than MAX_PIXELS, or a file of more than MAX_BYTES, is refused before it is decoded;
- whole or not at all: damaged and cut-short data is refused, never half decoded;
- first frame of an animated or multi-page file; EXIF orientation applied; colour profiles and PNG gamma ignored;
- colour to grey by ITU-R 601 (r = g = b = v gives v), palettes by their colours, transparency over black;
- deeper than 8 bits: linear from the picture's own minimum..maximum to 0..255, nothing saturates, a constant gives 0
  (16-bit colour in PNG, TIFF and JPEG 2000 is the exception: Pillow keeps the high bytes, linear from 0..65535);
- DICOM: modality LUT or rescale, then VOI LUT or the first window; where there is neither, 8 bits as they are and other
  depths from minimum to maximum of what is not padding; MONOCHROME1 inverted; padding black. In scope are single-frame
  CR, DX, RG and secondary captures;
- resize: bilinear, antialiased, aspect ratio not kept (MURA's paper).

A file that is none of this raises Unreadable with one of four codes; nothing else comes out, whatever the bytes.
"""

import contextlib
import io
import logging
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image

from mura_dist.data import body_parts

Source = Path | str | bytes | BinaryIO
Code = Literal["not_image", "out_of_scope", "unreadable", "too_large"]

MAX_PIXELS = 50_000_000  # a stitched whole-leg radiograph has about 30 million, a hand on the finest detector 15
MAX_BYTES = 4 * MAX_PIXELS
BLOCK_PIXELS = 1 << 20  # turned into grey at a time: what lies between is up to 24 times as large as the grey
HEADER_BYTES = 1 << 20  # what `identity` looks at: groups 0008 to 0020 open a DICOM

_PILLOW_KINDS = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
}
_REFUSED_KINDS: dict[bytes, tuple[Code, str]] = {
    b"GIF8": ("out_of_scope", "a GIF, not a format radiographs are kept in"),
    b"BM": ("out_of_scope", "a BMP, not a format radiographs are kept in"),
    b"RIFF": ("out_of_scope", "a WebP or another RIFF file, not a format radiographs are kept in"),
    b"\0\0\1\0": ("out_of_scope", "an icon, not a radiograph"),
    b"\0\x05\x16\x07": ("not_image", "macOS's AppleDouble companion of a file, not the file itself"),
    b"version https://git-lfs": ("not_image", "a Git LFS pointer, not the file it stands for"),
    b"<": ("not_image", "a text or web page, not an image"),
}
# Old DICOM without its preamble opens with an element of group 0002 or 0008, little endian.
_BARE_DICOM = re.compile(rb"\x02\0[\0\1]\0|\x08\0[\0\1\x05\x08\x16]\0")
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_BARE_SYNTAX = {(True, True): "1.2.840.10008.1.2", (False, True): "1.2.840.10008.1.2.1"}  # by (implicit, little endian)
_RLE = "1.2.840.10008.1.2.5"
_PNG_KIND, _PNG_GREY_ALPHA_16, _PNG_RGBA_8 = slice(24, 26), b"\x10\4", b"\x08\6"  # bit depth and colour type
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

_GREY_MODES = ("1", "L", "LA", "La")
_SAMPLE_PX = 64  # of a side of `Look.colours`

_UPRIGHT_NAMES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_UPRIGHT = dict(enumerate((Image.Transpose[name] for name in _UPRIGHT_NAMES.split()), start=2))  # by EXIF orientation
_EXIF_ORIENTATION = 0x0112
_TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0

_stderr_lock = threading.Lock()


class Unreadable(Exception):
    """This file gives no radiograph. `reason` is one plain sentence: no path, no DICOM value, no library's words."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(code, reason)
        self.code: Code = code
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}"


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


def read(source: Source, size: int) -> np.ndarray:
    """The radiograph of a file, size x size: (size, size) uint8. Raises Unreadable and nothing else."""
    assert size > 0, size
    return np.asarray(_grey(source).resize((size, size), Image.Resampling.BILINEAR))


class Look(NamedTuple):
    """A radiograph as the model sees it, and what only its file knows.

    image (size, size) uint8, what `read` gives; colours (n, n, 3) uint8, a sparse sample of the file's own, None of a grey one;
    shown (h, w) uint8, the radiograph for a person, in its own proportions; None where nobody looks.
    """

    image: np.ndarray
    colours: np.ndarray | None
    shown: np.ndarray | None


def look(source: Source, size: int, longest: int = 0) -> Look:
    """`read`, and more of the same decoding. longest: of `shown`, in pixels, at most; 0: nobody looks. Raises Unreadable."""
    grey, colours = _decoded(source)
    image = np.asarray(grey.resize((size, size), Image.Resampling.BILINEAR))
    if not longest:
        return Look(image, colours, None)
    grey.thumbnail((longest, longest), Image.Resampling.BOX)
    return Look(image, colours, np.asarray(grey))


def decode(source: Source) -> np.ndarray:
    """The radiograph of a file as large as it is: (H, W) uint8. Raises Unreadable and nothing else.

    `source` is a path, or a binary file that can seek; what the file is called says nothing about what it is.
    """
    return np.asarray(_grey(source))


def identity(source: Source) -> DicomIdentity | None:
    """Study, body part and laterality of a DICOM, from its header alone; None for any other file. Raises nothing."""
    _quieten()
    try:
        with open(source, "rb") if isinstance(source, Path | str | bytes) else contextlib.nullcontext(source) as file:
            file.seek(0)
            head = file.read(HEADER_BYTES)
        if _kind(head) != "DICOM":
            return None
    except Exception:  # whatever is wrong with the file, `read` says it better
        return None
    try:
        content = io.BytesIO(head)
        header = _parse_dicom(content, stop_before_pixels=True, specific_tags=_IDENTITY_TAGS)
    except Exception:
        return DicomIdentity("", "", "", may_show_text=True)
    # Where the pixels, or the end, lie beyond what was looked at, the header may go on with what matters here.
    whole = len(head) < HEADER_BYTES or content.tell() < len(head)
    return DicomIdentity(
        _told(header, "StudyInstanceUID"),
        _body_part(header),
        # An image's own laterality before its series': a series of both hands has "B", or whichever came first.
        body_parts.laterality(_told(header, "ImageLaterality") or _told(header, "Laterality")),
        _may_show_text(header) or not whole,
    )


def _told(header: Any, keyword: str) -> str:
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
    if written := body_parts.plain(_told(header, "BodyPartExamined")):
        return written
    with contextlib.suppress(Exception):  # none, several, or no sequence at all
        (region,) = header.AnatomicRegionSequence
        return body_parts.of_code(_told(region, "CodingSchemeDesignator"), _told(region, "CodeValue"))
    return ""


def _may_show_text(header: Any) -> bool:
    classes = (_told(header.file_meta, "MediaStorageSOPClassUID"), _told(header, "SOPClassUID"))
    if any(one.startswith(_SECONDARY_CAPTURE) for one in classes):
        return True
    # The type of conversion stands in the module of secondary captures alone: digitised films carry labels, too.
    if body_parts.plain(_told(header, "Modality")) in _CAPTURED or "ConversionType" in header:
        return True
    try:
        return body_parts.plain(str(header.get("BurnedInAnnotation") or "NO")) != "NO"
    except Exception:  # it says something, and nobody knows what
        return True


def _grey(source: Source) -> Image.Image:
    return _decoded(source)[0]


def _decoded(source: Source) -> tuple[Image.Image, np.ndarray | None]:
    """The grey radiograph, and a sample of the colours it had."""
    data = _contents(source)
    kind = _kind(data)
    _quieten()
    try:
        return _from_dicom(data) if kind == "DICOM" else _from_pillow(data, kind)
    except Unreadable:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, before ours
        raise Unreadable("too_large", f"its {kind} header promises more than {MAX_PIXELS:,} pixels") from error
    except MemoryError as error:
        raise Unreadable("too_large", f"this {kind} needs more memory than there is to decode") from error
    except Exception as error:  # the libraries raise some twenty kinds; to the reader they all say the same
        raise Unreadable("unreadable", f"its {kind} data is damaged, cut short or of an unsupported variant") from error


def _quieten() -> None:
    """What the libraries complain of is raised or harmless, and may quote a patient. By module, for good: entering
    and leaving `catch_warnings` around each file is not thread-safe."""
    for library in ("PIL", "pydicom"):
        warnings.filterwarnings("ignore", module=rf"{library}\.")
        logger = logging.getLogger(library)
        if logger.level != logging.CRITICAL:
            logger.setLevel(logging.CRITICAL)


def _contents(source: Source) -> bytes:
    try:
        if not isinstance(source, Path | str | bytes):
            return _all_of(source)
        if not os.path.isfile(source) and os.path.exists(source):  # opening a pipe would wait for ever
            raise Unreadable("unreadable", "cannot be opened: not a regular file")
        with open(source, "rb") as file:
            return _all_of(file)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not a usable path"
        raise Unreadable("unreadable", f"cannot be opened: {why.lower()}") from error
    except MemoryError as error:
        raise Unreadable("too_large", "there is not enough memory to hold the file") from error


def _all_of(file: BinaryIO) -> bytes:
    if file.seek(0, io.SEEK_END) > MAX_BYTES:
        raise Unreadable("too_large", f"the file is larger than {MAX_BYTES:,} bytes")
    file.seek(0)
    return file.read()


def _kind(data: bytes) -> str:
    """ "DICOM", or the name of Pillow's reader. Raises Unreadable for what neither should try."""
    if data[128:132] == b"DICM" or _BARE_DICOM.match(data):
        return "DICOM"
    for signature, kind in _PILLOW_KINDS.items():
        if data.startswith(signature):
            return kind
    for signature, (code, reason) in _REFUSED_KINDS.items():
        if data.startswith(signature):
            raise Unreadable(code, reason)
    raise Unreadable("not_image", "it does not begin as any image format does" if data else "the file is empty")


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Unreadable("too_large", f"its header promises {width} x {height} pixels, more than {MAX_PIXELS:,}")


# ---- Pillow's formats


def _from_pillow(data: bytes, kind: str) -> tuple[Image.Image, np.ndarray | None]:
    disguised = data[:8] in _PILLOW_KINDS and data[_PNG_KIND] == _PNG_GREY_ALPHA_16
    image: Image.Image = Image.open(io.BytesIO(_disguised(data) if disguised else data), formats=(kind,))
    _check_size(*image.size)
    if kind == "PNG":
        _check_png(data)
    with _hushed() if kind == "TIFF" else contextlib.nullcontext():
        image.load()
    orientation = _orientation(image)
    deep = image.mode[0] in "IF"
    grey = _from_disguised(image) if disguised else _from_deep(image) if deep else _from_shallow(image)
    colours = None if disguised or deep else _sample(image)
    return (grey.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else grey), colours


def _sample(image: Image.Image) -> np.ndarray | None:
    """Of a file in colour, which may be grey for all that: pixels of a coarse grid."""
    if image.mode in _GREY_MODES:
        return None
    side = min(_SAMPLE_PX, *image.size)
    return np.asarray(image.resize((side, side), Image.Resampling.NEAREST).convert("RGB"))


def _disguised(data: bytes) -> bytes:
    """Of 16-bit grey with alpha in a PNG Pillow keeps the high bytes alone: 12 bits of grey would come out black. To the
    format two samples of 16 bits are four of 8, byte for byte: given out as RGBA, all of them come through."""
    header = data[12:24] + _PNG_RGBA_8 + data[26:29]
    checksum = zlib.crc32(data[12:29]) ^ int.from_bytes(data[29:33], "big")  # not 0: wrong before, wrong after
    return data[:12] + header + (zlib.crc32(header) ^ checksum).to_bytes(4, "big") + data[33:]


def _from_disguised(image: Image.Image) -> Image.Image:
    """Red and green are the grey's bytes, blue and alpha the alpha's."""
    samples = np.asarray(image).view(">u2")  # (H, W, 2)
    values, alpha = samples[..., 0], samples[..., 1]
    grey, shown = _scale(values, *_extent(values)), _by_blocks(lambda block: np.rint(block / 257), alpha)
    return Image.composite(Image.fromarray(grey), Image.new("L", image.size), Image.fromarray(shown))


def _check_png(data: bytes) -> None:
    """Pillow skips the checksums of pixel data: a file half of zeros would come out half decoded."""
    place, view = 8, memoryview(data)
    while place + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        if name == b"IDAT":
            checksum = zlib.crc32(view[place + 4 : end]).to_bytes(4, "big")
            if checksum != data[end : end + 4]:
                raise Unreadable("unreadable", "its PNG data is damaged or cut short")
        place = len(data) if name == b"IEND" else end + 4


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # broken EXIF does not break the picture beside it
        return 1


def _from_shallow(image: Image.Image) -> Image.Image:
    """Any mode of 8 bits a sample or fewer."""
    if not image.has_transparency_data:
        return image.convert("L")
    colours = image.convert("RGBA")
    return Image.composite(colours.convert("L"), Image.new("L", image.size), colours.getchannel("A"))


def _from_deep(image: Image.Image) -> Image.Image:
    """Modes I;16, I and F; `convert("L")` would clip them at 255."""
    values = np.asarray(image)  # (H, W) uint16, int32 or float32
    grey = _scale(values, *_extent(values))
    if getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8 bits only
        grey = 255 - grey
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 0
    return Image.fromarray(grey)


def _extent(values: np.ndarray) -> tuple[float, float]:
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def _scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """low..high to 0..255, linear, rounded, clipped; uint8 of the same shape. All 0 where there is no range."""
    if not high > low:
        return np.zeros(values.shape, np.uint8)

    def scaled(block: np.ndarray) -> np.ndarray:
        grey = np.subtract(block, low, dtype=np.float32 if values.dtype.itemsize < 4 else np.float64)
        grey *= 255 / (high - low)
        return np.nan_to_num(np.clip(np.rint(grey, out=grey), 0, 255, out=grey), copy=False)

    with np.errstate(all="ignore"):
        return _by_blocks(scaled, values)


def _by_blocks(grey_of: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """uint8 of the shape of `values`, BLOCK_PIXELS at a time, in whole rows."""
    grey = np.empty(values.shape, np.uint8)
    rows = max(1, BLOCK_PIXELS * len(values) // max(1, values.size))
    for start in range(0, len(values), rows):
        grey[start : start + rows] = grey_of(values[start : start + rows])
    return grey


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """libtiff writes its complaints to file descriptor 2 itself; what it complains of is raised anyway."""
    with _stderr_lock, open(os.devnull, "wb") as nothing:
        try:
            kept = os.dup(2)
        except OSError:  # no stderr, nothing to hush
            yield
            return
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


# ---- DICOM


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


def _from_dicom(data: bytes) -> tuple[Image.Image, np.ndarray | None]:
    from pydicom.pixels import pixel_array

    dataset = _parse_dicom(
        io.BytesIO(data)
    )  # an empty one, but for its group 0002, if the file ends in the midst of its pixels
    _check_scope(dataset)
    width, height, samples = int(dataset.Columns), int(dataset.Rows), int(dataset.SamplesPerPixel)
    _check_size(width, height)
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
    return _by_blocks(lambda block: table[np.subtract(block, first, dtype=np.int32)], stored)


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
    return _scale(modal, *_extent(modal[span]))


def _looked_up(modal: np.ndarray, dataset: Any) -> np.ndarray:
    """By the VOI LUT. White is the largest entry: descriptors often promise more bits than their tables use."""
    from pydicom.pixels import apply_voi

    entries, first, _ = dataset.VOILUTSequence[0].LUTDescriptor
    last = first + (entries or 0x10000) - 1
    table = apply_voi(np.arange(first, last + 1), dataset)
    return _scale(table[np.clip(np.rint(modal), first, last).astype(np.int64) - first], 0, float(table.max()))


def _windowed(modal: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, onto 0..255."""
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return _scale(1 / (1 + np.exp(-4 * (modal - centre) / width)), 0, 1)
    if function == "LINEAR_EXACT":
        return _scale(modal, centre - width / 2, centre + width / 2)
    half = max(width - 1, 1e-3) / 2  # a width of 1 is a step
    return _scale(modal, centre - 0.5 - half, centre - 0.5 + half)


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
        return colour.convert("L"), _sample(colour)
    luma = np.zeros(pixels.shape[:2], np.float32)  # (H, W)
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        luma += np.multiply(pixels[..., channel], weight, dtype=np.float32)
    return Image.fromarray(_scale(luma, *_extent(luma))), None
