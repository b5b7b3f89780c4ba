"""The architecture: folders are floors, imports run downward, heavy packages stay where they belong, the base needs no extra."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter

import pytest
from helpers.commands import ROOT, run

PACKAGE = ROOT / "mura_dist"

# Folders from the ground up; a folder's subfolders share its floor. Modules directly in the package are entry points, on top.
FLOORS = (
    {"core"},
    {"metrics", "distributed"},
    {"data"},
    {"models", "reports"},
    {"training"},
    {"inference"},
    {"evaluation", "bench"},
    {"cli"},
)
TOP = len(FLOORS)

# Which modules may import a heavy package: a path without .py, or a folder. `bench` measures ours against it.
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
# What a plain PC imports without an extra: whole folders, but for the modules that torch may enter.
BASE = ("core", "metrics", "data", "reports", "inference", "evaluation", "cli")

MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def folder_of(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def floor_of(name: str) -> int:
    folder = folder_of(name)
    if not folder:
        return -1 if name == "__init__" else TOP
    return next(floor for floor, folders in enumerate(FLOORS) if folder in folders)


def belongs(name: str, homes: set[str]) -> bool:
    return any(name == home or name.startswith(f"{home}/") for home in homes)


def module_named(dotted: str) -> str | None:
    """The module of ours of a dotted name, as MODULES knows it."""
    path = dotted.replace(".", "/")
    return path if path in MODULES else f"{path}/__init__" if f"{path}/__init__" in MODULES else None


def resolved(name: str, node: ast.ImportFrom) -> str:
    """The absolute module that an import of a module of ours names."""
    if not node.level:
        return node.module or ""
    package = ["mura_dist", *name.split("/")[:-1]]
    return ".".join(package[: len(package) - node.level + 1] + ([node.module] if node.module else []))


@cache
def imports(name: str, everywhere: bool = True) -> tuple[frozenset[str], frozenset[str]]:
    """(modules of ours, packages of others) that a module imports; `everywhere`: inside functions too.

    The package's `__init__` names the public objects of all floors for type checkers, and imports them when they are used.
    """
    ours, others = set(), set()
    for node in ast.walk(TREES[name]) if everywhere and name != "__init__" else top_level(TREES[name]):
        if isinstance(node, ast.Import):
            others |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolved(name, node)
            if base.partition(".")[0] != "mura_dist":
                others.add(base.partition(".")[0])
                continue
            inside = base.partition(".")[2]
            for alias in node.names:
                one = module_named(f"{inside}.{alias.name}".strip(".")) or module_named(inside) or "__init__"
                ours.add(one)
    return frozenset(ours - {name}), frozenset(others)


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """What runs when the module is imported; not what only a type checker reads."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            yield from node.body
        yield node


@cache
def loaded_with(name: str) -> frozenset[str]:
    """Packages of others that are loaded when a module is imported, by it or by what it imports."""
    found, waiting, seen = set(), [name], set()
    while waiting:
        if (one := waiting.pop()) in seen:
            continue
        seen.add(one)
        ours, others = imports(one, everywhere=False)
        found |= others
        waiting += ours
    return frozenset(found)


def test_every_folder_has_a_floor() -> None:
    folders = {folder_of(name) for name in MODULES} - {""}
    assert folders == set().union(*FLOORS)


def test_the_package_itself_imports_no_module_of_its_own() -> None:
    assert not imports("__init__")[0]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_downward(name: str) -> None:
    up = {other for other in imports(name)[0] if floor_of(other) > floor_of(name)}
    assert not up, f"{name} imports {up}, which lie above it"


def test_files_import_each_other_in_no_cycle() -> None:
    list(TopologicalSorter({name: imports(name)[0] for name in MODULES}).static_order())  # raises CycleError naming it


def test_folders_import_each_other_in_no_cycle() -> None:
    """Subfolders too: data/shards must not lean on data/loaders where that leans on it."""
    edges: dict[str, set[str]] = {}
    for name in MODULES:
        folder = name.rpartition("/")[0]
        edges.setdefault(folder, set()).update(other.rpartition("/")[0] for other in imports(name)[0])
    for folder, others in edges.items():
        others.discard(folder)
        others.discard("")  # the package itself: its version
        edges[folder] = others
    list(TopologicalSorter(edges).static_order())


@pytest.mark.parametrize("package", sorted(CONFINED))
def test_heavy_packages_stay_where_they_belong(package: str) -> None:
    users = {name for name in MODULES if package in imports(name)[1]}
    strangers = {name for name in users if not belongs(name, CONFINED[package])}
    assert not strangers


@pytest.mark.parametrize("name", sorted(name for name in MODULES if folder_of(name) in BASE))
def test_the_base_imports_without_the_extras(name: str) -> None:
    if not belongs(name, CONFINED["torch"]):
        assert not loaded_with(name) & set(EXTRAS)


def test_predict_loads_no_torch() -> None:
    code = "import sys, mura_dist.cli.main, mura_dist.inference.predict, mura_dist.reports.dataset; "
    code += f"print([name for name in {EXTRAS} if name in sys.modules])"
    assert run("python", "-c", code).stdout.strip() == "[]"


def test_no_file_is_named_for_nothing() -> None:
    assert not {"utils", "common", "helpers", "misc"} & {name.rpartition("/")[2] for name in MODULES}


def test_nothing_of_this_machine_is_in_the_files() -> None:
    host = re.compile(
        "|".join(["py" + "pi", "python" + "hosted", "npm" + "js"]) + r"|/(?:home|root|work)/\w", re.IGNORECASE
    )
    for folder in ("mura_dist", "tools", "launch", "tests", "docs", "shards"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".sh", ".toml", ".md") and "/shards/demo" not in path.as_posix():
                found = host.search(path.read_text())
                assert not found, f"{path}: {found and found[0]}"


def test_no_test_imports_another_test() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
                assert not any(re.match(r"(test_|conftest)", part) for name in named for part in name.split(".")), path
