"""The house: arrows point down, heavy imports stay in their rooms, the base needs no torch."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT, run

PACKAGE = ROOT / "mura_dist"

# From the ground up. A module may import from its own floor and from those below; the roof holds the house together.
BENCHES = (
    "",
    ".clock",
    ".workload",
    ".shards",
    ".pipeline",
    ".peers",
    ".streams",
    ".footprint",
    ".encodings",
    ".plots",
)
BENCHES += (".training", ".ranks", ".prediction")
BENCHES += (".fleet", ".communication", ".networks", ".scaling", ".trials", ".outlook", ".planning", ".scaling_plots")
FLOORS = [
    {"words": {"__init__", "refusal", "mura", "config", "launcher", "points", "card", "signals", "anatomy"}},
    {
        "on disk": {
            *(
                "atomic",
                "places",
                "workers",
                "overdue",
                "lock",
                "scratch",
                "sharing",
                "guarded",
                "pseudonyms",
                "manifest",
                "audit",
                "radiograph",
                "samples",
                "shards",
                "mirror",
                "members",
            ),
            *("tree", "csvs", "duplicates", "scan", "pack", "convert", "phantoms", "sheets", "submission"),
        }
    },
    {
        "numbers": {
            *("metrics", "intervals", "measure", "compare", "calibration", "order"),
            *("html", "local", "heat", "gate", "report.plot", "report.curves", "report.pictures"),
        }
    },
    {"the world": {"world", "journal"}},
    {"batches": {"pipeline", "pipeline.images", "pipeline.cpu", "pipeline.dali"}},
    {
        "learning": {
            *("model", "blocks", "loss", "schedule", "flat", "batchnorm", "average", "memory", "deepspeed_json"),
            *("engine", "checkpoint", "runs", "state", "plan"),
        }
    },
    {
        "loops": {
            *("describe", "contact_sheet", "ensemble", "maps", "gallery", "evaluate", "score", "train"),
            *("report", "report.findings", "report.figures", "report.sections"),
        }
    },
    {
        "delivery": {
            "runtime",
            "tuning",
            "study_types",
            "walk",
            "readings",
            "grouping",
            "tables",
            "overlays",
            "predict",
            *("page", "page.study", "page.words", "page.examples", "page.privacy", "page.screen", "page.script"),
            "quantise",
            "variants",
            "triton",
            "export",
        }
    },
    {"roof": {"cli", *(f"bench{room}" for room in BENCHES)}},
]
FLOOR = {name: floor for floor, rooms in enumerate(FLOORS) for names in rooms.values() for name in names}

CONFINED = {
    "nvidia": {"pipeline.dali", "bench.peers"},
    "deepspeed": {"engine"},
    "streamlit": {"page", "page.privacy", "page.screen"},
    "starlette": {"page.privacy"},
    "fsspec": {"places"},
    "onnxruntime": {"runtime", "bench.prediction"},
    "cv2": {"pipeline.cpu", "bench.pipeline"},
    "pydicom": {"radiograph"},
    "openvino": {"runtime"},
    "onnx": {"export", "quantise", "triton"},
    "webdataset": {"bench.peers"},
}
BASE = {
    *("card", "runtime", "tuning", "study_types", "walk", "readings", "grouping", "tables"),
    *("overlays", "predict", "cli"),
    *("describe", "contact_sheet", "score"),
    *("metrics", "intervals", "measure", "compare", "calibration", "html", "local", "heat", "gate", "order"),
    *("page", "page.study", "page.words", "page.examples", "page.privacy"),
    "report",
    *(f"report.{room}" for room in ("plot", "curves", "pictures", "findings", "figures", "sections")),
} | {name for floor in FLOORS[:2] for names in floor.values() for name in names}
NOT_IN_BASE = ("torch", "torchvision", "cv2", "matplotlib", "onnx", "deepspeed", "nvidia", "safetensors", "webdataset")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


PACKAGES = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
MODULES = {name_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def without_entry(tree: ast.Module) -> list[ast.stmt]:
    """A module's body but for `if __name__ == "__main__"`, where a page hands itself to the command line."""
    return [node for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.dump(node.test))]


def imports(name: str, *, everywhere: bool = True) -> tuple[set[str], set[str]]:
    """(modules of ours, packages of others) that a module imports; `everywhere`: inside functions too."""
    ours, others = set(), set()
    for statement in without_entry(MODULES[name]):
        nodes = ast.walk(statement) if everywhere else [statement]
        for node in nodes:
            if isinstance(node, ast.Import):
                others |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                others.add((node.module or "").partition(".")[0])
            elif isinstance(node, ast.ImportFrom):
                inside = name.split(".") if name in PACKAGES else name.split(".")[:-1]
                base = inside[: len(inside) - node.level + 1] + (node.module.split(".") if node.module else [])
                for alias in node.names:
                    whole = ".".join([*base, alias.name])
                    ours.add(whole if whole in MODULES else ".".join(base) or "__init__")
    return ours - {name}, others


def test_every_module_has_a_floor() -> None:
    assert set(MODULES) == set(FLOOR), set(MODULES) ^ set(FLOOR)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_arrows_point_down(name: str) -> None:
    ours, _ = imports(name)
    up = {other for other in ours if FLOOR[other] > FLOOR[name]}
    assert not up, f"{name} imports {up}, which lie above it"


def test_there_is_no_cycle() -> None:
    list(TopologicalSorter({name: imports(name)[0] for name in MODULES}).static_order())  # raises CycleError naming it


@pytest.mark.parametrize("package", sorted(CONFINED))
def test_heavy_packages_stay_in_their_room(package: str) -> None:
    users = {name for name in MODULES if package in imports(name)[1]}
    assert users <= CONFINED[package]


@pytest.mark.parametrize("name", sorted(BASE & set(MODULES)))
def test_the_base_imports_without_the_extras(name: str) -> None:
    _, others = imports(name, everywhere=False)
    assert not others & set(NOT_IN_BASE)


def test_predict_loads_no_torch() -> None:
    code = (
        "import sys, mura_dist.cli, mura_dist.predict, mura_dist.describe; print([n for n in {} if n in sys.modules])"
    )
    assert run("python", "-c", code.format(NOT_IN_BASE)).stdout.strip() == "[]"


def test_no_room_without_a_name() -> None:
    assert not {"utils", "common", "helpers", "misc"} & set(MODULES)


def test_nothing_of_this_machine_is_in_the_files() -> None:
    host = re.compile(
        "|".join(["py" + "pi", "python" + "hosted", "npm" + "js"]) + r"|/(?:home|root|work)/\w", re.IGNORECASE
    )
    for folder in ("mura_dist", "tools", "launch", "tests", "docs", "shards"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".sh", ".toml", ".md") and "/shards/demo" not in path.as_posix():
                found = host.search(path.read_text())
                assert not found, f"{path}: {found and found[0]}"
