"""Test tiff.py: every sample kind that Pillow opens gives the values written, and the right page is read.

The tests write the files by the specification (TIFF 6.0 and BigTIFF), since Pillow writes few of these kinds.
"""

import io
import itertools
import lzma
import re
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from mura_dist.data.radiograph import UnreadableFileError, decode

UNSIGNED, SIGNED, FLOATING, VOID = 1, 2, 3, 4
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
HEIGHT, WIDTH = 21, 37
FULL, REDUCED, MASK = 0, 1, 4

# (SampleFormat, BitsPerSample): supported kinds, and kinds refused by name regardless of the other tags.
READ = [
    (UNSIGNED, 8),
    (UNSIGNED, 12),
    (UNSIGNED, 16),
    (UNSIGNED, 32),
    (SIGNED, 8),
    (SIGNED, 16),
    (SIGNED, 32),
    (FLOATING, 32),
]
REFUSED = [(UNSIGNED, 64), (SIGNED, 64), (FLOATING, 16), (FLOATING, 64), (UNSIGNED, 24), (VOID, 16)]


def lzw(data: bytes) -> bytes:
    """Compress with a table that is cleared before its codes exceed 9 bits. Every byte is a code."""
    codes = [256, *itertools.chain.from_iterable((*data[n : n + 200], 256) for n in range(0, len(data), 200)), 257]
    bits = "".join(f"{code:09b}" for code in codes)
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def packbits(data: bytes) -> bytes:
    return b"".join(bytes([len(run) - 1]) + run for run in (data[n : n + 128] for n in range(0, len(data), 128)))


COMPRESSIONS: dict[int, Callable[[bytes], bytes]] = {
    1: bytes,
    5: lzw,
    8: zlib.compress,
    32946: zlib.compress,
    32773: packbits,
    34925: lzma.compress,
}
MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def samples_of(kind: int, bits: int, seed: int = 0) -> np.ndarray:
    """Return random values (HEIGHT, WIDTH) over the full range. 12 and 24 bits are in wider integers."""
    random = np.random.default_rng(seed)
    if kind == FLOATING:
        return random.normal(0, 100, (HEIGHT, WIDTH)).astype(f"f{bits // 8}")
    if bits in (12, 24):
        return random.integers(0, 1 << bits, (HEIGHT, WIDTH))
    dtype = np.dtype(f"{'i' if kind == SIGNED else 'u'}{bits // 8}")
    return random.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, (HEIGHT, WIDTH), dtype, endpoint=True)


def packed(values: np.ndarray, bits: int, order: str) -> bytes:
    """Return rows of samples, each padded to a full byte."""
    if bits in (12, 24):
        rows = values.reshape(len(values), -1, 1) >> np.arange(bits - 1, -1, -1) & 1
        return np.packbits(rows.astype(np.uint8).reshape(len(values), -1), axis=1).tobytes()
    return np.ascontiguousarray(values, values.dtype.newbyteorder(order)).tobytes()


