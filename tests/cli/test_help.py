"""Test every --help: it is readable at two widths and ends with examples, which parse and work."""

import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from helpers.commands import ROOT, SHORT, TINY, run

from mura_dist.cli.main import DONE, cli, main
from mura_dist.core import config

COMMANDS = sorted(cli.commands)


def help_text(capsys, *arguments: str) -> str:
    assert main([*arguments, "--help"]) == DONE
    return str(capsys.readouterr().out)


def examples_of(text: str) -> list[str]:
    """Return the command lines of the last section of a help text."""
    match = re.search(r"\n\nExamples?:\n((?:  \S.*\n)+)\Z", text)
    assert match, text[-500:]
    return [line.strip() for line in match[1].splitlines()]


def example_lines() -> list[str]:
    return [*cli.examples, *(example for name in COMMANDS for example in cli.commands[name].examples)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("columns", [80, 110])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_ends_with_examples_and_fits(command: str, columns: int, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is wider than the terminal, except for an unbreakable name. The last section is the examples."""
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_text(capsys, *command.split())
    examples = examples_of(text)
    declared = cli if not command else cli.commands[command]
    assert examples == list(declared.examples)  # type: ignore[attr-defined]
    assert len(examples) >= (2 if command == "train" else 1)
    for line in text.splitlines():
        assert len(line) < columns, line
        assert line == line.rstrip() or not line.strip()


def test_help_of_train_shows_usage_groups_and_examples(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_text(capsys, "train")
    assert text.startswith("Usage: mura-dist train [OPTIONS] [RECIPE.toml] [key=value ...]\n")
    headings = [f"\n{group.value.capitalize()}:\n" for group in config.Group]
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)
    assert config.help_text(78) in text


@pytest.mark.parametrize("line", example_lines())
def test_example_parses(line: str) -> None:
    """Its command and options exist, its values convert, its settings are valid, and its recipe exists."""
    program, name, *arguments = shlex.split(line)
    assert program == "mura-dist"
    command = cli.commands[name]
    with command.make_context(name, [*arguments], parent=click.Context(cli)) as context:
        assert context.params
    if name == "train":
        recipe, *settings = arguments
        assert config.load(ROOT / recipe, settings)


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (("python", "-m", "mura_dist.train"), "train"),
        (("python", "-m", "mura_dist.predict"), "predict"),
        (("python", ROOT / "tools" / "make_shards.py"), "shards"),
        (("python", ROOT / "tools" / "predict.py"), "predict"),
        (("python", ROOT / "tools" / "make_phantoms.py"), "phantoms"),
        (("python", ROOT / "tools" / "check_shards.py"), "verify"),
    ],
    ids=lambda value: None if isinstance(value, str) else Path(str(value[-1])).name,
)
def test_every_entry_point_has_the_help_of_its_command(arguments: tuple[object, ...], command: str, capsys) -> None:
    done = run(*arguments, "--help", env={"COLUMNS": "80"}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    os.environ["COLUMNS"] = "80"
    try:
        assert done.stdout == help_text(capsys, command)
    finally:
        del os.environ["COLUMNS"]


EXTRA_WORDS = {
    "phantoms": ["--studies", "60", "--size", "128"],
    "train": [*TINY, "epochs=1"],
    "ensemble": ["--top", "2"],
}
"""Words that make an example small: it is run as it stands otherwise."""

NOT_RUN = {
    "page": "serves until it is stopped; tests/inference/page runs it",
    "s3://": "needs a store; tests/core/test_storage.py has one",
    "/data/": "a folder that a user has",
    "bench": "takes minutes; tests/bench runs it, smaller",
    "int8": "takes a minute; tests/inference/export/test_int8.py runs it",
}


@pytest.mark.slow
def test_examples_work(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, model: Path, reference_run: Callable[..., Path]
) -> None:
    """Run the examples of `mura-dist --help` in one folder, then every other example that needs only their files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launch").symlink_to(ROOT / "launch")

    def works(line: str) -> None:
        _, name, *arguments = shlex.split(line)
        status = main([name, *arguments, *EXTRA_WORDS.get(name, []), *([] if name == "describe" else ["--quiet"])])
        assert status == DONE, (line, capsys.readouterr())

    for line in cli.examples:  # type: ignore[attr-defined]
        works(line)
    views = sorted((tmp_path / "data" / "bones" / "valid").rglob("*.png"))
    for name, source in {"model.onnx": model, "left.dcm": views[0], "right.dcm": views[1]}.items():
        shutil.copy(source, tmp_path / name)
    shutil.copy(tmp_path / "data" / "bones" / "valid_labeled_studies.csv", tmp_path / "labels.csv")
    for name, arguments in {"mura": SHORT, "mura-seed1": (*SHORT, "seed=1")}.items():
        shutil.copytree(reference_run(1, *arguments), tmp_path / "runs" / name)
    for line in example_lines():
        done = line in cli.examples or line.split()[1] in ("phantoms", "shards", "train")  # type: ignore[attr-defined]
        if done or any(word in line for word in NOT_RUN):
            continue
        works(line)


def test_every_exception_matches_an_example() -> None:
    assert all(any(word in line for line in example_lines()) for word in NOT_RUN)
