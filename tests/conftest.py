"""What several tests start from: the shared data, drawn phantoms, shards of them, and a way to run a command."""

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import ROOT, train

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; the suite's processes share two cores

# What is started in the background inherits that SIGINT is ignored, and so would all that tests start and send it to.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["ORT_DISABLE_TELEMETRY"] = (
    "1"  # some tests import ONNX Runtime before mura_dist.inference.engine_onnxruntime does
)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real radiographs and hostile files, beside the checkout; the test skips where they are not."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data beside the checkout ({folder} is not there)")
    return folder


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn data set in MURA's layout: 60 studies."""
    from mura_dist.data.phantoms import draw

    folder = tmp_path_factory.mktemp("phantoms") / "set"
    draw(folder, studies=60, size=128, seed=1)
    return folder


@pytest.fixture(scope="session")
def shard_folder(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw shards of the phantoms at 64 px."""
    from mura_dist.data.shards.convert import convert

    folder = tmp_path_factory.mktemp("shards") / "raw"
    convert(phantoms, folder, size=64, workers=2)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small exported model of 64 px, of random weights."""
    from helpers.models import card_of, tiny

    from mura_dist.inference.export.onnx import export

    path = tmp_path_factory.mktemp("model") / "model.onnx"
    export(tiny(), card_of(), path)
    return path


@pytest.fixture
def own_site_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's own key to name DICOM studies by, not made yet."""
    monkeypatch.setenv("MURA_DIST_SITE_KEY", str(tmp_path_factory.mktemp("site") / "new" / "site.key"))


@pytest.fixture(scope="module")
def whole(shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of these ranks and settings, two epochs, never interrupted."""

    @functools.cache
    def made(ranks: int, *words: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "whole"
        result = train(ranks, shard_folder, folder, *words)
        assert result.returncode == 0, result.stderr
        return folder

    return made


@pytest.fixture(scope="module")
def one(whole: Callable[..., Path]) -> Path:
    """The run of one rank."""
    return whole(1)
