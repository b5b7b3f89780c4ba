"""Print those packages of requirements.lock that some extras need, as a requirements file for pip install --require-hashes.

    python3 launch/locked.py EXTRA,...      base is always among them; build alone prints what builds a wheel

launch/setup.sh calls it before anything is installed: the standard library has to do.
"""

import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
BASE, BUILD = "base", "build"


def select(lock: str, extras: set[str]) -> str:
    """Return the lines of the packages above which one of the extras stands."""
    selected, wanted = [], False
    for line in lock.splitlines(keepends=True):
        if line.startswith("#"):
            wanted = not extras.isdisjoint(line[1:].replace(",", " ").split())
        elif wanted:
            selected.append(line)
    return "".join(selected)


def main(words: list[str]) -> int:
    extras = set(words[0].split(",")) if words else set()
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    available = [*project["optional-dependencies"], BUILD]
    if unknown := sorted(extras - {*available}):
        sys.stderr.write(f"launch/locked.py: no extra {', '.join(unknown)}; name some of: {', '.join(available)}\n")
        return 2
    lock = (HERE / "requirements.lock").read_text()
    sys.stdout.write(select(lock, extras if extras == {BUILD} else {*extras, BASE}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
