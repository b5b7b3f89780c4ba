"""Broken files by the thousand for `radiograph.read` and `identity`: no crash, no hang, no foreign exception, no noise.

python tools/robustness/fuzz_radiograph.py [--files 20000] [--seed S] [--seeds FOLDER] [--keep DIR]

    seed files -> Hypothesis draws a file and what befalls it -> bytes -> a child process reads them -> verdict

Seed files are all that tests/data/test_radiograph.py draws, the good and the refused, some of what a DICOM may hold more, and
those of --seeds. The child ends,
stalls or speaks without harm to the run: the case is told, kept below --keep, and a fresh child goes on. Each file must
give a gray square or UnreadableFileError, within SECONDS and MEMORY_BYTES, and silence. Exit status: 0 all well, 1 something was
found. The same seed, number and files give the same cases as long as the reader's code stays as it is (Hypothesis tries the
constants it finds there). A digest of them stands in the summary.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 5.0  # a file; the slowest good one of this size takes 0.05
MEMORY_BYTES = (
    1500 << 20
)  # above the idle child; the dearest legal file takes 1,060: 50 million pixels of 16-bit RGB in RLE
ADDRESSES_BYTES = 16 << 30  # a stop for what would take the machine with it
SEED_BYTES = 1 << 20  # larger files of --seeds are left out: mutations would be lost in them
SIZE_PX = 24

PNG = b"\x89PNG\r\n\x1a\n"
NUMBERS = [0, 1, 2, 3, 4, 7, 8, 9, 12, 15, 16, 17, 31, 32, 64, 127, 128, 255, 256, 257, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF]
NUMBERS += [0x10000, 0xFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 30_000, 60_000, 50_000_000]
# Size, samples, bits, sign, frames, palettes, windows, tables, padding; syntax, class, modality; the pixels.
DICOM_TAGS = [(0x28, element) for element in (2, 4, 6, 8, 0x10, 0x11, 0x100, 0x101, 0x102, 0x103, 0x120, 0x121)]
DICOM_TAGS += [
    (0x28, element) for element in (0x1050, 0x1051, 0x1052, 0x1053, 0x1101, 0x1201, 0x3000, 0x3002, 0x3006, 0x3010)
]
DICOM_TAGS += [(2, 0x10), (8, 0x16), (8, 0x60), (0x2050, 0x20), (0x5200, 0x9229), (0x7FE0, 0x10)]
# Markers and names where a number decides something: frame, scan, tables, EXIF, JPEG 2000's boxes and segments, PNG's chunks.
ANCHORS = [
    b"\xff\xc0",
    b"\xff\xc1",
    b"\xff\xc2",
    b"\xff\xc3",
    b"\xff\xc4",
    b"\xff\xda",
    b"\xff\xdb",
    b"\xff\xdd",
    b"\xff\xe1",
]
ANCHORS += [
    b"\xff\xee",
    b"\xff\xf7",
    b"\xff\x4f",
    b"\xff\x51",
    b"\xff\x52",
    b"\xff\x5c",
    b"\xff\x90",
    b"ihdr",
    b"colr",
    b"jp2c",
]
ANCHORS += [
    b"pclr",
    b"cmap",
    b"cdef",
    b"IHDR",
    b"PLTE",
    b"tRNS",
    b"IDAT",
    b"acTL",
    b"fcTL",
    b"fdAT",
    b"eXIf",
    b"iCCP",
    b"IEND",
]
ANCHORS += [
    struct.pack("<H", tag) for tag in (256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 284, 317, 320, 338, 339)
]


# ---- what befalls a file


@dataclass(frozen=True)
class Blow:
    """One change. `at` and `other_at` are shares of a length in 2**-16; `number` and `some` mean what `kind` makes of them."""

    kind: str
    at: int
    number: int
    some: bytes
    other: str
    other_at: int


def _flip(data: bytearray, place: int, blow: Blow, other: bytes) -> None:
    if data:
        data[min(place, len(data) - 1)] ^= 1 << blow.number % 8


def _overwrite(data: bytearray, place: int, blow: Blow, other: bytes) -> None:
    data[place : place + len(blow.some)] = blow.some


def _insert(data: bytearray, place: int, blow: Blow, other: bytes) -> None:
    data[place:place] = blow.some


def _delete(data: bytearray, place: int, blow: Blow, other: bytes) -> None:
    del data[place : place + 1 + blow.number % 300]


def _duplicate(data: bytearray, place: int, blow: Blow, other: bytes) -> None:
    data[place:place] = data[place : place + 1 + blow.number % 3000]


def _cut(data: bytearray, place: int, blow: Blow, other: bytes) -> None:
    del data[place:]


def _zeros(data: bytearray, place: int, blow: Blow, other: bytes) -> None:
    """As a copy that broke off leaves them."""
    data[place:] = bytes(len(data) - place)


def _splice(data: bytearray, place: int, blow: Blow, other: bytes) -> None:
    """The head of one file, the tail of another."""
    data[place:] = other[blow.other_at * len(other) >> 16 :]


def _transplant(data: bytearray, place: int, blow: Blow, other: bytes) -> None:
    """A piece of another file, over as much of this."""
    start = blow.other_at * len(other) >> 16
    piece = other[start : start + 1 + blow.number % 500]
    data[place : place + len(piece)] = piece


def _number(data: bytearray, place: int, blow: Blow, other: bytes) -> None:
    """A number that breaks programs, in any of six encodings, anywhere."""
    _put(data, place, blow)


def _header_number(data: bytearray, place: int, blow: Blow, other: bytes) -> None:
    _put(data, blow.at % max(1, min(len(data), 200)), blow)


def _anchored_number(data: bytearray, place: int, blow: Blow, other: bytes) -> None:
    """A number within twelve bytes behind a marker or a name that this file has."""
    anchors = [anchor for anchor in ANCHORS if anchor in data]
    if anchors:
        anchor = anchors[blow.at % len(anchors)]
        _put(data, data.index(anchor) + len(anchor) + blow.other_at % 12, blow)


def _put(data: bytearray, place: int, blow: Blow) -> None:
    width = (1, 2, 4)[blow.other_at % 3]
    number = NUMBERS[blow.number % len(NUMBERS)] % (1 << 8 * width)
    data[place : place + width] = number.to_bytes(width, "big" if blow.other_at & 8 else "little")


def _dicom_element(data: bytearray, place: int, blow: Blow, other: bytes) -> None:
    """The value, or now and then the length or the type, of an element that decides how pixels are read."""
    tags = [tag for pair in DICOM_TAGS if (tag := struct.pack("<HH", *pair)) in data]
    if tags:
        where = data.index(tags[blow.at % len(tags)]) + (8, 8, 8, 8, 8, 8, 6, 4)[blow.other_at % 8]
        number = NUMBERS[blow.number % len(NUMBERS)] & 0xFFFF
        data[where : where + 2] = struct.pack("<H", number)


def _png_chunks(data: bytearray, place: int, blow: Blow, other: bytes) -> None:
    """A PNG's chunk twice, or gone, or elsewhere."""
    chunks = list(_chunks(data))
    if chunks:
        chosen = chunks.pop(blow.at % len(chunks))
        for _ in range(blow.number % 3):
            chunks.insert(blow.other_at % (len(chunks) + 1), chosen)
        data[:] = PNG + b"".join(_chunk(name, body) for name, body in chunks)


