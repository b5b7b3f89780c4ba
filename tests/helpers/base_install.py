"""An environment with the base install and selected extras only, made of links to the packages of this environment.

It resolves the requirements of pyproject.toml by metadata and links each package into FOLDER/site. `python -S` then finds no
other package.
"""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from helpers.commands import NO_GPU, ROOT

# ONNX Runtime for CPUs and that for GPUs are the same modules.
_SAME_MODULES = {"onnxruntime": "onnxruntime-gpu"}


class BaseInstall:
    """Environment without the packages of the other extras."""

    def __init__(self, folder: Path, *extras: str) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        requirements = [*project["dependencies"], *(text for extra in extras for text in _of_extra(project, extra))]
        self.site = folder / "site"
        self.site.mkdir(parents=True)
        for distribution in _closure(requirements):
            for top in {Path(file).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
                link = self.site / top
                if not link.exists():
                    link.symlink_to(Path(str(distribution.locate_file(top))))

    def run(self, *arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments. It finds only this environment's packages and the checkout."""
        environment = {**os.environ, **NO_GPU, "PYTHONPATH": f"{self.site}{os.pathsep}{ROOT}", **(env or {})}
        command = [sys.executable, "-S", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)


def _of_extra(project: dict, extra: str) -> list[str]:
    return list(project["optional-dependencies"][extra])


def _closure(requirements: list[str]) -> list[metadata.Distribution]:
    """Return the distributions that these requirements install, and mura-dist's own, whose metadata lists the extras."""
    distributions = {"mura-dist": metadata.distribution("mura-dist")}
    pending = [Requirement(text) for text in requirements]
    while pending:
        requirement = pending.pop()
        try:
            distribution = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            distribution = metadata.distribution(_SAME_MODULES[requirement.name])
        environments = [{"extra": extra} for extra in ("", *requirement.extras)]
        if requirement.name in distributions:
            continue
        distributions[requirement.name] = distribution
        children = map(Requirement, distribution.requires or [])
        pending += [child for child in children if not child.marker or any(map(child.marker.evaluate, environments))]
    return list(distributions.values())
