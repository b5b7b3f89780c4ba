"""Test that only its owner can access a prediction's output, at every moment, unless it is shared."""

import os
import stat
from pathlib import Path

import pytest
from helpers.models import noise
from PIL import Image

from mura_dist.inference.predict import PredictOptions, predict

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")


def modes(folder: Path) -> dict[str, int]:
    """Return the permissions of a folder and of everything below it, by relative path."""
    paths = [folder, *folder.rglob("*")]
    return {str(path.relative_to(folder)): path.lstat().st_mode & 0o7777 for path in paths if path.exists()}


def is_private(modes_by_name: dict[str, int], folder: Path) -> bool:
    return all(
        mode == (0o700 if stat.S_ISDIR((folder / name).lstat().st_mode) else 0o600)
        for name, mode in modes_by_name.items()
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for index, pixels in enumerate(noise(3)):
        (tmp_path / f"in/patient{index}").mkdir(parents=True)
        Image.fromarray(pixels[0]).save(tmp_path / f"in/patient{index}/a.png")
    return tmp_path / "in"


@pytest.mark.parametrize("umask", [0o000, 0o022])
@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_output_is_private_at_every_moment(model: Path, source: Path, tmp_path: Path, umask: int, format: str) -> None:
    out, before, observed = tmp_path / "above/out", os.umask(umask), []

    def check_modes(done: int, total: int | None) -> None:
        if out.exists():
            observed.append(is_private(modes(out), out))

    try:
        predict(model, source, out, PredictOptions(overlays=True, format=format, workers=1), progress=check_modes)
    finally:
        os.umask(before)
    assert len(modes(out)) > 10
    assert is_private(modes(out), out), {name: oct(mode) for name, mode in modes(out).items()}
    assert observed
    assert all(observed)
    assert out.parent.stat().st_mode & 0o777 == 0o777 & ~umask, "the parent folder keeps its mode"


def test_shared_output_follows_umask_and_existing_folder_keeps_mode(model: Path, source: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        predict(model, source, tmp_path / "out", PredictOptions(overlays=True, shared=True, workers=1))
        (tmp_path / "mine").mkdir(mode=0o750)
        predict(model, source, tmp_path / "mine", PredictOptions(workers=1))
    finally:
        os.umask(before)
    assert set(modes(tmp_path / "out").values()) == {0o750, 0o640}
    modes_by_name = modes(tmp_path / "mine")
    assert modes_by_name.pop(".") == 0o750
    assert set(modes_by_name.values()) == {0o600}