def _png_filtered(data: bytearray, place: int, blow: Blow, other: bytes) -> None:
    """Behind a PNG's compression: its filtered lines change, its stream is sound."""
    chunks = list(_chunks(data))
    pixels = b"".join(body for name, body in chunks if name == b"IDAT")
    with contextlib.suppress(zlib.error):
        lines = bytearray(zlib.decompressobj().decompress(pixels, 1 << 20))
        start = blow.at * len(lines) >> 16
        lines[start : start + len(blow.some)] = blow.some
        if blow.number % 4 == 0:
            del lines[start:]
        keep = [(name, body) for name, body in chunks if name not in (b"IDAT", b"IEND")]
        data[:] = PNG + b"".join(
            _chunk(*chunk) for chunk in [*keep, (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b"")]
        )


def _chunks(data: bytes | bytearray) -> Iterator[tuple[bytes, bytes]]:
    place = len(PNG)
    while data.startswith(PNG) and place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        yield name, bytes(data[place + 8 : place + 8 + length])
        place += 12 + length


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body), name) + body + struct.pack(">I", zlib.crc32(name + body))


_BLOWS = [_flip, _overwrite, _insert, _delete, _duplicate, _cut, _zeros, _splice, _transplant, _number]
_BLOWS += [_header_number, _anchored_number, _dicom_element, _png_chunks, _png_filtered]
BLOWS: dict[str, Callable[[bytearray, int, Blow, bytes], None]] = {blow.__name__[1:]: blow for blow in _BLOWS}


