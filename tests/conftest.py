"""What several tests start from: the shared data, drawn phantoms, shards of them, and a way to run a command."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; the suite's processes share two cores

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # some tests import ONNX Runtime before mura_dist.runtime does

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

Command = Callable[..., subprocess.CompletedProcess[str]]


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
    from mura_dist.phantoms import draw

    folder = tmp_path_factory.mktemp("phantoms") / "set"
    draw(folder, studies=60, size=128, seed=1)
    return folder


@pytest.fixture(scope="session")
def shard_folder(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw shards of the phantoms at 64 px."""
    from mura_dist.convert import convert

    folder = tmp_path_factory.mktemp("shards") / "raw"
    convert(phantoms, folder, size=64, workers=2)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small exported model of 64 px, of random weights."""
    from test_export import card_of, tiny

    from mura_dist.export import export

    path = tmp_path_factory.mktemp("model") / "model.onnx"
    export(tiny(), card_of(), path)
    return path


@pytest.fixture
def own_site_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's own key to name DICOM studies by, not made yet."""
    monkeypatch.setenv("MURA_DIST_SITE_KEY", str(tmp_path_factory.mktemp("site") / "new" / "site.key"))


NO_GPU = {
    "CUDA_VISIBLE_DEVICES": ""
}  # ranks outnumber GPUs, and bit for bit is a promise of the CPU; test_gpu.py overrides


def run(*words: object, cwd: Path | None = None, timeout_s: float = 240, env: dict[str, str] | None = None):
    """Run a command of this environment to its end; its output as text."""
    command = [str(word) for word in words]
    command[0] = str(BIN / command[0])
    return subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **NO_GPU, **(env or {})},
        check=False,
    )


def torchrun(ranks: int, *words: object, cwd: Path | None = None, env: dict[str, str] | None = None):
    """`torchrun` on this machine with a free port; the module's words follow."""
    return run("torchrun", "--standalone", "--nproc-per-node", ranks, "-m", *words, cwd=cwd, env=env)


def killed_when(begun: Callable[[], bool], names: Path, *words: object) -> None:
    """Start a command, and when `begun` kill -9 it and all it started: every process whose command line has the path `names`."""
    command = [str(BIN / str(words[0])), *map(str, words[1:])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not begun():
        assert process.poll() is None, "it ended before it began"
        time.sleep(0.01)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if str(names).encode() in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)
    process.wait()


TINY = (
    "architecture=tiny",
    "global_batch=12",
    "micro_batch=2",
    "learning_rate=1e-3",
    "epochs=2",
    "log_every=1",
    "tensorboard=false",
    "precision=fp32",
)
"""Settings of a run that takes seconds: a small DenseNet of the same class, in the precision the laws are stated for."""
