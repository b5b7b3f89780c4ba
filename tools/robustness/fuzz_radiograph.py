"""Fuzz `radiograph.read` and `read_identity` with mutated files.

python tools/robustness/fuzz_radiograph.py [--files 20000] [--seed S] [--seeds FOLDER] [--keep DIR]

    seed files -> Hypothesis draws a file and its mutations -> bytes -> a child process reads them -> verdict

Seed files are the files that tests/data/test_radiograph.py draws, DICOM files with more attributes, and the files of --seeds.
Each mutated file must give a gray square or UnreadableFileError, within SECONDS and MEMORY_BYTES, without output on stderr.
Anything else is a finding, also a crash, a hang or another exception. The tool logs the case, copies the file into --keep, and
starts a new child.

Exit status: 0 no finding, 1 findings. The same seed, number and files give the same cases while the reader's code is unchanged,
because Hypothesis tries the constants in that code. The summary has a digest of the cases.
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
SECONDS = 5.0  # limit per file; the slowest valid file of this size takes 0.05
# Limit above the idle child. The most expensive legal file takes 1,060 MiB: 50 million pixels of 16-bit RGB in RLE.
MEMORY_BYTES = 1500 << 20
ADDRESSES_BYTES = 16 << 30  # limit of the address space, which protects the machine
SEED_BYTES = 1 << 20  # larger files of --seeds are skipped: a mutation would rarely hit a header
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
# Markers and names followed by a number that the decoder uses: frame, scan, tables, EXIF, JPEG 2000's boxes and segments, PNG's
# chunks.
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


# ---- mutations


@dataclass(frozen=True)
class Mutation:
    """One change of a file.

    `at` and `donor_at` are shares of a length in 2**-16. The meaning of `number` and `payload` depends on `kind`.
    """

    kind: str
    at: int
    number: int
    payload: bytes
    donor: str
    donor_at: int


def _flip(data: bytearray, offset: int, mutation: Mutation, donor: bytes) -> None:
    if data:
        data[min(offset, len(data) - 1)] ^= 1 << mutation.number % 8


def _overwrite(data: bytearray, offset: int, mutation: Mutation, donor: bytes) -> None:
    data[offset : offset + len(mutation.payload)] = mutation.payload


def _insert(data: bytearray, offset: int, mutation: Mutation, donor: bytes) -> None:
    data[offset:offset] = mutation.payload


def _delete(data: bytearray, offset: int, mutation: Mutation, donor: bytes) -> None:
    del data[offset : offset + 1 + mutation.number % 300]


def _duplicate(data: bytearray, offset: int, mutation: Mutation, donor: bytes) -> None:
    data[offset:offset] = data[offset : offset + 1 + mutation.number % 3000]


def _cut(data: bytearray, offset: int, mutation: Mutation, donor: bytes) -> None:
    del data[offset:]


def _zeros(data: bytearray, offset: int, mutation: Mutation, donor: bytes) -> None:
    """Replace the rest of the file by zeros, as an interrupted copy does."""
    data[offset:] = bytes(len(data) - offset)


def _splice(data: bytearray, offset: int, mutation: Mutation, donor: bytes) -> None:
    """Join the head of this file and the tail of the donor."""
    data[offset:] = donor[mutation.donor_at * len(donor) >> 16 :]


def _transplant(data: bytearray, offset: int, mutation: Mutation, donor: bytes) -> None:
    """Overwrite bytes by as many bytes of the donor."""
    start = mutation.donor_at * len(donor) >> 16
    piece = donor[start : start + 1 + mutation.number % 500]
    data[offset : offset + len(piece)] = piece


def _number(data: bytearray, offset: int, mutation: Mutation, donor: bytes) -> None:
    """Write a boundary value in one of six encodings at any offset."""
    _put(data, offset, mutation)


def _header_number(data: bytearray, offset: int, mutation: Mutation, donor: bytes) -> None:
    _put(data, mutation.at % max(1, min(len(data), 200)), mutation)


def _anchored_number(data: bytearray, offset: int, mutation: Mutation, donor: bytes) -> None:
    """Write a boundary value within twelve bytes after a marker or name of the file."""
    anchors = [anchor for anchor in ANCHORS if anchor in data]
    if anchors:
        anchor = anchors[mutation.at % len(anchors)]
        _put(data, data.index(anchor) + len(anchor) + mutation.donor_at % 12, mutation)


def _put(data: bytearray, offset: int, mutation: Mutation) -> None:
    width = (1, 2, 4)[mutation.donor_at % 3]
    number = NUMBERS[mutation.number % len(NUMBERS)] % (1 << 8 * width)
    data[offset : offset + width] = number.to_bytes(width, "big" if mutation.donor_at & 8 else "little")


def _dicom_element(data: bytearray, offset: int, mutation: Mutation, donor: bytes) -> None:
    """Change the value, or sometimes the length or the type, of an element that decides how pixels are read."""
    tags = [tag for pair in DICOM_TAGS if (tag := struct.pack("<HH", *pair)) in data]
    if tags:
        start = data.index(tags[mutation.at % len(tags)]) + (8, 8, 8, 8, 8, 8, 6, 4)[mutation.donor_at % 8]
        number = NUMBERS[mutation.number % len(NUMBERS)] & 0xFFFF
        data[start : start + 2] = struct.pack("<H", number)


def _png_chunks(data: bytearray, offset: int, mutation: Mutation, donor: bytes) -> None:
    """Duplicate, delete or move a chunk of a PNG."""
    chunks = list(_chunks(data))
    if chunks:
        chunk = chunks.pop(mutation.at % len(chunks))
        for _ in range(mutation.number % 3):
            chunks.insert(mutation.donor_at % (len(chunks) + 1), chunk)
        data[:] = PNG + b"".join(_chunk(name, body) for name, body in chunks)


def _png_filtered(data: bytearray, offset: int, mutation: Mutation, donor: bytes) -> None:
    """Change the filtered lines of a PNG and compress them again, so that the stream is valid."""
    chunks = list(_chunks(data))
    pixels = b"".join(body for name, body in chunks if name == b"IDAT")
    with contextlib.suppress(zlib.error):
        lines = bytearray(zlib.decompressobj().decompress(pixels, 1 << 20))
        start = mutation.at * len(lines) >> 16
        lines[start : start + len(mutation.payload)] = mutation.payload
        if mutation.number % 4 == 0:
            del lines[start:]
        keep = [(name, body) for name, body in chunks if name not in (b"IDAT", b"IEND")]
        data[:] = PNG + b"".join(
            _chunk(*chunk) for chunk in [*keep, (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b"")]
        )


def _chunks(data: bytes | bytearray) -> Iterator[tuple[bytes, bytes]]:
    offset = len(PNG)
    while data.startswith(PNG) and offset + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, offset)
        yield name, bytes(data[offset + 8 : offset + 8 + length])
        offset += 12 + length


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body), name) + body + struct.pack(">I", zlib.crc32(name + body))


_MUTATIONS = [_flip, _overwrite, _insert, _delete, _duplicate, _cut, _zeros, _splice, _transplant, _number]
_MUTATIONS += [_header_number, _anchored_number, _dicom_element, _png_chunks, _png_filtered]
MUTATIONS: dict[str, Callable[[bytearray, int, Mutation, bytes], None]] = {
    mutation.__name__[1:]: mutation for mutation in _MUTATIONS
}


@dataclass(frozen=True)
class Case:
    """A seed file and its mutations.

    `keep_header` restores the first bytes afterwards. Without it, most cases would not be images. `fix_checksums` corrects the
    checksums of a PNG, so that the decoder reads the mutated bytes.
    """

    name: str
    mutations: tuple[Mutation, ...]
    keep_header: bool
    fix_checksums: bool

    def data(self, seeds: dict[str, bytes]) -> bytes:
        original = seeds[self.name]
        data = bytearray(original)
        for mutation in self.mutations:
            MUTATIONS[mutation.kind](data, mutation.at * len(data) >> 16, mutation, seeds[mutation.donor])
        if self.keep_header:
            signature = original[: 132 if original[128:132] == b"DICM" else 8]
            data[: len(signature)] = signature
        return fix_checksums(bytes(data)) if self.fix_checksums else bytes(data)

    def __str__(self) -> str:
        kinds = " ".join(mutation.kind for mutation in self.mutations)
        return f"{self.name}: {kinds}{' (header kept)' * self.keep_header}{' (checksums fixed)' * self.fix_checksums}"


def fix_checksums(data: bytes) -> bytes:
    """Return a PNG with the right checksum in each complete chunk. Return other files unchanged."""
    changed, offset = bytearray(data), len(PNG)
    while data.startswith(PNG) and offset + 12 <= len(data):
        end = offset + 8 + struct.unpack_from(">I", data, offset)[0]
        if end + 4 <= len(data):
            changed[end : end + 4] = struct.pack(">I", zlib.crc32(data[offset + 4 : end]))
        offset = end + 4
    return bytes(changed)


def cases(names: list[str]) -> st.SearchStrategy[Case]:
    """Return a strategy that draws cases from the seed files of these names."""
    share, payload = st.integers(0, 0xFFFF), st.binary(min_size=1, max_size=12)
    name, kind = st.sampled_from(names), st.sampled_from(sorted(MUTATIONS))
    mutation = st.builds(
        Mutation, kind=kind, at=share, number=st.integers(0, 0xFFFF), payload=payload, donor=name, donor_at=share
    )
    mutations, often = st.lists(mutation, min_size=1, max_size=6).map(tuple), st.sampled_from([True, True, True, False])
    return st.builds(Case, name=name, mutations=mutations, keep_header=often, fix_checksums=often)


def visit_cases(names: list[str], num_files: int, start: int, visit: Callable[[Case], None]) -> None:
    """Call `visit` with `num_files` cases. The same names, number and start give the same cases."""
    checks = list(HealthCheck)

    @seed(start)
    @settings(
        max_examples=num_files, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=checks
    )
    @given(cases(names))
    def visit_case(case: Case) -> None:
        visit(case)

    visit_case()


# ---- seed files


def build_seeds() -> dict[str, bytes]:
    """Return by name the image files that the reader's tests draw, and DICOM files with many attributes."""
    sys.path.insert(0, str(ROOT / "tests"))
    path = ROOT / "tests/data/test_radiograph.py"
    spec = importlib.util.spec_from_file_location("drawn_radiographs", path)
    assert spec is not None
    assert spec.loader is not None
    tests: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    refused = {name: build for name, (build, code, _) in tests.REFUSED.items() if code != "not_image"}
    factories = {**tests.SAME, **tests.LOSSY, **refused}
    return {name: build() for name, build in factories.items()} | _dicom_seeds()