def blocks(values: np.ndarray, layout: str) -> tuple[list[np.ndarray], dict[int, int]]:
    """Return one strip, strips of 10 rows, or tiles of 16 x 32, and their tags."""
    if layout == "tiles":
        high, wide = -(-len(values) // 16) * 16, -(-values.shape[1] // 32) * 32
        pad = [(0, high - len(values)), (0, wide - values.shape[1])] + [(0, 0)] * (values.ndim - 2)
        complete = np.pad(values, pad, mode="edge")
        tiles = [complete[y : y + 16, x : x + 32] for y in range(0, high, 16) for x in range(0, wide, 32)]
        return tiles, {322: 32, 323: 16}
    rows = len(values) if layout == "strip" else 10
    return [values[y : y + rows] for y in range(0, len(values), rows)], {278: rows}


def page(
    values: np.ndarray,
    kind: int,
    bits: int,
    *,
    order: str = "<",
    photometric: int = BLACK_IS_ZERO,
    compression: int = 1,
    layout: str = "strip",
    planes: int | None = None,
    fill: int = 1,
    **tags: int,
) -> tuple[list[bytes], dict[int, tuple[int, ...]]]:
    """Return the pixel blocks and the tags without block offsets of values (H, W) or (H, W, C). `tags`: tag_254=1."""
    channels = [values[..., n] for n in range(values.shape[-1])] if values.ndim == 3 and planes == 2 else [values]
    pieces: list[np.ndarray] = []
    for channel in channels:
        cut, where = blocks(channel, layout)
        pieces += cut
    data = [COMPRESSIONS[compression](packed(piece, bits, order)) for piece in pieces]
    if fill == 2:
        data = [piece.translate(MIRRORED) for piece in data]
    num_samples = values.shape[2] if values.ndim == 3 else 1
    directory = {256: (values.shape[1],), 257: (len(values),), 258: (bits,) * num_samples, 259: (compression,)}
    directory |= {262: (photometric,), 266: (fill,), 277: (num_samples,), 339: (kind,) * num_samples}
    directory |= {tag: (value,) for tag, value in where.items()}
    directory |= {284: (planes,)} if planes else {}
    directory |= {int(name.removeprefix("tag_")): (value,) for name, value in tags.items()}
    return data, directory


Parts = tuple[list[bytes], dict[int, tuple[int, ...]]]


def tiff(*pages: Parts, order: str = "<", big: bool = False, sub_pages: tuple[Parts, ...] = ()) -> bytes:
    """Return a file of pages in their order. `sub_pages` belong to the first page."""
    out, offset_format = bytearray(b"II" if order == "<" else b"MM"), order + ("Q" if big else "I")
    out += struct.pack(order + "HHHQ", 43, 8, 0, 16) if big else struct.pack(order + "HI", 42, 8)
    first_link = len(out) - (8 if big else 4)

    def put(parts: Parts, extra: dict[int, tuple[int, ...]], link: int) -> int:
        """Write the pixels, then the directory. Store its offset at `link`. Return the position of the next link."""
        data, directory = parts
        offsets = []
        for piece in data:
            offsets.append(len(out))
            out.extend(piece + b"\0" * (len(piece) % 2))
        lengths = tuple(len(piece) for piece in data)
        tiled = 322 in directory
        directory = directory | extra | {324 if tiled else 273: tuple(offsets), 325 if tiled else 279: lengths}
        entries = b""
        for tag, values in sorted(directory.items()):
            short = tag not in (254, 256, 257, 273, 278, 279, 324, 325, 330)
            body = struct.pack(f"{order}{len(values)}{'H' if short else 'I'}", *values)
            if len(body) > len(struct.pack(offset_format, 0)):
                position = len(out)
                out.extend(body + b"\0" * (len(body) % 2))
                body = struct.pack(offset_format, position)
            head = struct.pack(order + "HH", tag, 3 if short else 4) + struct.pack(offset_format, len(values))
            entries += head + body.ljust(len(struct.pack(offset_format, 0)), b"\0")
        struct.pack_into(offset_format, out, link, len(out))
        out.extend(struct.pack(order + ("Q" if big else "H"), len(directory)) + entries)
        out.extend(struct.pack(offset_format, 0))
        return len(out) - (8 if big else 4)

    spare, starts = len(out), []
    out.extend(bytes(8))
    for child in sub_pages:
        put(child, {}, spare)
        starts.append(struct.unpack_from(offset_format, out, spare)[0])
    link = first_link
    for number, parts in enumerate(pages):
        link = put(parts, {330: tuple(starts)} if starts and not number else {}, link)
    return bytes(out)


def stretched(values: np.ndarray, photometric: int = BLACK_IS_ZERO) -> np.ndarray:
    """Return the gray of linear values: smallest to 0, largest to 255. uint8 is unchanged."""
    wide = values.astype(np.float64)
    if values.dtype != np.uint8:
        wide = (wide - wide.min()) * 255 / (wide.max() - wide.min())
    return 255 - wide if photometric == WHITE_IS_ZERO else wide


# ---- samples


@pytest.mark.parametrize(("kind", "bits"), READ)
def test_samples_equal_the_values_written_or_are_refused(kind: int, bits: int) -> None:
    """Over byte order, compression, layout, planes and polarity. At least a quarter of each kind must be read."""
    values, num_read, num = samples_of(kind, bits), 0, 0
    grid = itertools.product(
        "<>", COMPRESSIONS, ("strip", "strips", "tiles"), (None, 1, 2), (BLACK_IS_ZERO, WHITE_IS_ZERO)
    )
    for order, compression, layout, planes, photometric in grid:
        options = {"order": order, "compression": compression, "layout": layout, "photometric": photometric}
        data, num = tiff(page(values, kind, bits, planes=planes, **options), order=order), num + 1
        try:
            gray = decode(io.BytesIO(data))
        except UnreadableFileError as error:
            reason = error.reason
        else:
            reason, num_read = "", num_read + 1
        if reason:
            inverse = ", 0 for white," if photometric == WHITE_IS_ZERO else ""
            assert re.match(rf"a TIFF of {bits}-bit \w+.* (integers|numbers){inverse} is not read; save it", reason), (
                options
            )
            continue
        assert np.abs(gray - stretched(values, photometric)).max() <= 0.51, (options, planes)
    assert num_read >= num / 4


@pytest.mark.parametrize(("kind", "bits"), REFUSED)
def test_unsupported_sample_kind_is_refused_by_name(kind: int, bits: int) -> None:
    values = samples_of(kind if kind != VOID else UNSIGNED, bits)
    for order, compression, photometric in itertools.product("<>", COMPRESSIONS, (BLACK_IS_ZERO, WHITE_IS_ZERO)):
        parts = page(values, kind, bits, order=order, compression=compression, photometric=photometric)
        with pytest.raises(
            UnreadableFileError, match="TIFF" if kind == VOID else f"a TIFF of {bits}-bit .*; save it with 8 or 16 bits"
        ):
            decode(io.BytesIO(tiff(parts, order=order)))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_low_bit_depths_in_both_polarities(bits: int) -> None:
    """A single plane marked as separate is inverted too."""
    values = np.random.default_rng(0).integers(0, 1 << bits, (HEIGHT, WIDTH))
    bit_rows = values[..., None] >> np.arange(bits - 1, -1, -1) & 1
    rows = np.packbits(bit_rows.astype(np.uint8).reshape(HEIGHT, -1), axis=1)
    for photometric, planes, compression in itertools.product((BLACK_IS_ZERO, WHITE_IS_ZERO), (None, 1, 2), (1, 5, 8)):
        options = {"photometric": photometric, "planes": planes, "compression": compression}
        parts, directory = page(rows, UNSIGNED, 8, **options)
        data = tiff((parts, directory | {256: (WIDTH,), 258: (bits,)}))
        gray = np.rint(values * (255 / ((1 << bits) - 1)))
        np.testing.assert_array_equal(decode(io.BytesIO(data)), 255 - gray if photometric == WHITE_IS_ZERO else gray)


@pytest.mark.parametrize("predictor", [2, 3])
@pytest.mark.parametrize("order", "<>")
def test_predictors_are_undone(predictor: int, order: str) -> None:
    for kind, bits in READ:
        if bits == 12 or (kind == FLOATING) != (predictor == 3) or (order, kind, bits) == (">", UNSIGNED, 32):
            continue
        values = samples_of(kind, bits)
        if predictor == 2:
            coded = values.copy()
            coded[:, 1:] -= values[:, :-1]
        else:  # the bytes of each row, the most significant of all samples first, then their differences
            planes = np.moveaxis(values.astype(">f4").view(np.uint8).reshape(HEIGHT, WIDTH, 4), 2, 1).reshape(
                HEIGHT, -1
            )
            coded = planes.copy()
            coded[:, 1:] -= planes[:, :-1]
        parts, directory = page(coded, kind, bits if predictor == 2 else 8, order=order, compression=8)
        data = tiff((parts, directory | {256: (WIDTH,), 258: (bits,), 317: (predictor,)}), order=order)
        assert np.abs(decode(io.BytesIO(data)) - stretched(values)).max() <= 0.51, (kind, bits)


@pytest.mark.parametrize("bits", [8, 16])
def test_planar_and_interleaved_colors(bits: int) -> None:
    """They are read correctly or refused. 16 bits keep their high bytes."""
    colors = np.random.default_rng(bits).integers(0, 1 << bits, (HEIGHT, WIDTH, 3)).astype(f"u{bits // 8}")
    expected, num_read = (colors >> (bits - 8)) @ np.array([0.299, 0.587, 0.114]), 0
    grid = itertools.product("<>", (1, 5, 8), ("strip", "strips", "tiles"), (1, 2), (1, 2))
    for order, compression, layout, planes, fill in grid:
        options = {"order": order, "compression": compression, "layout": layout, "planes": planes, "fill": fill}
        data = tiff(page(colors, UNSIGNED, bits, photometric=RGB, **options), order=order)
        try:
            np.testing.assert_allclose(decode(io.BytesIO(data)), expected, atol=1.01, err_msg=str(options))
            num_read += 1
        except UnreadableFileError:
            assert fill == 2 or (planes == 2 and bits == 16), options
    assert num_read >= 20


@pytest.mark.parametrize(("kind", "bits"), [(UNSIGNED, 8), (UNSIGNED, 16)])
def test_reversed_bit_order_is_read_or_refused(kind: int, bits: int) -> None:
    """The tag is FillOrder 2."""
    values, num_read = samples_of(kind, bits), 0
    for order, compression, photometric in itertools.product("<>", COMPRESSIONS, (BLACK_IS_ZERO, WHITE_IS_ZERO)):
        options = {"order": order, "compression": compression, "photometric": photometric}
        try:
            gray = decode(io.BytesIO(tiff(page(values, kind, bits, fill=2, **options), order=order)))
        except UnreadableFileError:
            continue
        num_read += 1
        assert np.abs(gray - stretched(values, photometric)).max() <= 0.51, options
    assert num_read >= 6


def test_largest_uint32_is_white() -> None:
    values = np.array([[0, 1 << 31, (1 << 32) - 1]], np.uint32)
    np.testing.assert_array_equal(decode(io.BytesIO(tiff(page(values, UNSIGNED, 32)))), [[0, 128, 255]])
    values = np.array([[-128, 0, 127]], np.int8)
    np.testing.assert_array_equal(decode(io.BytesIO(tiff(page(values, SIGNED, 8)))), [[0, 128, 255]])


# ---- pages


def of_level(level: int, side: int = 6, **tags: int) -> Parts:
    """Return a page of one level, which identifies the page."""
    return page(np.full((side, side), level, np.uint8), UNSIGNED, 8, **tags)


def level_of(data: bytes) -> int:
    gray = decode(io.BytesIO(data))
    assert np.ptp(gray) == 0
    return int(gray[0, 0])


@pytest.mark.parametrize(("order", "big"), [("<", False), (">", False), ("<", True)])
def test_first_full_resolution_page_is_read(order: str, big: bool) -> None:
    """By NewSubfileType (reduced, mask, both) or the old SubfileType, for any page size."""
    for sideways in ({"tag_254": REDUCED}, {"tag_254": MASK}, {"tag_254": REDUCED | MASK | 2}, {"tag_255": 2}):
        for retained in ({}, {"tag_254": FULL}, {"tag_254": 2}, {"tag_255": 1}, {"tag_255": 3}):
            behind = [of_level(99, order=order, **sideways), of_level(100, order=order, **retained)]
            for num in range(4):
                before = [of_level(10 + n, 20, order=order, **sideways) for n in range(num)]
                data = tiff(*before, of_level(200, order=order, **retained), *behind, order=order, big=big)
                assert level_of(data) == 200


def test_big_endian_bigtiff_is_refused_by_name() -> None:
    with pytest.raises(UnreadableFileError, match="a big-endian BigTIFF is not read; save it as a TIFF"):
        decode(io.BytesIO(tiff(of_level(200, order=">"), order=">", big=True)))


def test_largest_page_is_read_when_all_are_reduced() -> None:
    for sides in itertools.permutations((4, 8, 16)):
        pages = [of_level(10 * side, side, tag_254=REDUCED) for side in sides]
        assert level_of(tiff(*pages)) == 160
    assert level_of(tiff(*(of_level(level, tag_254=REDUCED) for level in (7, 8, 9)))) == 7
    assert level_of(tiff(of_level(7, tag_254=REDUCED))) == 7


def test_sub_page_may_be_the_full_resolution_image() -> None:
    """Cameras and scanners store a thumbnail with the image below it. A pyramid is the other way round."""
    thumbnail, picture, last = of_level(1, 3, tag_254=REDUCED), of_level(200, 9), of_level(90, 9)
    assert level_of(tiff(thumbnail, last, sub_pages=(of_level(2, 4, tag_254=REDUCED), picture))) == 200
    assert level_of(tiff(thumbnail, last, sub_pages=(of_level(2, 4, tag_254=REDUCED),))) == 90
    assert level_of(tiff(picture, last, sub_pages=(thumbnail,))) == 200


def test_selected_page_is_read_by_its_own_tags() -> None:
    """Samples, orientation and size are those of the page, not of the thumbnail before it."""
    values = samples_of(SIGNED, 16)
    for order, compression in itertools.product("<>", COMPRESSIONS):
        options = {"order": order, "compression": compression}
        deep = page(values, SIGNED, 16, tag_274=6, **options)
        data = tiff(of_level(3, tag_254=REDUCED, order=order, tag_274=3), deep, order=order)
        assert np.abs(decode(io.BytesIO(data)) - np.rot90(stretched(values), -1)).max() <= 0.51


def test_cyclic_or_very_long_page_chain_terminates() -> None:
    thumbnail = of_level(5, tag_254=REDUCED)
    data = bytearray(tiff(thumbnail))
    struct.pack_into("<I", data, len(data) - 4, struct.unpack_from("<I", data, 4)[0])
    assert level_of(bytes(data)) == 5
    assert level_of(tiff(*[thumbnail] * 99, of_level(9))) == 9
    with pytest.raises(UnreadableFileError, match="whose first 100 pages are reduced copies or masks"):
        decode(io.BytesIO(tiff(*[thumbnail] * 100, of_level(9))))


def test_page_chain_truncated_before_the_image_is_refused() -> None:
    """The thumbnail alone is no radiograph. Data behind the image do not matter."""
    data = tiff(of_level(5, tag_254=REDUCED), of_level(9))
    assert level_of(data) == 9
    for end in range(len(data) - 4, len(data) - 100, -7):
        with pytest.raises(UnreadableFileError, match="corrupt, truncated"):
            decode(io.BytesIO(data[:end]))
    behind = bytearray(tiff(of_level(9)))
    struct.pack_into("<I", behind, len(behind) - 4, 0xFFFFFFF0)
    assert level_of(bytes(behind)) == 9


def test_files_written_by_pillow_are_read() -> None:
    values = samples_of(UNSIGNED, 16)
    data = io.BytesIO()
    Image.fromarray(values).save(
        data, "TIFF", compression="tiff_lzw", append_images=[Image.fromarray(values[::-1])], save_all=True
    )
    assert np.abs(decode(data) - stretched(values)).max() <= 0.51
