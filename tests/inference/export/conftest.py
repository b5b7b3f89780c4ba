"""A trained, evaluated run to export."""

import shutil
from pathlib import Path

import pytest
from helpers.commands import TINY, run
from helpers.models import S

from mura_dist.models import densenet


@pytest.fixture(scope="module")
def halved(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose tune split is large enough to fit calibration on."""
    from mura_dist.data.shards.convert import convert

    shards = tmp_path_factory.mktemp("halved") / "shards"
    convert(phantoms, shards, size=S, tune=0.5, workers=2)
    return shards


@pytest.fixture(scope="module")
def folder(halved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose recipe is full of this machine's paths, trained for an epoch and evaluated."""
    from safetensors.torch import save_file

    parent = tmp_path_factory.mktemp("secret-place")
    save_file(densenet.build("tiny").state_dict(), parent / "start.safetensors")
    (parent / "engine.json").write_text("{}")
    paths = (
        f"mirror={parent / 'mirror'}",
        f"pretrained={parent / 'start.safetensors'}",
        f"deepspeed={parent / 'engine.json'}",
    )
    words = (*TINY, f"shards={halved}", f"run={parent / 'run'}", "epochs=1", *paths)
    for command in (("train", *words), ("evaluate", parent / "run", halved, "--no-gallery")):
        result = run("mura-dist", *command, "--quiet")
        assert result.returncode == 0, result.stderr
    return parent / "run"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The run, to be exported and harmed."""
    return Path(shutil.copytree(folder, tmp_path / "run"))
