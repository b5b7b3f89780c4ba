"""Provide a trained and evaluated run to export."""

import functools
import shutil
from pathlib import Path

import pytest
from helpers.cache import Cache
from helpers.commands import TINY, run

from mura_dist.models import densenet


@pytest.fixture(scope="session")
def folder(cache: Cache, halved: Path) -> Path:
    """Return a run of one epoch, evaluated, whose recipe contains paths of this machine."""
    return cache.path("secret-place", functools.partial(_train, halved)) / "run"


def _train(halved: Path, parent: Path) -> None:
    from safetensors.torch import save_file

    parent.mkdir()
    save_file(densenet.build("tiny").state_dict(), parent / "start.safetensors")
    (parent / "engine.json").write_text("{}")
    paths = (
        f"mirror={parent / 'mirror'}",
        f"pretrained={parent / 'start.safetensors'}",
        f"deepspeed={parent / 'engine.json'}",
    )
    arguments = (*TINY, f"shards={halved}", f"run={parent / 'run'}", "epochs=1", *paths)
    for command in (("train", *arguments), ("evaluate", parent / "run", halved, "--no-gallery")):
        result = run("mura-dist", *command, "--quiet")
        assert result.returncode == 0, result.stderr


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the run that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "run"))
