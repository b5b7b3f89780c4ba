"""Shared fixtures: the shared data, drawn phantoms, their shards, and trained runs. Also the order of the tests."""

import atexit
import functools
import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import scheduling, warm
from helpers.cache import Cache
from helpers.commands import ROOT, run, train
from helpers.read_faults import ReadFaults, compile_library

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; the suite's processes share two cores

# A background process inherits that SIGINT is ignored. The processes that tests interrupt would inherit it too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["ORT_DISABLE_TELEMETRY"] = (
    "1"  # some tests import ONNX Runtime before mura_dist.inference.engine_onnxruntime does
)


def pytest_configure(config: pytest.Config) -> None:
    """Start the one warm server of the session (warm.py); workers of xdist inherit the environment."""
    if not hasattr(config, "workerinput"):
        folder = Path(tempfile.mkdtemp(prefix="warm-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["MURA_DIST_WARM_PYTHON"] = str(warm.start(folder))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items[:] = scheduling.order(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> scheduling.LongestFirst:
    return scheduling.LongestFirst(config, log)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real radiographs and hostile files beside the checkout. Skip the test where it is missing."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data beside the checkout ({folder} is not there)")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return the cache that all workers of the session share."""
    folder = tmp_path_factory.getbasetemp()
    return Cache((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cache")


@pytest.fixture(scope="session")
def phantoms(cache: Cache) -> Path:
    """Return a data set of 60 drawn studies in MURA's layout."""
    from mura_dist.data.phantoms import draw

    return cache.path("phantoms", lambda folder: draw(folder, studies=60, size=128, seed=1))


@pytest.fixture(scope="session")
def shard_folder(cache: Cache, phantoms: Path) -> Path:
    """Return raw shards of the phantoms at 64 px."""
    from mura_dist.data.shards.convert import convert

    return cache.path("shards", lambda folder: convert(phantoms, folder, size=64, workers=2))


@pytest.fixture(scope="session")
def halved(cache: Cache, phantoms: Path) -> Path:
    """Return shards with half of the train patients in the tune split, enough to fit calibration and thresholds."""
    from mura_dist.data.shards.convert import convert

    return cache.path("halved", lambda folder: convert(phantoms, folder, size=64, workers=2, tune=0.5))


@pytest.fixture(scope="session")
def model(cache: Cache) -> Path:
    """Return a small exported model of 64 px with random weights."""
    from helpers.models import card_of, tiny

    from mura_dist.inference.export.onnx import export

    return cache.path("model", lambda folder: export(tiny(), card_of(), folder / "model.onnx")) / "model.onnx"


@pytest.fixture
def read_faults(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ReadFaults]:
    """Return a function that creates ReadFaults. They apply to processes with their `environment`."""
    library, folder = cache.path("read_faults.so", compile_library), tmp_path_factory.mktemp("read-faults")

    def inject(path: str, **more: Any) -> ReadFaults:
        counter = folder / f"{len(list(folder.iterdir()))}.calls"
        counter.write_bytes(bytes(8))
        return ReadFaults(library, counter, path, **more)

    return inject


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start an S3 server and yield the URL of a bucket. Clients find the server by environment variables."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    import s3fs

    s3fs.S3FileSystem().makedirs("bucket", exist_ok=True)  # moto keeps its content in this process
    yield "s3://bucket"
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()  # the instances refer to this server
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as a container's user may: without HOME, and with a user id that the system does not know."""
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    pwd = pytest.importorskip("pwd")

    def unknown(user: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.fixture
def own_site_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the path of a site key of the test's own, which does not exist yet."""
    monkeypatch.setenv("MURA_DIST_SITE_KEY", str(tmp_path_factory.mktemp("site") / "new" / "site.key"))


@pytest.fixture(scope="session")
def reference_run(cache: Cache, shard_folder: Path) -> Callable[..., Path]:
    """Return a function that trains without interruption, with these ranks and settings, for two epochs by default."""

    def trained(ranks: int, *arguments: str) -> Path:
        def make(folder: Path) -> None:
            result = train(ranks, shard_folder, folder, *arguments)
            assert result.returncode == 0, result.stderr

        name = hashlib.sha256(repr((ranks, arguments)).encode()).hexdigest()[:12]
        return cache.path(f"run-{name}", make)

    return functools.cache(trained)


@pytest.fixture(scope="session")
def untrained(cache: Cache, halved: Path) -> Path:
    """Return a run of zero epochs, evaluated on valid and exported.

    Its probabilities are not random: with this seed they are slightly higher for abnormal studies.
    """

    def make(folder: Path) -> None:
        done = [train(1, halved, folder, "epochs=0", "seed=3", "loss_weights=none")]
        done += [run("mura-dist", *arguments) for arguments in (("evaluate", folder, halved), ("export", folder))]
        assert [result.returncode for result in done] == [0, 0, 0], [result.stderr for result in done]

    return cache.path("untrained", make)


@pytest.fixture(scope="session")
def single_rank_run(reference_run: Callable[..., Path]) -> Path:
    """Return the reference run of one rank."""
    return reference_run(1)
