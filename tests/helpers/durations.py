"""The recorded duration of each test, which determines the order of the tests (conftest.py).

    python tests/helpers/durations.py < LOG > tests/durations.tsv

LOG is the output of `pytest --durations=0 --durations-min=0.05`. The head of the table names the command and the hardware.
"""

import re
import sys
from collections import Counter
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "durations.tsv"
LINE = re.compile(r"\s*(\d+\.\d+)s (setup|call|teardown)\s+(\S+::.*?)(@[^@\]]*)?$")


def read() -> Counter[str]:
    """Return the seconds of each test, with setup and teardown, by its name without the file, since files move."""
    seconds: Counter[str] = Counter()
    for line in TABLE.read_text().splitlines():
        if not line.startswith("#"):
            duration, _, test = line.split("\t")
            seconds[test.partition("::")[2]] += float(duration)
    return seconds


def table(log: str) -> str:
    """Return the table of a log: the seconds of each file as comments, then those of each phase of each test."""
    lines = [match.groups() for line in log.splitlines() if (match := LINE.match(line))]
    files: Counter[str] = Counter()
    for seconds, _, test, _ in lines:
        files[test.partition("::")[0]] += float(seconds)
    totals = [f"# {seconds:.1f}\t{file}" for file, seconds in files.most_common()]
    rows = [f"{seconds}\t{phase}\t{test}" for seconds, phase, test, _ in lines if float(seconds) >= 0.05]
    return "\n".join([*totals, *rows]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table(sys.stdin.read()))
