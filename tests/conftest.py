"""What several tests start from: the shared data, drawn phantoms, shards of them, and a way to run a command."""

import atexit
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import warm

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; the suite's processes share two cores

# What is started in the background inherits that SIGINT is ignored, and so would all that tests start and send it to.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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


@functools.cache
def warm_python() -> str:
    """The executable of this process' own server (warm.py)."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(warm.start(folder))


def run(
    *words: object,
    cwd: Path | None = None,
    timeout_s: float = 240,
    env: dict[str, str] | None = None,
    cold: bool = False,
):
    """Run a command of this environment to its end; its output as text.

    mura-dist and torchrun, and torchrun's ranks, are forks of a process that has imported torch (warm.py). `cold`: started from
    nothing, as a user does; for what the environment says to a library as it is loaded.
    """
    command = [str(word) for word in words]
    environment = {**os.environ, **NO_GPU, **(env or {})}
    warmed = not cold and command[0] in ("mura-dist", "torchrun")
    command[0] = str(BIN / command[0])
    if warmed:
        command.insert(0, warm_python())
        environment["PYTHON_EXEC"] = warm_python()  # torchrun's: what starts its ranks
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False
    )


def torchrun(
    ranks: int, *words: object, cwd: Path | None = None, env: dict[str, str] | None = None, cold: bool = False
):
    """`torchrun` on this machine with a free port; the module's words follow."""
    return run("torchrun", "--standalone", "--nproc-per-node", ranks, "-m", *words, cwd=cwd, env=env, cold=cold)


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


def train(ranks: int, shards: Path, folder: Path, *words: str):
    """A TINY run under torchrun, with these words too."""
    settings = (*TINY, f"shards={shards}", f"run={folder}", *words)
    return torchrun(ranks, "mura_dist.train", *settings, "--quiet")


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
