"""Test names: no filler, metaphor or British spelling, unique public classes, and exceptions that end in `Error`.

`python tests/test_names.py FOLDER` lists the names of a folder that break these rules.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("mura_dist", "tools", "launch", "shards", "tests")

FILLERS = [
    "asked",
    "found",
    "given",
    "here",
    "judged",
    "kept",
    "known",
    "left",
    "made",
    "meant",
    "offered",
    "one",
    "ones",
    "other",
    "others",
    "ours",
    "painted",
    "part",
    "place",
    "said",
    "seen",
    "shown",
    "stuff",
    "taken",
    "theirs",
    "them",
    "there",
    "thing",
    "things",
    "told",
    "took",
    "wanted",
    "way",
    "whole",
    "whose",
    "words",
]
METAPHORS = [
    "aside",
    "beside",
    "bell",
    "born",
    "claim",
    "crew",
    "desk",
    "dice",
    "ears",
    "forget",
    "heart",
    "house",
    "hushed",
    "journal",
    "room",
    "staff",
    "stillborn",
]
BRITISH = (
    "normalis",
    "optimisa",
    "optimise",
    "optimising",
    "quantis",
    "initialis",
    "serialis",
    "summaris",
    "colour",
    "grey",
    "centre",
    "behaviour",
)
DENIED = frozenset(FILLERS + METAPHORS)

Name = tuple[Path, int, str]


def source_files(*folders: str) -> list[Path]:
    return sorted(
        path for folder in folders for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts
    )


def names_of(path: Path) -> Iterator[Name]:
    """Yield the names that a file defines: its own, classes, functions, parameters, variables, attributes and aliases."""
    yield path, 1, path.stem
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield path, node.lineno, node.name
            case ast.arg():
                yield path, node.lineno, node.arg
            case ast.Name(ctx=ast.Store()):
                yield path, node.lineno, node.id
            case ast.Attribute(ctx=ast.Store(), value=ast.Name(id="self")):
                yield path, node.lineno, node.attr
            case ast.alias(asname=str()):
                yield path, node.lineno if hasattr(node, "lineno") else 1, node.asname
            case ast.ExceptHandler(name=str()) | ast.MatchAs(name=str()):
                yield path, node.lineno, node.name


def is_denied(name: str) -> bool:
    return name.strip("_").lower() in DENIED or any(spelling in name.lower() for spelling in BRITISH)


def denied_names(path: Path) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line}: {name}" for path, line, name in names_of(path) if is_denied(name)]


def public_classes() -> dict[str, list[str]]:
    """Return each public class of the package with the files that define it at their top level."""
    classes = defaultdict(list)
    for path in source_files("mura_dist"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(str(path.relative_to(ROOT)))
    return classes


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_name_is_a_filler_a_metaphor_or_british(folder: str) -> None:
    names = [line for path in source_files(folder) for line in denied_names(path)]
    assert not names, "\n" + "\n".join(names)


def test_no_two_public_classes_share_a_name() -> None:
    shared = {name: files for name, files in public_classes().items() if len(files) > 1}
    assert not shared


def test_exceptions_end_in_error() -> None:
    """An exception is a class whose bases, followed within the package, include a built-in exception."""
    bases = {
        node.name: [base.id if isinstance(base, ast.Name) else getattr(base, "attr", "") for base in node.bases]
        for path in source_files("mura_dist", "tools")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }

    def is_exception(name: str) -> bool:
        if name in bases:
            return any(is_exception(base) for base in bases[name] if base != name)
        builtin = getattr(__import__("builtins"), name, None)
        return isinstance(builtin, type) and issubclass(builtin, BaseException)

    exceptions = [name for name in bases if is_exception(name)]
    assert len(exceptions) > 5
    assert not [name for name in exceptions if not name.endswith("Error")]


@pytest.mark.parametrize(
    ("name", "expected"), [("found", True), ("_told", True), ("optimiser", True), ("foundation", False)]
)
def test_deny_list_applies_to_full_names(name: str, expected: bool) -> None:
    assert is_denied(name) is expected


if __name__ == "__main__":
    lines = [line for path in source_files(*(sys.argv[1:] or FOLDERS)) for line in denied_names(path)]
    print("\n".join(lines), f"{len(lines)} names", sep="\n")
    sys.exit(bool(lines))
