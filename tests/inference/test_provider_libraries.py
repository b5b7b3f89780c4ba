"""Test the errors about missing provider libraries and about a missing ONNX Runtime."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import ROOT, run

from mura_dist.cli.main import INVALID, main
from mura_dist.core.errors import UserError, install_remedy
from mura_dist.inference import provider_libraries
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.inference.predict import predict

BOTH = f"(cpu; cuda for an NVIDIA GPU). Install it: {install_remedy('cpu', 'cuda')}."


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_missing_dependency_of_a_library_is_named(tmp_path: Path) -> None:
    def compile_library(name: str, *arguments: str) -> Path:
        library = tmp_path / f"lib{name}.so"
        command = ["cc", "-shared", "-fPIC", "-o", library, "-x", "c", "-", f"-Wl,-soname,lib{name}.so.10", *arguments]
        subprocess.run(command, input=f"int {name}(void) {{ return 1; }}", text=True, check=True)
        return library

    second = compile_library("second")
    first = compile_library("first", "-x", "none", "-Wl,--no-as-needed", str(second))
    assert (
        provider_libraries.find_unopenable(str(first)) == "libsecond.so.10"
    )  # the loader searches for the soname elsewhere
    assert provider_libraries.find_unopenable(str(second)) is None
    assert provider_libraries.find_unopenable("libthird.so.7") == "libthird.so.7"


@pytest.mark.parametrize(
    ("library", "arguments"),
    [
        ("libcurand.so.10", install_remedy("cuda")),
        ("libcudnn.so.9", install_remedy("cuda")),
        ("libcuda.so.1", "driver"),
        ("libnvinfer.so.10", "'tensorrt-cu13<11'"),
        ("libnvonnxparser.so.10", "TensorRT 10"),
    ],
)
def test_each_missing_library_has_a_remedy(library: str, arguments: str) -> None:
    assert arguments in provider_libraries.remedy(library)


# ---- without ONNX Runtime


@pytest.fixture
def no_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)


@pytest.mark.usefixtures("no_onnxruntime")
@pytest.mark.parametrize("command", ["predict", "page", "evaluate", "export", "bench"])
def test_commands_without_onnx_runtime_name_the_extra(
    command: str,
    model: Path,
    untrained: Path,
    halved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = {
        "predict": [model, tmp_path, "--out", tmp_path / "out"],
        "page": [model],
        "evaluate": [model, halved, "--out", tmp_path / "out"],
        "export": [untrained, "--out", tmp_path / "exported.onnx"],
        "bench": ["predict", "--size", "32", "--radiographs", "16", "--quiet"],
    }
    assert main([command, *map(str, arguments[command])]) == INVALID
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(BOTH)


@pytest.mark.parametrize(
    "arguments", [["-m", "mura_dist.predict"], [ROOT / "tools" / "predict.py"]], ids=["module", "script"]
)
def test_scripts_without_onnx_runtime_name_the_extra(arguments: list[object], model: Path, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ModuleNotFoundError('none', name='onnxruntime')")
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = run("python", *arguments, model, tmp_path, "--out", tmp_path / "out", env=env, cold=True)
    assert done.returncode == INVALID
    [line] = done.stderr.splitlines()
    assert line.endswith(BOTH)


@pytest.mark.usefixtures("no_onnxruntime")
def test_functions_without_onnx_runtime_raise_user_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ONNX Runtime is not installed"):
        OnnxModel.load(model)
    with pytest.raises(UserError, match="ONNX Runtime is not installed"):
        predict(model, tmp_path, tmp_path.with_name("out"))


def test_empty_onnxruntime_namespace_is_refused(model: Path, tmp_path: Path) -> None:
    """Uninstalling onnxruntime or onnxruntime-gpu leaves a folder that imports as a namespace package."""
    (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from mura_dist.cli.main import entry; entry(sys.argv[2:])"
    site = tmp_path / "sitecustomize.py"
    site.write_text(
        "import importlib.machinery as m, importlib.util, sys\n"
        "class Left:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'onnxruntime':\n"
        "            spec = m.ModuleSpec(name, None, is_package=True)\n"
        f"            spec.submodule_search_locations = [{str(tmp_path / 'onnxruntime')!r}]\n"
        "            return spec\n"
        "sys.meta_path.insert(0, Left)\n"
    )
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = run(
        "python", "-c", code, ROOT, "predict", model, ROOT / "docs", "--out", tmp_path / "out", env=env, cold=True
    )
    assert done.returncode == INVALID, done.stderr
    assert "pip uninstall both" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.usefixtures("no_onnxruntime")
def test_openvino_needs_no_onnx_runtime(model: Path) -> None:
    pytest.importorskip("openvino")
    assert OnnxModel.load(model, "openvino").provider == "OpenVINO CPU"
