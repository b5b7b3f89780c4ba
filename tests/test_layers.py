"""Test the architecture: imports run downward between folders, heavy packages are confined, and the base needs no extra."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter

import pytest
from helpers.commands import ROOT, run

PACKAGE = ROOT / "mura_dist"

# Folders from the lowest layer up. Subfolders share the layer of their folder. Modules directly in the package are entry
# points, in the top layer.
LAYERS = (
    {"core"},
    {"metrics", "distributed"},
    {"data"},
    {"models", "reports"},
    {"training"},
    {"inference"},
    {"evaluation", "bench"},
    {"cli"},
)
TOP = len(LAYERS)

# The modules that may import a heavy package: a path without .py, or a folder. `bench` compares the package with it.
CONFINED = {
    "nvidia": {"data/loaders/dali", "bench"},
    "deepspeed": {"training/engine"},
    "torch": {
        "data/loaders",
        "distributed/process_group",
        "distributed/nccl",
        "models",
        "training",
        "inference/export",
        "evaluation/evaluate",
        "bench",
    },
    "torchvision": {"models", "bench"},
    "cv2": {"data/loaders/opencv", "bench"},
    "webdataset": {"bench"},
    "pydicom": {"data/dicom_header", "data/dicom_pixels"},
    "fsspec": {"core/storage"},
    "mlflow": {"training/mlflow_reader"},
    "onnx": {"inference/export"},
    "onnxscript": {"inference/export"},
    "onnxruntime": {"inference/engine_onnxruntime", "bench"},
    "openvino": {"inference/engine_openvino"},
    "streamlit": {"inference/page"},
    "starlette": {"inference/page"},
}
EXTRAS = (
    *("torch", "torchvision", "cv2", "matplotlib", "onnx", "onnxruntime", "deepspeed", "nvidia", "safetensors"),
    *("webdataset", "openvino"),
)
# The folders that import without an extra, except for the modules that may import torch.
BASE = ("core", "metrics", "data", "reports", "inference", "evaluation", "cli")

MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def folder_of(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def layer_of(name: str) -> int:
    folder = folder_of(name)
    if not folder:
        return -1 if name == "__init__" else TOP
    return next(layer for layer, folders in enumerate(LAYERS) if folder in folders)


def belongs(name: str, homes: set[str]) -> bool:
    return any(name == home or name.startswith(f"{home}/") for home in homes)


def module_named(dotted: str) -> str | None:
    """Return the module of the package that a dotted name means, as a key of MODULES."""
    path = dotted.replace(".", "/")
    return path if path in MODULES else f"{path}/__init__" if f"{path}/__init__" in MODULES else None


def absolute_name(name: str, node: ast.ImportFrom) -> str:
    """Return the absolute name of the module that an import names."""
    if not node.level:
        return node.module or ""
    package = ["mura_dist", *name.split("/")[:-1]]
    return ".".join(package[: len(package) - node.level + 1] + ([node.module] if node.module else []))


@cache
def imports(name: str, everywhere: bool = True) -> tuple[frozenset[str], frozenset[str]]:
    """Return the own modules and the external packages that a module imports.

    `everywhere` includes imports inside functions. The package's `__init__` names the public objects of all folders for type
    checkers and imports them on use.
    """
    own, external = set(), set()
    for node in ast.walk(TREES[name]) if everywhere and name != "__init__" else top_level(TREES[name]):
        if isinstance(node, ast.Import):
            external |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = absolute_name(name, node)
            if base.partition(".")[0] != "mura_dist":
                external.add(base.partition(".")[0])
                continue
            inside = base.partition(".")[2]
            for alias in node.names:
                module = module_named(f"{inside}.{alias.name}".strip(".")) or module_named(inside) or "__init__"
                own.add(module)
    return frozenset(own - {name}), frozenset(external)


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements that run on import, without those for type checkers only."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            yield from node.body
        yield node


@cache
def loaded_with(name: str) -> frozenset[str]:
    """Return the external packages that the import of a module loads, directly or indirectly."""
    packages, pending, visited = set(), [name], set()
    while pending:
        if (module := pending.pop()) in visited:
            continue
        visited.add(module)
        own, external = imports(module, everywhere=False)
        packages |= external
        pending += own
    return frozenset(packages)


def test_every_folder_has_a_layer() -> None:
    folders = {folder_of(name) for name in MODULES} - {""}
    assert folders == set().union(*LAYERS)


def test_package_init_imports_no_module() -> None:
    assert not imports("__init__")[0]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_downward(name: str) -> None:
    above = {module for module in imports(name)[0] if layer_of(module) > layer_of(name)}
    assert not above, f"{name} imports {above} of a higher layer"


def test_modules_have_no_import_cycle() -> None:
    list(
        TopologicalSorter({name: imports(name)[0] for name in MODULES}).static_order()
    )  # raises CycleError with the cycle


def test_folders_have_no_import_cycle() -> None:
    """Subfolders count: data/shards must not import data/loaders if that imports data/shards."""
    edges: dict[str, set[str]] = {}
    for name in MODULES:
        folder = name.rpartition("/")[0]
        edges.setdefault(folder, set()).update(module.rpartition("/")[0] for module in imports(name)[0])
    for folder, targets in edges.items():
        targets.discard(folder)
        targets.discard("")  # the package itself: its version
    list(TopologicalSorter(edges).static_order())


@pytest.mark.parametrize("package", sorted(CONFINED))
def test_heavy_packages_are_confined(package: str) -> None:
    users = {name for name in MODULES if package in imports(name)[1]}
    strangers = {name for name in users if not belongs(name, CONFINED[package])}
    assert not strangers


@pytest.mark.parametrize("name", sorted(name for name in MODULES if folder_of(name) in BASE))
def test_base_module_imports_without_the_extras(name: str) -> None:
    if not belongs(name, CONFINED["torch"]):
        assert not loaded_with(name) & set(EXTRAS)


def test_predict_loads_no_torch() -> None:
    code = "import sys, mura_dist.cli.main, mura_dist.inference.predict, mura_dist.reports.dataset; "
    code += f"print([name for name in {EXTRAS} if name in sys.modules])"
    assert run("python", "-c", code).stdout.strip() == "[]"


def test_no_module_has_a_catch_all_name() -> None:
    assert not {"utils", "common", "helpers", "misc"} & {name.rpartition("/")[2] for name in MODULES}


def test_files_contain_no_machine_path_or_package_index() -> None:
    host = re.compile(
        "|".join(["py" + "pi", "python" + "hosted", "npm" + "js"]) + r"|/(?:home|root|work)/\w", re.IGNORECASE
    )
    for folder in ("mura_dist", "tools", "launch", "tests", "docs", "shards"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".sh", ".toml", ".md") and "/shards/demo" not in path.as_posix():
                match = host.search(path.read_text())
                assert not match, f"{path}: {match and match[0]}"


def test_no_test_imports_another_test() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                named = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                )
                assert not any(re.match(r"(test_|conftest)", piece) for name in named for piece in name.split(".")), (
                    path
                )
