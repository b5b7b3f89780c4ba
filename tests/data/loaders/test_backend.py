"""backend.py: which backend a run takes, and what is said where DALI is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import NO_GPU, TINY

from mura_dist.cli.extras import extras_of
from mura_dist.core.errors import install_remedy
from mura_dist.data.loaders.backend import choose_backend

WITHOUT_DALI = "import sys; sys.modules['nvidia.dali'] = None\n"  # any import of it raises ModuleNotFoundError


def python(code: str, *phrases: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own, in which DALI cannot be imported."""
    command = [sys.executable, "-c", WITHOUT_DALI + code, *phrases]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, **NO_GPU}, check=False
    )


def test_the_backend_follows_the_device_and_the_setting() -> None:
    for pipeline, device, backend in (
        ("auto", "cpu", "cpu"),
        ("auto", "cuda", "dali"),
        ("cpu", "cuda", "cpu"),
        ("dali", "cpu", "dali"),
        ("resident", "cpu", "resident"),
    ):
        assert choose_backend(pipeline, torch.device(device)) == (backend, "")


def test_auto_on_cuda_without_dali_is_cpu_and_says_so(shard_folder: Path) -> None:
    """The run's first line says it (str of the loader); nothing touches the GPU for the choice."""
    code = f"""
import torch
from mura_dist.core.config import Settings
from mura_dist.data.loaders.loader import BatchLoader, RowTargets
from mura_dist.data.shards.reader import Shards
shards = Shards.open({str(shard_folder)!r})
settings = Settings(shards="s", run="r")
loader = BatchLoader.from_settings(settings, shards, RowTargets.from_shards(shards), torch.device("cuda"))
assert not torch.cuda.is_initialized()
print(loader.backend, loader, sep="\\n")
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    backend, line = result.stdout.splitlines()
    assert backend == "cpu"
    assert re.search(
        r"batches by cpu \(pipeline=auto selects dali on CUDA, but DALI cannot be imported: .*dali.*\)", line
    )


@pytest.mark.parametrize(
    ("absence", "reason"),
    [
        ("sys.modules['triton'] = None", "triton"),
        ("import os; os.environ['PATH'] = os.environ['CC'] = ''", "C compiler"),
    ],
)
def test_resident_on_cuda_without_triton_takes_torch_and_says_so(absence: str, reason: str) -> None:
    code = f"""
{absence}
import torch
from mura_dist.data.loaders import backend, warp
cuda = torch.device("cuda")
assert warp.select_warp(cuda) is warp.warp_by_torch
assert not torch.cuda.is_initialized()
print(*backend.choose_backend("resident", cuda))
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("resident torch operations replace its Triton kernel: ")
    assert reason in result.stdout


def test_dali_by_name_without_dali_is_refused_in_one_line(shard_folder: Path, tmp_path: Path) -> None:
    phrases = ("train", *TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "pipeline=dali")
    result = python("from mura_dist.cli.main import main; raise SystemExit(main(sys.argv[1:]))", *phrases)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    [line] = result.stderr.strip().splitlines()
    [extra] = extras_of("nvidia.dali.fn")
    for piece in ("pipeline=dali", "DALI cannot be imported", install_remedy(extra), "pipeline=cpu"):
        assert piece in line
