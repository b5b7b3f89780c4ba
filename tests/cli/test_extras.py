"""extras.py: the extra that installs a missing package, and every name of an extra in the package's own texts."""

import re
import tomllib
from importlib import metadata

import pytest
from helpers.commands import ROOT

from mura_dist.cli import extras
from mura_dist.training.run import _PACKAGES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def distributions(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}  # type: ignore[index]


@pytest.mark.parametrize(
    ("extra", "modules"),
    {
        "train": (
            *("torch", "torchvision", "deepspeed", "nvidia.dali", "cv2", "onnx", "onnxscript", "safetensors"),
            *("matplotlib.pyplot", "tensorboard", "webdataset"),
        ),
        "parquet": ("pyarrow",),
        "openvino": ("openvino",),
        "remote": ("fsspec", "s3fs"),
        "page": ("streamlit", "starlette.middleware"),
    }.items(),
)
def test_extra_of_each_module(extra: str, modules: tuple[str, ...]) -> None:
    assert [extras.extra_of(module) for module in modules] == [extra] * len(modules)


@pytest.mark.parametrize("module", ["numpy", "json", "mura_dist.nothing", ""])
def test_no_extra_installs_it(module: str) -> None:
    assert extras.extra_of(module) is None


def test_source_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert extras.extra_of("torch") is None


def test_renamed_distributions_are_required_by_an_extra() -> None:
    required = set().union(*map(distributions, PROJECT["optional-dependencies"].values()))
    assert set(extras._DISTRIBUTIONS.values()) <= required


def test_packages_named_in_environment_json_are_required() -> None:
    train = distributions(PROJECT["optional-dependencies"]["train"])
    assert set(_PACKAGES) <= distributions(PROJECT["dependencies"]) | train


def test_texts_name_extras_that_exist() -> None:
    files = [*(ROOT / "mura_dist").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    named = {name for file in files for name in re.findall(r"mura-dist\[([\w,]+)\]", file.read_text())}
    assert named
    assert {part for name in named for part in name.split(",")} <= set(PROJECT["optional-dependencies"])
