"""Ctrl-C on a terminal at any moment of a launch script: one line, exit status 3, no traceback. The same command resumes."""

import fcntl
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import NO_GPU, ROOT, TINY

from mura_dist.data import mura
from mura_dist.training import metrics_log
from mura_dist.training.run import Run

LIMIT_S = 300.0  # of one start; the demo runs through all stages before the interrupted one


def on_terminal(
    *arguments: object, is_time: Callable[[str], bool], folder: Path = ROOT, env: dict[str, str] | None = None
) -> tuple[int, list[str]]:
    """Run a command with a controlling terminal. Type Ctrl-C once `is_time` returns True for its output.

    Returns:
        Its exit status, and its lines after the Ctrl-C, without those of a progress bar.
    """
    controller, terminal = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    environment = {**os.environ, **NO_GPU, "OMP_NUM_THREADS": "1", **(env or {})}
    process = subprocess.Popen(
        [*map(str, arguments)], stdin=terminal, stdout=terminal, stderr=terminal, cwd=folder, env=environment,
        preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(terminal)
    output, after, end = "", None, time.monotonic() + LIMIT_S
    try:
        while process.poll() is None or select.select([controller], [], [], 0)[0]:
            assert time.monotonic() < end, output
            if select.select([controller], [], [], 0.02)[0]:
                try:
                    output += os.read(controller, 1 << 16).decode(errors="replace")
                except OSError:  # the terminal was closed
                    break
            if after is None and is_time(output):
                after = len(output)
                os.write(controller, b"\x03")
    finally:
        process.kill()
        os.close(controller)
    assert after is not None, output
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output[after:]).replace("\r", "\n")
    lines = [line.removeprefix("^C").strip() for line in plain.splitlines()]
    return process.wait(), [line for line in lines if line and "images/s" not in line and not line.startswith("epoch ")]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["at once", "torchrun loads", "a step"])
def test_interrupted_training_exits_with_one_line(moment: str, shard_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = (*TINY, f"shards={shard_folder}", f"run={folder}", "epochs=5000")
    started = time.monotonic()

    def is_time(_: str) -> bool:
        if moment == "a step":
            return any(line["kind"] == "step" for line in metrics_log.read(folder / "metrics.jsonl"))
        return time.monotonic() - started > (0.3 if moment == "at once" else 3)

    status, lines = on_terminal("bash", "launch/local.sh", 2, *arguments, is_time=is_time)
    assert (status, len(lines)) == (3, 1), lines
    if moment == "a step":
        assert re.fullmatch(r"mura-dist: stopped at step \d+ of 40000\. The same command resumes\.", lines[0])
        assert Run.load(folder).status()["state"] == "stopped"
    else:
        assert lines == ["launch/local.sh: stopped before the run began. The same command starts it."]


def checkout(folder: Path) -> Path:
    """Return a checkout with an installed environment and a small network."""
    for name in ("launch", "tools", "mura_dist"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "launch/setup.sh").write_text("sleep 1\n")
    recipe = folder / "launch/recipes/demo.toml"
    recipe.write_text(re.sub(r"(?m)^epochs = \d+", "epochs = 3", recipe.read_text()) + 'architecture = "tiny"\n')
    return folder


@pytest.mark.nightly(part="launchers")
def test_demo_resumes_after_an_interrupt_at_every_stage(tmp_path: Path) -> None:
    """Each start is interrupted one stage later than the previous one. The last start finishes the demo."""
    folder = checkout(tmp_path / "checkout")
    env = {"PYTHONPATH": str(folder), "STUDIES": "80"}
    for step, pause_s in [(0, 0.3), *((step, pause_s) for step in range(1, 9) for pause_s in (0.05, 1.0))]:
        reached: list[float] = []

        def is_time(output: str, step: int = step, pause_s: float = pause_s, reached: list[float] = reached) -> bool:
            if not reached and (not step or f"{step} of 8: " in output):
                reached.append(time.monotonic())
            return bool(reached) and time.monotonic() - reached[0] > pause_s

        status, lines = on_terminal("bash", "launch/demo.sh", is_time=is_time, folder=folder, env=env)
        assert status == 3, (step, pause_s, lines)
        assert "Traceback" not in " ".join(lines), (step, pause_s, lines)
        own = [line for line in lines if re.match(r"(mura-dist|launch/\w+\.sh): stopped", line)]
        assert len(own) == 1, (step, pause_s, lines)

    def finish() -> list[str]:
        done = subprocess.run(
            ["bash", "launch/demo.sh"],
            cwd=folder,
            env={**os.environ, **NO_GPU, **env},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1] == mura.TERMS
        assert (done.stdout + done.stderr).count(mura.TERMS) == 1
        return done.stdout.splitlines()

    end = [line.partition(":")[0] for line in finish()[-5:]]
    assert end == ["AUROC", "kappa", "report", "page", "time"]
    files = {path: path.stat().st_mtime_ns for path in (folder / "runs/demo").rglob("*") if path.name != "summary.json"}
    started = time.monotonic()
    again = finish()
    assert time.monotonic() - started < 10
    assert again.count("  already done") == 8
    assert len(again) == 2 * 8 + 5
    assert files == {path: path.stat().st_mtime_ns for path in files}
    (folder / "runs/demo/predictions/studies.csv").unlink()
    assert finish().count("  already done") == 7  # a step without its output runs again
    assert (folder / "runs/demo/predictions/studies.csv").is_file()
