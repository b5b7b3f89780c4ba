"""A CSV file as people save one -> (number, cells) of its lines that are not blank.

By the csv module: pandas.read_csv pads a short line as if it ended in empty cells, refuses a line longer than the first, and
does not tell on which line of the file a row or an error is. Messages need all three.
"""

import csv
import io
from collections.abc import Iterator

from mura_dist.core.errors import Refusal


def read_lines(
    text: str, name: str, remedy: str, *, strict: bool = False, skipinitialspace: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """Yield (number, cells) of each line of `text` that is not blank; the number is that of its last line in the file.

    Args:
        name: the file's, and `remedy`: what to do; both for the message about a line that is no CSV.
        strict, skipinitialspace: as csv.reader has them.

    Raises:
        Refusal: where a line is no CSV.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=strict, skipinitialspace=skipinitialspace)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise Refusal(f"{name} line {reader.line_num} is no CSV ({error}); {remedy}") from error