def _dicom_seeds() -> dict[str, bytes]:
    """Return DICOM files with tables, functional groups, padding, unusual bit layouts and a signed codestream."""
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
    """Return the files below a folder by relative path, without those larger than SEED_BYTES."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size <= SEED_BYTES)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# ---- the child process, which reads


def child() -> None:
    """Answer each path on stdin with a line of JSON on the original stdout.

    File descriptors 1 and 2 go to the noise file, so that output of a decoder is detected.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _limit_addresses()
    from mura_dist.data import radiograph

    for line in sys.stdin:
        path = line.removesuffix("\n")
        _reset_peak_memory()
        before, start = _memory("VmRSS"), time.monotonic()
        verdict = _verdict(radiograph, path)
        answer = {"verdict": verdict, "s": time.monotonic() - start, "bytes": max(0, _memory("VmHWM") - before)}
        print(json.dumps(answer), file=answers, flush=True)


def _verdict(radiograph: Any, path: str) -> str:
    """Return "read" or UnreadableFileError's code. Any other text is a finding."""
    try:
        identity = radiograph.read_identity(path)
        if identity is not None and not isinstance(identity, radiograph.DicomIdentity):
            return f"read_identity returned {type(identity).__name__}"
        image = radiograph.read(path, SIZE_PX)
    except radiograph.UnreadableFileError as error:
        if "memory" in error.reason:
            return "allocated without a bound"
        is_plain = error.reason.isprintable() and 0 < len(error.reason) < 120
        return str(error.code) if is_plain else f"reason not printable or too long: {error.reason!r}"
    except BaseException as error:  # any other exception is a finding
        return f"raised {type(error).__name__}: {error}"
    return (
        "read" if (image.shape, str(image.dtype)) == ((SIZE_PX, SIZE_PX), "uint8") else f"{image.dtype} {image.shape}"
    )


