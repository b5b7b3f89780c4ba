"""How long the page takes to answer, for one session and for many at once, in a real browser.

python tools/bench/page.py MODEL.onnx FOLDER [--sessions 10] [--views 4] [--rounds 3]

FOLDER is in MURA's layout; its first study types' radiographs are taken, `--views` of them as one study. A session's time runs
from handing the browser the files to the answer and all pictures being there. Sessions at once start together. Needs the extras
page and dev, and Chromium.
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
MOST_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sessions", type=int, default=10)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    files = study(asked.folder, asked.views)
    with socket.create_server(("127.0.0.1", 0)) as trial:
        port = trial.getsockname()[1]
    command = [sys.executable, "-m", "mura_dist", "page", str(asked.model), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        wait(process, f"{address}/_stcore/health")
        for sessions in (1, asked.sessions):
            taken = [asyncio.run(at_once(address, files, sessions)) for _ in range(asked.rounds)]
            told = {
                "sessions": sessions,
                "views": len(files),
                "rounds": asked.rounds,
                "median_s": round(statistics.median(one for some in taken for one in some), 2),
                "worst_s": round(max(max(some) for some in taken), 2),
                "server_mib": memory_mib(process.pid),
            }
            print(json.dumps(told), flush=True)
    finally:
        process.terminate()
        process.wait()


def study(folder: Path, views: int) -> list[dict[str, Any]]:
    """Files as a browser is given them, their names telling one study type."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".dcm"))
    study_type = next(name for name in mura.STUDY_TYPES if any(name in path.parts for path in paths))
    some = [path for path in paths if study_type in path.parts][:views]
    return [
        {
            "name": f"{study_type}_{place}{path.suffix}",
            "mimeType": "application/octet-stream",
            "buffer": path.read_bytes(),
        }
        for place, path in enumerate(some)
    ]


async def at_once(address: str, files: list[dict[str, Any]], sessions: int) -> list[float]:
    from playwright.async_api import async_playwright

    program = next(path for name in BROWSERS if (path := shutil.which(name)))
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        pages = [await (await browser.new_context()).new_page() for _ in range(sessions)]
        for page in pages:
            await page.goto(address)
            await page.locator("input[type=file]").wait_for(state="attached", timeout=1000 * MOST_S)
        taken = await asyncio.gather(*(answer(page, files) for page in pages))
        await browser.close()
    return taken


async def answer(page: Any, files: list[dict[str, Any]]) -> float:
    started = time.perf_counter()
    await page.locator("input[type=file]").set_input_files(files)
    await page.locator("section.outcome").wait_for(timeout=1000 * MOST_S)
    await page.locator("img[alt^='Radiograph']").nth(len(files) - 1).wait_for(timeout=1000 * MOST_S)
    return time.perf_counter() - started


def wait(process: subprocess.Popen[bytes], url: str) -> None:
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    sys.exit("the page did not start")


def memory_mib(process: int) -> int:
    """The server's and its children's proportional set size."""
    total, todo = 0, [process]
    while todo:
        one = todo.pop()
        for task in os.listdir(f"/proc/{one}/task"):
            todo += map(int, Path(f"/proc/{one}/task/{task}/children").read_text().split())
        rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total >> 10


if __name__ == "__main__":
    main()
