"""Print the packages of requirements.lock that some extras need, as a requirements file for pip install --require-hashes.

    python3 launch/locked.py EXTRA,...      base is always included; `build` alone prints the build requirements

launch/setup.sh calls it before anything is installed, so it uses the standard library only.
"""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASE, BUILD = "base", "build"


def select(lock: str, extras: set[str]) -> str:
    """Return the lines of the packages whose comment names one of the extras."""
    selected, is_selected = [], False
    for line in lock.splitlines(keepends=True):
        if line.startswith("#"):
            is_selected = not extras.isdisjoint(line[1:].replace(",", " ").split())
        elif is_selected:
            selected.append(line)
    return "".join(selected)


def main(arguments: list[str]) -> int:
    """Print the requirements of the extras in the first argument. Return the exit status."""
    extras = set(arguments[0].split(",")) if arguments else set()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    available = [*project["optional-dependencies"], BUILD]
    if unknown := sorted(extras - {*available}):
        sys.stderr.write(
            f"launch/locked.py: no such extra: {', '.join(unknown)}. Choose from: {', '.join(available)}\n"
        )
        return 2
    lock = (ROOT / "requirements.lock").read_text()
    sys.stdout.write(select(lock, extras if extras == {BUILD} else {*extras, BASE}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
