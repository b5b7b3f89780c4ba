"""Parts that are not final: some files of the chunk could not be read for an I/O fault, and a later start reads them again.

    part of an earlier start, the chunk's files -> select -> those to be read again -> complete -> the part with them

Such a part has FILES: a letter a file, in the order of the chunk.
"""

from collections import Counter
from collections.abc import Sequence

from mura_dist.data.io_faults import IO_ERROR
from mura_dist.inference.file_list import ListedFile
from mura_dist.inference.reader import ReadResult
from mura_dist.inference.tables import ChunkResult

FILES = "files"
_RADIOGRAPH, _FAILURE, _FAULT = "rfi"


def select_retries(before: ChunkResult, files: Sequence[ListedFile]) -> list[ListedFile]:
    """Choose the files of a chunk that `before` could not read."""
    return [file for file, letter in zip(files, before[FILES], strict=True) if letter == _FAULT]


def merge_retry(before: ChunkResult | None, part: ChunkResult, readings: Sequence[ReadResult]) -> ChunkResult:
    """Put what was read now, `part`, into the part of an earlier start. `readings`: of the files of `part`, in their order.

    The result has FILES where an I/O fault kept some of its files from being read again, else it is final.
    """
    letters = [_letter(reading) for reading in readings]
    if before is not None:
        letters, part = _merge(before, part, letters)
    return part | {FILES: "".join(letters)} if _FAULT in letters else part


def _letter(reading: ReadResult) -> str:
    if reading.image is not None:
        return _RADIOGRAPH
    return _FAULT if reading.failure[0] == IO_ERROR else _FAILURE


def _merge(before: ChunkResult, part: ChunkResult, new: list[str]) -> tuple[list[str], ChunkResult]:
    """(a letter a file, the part) of the whole chunk, in the order of its files."""
    lists = {_RADIOGRAPH: "predictions", _FAILURE: "failures", _FAULT: "failures"}
    old_lines, new_lines = ({name: iter(one[name]) for name in ("predictions", "failures")} for one in (before, part))
    merged: ChunkResult = {"predictions": [], "failures": []}
    letters, again = [], iter(new)
    for letter in before[FILES]:
        line = next(old_lines[lists[letter]])
        if letter == _FAULT:
            letter = next(again)
            line = next(new_lines[lists[letter]])
        merged[lists[letter]].append(line)
        letters.append(letter)
    for name in part.keys() - merged.keys():  # counts
        merged[name] = Counter(before[name])
        merged[name].update(part[name])
    return letters, merged