VERDICTS = ("read", "not_image", "out_of_scope", "unreadable", "too_large")


def _limit_addresses() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES_BYTES, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes, or 0 where unknown."""
    with contextlib.suppress(OSError):
        match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(match[1]) << 10 if match else 0
    return 0


# ---- the parent process


@dataclass
class Child:
    """A process that reads files, started when needed. Its unexpected output goes to the file `noise`."""

    folder: Path
    command: Sequence[str] = (sys.executable, __file__, "--child")
    patience_s: float = 10 * SECONDS  # time limit of an answer
    process: subprocess.Popen[bytes] | None = None

    @property
    def noise(self) -> Path:
        """The file of the child's stderr and stdout."""
        return self.folder / "noise"

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process with an empty noise file."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.noise, "wb") as noise:
            return subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, cwd=ROOT, env=environment
            )

    def end(self) -> int:
        """Kill the process and return its exit status, or 0 if none runs."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        with process:
            process.kill()
        return process.returncode

    def check(self, path: Path) -> tuple[str, float, int]:
        """Return (verdict, seconds, bytes) of a file. A finding ends the process, and the next file gets a new one."""
        verdict, seconds, num_bytes = self._query(path)
        if verdict in VERDICTS and (noise := self.noise.read_text(errors="replace")):
            verdict = f"noise on stderr: {noise.splitlines()[0][:100]}"
        elif verdict in VERDICTS and seconds > SECONDS:
            verdict = f"took {seconds:.1f} s"
        elif verdict in VERDICTS and num_bytes > MEMORY_BYTES:
            verdict = f"took {num_bytes >> 20} MiB"
        if verdict not in VERDICTS:
            self.end()
        return verdict, seconds, num_bytes

    def _query(self, path: Path) -> tuple[str, float, int]:
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
            noise = self.noise.read_text(errors="replace").strip().splitlines()
            return f"the process exited with status {status}: {noise[-1][:100] if noise else ''}", 0.0, 0
        answer = json.loads(line)
        return answer["verdict"], answer["s"], answer["bytes"]


@dataclass
class Outcome:
    """The results of a run. `findings` are (number of the case, verdict, the case)."""

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
    """Read `num_files` mutated files in a child process. Log each finding, and copy its file into `keep`."""
    outcome, digest = Outcome(), hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder, Child(Path(folder), command) as reader:
        path = Path(folder) / "a wrist.png"

        def visit(case: Case) -> None:
            data = case.data(seeds)
            digest.update(hashlib.sha256(data).digest())
            path.write_bytes(data)
            verdict, seconds, num_bytes = reader.check(path)
            outcome.num_files += 1
            outcome.slowest_s, outcome.most_bytes = max(outcome.slowest_s, seconds), max(outcome.most_bytes, num_bytes)
            outcome.counts[verdict if verdict in VERDICTS else "finding"] += 1
            if verdict not in VERDICTS:
                outcome.findings.append((outcome.num_files, verdict, str(case)))
                log(f"case {outcome.num_files}: {verdict}: {case}{_keep_file(path, keep, outcome.num_files)}")

        visit_cases(sorted(seeds), num_files, start, visit)
    outcome.digest = digest.hexdigest()[:16]
    return outcome


def _keep_file(path: Path, keep: Path | None, number: int) -> str:
    if keep is None:
        return ""
    keep.mkdir(parents=True, exist_ok=True)
    return f": kept as {shutil.copy(path, keep / f'case-{number:06d}')}"


def summary(outcome: Outcome, seconds: float) -> str:
    """Return the line that a run prints at its end."""
    counts = ", ".join(f"{outcome.counts[name]:,} {name}" for name in VERDICTS)
    return (
        f"{outcome.num_files:,} files in {seconds:.0f} s: {counts}; {len(outcome.findings)} findings; "
        f"slowest {outcome.slowest_s:.2f} s, most memory {outcome.most_bytes >> 20} MiB; cases {outcome.digest}"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Fuzz the reader of radiographs.")
    parser.add_argument("--files", type=int, default=20_000, help="mutated files to read (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same cases (%(default)s)")
    parser.add_argument("--seeds", type=Path, help="a folder of more seed files")
    parser.add_argument("--keep", type=Path, help="a folder for the files of findings")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child()
        return 0
    if options.seeds is not None and not options.seeds.is_dir():
        parser.error(f"--seeds {options.seeds} is not a folder. Name a folder of seed files.")
    if options.files < 1:
        parser.error(f"--files {options.files} is less than 1. Give a number of files.")
    start = time.monotonic()
    seeds = build_seeds() | (folder_seeds(options.seeds) if options.seeds else {})
    outcome = fuzz(seeds, options.files, options.seed, keep=options.keep)
    print(summary(outcome, time.monotonic() - start))
    return 1 if outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