@dataclass(frozen=True)
class Case:
    """A seed file and what befalls it. `headed`: its first bytes are put back afterwards, or most cases would be no image at
    all; `mended`: a PNG gets right checksums, so that the decoder sees the damage."""

    name: str
    blows: tuple[Blow, ...]
    headed: bool
    mended: bool

    def data(self, seeds: dict[str, bytes]) -> bytes:
        whole = seeds[self.name]
        data = bytearray(whole)
        for blow in self.blows:
            BLOWS[blow.kind](data, blow.at * len(data) >> 16, blow, seeds[blow.other])
        if self.headed:
            signature = whole[: 132 if whole[128:132] == b"DICM" else 8]
            data[: len(signature)] = signature
        return mended(bytes(data)) if self.mended else bytes(data)

    def __str__(self) -> str:
        kinds = " ".join(blow.kind for blow in self.blows)
        return f"{self.name}: {kinds}{' (headed)' * self.headed}{' (mended)' * self.mended}"


def mended(data: bytes) -> bytes:
    """A PNG with every whole chunk's checksum right; other files as they are."""
    changed, place = bytearray(data), len(PNG)
    while data.startswith(PNG) and place + 12 <= len(data):
        end = place + 8 + struct.unpack_from(">I", data, place)[0]
        if end + 4 <= len(data):
            changed[end : end + 4] = struct.pack(">I", zlib.crc32(data[place + 4 : end]))
        place = end + 4
    return bytes(changed)


def cases(names: list[str]) -> st.SearchStrategy[Case]:
    share, some = st.integers(0, 0xFFFF), st.binary(min_size=1, max_size=12)
    name, kind = st.sampled_from(names), st.sampled_from(sorted(BLOWS))
    blow = st.builds(Blow, kind=kind, at=share, number=st.integers(0, 0xFFFF), some=some, other=name, other_at=share)
    blows, often = st.lists(blow, min_size=1, max_size=6).map(tuple), st.sampled_from([True, True, True, False])
    return st.builds(Case, name=name, blows=blows, headed=often, mended=often)


def each_case(names: list[str], num_files: int, start: int, visit: Callable[[Case], None]) -> None:
    """Hypothesis draws `num_files` cases; the same for the same names, number and start."""
    checks = list(HealthCheck)

    @seed(start)
    @settings(
        max_examples=num_files, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=checks
    )
    @given(cases(names))
    def every(case: Case) -> None:
        visit(case)

    every()


# ---- seed files


def drawn_seeds() -> dict[str, bytes]:
    """Every file that the tests of the reader draw, but for those that are no images; and DICOMs of many attributes."""
    sys.path.insert(0, str(ROOT / "tests"))
    path = ROOT / "tests/data/test_radiograph.py"
    spec = importlib.util.spec_from_file_location("drawn_radiographs", path)
    assert spec is not None
    assert spec.loader is not None
    tests: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    refused = {name: make for name, (make, code, _) in tests.REFUSED.items() if code != "not_image"}
    made = {**tests.SAME, **tests.LOSSY, **refused}
    return {name: make() for name, make in made.items()} | _dicom_seeds()


