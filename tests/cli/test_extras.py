"""Test the extras: which extra installs a missing package, what each installs, and that texts name existing extras only."""

import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import elf
from helpers.commands import ROOT
from packaging.requirements import Requirement

from mura_dist.cli import extras
from mura_dist.core.errors import install_remedy
from mura_dist.training.run import _PACKAGES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OF_EXTRA = PROJECT["optional-dependencies"]
# The driver's library, which no package contains, and the libraries of every system with glibc.
SYSTEM = re.compile(r"(libcuda|libdl|librt|libpthread|libstdc\+\+|libm|libgcc_s|libc|ld-linux[\w-]*)\.so\.\d+")


def distributions(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}  # type: ignore[index]


@pytest.mark.parametrize(
    ("extra", "modules"),
    {
        "train": (
            *("torch", "torchvision", "deepspeed", "nvidia.dali", "cv2", "onnx", "onnxscript", "safetensors"),
            *("matplotlib.pyplot", "tensorboard", "webdataset"),
        ),
        "mlflow": ("mlflow",),
        "parquet": ("pyarrow",),
        "openvino": ("openvino",),
        "remote": ("fsspec", "s3fs"),
        "page": ("streamlit", "starlette.middleware", "uvicorn"),
    }.items(),
)
def test_extra_of_each_module(extra: str, modules: tuple[str, ...]) -> None:
    assert [extras.extras_of(module) for module in modules] == [[extra]] * len(modules)


def test_onnx_runtime_is_in_both_sibling_extras() -> None:
    assert extras.extras_of("onnxruntime.capi") == ["cpu", "cuda"]


@pytest.mark.parametrize("module", ["numpy", "json", "mura_dist.nothing", ""])
def test_module_outside_the_extras_has_no_extra(module: str) -> None:
    assert extras.extras_of(module) == []


def test_extras_are_read_from_a_source_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert extras.extras_of("torch") == []


def test_distributions_with_another_import_name_are_in_an_extra() -> None:
    required = set().union(*map(distributions, OF_EXTRA.values()))
    assert set().union(*extras._DISTRIBUTIONS.values()) <= required


def test_packages_recorded_in_environment_json_are_required() -> None:
    extras = distributions([*OF_EXTRA["train"], *OF_EXTRA["cuda"], *OF_EXTRA["cpu"]])
    assert set(_PACKAGES) <= distributions(PROJECT["dependencies"]) | extras


# ---- installation


def texts() -> dict[str, str]:
    """Return each text file of the repository by its path."""
    paths = {*ROOT.glob("*.*"), *(ROOT / ".ci").iterdir(), *(ROOT / "shards").glob("*.md")}
    for folder in ("docs", "launch", "mura_dist", "tests", "tools"):
        paths |= {path for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts}
    return {str(path.relative_to(ROOT)): path.read_text(errors="replace") for path in paths if path.is_file()}


def test_texts_name_extras_that_exist() -> None:
    pattern = re.compile(r"(?:\.\[|bash launch/setup\.sh |install_remedy\([\"'])(\w[\w,]*)(?=\]'|[\"')\s`])")
    names = {name for path, text in texts().items() if not path.startswith("tests/") for name in pattern.findall(text)}
    assert len(names) > 5
    assert {extra for name in names for extra in name.split(",")} <= set(OF_EXTRA)


def test_no_text_installs_mura_dist_from_an_index() -> None:
    """Nobody owns the name on an index, so another package could be installed. pyproject.toml may name its own extras."""
    asks = re.compile(r"\bmura[-_]dist\[|(pip|uv|pipx)( tool)?( install| add| run)[^\n`]* '?mura[-_]dist\b")
    hits = {path for path, text in texts().items() if asks.search(text)} - {"tests/cli/test_extras.py"}
    assert hits == {"pyproject.toml", "tests/launch/test_lock.py"}  # the requirement of train, and what strips it


