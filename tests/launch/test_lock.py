"""requirements.lock: what every extra needs, by version and hash; what launch/locked.py selects of it, and setup.sh installs."""

import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from helpers.commands import ROOT
from helpers.tools import tool
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = list(PROJECT["project"]["optional-dependencies"])
PYTHONS = ("3.11", "3.12", "3.13")
LINUX = {"sys_platform": "linux", "os_name": "posix", "platform_system": "Linux", "platform_machine": "x86_64"}


locked, lock = tool("../launch/locked"), tool("lock")


def entries(text: str) -> dict[str, Requirement]:
    """Return the requirement of each package, by its canonical name."""
    requirements = [Requirement(entry.partition("\\")[0].strip()) for _, entry in lock.packages(text)]
    return {canonicalize_name(each.name): each for each in requirements}


def pins(*extras: str, python: str = "3.11") -> dict[str, str]:
    """Return the version of each package that is installed for these extras on Linux."""
    environment = LINUX | {"python_version": python, "python_full_version": f"{python}.1"}
    selected = entries(locked.select(LOCK, {"base", *extras})).items()
    return {
        name: str(each.specifier).removeprefix("==")
        for name, each in selected
        if not each.marker or each.marker.evaluate(environment)
    }


def test_every_package_has_one_version_and_hashes() -> None:
    lines = [line for line in LOCK.splitlines() if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.+]+( ; [^\\]+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
    packages = list(lock.packages(LOCK))
    assert len(packages) > 150
    assert len(entries(LOCK)) == len(packages)
    for name, entry in packages:
        assert "--hash=sha256:" in entry, name


def test_lock_names_no_index() -> None:
    assert not re.search(r"//|index-url|find-links|trusted-host|\bfile:", LOCK)


def closure(requirements: list[str], python: str) -> set[str]:
    """Return the names that these requirements install, by the metadata of what is installed here."""
    pending, visited = [(Requirement(text), {""}) for text in requirements], set()
    while pending:
        requirement, extras = pending.pop()
        environments = [
            LINUX | {"extra": extra, "python_version": python, "python_full_version": f"{python}.1"} for extra in extras
        ]
        name = canonicalize_name(requirement.name)
        if requirement.marker and not any(map(requirement.marker.evaluate, environments)):
            continue
        if (name, frozenset(requirement.extras)) in visited:
            continue
        visited.add((name, frozenset(requirement.extras)))
        try:
            children = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        pending += [(Requirement(child), {"", *requirement.extras}) for child in children]
    return {name for name, _ in visited} - {"mura-dist"}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("extra", EXTRAS)
def test_requirements_of_every_extra_are_locked(extra: str, python: str) -> None:
    """Requirements of requirements are included, in the versions that their metadata allows."""
    project = PROJECT["project"]
    own = [text for text in project["optional-dependencies"][extra] if not text.startswith("mura-dist[")]
    if extra == "train":
        own += project["optional-dependencies"]["cuda"]
    needed, available = closure([*project["dependencies"], *own], python), pins(extra, python=python)
    assert needed <= available.keys()
    for text in (*project["dependencies"], *own):
        requirement = Requirement(text)
        assert requirement.specifier.contains(available[canonicalize_name(requirement.name)])


def test_extras_do_not_install_each_others_packages() -> None:
    assert "torch" not in pins("cpu", "page")
    assert "onnxruntime-gpu" not in pins("cpu")
    assert "onnxruntime" not in pins("train", "dev", "page")
    assert pins("cuda").items() <= pins("train").items()
    assert not pins().keys() & {"onnxruntime", "onnxruntime-gpu", "streamlit"}


def test_build_requirements_are_locked() -> None:
    build = entries(locked.select(LOCK, {"build"}))
    for text in PROJECT["build-system"]["requires"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(str(build[requirement.name].specifier).removeprefix("=="))
    assert build.keys() == {"packaging", "setuptools", "wheel"}


def test_installed_versions_are_locked_versions() -> None:
    """The suite runs with the locked versions."""
    everything = pins(*EXTRAS, python=".".join(map(str, sys.version_info[:2])))
    installed = {canonicalize_name(each.name): each.version for each in metadata.distributions()}
    differing = {name: (installed[name], version) for name, version in everything.items() if name in installed}
    assert {name: pair for name, pair in differing.items() if pair[0] != pair[1]} == {}


def test_unknown_extra_is_refused(tmp_path: Path) -> None:
    """It is refused before an environment is created."""
    (tmp_path / "launch").mkdir()
    for name in ("launch/setup.sh", "launch/locked.py", "pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    command = ["bash", tmp_path / "launch" / "setup.sh", "cpu,nope,x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("launch/locked.py: no such extra: nope, x. Choose from: cpu, cuda, train")
    assert not (tmp_path / ".venv").exists()


def setup(folder: Path, extras: str, *, terminal: bool) -> tuple[str, list[list[str]]]:
    """Run setup.sh in a checkout whose pip only records its arguments. Return the output, and the arguments of each call."""
    (folder / "launch").mkdir()
    for name in ("launch/setup.sh", "launch/locked.py", "pyproject.toml", "requirements.lock"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n')
    python.chmod(0o755)
    command = shlex.join(["bash", str(folder / "launch/setup.sh"), extras])
    command_line = ["script", "-qec", command, "/dev/null"] if terminal else ["bash", "-c", command]
    done = subprocess.run(command_line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = (folder / "calls").read_text().splitlines()
    return done.stdout + done.stderr, [line.split() for line in calls if line.startswith("-m pip install")]


@pytest.mark.parametrize("terminal", [False, True])
def test_pip_shows_progress_on_a_terminal_only(tmp_path: Path, terminal: bool) -> None:
    _, calls = setup(tmp_path, "cpu", terminal=terminal)
    assert len(calls) == 3
    assert ["--quiet" in call for call in calls] == [not terminal] * 3


@pytest.mark.parametrize(
    "extras", [*(extra for extra in EXTRAS if extra not in ("cpu", "cuda", "train")), "train,page", "cuda"]
)
def test_setup_prints_what_it_installs_and_its_size(tmp_path: Path, extras: str) -> None:
    text, _ = setup(tmp_path, extras, terminal=False)
    for extra in ("base", *extras.split(",")):
        assert re.search(rf"(?m)^  {extra}: \w.*: \d\.\d GB\b", text), text
    without_runtime = {"cpu", "cuda", "train"}.isdisjoint(extras.split(","))
    assert (
        "ONNX Runtime is missing, predict and page need it. Run bash launch/setup.sh cpu (or" in text
    ) == without_runtime


def test_the_file_is_as_the_tool_writes_it() -> None:
    """Its header, the packages in the order of their names, above each the extras."""
    assert LOCK.startswith(lock.HEADER)
    names = [name for name, _ in lock.packages(LOCK)]
    assert names == sorted(names)
    groups = re.findall(r"^# (.*)$", LOCK.removeprefix(lock.HEADER), re.MULTILINE)
    assert len(groups) == len(names)
    assert {extra for group in groups for extra in group.split(", ")} == {lock.BASE, lock.BUILD, *EXTRAS}
