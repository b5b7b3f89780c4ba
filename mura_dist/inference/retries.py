"""Chunk results that are not final: I/O faults kept files of the chunk from being read, and a later start reads them again.

    earlier result, the chunk's files -> select_retries -> files to read again -> merge_retry -> the complete result

Such a result has the key FILES: one letter per file, in the order of the chunk.
"""

from collections import Counter
from collections.abc import Sequence

from mura_dist.data.io_faults import IO_ERROR
from mura_dist.inference.file_list import ListedFile
from mura_dist.inference.reader import ReadResult
from mura_dist.inference.tables import ChunkResult

FILES = "files"
_RADIOGRAPH, _FAILURE, _FAULT = "rfi"


def select_retries(previous: ChunkResult, files: Sequence[ListedFile]) -> list[ListedFile]:
    """Return the files of a chunk that an I/O fault kept `previous` from reading."""
    return [file for file, letter in zip(files, previous[FILES], strict=True) if letter == _FAULT]


def merge_retry(previous: ChunkResult | None, result: ChunkResult, reads: Sequence[ReadResult]) -> ChunkResult:
    """Merge a chunk's new result into the one of an earlier start.

    Args:
        previous: Result of an earlier start; None for the first attempt.
        result: Result of the files that were read now.
        reads: The reads behind `result`, in the order of the files.

    Returns:
        The result of the whole chunk. It has FILES if I/O faults occurred again, otherwise it is final.
    """
    letters = [_letter(read) for read in reads]
    if previous is not None:
        letters, result = _merge(previous, result, letters)
    return result | {FILES: "".join(letters)} if _FAULT in letters else result


def _letter(read: ReadResult) -> str:
    if read.is_radiograph:
        return _RADIOGRAPH
    return _FAULT if read.failure[0] == IO_ERROR else _FAILURE


def _merge(previous: ChunkResult, result: ChunkResult, new_letters: list[str]) -> tuple[list[str], ChunkResult]:
    """Return the letters and the result of all files of the chunk, in their order."""
    table_of = {_RADIOGRAPH: "predictions", _FAILURE: "failures", _FAULT: "failures"}
    old_rows, new_rows = (
        {name: iter(source[name]) for name in ("predictions", "failures")} for source in (previous, result)
    )
    merged: ChunkResult = {"predictions": [], "failures": []}
    letters, retried = [], iter(new_letters)
    for letter in previous[FILES]:
        row = next(old_rows[table_of[letter]])
        if letter == _FAULT:
            letter = next(retried)
            row = next(new_rows[table_of[letter]])
        merged[table_of[letter]].append(row)
        letters.append(letter)
    for name in result.keys() - merged.keys():  # counts
        merged[name] = Counter(previous[name])
        merged[name].update(result[name])
    return letters, merged
