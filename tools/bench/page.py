"""Measure how long the page takes to answer in a browser, for one session and for several at once.

python tools/bench/page.py MODEL.onnx FOLDER [--sessions 10] [--views 4] [--rounds 3]

FOLDER is in MURA's layout. The first `--views` radiographs of its first study type form one study. The time of a session starts
when the browser gets the files, and ends when the page shows the answer and all pictures. Concurrent sessions start together. The
tool needs the extras page and dev, and Chromium.
"""

import argparse
import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from mura_dist.data import mura

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_S = 120.0


def main() -> None:
    """Start the page, run the sessions and print their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sessions", type=int, default=10)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    files = study(options.folder, options.views)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "mura_dist", "page", str(options.model), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_healthy(process, f"{address}/_stcore/health")
        for sessions in (1, options.sessions):
            seconds = [asyncio.run(run_sessions(address, files, sessions)) for _ in range(options.rounds)]
            result = {
                "sessions": sessions,
                "views": len(files),
                "rounds": options.rounds,
                "median_s": round(statistics.median(second for session in seconds for second in session), 2),
                "worst_s": round(max(map(max, seconds)), 2),
                "server_mib": memory_mib(process.pid),
            }
            print(json.dumps(result), flush=True)
    finally:
        process.terminate()
        process.wait()


def study(folder: Path, views: int) -> list[dict[str, Any]]:
    """Return the files of one study as Playwright uploads them. Their names contain the study type."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".dcm"))
    study_type = next(name for name in mura.STUDY_TYPES if any(name in path.parts for path in paths))
    paths_of_type = [path for path in paths if study_type in path.parts][:views]
    return [
        {
            "name": f"{study_type}_{index}{path.suffix}",
            "mimeType": "application/octet-stream",
            "buffer": path.read_bytes(),
        }
        for index, path in enumerate(paths_of_type)
    ]


async def run_sessions(address: str, files: list[dict[str, Any]], sessions: int) -> list[float]:
    """Return the seconds of concurrent sessions, each with a browser context of its own."""
    from playwright.async_api import async_playwright

    program = next(path for name in BROWSERS if (path := shutil.which(name)))
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        pages = [await (await browser.new_context()).new_page() for _ in range(sessions)]
        for page in pages:
            await page.goto(address)
            await page.locator("input[type=file]").wait_for(state="attached", timeout=1000 * TIMEOUT_S)
        seconds = await asyncio.gather(*(time_answer(page, files) for page in pages))
        await browser.close()
    return seconds


async def time_answer(page: Any, files: list[dict[str, Any]]) -> float:
    """Upload the files and return the seconds until the page shows the answer and all pictures."""
    started = time.perf_counter()
    await page.locator("input[type=file]").set_input_files(files)
    await page.locator("section.outcome").wait_for(timeout=1000 * TIMEOUT_S)
    await page.locator("img[alt^='Radiograph']").nth(len(files) - 1).wait_for(timeout=1000 * TIMEOUT_S)
    return time.perf_counter() - started


def wait_until_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    """Wait until the server answers, at most 60 s. Exit if it does not."""
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    sys.exit("the page did not start")


def memory_mib(process: int) -> int:
    """Return the proportional set size of a process and its descendants in MiB."""
    total, pending = 0, [process]
    while pending:
        parent = pending.pop()
        for task in os.listdir(f"/proc/{parent}/task"):
            pending += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
        rollup = Path(f"/proc/{parent}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total >> 10


if __name__ == "__main__":
    main()
