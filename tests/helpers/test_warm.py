"""Test that a fork of the warm server behaves like a new process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.commands import warm_python

PRINT = "import os, sys\nprint(__name__, sys.argv[1:], os.getcwd(), os.environ['OF_THE_TEST'], sys.stdin.read())\n"
ENDS = {
    "normal": PRINT,
    "with a status": PRINT + "sys.exit(7)\n",
    "with a message": PRINT + "sys.exit('no such thing')\n",
    "with an error": PRINT + "raise ValueError('a fault of the test')\n",
    "in a library": PRINT + "sys.stdout.flush()\nos._exit(5)\n",
    "killed": PRINT + "sys.stdout.flush()\nos.kill(os.getpid(), 9)\n",
    "terminated": PRINT + "sys.stdout.flush()\nos.kill(os.getpid(), 15)\n",
    "at its exit": PRINT + "import atexit\natexit.register(print, 'at exit')\n",
}


@pytest.mark.parametrize("kind", ["script", "module"])
@pytest.mark.parametrize("end", ENDS)
def test_warm_process_exits_like_a_new_process(end: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "of_the_test.py").write_text(ENDS[end])
    arguments = ["-m", "of_the_test"] if kind == "module" else ["of_the_test.py"]
    env = {**os.environ, "OF_THE_TEST": "heard"}
    cold, warm = (
        subprocess.run(
            [python, "-u", *arguments, "a", "b c"], cwd=tmp_path, env=env, input="said", capture_output=True, text=True
        )
        for python in (sys.executable, warm_python())
    )
    assert (warm.returncode, warm.stdout) == (cold.returncode, cold.stdout)
    assert warm.stderr.splitlines()[-1:] == cold.stderr.splitlines()[-1:]
    assert "__main__ ['a', 'b c']" in warm.stdout


def start(folder: Path, code: str) -> tuple["subprocess.Popen[str]", int]:
    """Return a running client and the process id of its fork."""
    (folder / "code.py").write_text("import os, signal, sys, time\n" + code)
    process = subprocess.Popen([warm_python(), folder / "code.py"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_warm_process_receives_signals(name: str, tmp_path: Path) -> None:
    code = f"signal.signal(signal.{name}, lambda *_: os._exit(9))\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n"
    process, _ = start(tmp_path, code)
    process.send_signal(getattr(signal, name))
    assert process.wait(20) == 9


def test_fork_exits_with_its_client(tmp_path: Path) -> None:
    process, fork = start(tmp_path, "print(os.getpid(), flush=True)\ntime.sleep(60)\n")
    assert fork != process.pid
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while Path(f"/proc/{fork}").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
