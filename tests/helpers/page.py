"""The running page, and a browser that a test drives."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import BIN, NO_GPU, free_port

NEED_BROWSER = "MURA_DIST_NEED_BROWSER"  # if set, a missing browser is a failure, not a skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str:
    """Return the path of Chromium. Skip the test where there is none."""
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        if os.environ.get(NEED_BROWSER):
            pytest.fail(f"no Chromium, and {NEED_BROWSER} is set; on Debian: apt-get install chromium")
        pytest.skip("no Chromium here; on Debian: apt-get install chromium")
    return program


@contextlib.contextmanager
def served(
    model: Path, *arguments: object, env: dict[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start `mura-dist page` with these arguments. Yield its address and process once it answers."""
    port = free_port()
    command = [str(BIN / "mura-dist"), "page", str(model), "--port", str(port), *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **NO_GPU, **(env or {})},
    )
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or _answers(f"{address}/_stcore/health"), 180)
        assert process.poll() is None, process.communicate()[0]
        yield address, process
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.communicate()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def until(condition: Any, timeout_s: float = 60) -> None:
    """Wait for a condition."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition was never met"
        time.sleep(0.1)


def upload(page: Any, *files: Path | tuple[str, bytes]) -> None:
    """Give files to the page's uploader, by path or as (name, content)."""
    contents = [file if isinstance(file, tuple) else (file.name, file.read_bytes()) for file in files]
    payloads = [{"name": name, "mimeType": "application/octet-stream", "buffer": data} for name, data in contents]
    page.locator("input[type=file]").set_input_files(payloads)


def choose(page: Any, label: str, option: str) -> None:
    """Choose an option by typing, since a long list contains only its visible options."""
    box = page.get_by_role("combobox", name=label)
    box.click()
    box.fill(option)
    page.get_by_role("option", name=option, exact=True).click()
