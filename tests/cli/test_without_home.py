"""Test every command for a user unknown to the system and without HOME, as a container may start them."""

import http.client
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from helpers.commands import BIN, NO_GPU, SHORT, TINY, free_port

USER = 12345
# Only root may be able to read the environment's Python.
BECOME = [*("setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups")]
BECOME += [*("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search")]
HOMES = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.name != "posix" or os.geteuid() != 0 or not shutil.which("setpriv"), reason="takes root, and setpriv"
    ),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder that this user owns and can reach."""
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o055)
    os.chown(tmp_path, USER, USER)
    return tmp_path


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    variables = {name: value for name, value in os.environ.items() if name not in HOMES} | NO_GPU
    command = [*BECOME, str(BIN / "mura-dist"), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_training_to_prediction_without_home(shard_folder: Path, phantoms: Path, folder: Path) -> None:
    train = ("train", *TINY, *SHORT, f"shards={shard_folder}", "run=run", "--quiet")
    predict = ("predict", "run/model.onnx", phantoms / "valid", "--out", "out")
    for arguments in (
        train,
        ("evaluate", "run", shard_folder, "--no-gallery"),
        ("export", "run"),
        predict,
        ("--help",),
    ):
        process = start(folder, *arguments)
        _, err = process.communicate(timeout=120)
        assert (process.returncode, "Traceback" in err) == (0, False), err
    assert sorted(path.name for path in folder.iterdir()) == ["out", "run"], "no folder is named ~"


def is_answered(port: int) -> bool:
    """Request the page without a proxy of the environment."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def test_page_without_home(model: Path, folder: Path) -> None:
    port = free_port()
    process = start(folder, "page", model, "--port", port)
    deadline_s = time.monotonic() + 120
    try:
        while not is_answered(port):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline_s, "the page does not answer"
            time.sleep(0.2)
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert list(folder.iterdir()) == []