def _dicom_seeds() -> dict[str, bytes]:
    """Tables, functional groups and padding, in words of odd layouts, and a signed codestream."""
    import numpy as np

    dicoms: Any = importlib.import_module("helpers.dicoms")
    values, curve = np.arange(2400, dtype=np.uint16).reshape(60, 40), np.arange(4096, dtype=np.uint16)[::-1].copy()
    window = dicoms.sequence(WindowCenter="1200", WindowWidth="2400")
    labels: dict[str, Any] = {"Modality": "DX", "SOPClassUID": dicoms.CR, "PresentationLUTShape": "IDENTITY"}
    labels |= {"PixelPaddingValue": 7, "PixelPaddingRangeLimit": 9}
    tables = {
        "ModalityLUTSequence": dicoms.table(curve, 0, 12),
        "VOILUTSequence": dicoms.table(curve.astype("u1"), 0, 8),
    }
    groups = {"SharedFunctionalGroupsSequence": dicoms.sequence(FrameVOILUTSequence=window)}
    return {
        "dicom with tables": dicoms.dicom(values, bits=12, **labels, **tables),
        "dicom with groups": dicoms.dicom(values, bits=12, **labels, **groups, RescaleSlope="2", RescaleIntercept="-9"),
        "dicom of high bits": dicoms.dicom(values << 3, bits=16, **labels, BitsStored=12, HighBit=14),
        "implicit bare dicom": dicoms.without_meta(dicoms.dicom(values, bits=12, syntax=dicoms.IMPLICIT, **labels)),
        "signed jpeg 2000 dicom": dicoms.dicom(
            values.astype("i2") - 900, bits=12, syntax=dicoms.J2K_LOSSLESS, PixelRepresentation=0
        ),
    }


def folder_seeds(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size <= SEED_BYTES)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# ---- the child reads


def child() -> None:
    """Answers each line, a path, with a line of JSON. File descriptors 1 and 2 are left to whoever speaks out of turn."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _limit_addresses()
    from mura_dist.data import radiograph

    for line in sys.stdin:
        path = line.removesuffix("\n")
        _forget_peak()
        before, start = _memory("VmRSS"), time.monotonic()
        verdict = _verdict(radiograph, path)
        answer = {"verdict": verdict, "s": time.monotonic() - start, "bytes": max(0, _memory("VmHWM") - before)}
        print(json.dumps(answer), file=answers, flush=True)


def _verdict(radiograph: Any, path: str) -> str:
    """ "read" or UnreadableFileError's code; anything else is a finding."""
    try:
        where = radiograph.read_identity(path)
        if where is not None and not isinstance(where, radiograph.DicomIdentity):
            return f"identity gave {type(where).__name__}"
        grey = radiograph.read(path, SIZE_PX)
    except radiograph.UnreadableFileError as refused:
        if "memory" in refused.reason:
            return "allocated without a bound"
        plain = refused.reason.isprintable() and 0 < len(refused.reason) < 120
        return str(refused.code) if plain else f"a reason that is not plain: {refused.reason!r}"
    except BaseException as error:  # whatever it is, it is the finding
        return f"{type(error).__name__} came out: {error}"
    return "read" if (grey.shape, str(grey.dtype)) == ((SIZE_PX, SIZE_PX), "uint8") else f"{grey.dtype} {grey.shape}"


VERDICTS = ("read", "not_image", "out_of_scope", "unreadable", "too_large")


def _limit_addresses() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES_BYTES, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) << 10 if found else 0
    return 0


# ---- the parent watches


