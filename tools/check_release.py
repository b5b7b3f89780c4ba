"""Check that a tag may be released: python tools/check_release.py vX.Y.Z

The tag names the version of mura_dist/__init__.py, and CHANGELOG.md has a heading `## [X.Y.Z] - YYYY-MM-DD`. A version whose
heading has no date, such as "not yet released", is refused. Only the standard library is used.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problem(tag: str, version: str, changelog: str) -> str:
    """Return what keeps `tag` from being released, or an empty text."""
    if tag != f"v{version}":
        return f"the tag is {tag}, the package's version {version} (v{version}). Change one of them"
    heading = re.search(rf"^## \[{re.escape(version)}\](.*)$", changelog, re.MULTILINE)
    if heading is None:
        return f"CHANGELOG.md has no section of {version}. Add the heading ## [{version}] - YYYY-MM-DD"
    if not re.fullmatch(r" - \d{4}-\d{2}-\d{2}", heading[1]):
        return f"CHANGELOG.md gives {version} no date: {heading[0]!r}. Write ## [{version}] - YYYY-MM-DD"
    return ""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("check_release: one tag is needed, such as v0.1.0\n")
        return 2
    package = (ROOT / "mura_dist" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', package, re.MULTILINE)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    reason = problem(arguments[0], version[1] if version else "", changelog)
    if reason:
        sys.stderr.write(f"check_release: {reason}\n")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
