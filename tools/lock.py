"""Write requirements.lock: each package of every extra, its version, the SHA-256 of its archives, the extras that need it.

    pip install uv
    python tools/lock.py                       keep the locked versions, add what pyproject.toml newly requires
    python tools/lock.py --upgrade [NAME ...]  move these packages, or all, to their newest versions

uv resolves for every supported Python and platform at once. It reads the package index from its own configuration, such as
UV_DEFAULT_INDEX. The file contains no address of an index.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT, LOCK = ROOT / "pyproject.toml", ROOT / "requirements.lock"
BASE, BUILD = "base", "build"
HEADER = """\
# Every version this project was tried with, and the SHA-256 of each of its archives. launch/setup.sh installs these.
# Written by tools/lock.py. Above each package: the extras that need it. base: every installation; build: what builds a wheel.
"""
_BUILD_TOO = ["wheel"]  # deepspeed is a source distribution without a build backend
_PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==")


def lock(upgrade: list[str] | None) -> str:
    """Return the text of the lock.

    Args:
        upgrade: Names of packages to move to their newest versions. Empty: all. None: none.

    Raises:
        subprocess.CalledProcessError: uv failed. Its own message is on stderr.
    """
    project = tomllib.loads(PROJECT.read_text())
    extras = list(project["project"]["optional-dependencies"])
    build = [*project["build-system"]["requires"], *_BUILD_TOO]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "build.in").write_text("\n".join(build))
        (folder / "lock").write_text(LOCK.read_text() if LOCK.exists() else "")
        upgrades = [f"--upgrade-package={each}" for each in upgrade or []] if upgrade != [] else ["--upgrade"]
        text = _compile(
            PROJECT, folder / "build.in", "--all-extras", "--generate-hashes", *upgrades, into=folder / "lock"
        )
        pins = ["--constraint", folder / "lock"]
        requirements = {
            BASE: _compile(PROJECT, *pins),
            BUILD: _compile(folder / "build.in", *pins),
            **{extra: _compile(PROJECT, "--extra", extra, *pins) for extra in extras},
        }
    by_extra = {extra: {package for package, _ in packages(closure)} for extra, closure in requirements.items()}
    return HEADER + "".join(f"# {', '.join(_extras(name, by_extra))}\n{entry}" for name, entry in packages(text))


def _extras(name: str, by_extra: dict[str, set[str]]) -> list[str]:
    """Return the extras that need a package. The base stands for all of them."""
    extras = sorted(extra for extra, closure in by_extra.items() if name in closure)
    return [extra for extra in extras if extra in (BASE, BUILD)] if BASE in extras else extras


def _compile(*arguments: object, into: Path | None = None) -> str:
    """Return the output of `uv pip compile`. It keeps the versions that the file `into` contains."""
    output = ["--output-file", into] if into else []
    options = [
        "--universal",
        "--python-version",
        _oldest_python(),
        "--no-header",
        "--no-annotate",
        "--no-emit-index-url",
        "--quiet",
    ]
    command = ["uv", "pip", "compile", *options, *arguments, *output]
    result = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True)
    return into.read_text() if into else result.stdout


def _oldest_python() -> str:
    return str(tomllib.loads(PROJECT.read_text())["project"]["requires-python"]).removeprefix(">=")


def packages(text: str) -> Iterator[tuple[str, str]]:
    """Yield (name, lines) of each package of a requirements file, without comments."""
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("#")]
    for entry in re.split(r"\n(?=\S)", "".join(lines).strip()):
        if match := _PIN.match(entry):
            yield match[1], f"{entry}\n"


def main(arguments: list[str]) -> int:
    """Write the lock and print the number of packages. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", nargs="*", metavar="NAME", help="packages to upgrade; without a NAME: all")
    text = lock(parser.parse_args(arguments).upgrade)
    LOCK.write_text(text)
    print(f"{LOCK.name}: {sum(1 for _ in packages(text))} packages")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except FileNotFoundError:
        sys.exit("tools/lock.py: uv is not installed. Run pip install uv")
    except subprocess.CalledProcessError:
        sys.exit("tools/lock.py: uv could not resolve pyproject.toml. See its message above.")
