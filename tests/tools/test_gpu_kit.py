"""tools/bench/gpu.py: what it takes from the package is there, how a stage ends, and (nightly) all of it at its tiny size."""

import argparse
import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import ROOT, run
from helpers.tools import tool

SCRIPT = ROOT / "tools/bench/gpu.py"
gpu = tool("bench/gpu")


def names_of_the_package() -> list[tuple[str, str]]:
    """(module, name) of each import from mura_dist, in whatever function, and of each attribute of a module it imports."""
    tree = ast.parse(SCRIPT.read_text())
    names, modules = [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mura_dist"):
            names += [(node.module, alias.name) for alias in node.names]
            modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            names.append((modules[node.value.id], node.attr))
    return names


def test_every_name_it_takes_from_the_package_is_there() -> None:
    """A rename that forgets the script fails here, not on a GPU; mypy checks how they are used."""
    names = names_of_the_package()
    assert ("mura_dist.data.shards.convert", "convert") in names
    assert ("mura_dist.data.loaders.sampler", "epoch_permutation") in names
    for module, name in names:
        parent, _, last = module.rpartition(".")
        owner = getattr(importlib.import_module(parent), last, None) or importlib.import_module(module)
        assert hasattr(owner, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module}.{name}"


@pytest.mark.nightly(part="system")
def test_stages_end_ok_or_skipped_and_write_their_measurements(tmp_path: Path) -> None:
    arguments = ("--out", tmp_path / "out", "--scratch", tmp_path / "scratch", "--stages", "graph,roofline,proto")
    done = run("python", SCRIPT, *arguments, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "gpu_check.json",
        "gpu_check.jsonl",
        "logs.log",
    ]
    written = json.loads((tmp_path / "out/gpu_check.json").read_text())
    assert written["stages"] == {
        "graph": "skipped: CUDA graphs need CUDA",
        "roofline": "ok",
        "proto": f"skipped: no raw shards in {tmp_path / 'scratch'}. Run stage data first.",
    }
    assert any(line["what"] == "matmul 128 bfloat16" and line["tflops"] > 0 for line in written["measurements"])
    assert "matmul 128 bfloat16" in done.stdout.partition("in all; ")[2]


def test_a_stage_that_fails_or_stalls_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(out=tmp_path, stage="env")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu.STAGES, "env", gpu.Stage(lambda record, options: 1 / 0, 1.0))
        assert gpu.run_stage(options) == 1
    assert gpu.read_lines(options)[-1]["state"] == "failed: ZeroDivisionError('division by zero')"
    for code, state in (
        ("import time; time.sleep(60)", "stopped after 1 s"),
        ("raise SystemExit(3)", "failed: exited with status 3"),
    ):
        process = subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True)
        assert gpu.wait_for(process, "data", 1.0 if "sleep" in code else 60.0, options) == state
        assert gpu.has_failed(state)


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--stages", "env,fly"]) == 2
    assert capsys.readouterr().err.startswith("gpu.py: --stages fly: must be some of env,data,")


@pytest.mark.nightly(part="system")
def test_all_of_it_at_its_tiny_size(tmp_path: Path) -> None:
    arguments = ("--out", tmp_path / "out", "--scratch", tmp_path / "scratch")
    done = run("python", SCRIPT, *arguments, cwd=ROOT, timeout_s=1800)
    states = json.loads((tmp_path / "out/gpu_check.json").read_text())["stages"]
    assert done.returncode == 0, states
    assert states.keys() == gpu.STAGES.keys()  # in the order in which they ended: one runs beside another
    assert all(state == "ok" or state.startswith("skipped: ") for state in states.values())


@pytest.mark.nightly(part="system")
def test_the_tests_for_a_gpu_run_on_a_cpu() -> None:
    """Their code: what they compare is then the same device twice."""
    done = run("pytest", "tests/gpu", "-q", cwd=ROOT, env={"REHEARSE_GPU_TESTS": "1"}, timeout_s=900)
    assert done.returncode == 0, done.stdout[-5000:]