@pytest.mark.parametrize("extras_named", [("page",), ("cpu", "cuda")])
def test_remedy_fits_the_environment(
    extras_named: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    commands = [f"pip install '.[{extra}]'" for extra in extras_named]
    assert install_remedy(*extras_named) == " or ".join(commands) + " in the checkout"
    (tmp_path / "installed").touch()
    commands = [f"bash launch/setup.sh {extra}" for extra in extras_named]
    assert install_remedy(*extras_named) == " or ".join(commands) + " in the checkout"


# ---- the two extras of ONNX Runtime


def test_cpu_and_cuda_are_siblings_and_the_base_has_neither() -> None:
    runtimes = {"onnxruntime", "onnxruntime-gpu"}
    by_extra = {extra: distributions(requirements) & runtimes for extra, requirements in OF_EXTRA.items()}
    assert by_extra.pop("cpu") == {"onnxruntime"}
    assert by_extra.pop("cuda") == {"onnxruntime-gpu"}
    assert not set().union(*by_extra.values(), distributions(PROJECT["dependencies"])) & runtimes
    assert "mura-dist[cuda]" in OF_EXTRA["train"]


def test_gpu_wheel_is_not_required_on_macos() -> None:
    [requirement] = [Requirement(text) for text in OF_EXTRA["cuda"]]
    assert requirement.marker
    assert not requirement.marker.evaluate({"sys_platform": "darwin"})
    assert requirement.marker.evaluate({"sys_platform": "linux"})
    assert [Requirement(text).marker for text in OF_EXTRA["cpu"]] == [None]


def installed_by(requirements: list[str]) -> tuple[set[str], set[str]]:
    """Return the file names that these requirements install, dependencies included, and the missing distributions."""
    pending, lines = [Requirement(text) for text in requirements], set()
    files: set[str] = set()
    absent: set[str] = set()
    while pending:
        requirement = pending.pop()
        if (key := (requirement.name.lower(), frozenset(requirement.extras))) in lines:
            continue
        lines.add(key)
        try:
            distribution = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            absent.add(requirement.name)
            continue
        files |= {path.name for path in distribution.files or []}
        environments = [{"extra": extra} for extra in ("", *requirement.extras)]
        children = map(Requirement, distribution.requires or [])
        pending += [child for child in children if not child.marker or any(map(child.marker.evaluate, environments))]
    return files, absent


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="ONNX Runtime is not installed")
def test_cuda_extra_installs_every_library_of_its_provider() -> None:
    """By the metadata of the extra's own requirements, without those of other extras."""
    import onnxruntime

    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not provider.is_file():
        pytest.skip("this environment has the extra cpu")
    files, absent = installed_by(OF_EXTRA["cuda"])
    needed = {name for name in elf.needed(provider) if not SYSTEM.fullmatch(name)}
    assert {name.partition(".")[0] for name in needed} >= {
        "libcublas",
        "libcudart",
        "libcurand",
    }  # otherwise the ELF file was not read
    assert needed <= files, f"not installed: {absent}"
    for opened_later in ("libcudnn.so.", "libcufft.so.", "libnvrtc.so."):
        assert any(name.startswith(opened_later) for name in files), opened_later
    assert not absent


@pytest.mark.parametrize(
    ("extras_asked", "installed"),
    [("cpu,train", None), ("cuda,cpu", None), ("cpu,page", "onnxruntime_gpu"), ("train", "onnxruntime")],
)
def test_setup_refuses_two_onnx_runtimes(tmp_path: Path, extras_asked: str, installed: str | None) -> None:
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "setup.sh", tmp_path / "launch")
    if installed:
        (tmp_path / f".venv/lib/python3.11/site-packages/{installed}-1.31.1.dist-info").mkdir(parents=True)
    command = ["bash", tmp_path / "launch" / "setup.sh", extras_asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"launch/setup.sh: {extras_asked}: ONNX Runtime for CPUs (cpu) cannot be installed beside")
