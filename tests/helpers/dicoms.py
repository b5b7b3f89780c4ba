"""DICOM files drawn for tests: pixels, plain or compressed, under a header that tests may falsify.

pixels (H, W) or (H, W, 3) -> dicom -> bytes of a file          codestream -> encapsulated -> bytes of a file
values (H, W) -> jpeg_lossless, flat_jpeg -> codestream         values by keyword -> table, group -> items of sequences
"""

import io
import struct
from typing import Any

import numpy as np
import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.tag import Tag

CR, DX_PROCESSING, SC = "1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1.1", "1.2.840.10008.5.1.4.1.1.7"
IMPLICIT, EXPLICIT, DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
RLE, J2K_LOSSLESS, J2K, JPEG = "1.2.840.10008.1.2.5", *(f"1.2.840.10008.1.2.4.{n}" for n in (90, 91, 50))
JPEG_EXTENDED, JPEG_LOSSLESS, JPEG_LOSSLESS_SV1 = (f"1.2.840.10008.1.2.4.{n}" for n in (51, 57, 70))


def dicom(pixels: np.ndarray, *, bits: int = 8, syntax: str = EXPLICIT, **values: Any) -> bytes:
    """Return a secondary capture of `pixels` ((H, W) or (H, W, 3)).

    `values` are set last. None removes an element, and bytes are written unchanged, even if invalid.
    """
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax if syntax in (IMPLICIT, BIG_ENDIAN, DEFLATED) else EXPLICIT
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = SC, "1.2.3", "OT"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = (8 if bits <= 8 else 16), bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    dataset["PixelData"].VR = "OB" if bits <= 8 else "OW"
    if syntax in (RLE, J2K_LOSSLESS):
        dataset.compress(syntax, generate_instance_uid=False)
    for name, value in values.items():
        put(dataset, name, value, syntax)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def put(dataset: Dataset, name: str, value: Any, syntax: str = EXPLICIT) -> None:
    """Set, delete (None) or write raw (bytes) an attribute."""
    tag = Tag(name)
    if value is None:
        del dataset[name]
    elif isinstance(value, bytes) and name != "PixelData":
        value += b"\0" * (len(value) % 2)
        vr = dictionary_VR(tag).split(" or ")[0]
        dataset[tag] = RawDataElement(tag, vr, len(value), value, 0, syntax == IMPLICIT, syntax != BIG_ENDIAN)
    else:
        setattr(dataset, name, value)


def sequence(**values: Any) -> Sequence:
    """Return a sequence of one item."""
    item = Dataset()
    for name, value in values.items():
        put(item, name, value)
    return Sequence([item])


def table(entries: np.ndarray, first: int, bits: int, *, vr: str = "OW", order: str = "<") -> Sequence:
    """Return a modality or VOI LUT.

    `entries` (n,) are uint8 (bytes, two in a word) or uint16 (words). `first` is an unsigned word, or negative.
    """
    data = entries.tobytes() + b"\0" * (entries.nbytes % 2)
    values_16 = np.frombuffer(data, "<u2")
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries) % 0x10000, first, bits])
    item.add_new("LUTData", vr, values_16.tolist() if vr == "US" else values_16.astype(f"{order}u2").tobytes())
    return Sequence([item])


def encapsulated(frame: bytes, syntax: str, *, bits: int = 8, **values: Any) -> bytes:
    """Return a DICOM that contains `frame`. Its header gives 60 x 45 unless `values` say otherwise."""
    drawn = np.zeros((60, 45), np.uint8 if bits <= 8 else np.uint16)
    dataset = pydicom.dcmread(io.BytesIO(dicom(drawn, bits=bits, **values)))
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = values.get("PixelData", encapsulate([frame]))
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def jpeg_lossless(values: np.ndarray, precision: int, predictor: int = 1) -> bytes:
    """Compress by JPEG process 14, the lossless JPEG of most CR and DX.

    It codes differences to the previous pixel (predictor 1) or the one above (2), with Huffman codes of five bits for their 17
    lengths.
    """
    table = b"\xff\xc4" + struct.pack(">HB16B", 36, 0, 0, 0, 0, 0, 17, *[0] * 11) + bytes(range(17))
    frame = b"\xff\xc3" + struct.pack(">HBHHB", 11, precision, *values.shape, 1) + b"\1\x11\0"
    scan = b"\xff\xda" + struct.pack(">HB", 8, 1) + bytes([1, 0, predictor, 0, 0])
    pixels = values.astype(np.int64)
    before = np.empty_like(pixels)
    before[:, 1:], before[1:, 0] = pixels[:, :-1], pixels[:-1, 0]
    if predictor == 2:
        before[1:] = pixels[:-1]
    before[0, 0] = 1 << (precision - 1)
    before[0, 1:] = pixels[0, :-1]
    coded = _coded((pixels - before + 0x8000) % 0x10000 - 0x8000)
    return b"\xff\xd8" + frame + table + scan + coded + b"\xff\xd9"


def _coded(differences: np.ndarray, end: str = "") -> bytes:
    """Return JPEG's entropy-coded data: each difference, then `end`."""
    bits = "".join(_difference_bits(int(difference)) + end for difference in differences.flat)
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")


def _difference_bits(difference: int) -> str:
    length = abs(difference).bit_length()
    if length in (0, 16):  # 0, or -32768: the length determines the value
        return f"{length:05b}"
    return f"{length:05b}{difference if difference > 0 else difference + (1 << length) - 1:0{length}b}"


def flat_jpeg(values: np.ndarray, precision: int) -> bytes:
    """Compress by JPEG's extended process. Blocks of 8 x 8 equal pixels lose nothing. values: (H / 8, W / 8)."""
    height, width = (8 * side for side in values.shape)
    quantization = b"\xff\xdb" + struct.pack(">HB", 67, 0) + b"\1" * 64
    frame = b"\xff\xc1" + struct.pack(">HBHHB", 11, precision, height, width, 1) + b"\1\x11\0"
    means = b"\xff\xc4" + struct.pack(">HB16B", 36, 0, 0, 0, 0, 0, 17, *[0] * 11) + bytes(range(17))
    ends = b"\xff\xc4" + struct.pack(">HB16B", 20, 0x10, 1, *[0] * 15) + b"\0"  # "0": the rest of the block is 0
    levels = 8 * (values.astype(np.int64).ravel() - (1 << (precision - 1)))
    scan = b"\xff\xda" + struct.pack(">HB", 8, 1) + b"\1\0\0\x3f\0"
    return (
        b"\xff\xd8" + quantization + frame + means + ends + scan + _coded(np.diff(levels, prepend=0), "0") + b"\xff\xd9"
    )


def without_meta(data: bytes) -> bytes:
    return data[144 + struct.unpack_from("<I", data, 140)[0] :]