@dataclass
class Child:
    """A process that reads files, started when needed; what it says on its own is found in `noise`."""

    folder: Path
    command: Sequence[str] = (sys.executable, __file__, "--child")
    patience_s: float = 10 * SECONDS
    process: subprocess.Popen[bytes] | None = None

    @property
    def noise(self) -> Path:
        return self.folder / "noise"

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.noise, "wb") as noise:
            return subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, cwd=ROOT, env=environment
            )

    def end(self) -> int:
        """The exit status, once it is gone."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        with process:
            process.kill()
        return process.returncode

    def judge(self, path: Path) -> tuple[str, float, int]:
        """(verdict, seconds, bytes) of one file. Whatever is wrong ends the child: the next file meets a fresh one."""
        verdict, seconds, taken = self._asked(path)
        if verdict in VERDICTS and (said := self.noise.read_text(errors="replace")):
            verdict = f"noise on stderr: {said.splitlines()[0][:100]}"
        elif verdict in VERDICTS and seconds > SECONDS:
            verdict = f"took {seconds:.1f} s"
        elif verdict in VERDICTS and taken > MEMORY_BYTES:
            verdict = f"took {taken >> 20} MiB"
        if verdict not in VERDICTS:
            self.end()
        return verdict, seconds, taken

    def _asked(self, path: Path) -> tuple[str, float, int]:
        if self.process is None:
            self.process = self.start()
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write(os.fsencode(path) + b"\n")
            stdin.flush()
        ready, _, _ = select.select([stdout], [], [], self.patience_s)
        if not ready:
            return "hangs", self.patience_s, 0
        line = stdout.readline()
        if not line:
            status = self.process.wait()
            said = self.noise.read_text(errors="replace").strip().splitlines()
            return f"the process ended with status {status}: {said[-1][:100] if said else ''}", 0.0, 0
        answer = json.loads(line)
        return answer["verdict"], answer["s"], answer["bytes"]


@dataclass
class Outcome:
    """What a run found; `findings` are (number of the case, what, the case)."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[int, str, str]] = field(default_factory=list)
    num_files: int = 0
    slowest_s: float = 0.0
    most_bytes: int = 0
    digest: str = ""


def fuzz(
    seeds: dict[str, bytes],
    num_files: int,
    start: int,
    *,
    keep: Path | None = None,
    log: Callable[[str], None] = print,
    command: Sequence[str] = Child.command,
) -> Outcome:
    """Reads `num_files` broken files in a child process. Findings are said at once, and kept in `keep`."""
    outcome, digest = Outcome(), hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder, Child(Path(folder), command) as reader:
        path = Path(folder) / "a wrist.png"

        def visit(case: Case) -> None:
            data = case.data(seeds)
            digest.update(hashlib.sha256(data).digest())
            path.write_bytes(data)
            verdict, seconds, taken = reader.judge(path)
            outcome.num_files += 1
            outcome.slowest_s, outcome.most_bytes = max(outcome.slowest_s, seconds), max(outcome.most_bytes, taken)
            outcome.counts[verdict if verdict in VERDICTS else "found"] += 1
            if verdict not in VERDICTS:
                outcome.findings.append((outcome.num_files, verdict, str(case)))
                log(f"case {outcome.num_files}: {verdict}: {case}{_kept(path, keep, outcome.num_files)}")

        each_case(sorted(seeds), num_files, start, visit)
    outcome.digest = digest.hexdigest()[:16]
    return outcome


def _kept(path: Path, keep: Path | None, number: int) -> str:
    if keep is None:
        return ""
    keep.mkdir(parents=True, exist_ok=True)
    return f": kept as {shutil.copy(path, keep / f'case-{number:06d}')}"


def summary(outcome: Outcome, seconds: float) -> str:
    counts = ", ".join(f"{outcome.counts[name]:,} {name}" for name in VERDICTS)
    return (
        f"{outcome.num_files:,} files in {seconds:.0f} s: {counts}; {len(outcome.findings)} findings; "
        f"slowest {outcome.slowest_s:.2f} s, most memory {outcome.most_bytes >> 20} MiB; cases {outcome.digest}"
    )


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Fuzz the reader of radiographs.")
    parser.add_argument("--files", type=int, default=20_000, help="mutated files to read (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same cases (%(default)s)")
    parser.add_argument("--seeds", type=Path, help="a folder of more files to start from")
    parser.add_argument("--keep", type=Path, help="a folder for the files that were found out")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.child:
        child()
        return 0
    if options.seeds is not None and not options.seeds.is_dir():
        parser.error(f"--seeds {options.seeds} is not a folder; name one that holds files to start from")
    if options.files < 1:
        parser.error(f"--files {options.files} is less than 1; give a number of files")
    start = time.monotonic()
    seeds = drawn_seeds() | (folder_seeds(options.seeds) if options.seeds else {})
    outcome = fuzz(seeds, options.files, options.seed, keep=options.keep)
    print(summary(outcome, time.monotonic() - start))
    return 1 if outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
