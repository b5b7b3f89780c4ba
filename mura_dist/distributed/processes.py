"""Processes end with the process that started them: workers with their parent, ranks with their launcher.

Worker processes load and draw, they are never ranks.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mura_dist.distributed import environment as launcher
from mura_dist.distributed.spawn import CONTEXT

WATCH_S = 1.0  # how often a rank looks for its launcher
ORDERLY_S = 15.0  # how long a rank whose launcher is gone may take to save and leave
_PROC = Path("/proc")


def start(count: int, prepare: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """A pool of `count` processes, each of which first calls `prepare(*arguments)`; what is sent must pickle.

    Spawned, not forked: a fork of a process with threads may hang.
    """
    return ProcessPoolExecutor(count, CONTEXT, _begin, (prepare, arguments))


def _begin(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    if prepare is not None:
        prepare(*arguments)


def end_with_parent() -> None:
    """In a worker process: leave Ctrl-C to the parent, and end when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True, name="watch-parent").start()


def _end_with(parent: BaseProcess) -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent.join()
    os._exit(1)


def end_with_launcher() -> None:
    """In a rank: when torchrun or deepspeed is gone, stop as SIGTERM asks; who has not left ORDERLY_S later ends at once.

    `kill -9` of torchrun leaves its ranks in sessions of their own. `deepspeed` on one machine passes no signal on: SIGTERM
    to it looks like `kill -9` from here, and has to save as well. Without a launcher nothing is watched: under `nohup` a
    training outlives its shell.
    """
    if os.name == "posix" and launcher.has_launcher():
        watched = _launchers(os.getppid())
        threading.Thread(target=_end_without, args=(watched,), daemon=True, name="watch-launcher").start()


def _launchers(parent: int) -> list[tuple[int, int | None]]:
    """(process, when born; None: gone already) of who has to live: the parent, and where it is deepspeed's inner launcher
    (`deepspeed` starts `deepspeed.launcher.launch`, which starts us) the outer one too."""
    watched = [(parent, born(parent) if _can_be_launcher(parent) else None)]
    if b"deepspeed.launcher.launch" in _read(parent, "cmdline"):
        runner = _parent(parent)
        if b"deepspeed" in _read(runner, "cmdline"):
            watched.append((runner, born(runner)))
        elif runner == 1:  # an orphan; under any other process somebody started the inner launcher by hand
            watched.append((runner, None))
    return watched


def _can_be_launcher(process: int) -> bool:
    """Whether it can have started us: both launchers are Python, and what they start may be a script that starts us.

    Else our launcher was gone before the watch began, and this is the system's process that takes in orphans.
    """
    if not (_PROC / "self").exists():
        return process != 1
    try:
        program = os.readlink(_PROC / str(process) / "exe")
    except OSError:  # ended, or another user's
        return False
    environment = _read(process, "environ")
    return "python" in Path(program).name or any(
        f"{name}=".encode() in environment for name in launcher.LAUNCHER_VARIABLES
    )


def _end_without(watched: Sequence[tuple[int, int | None]]) -> None:
    parent = watched[0][0]
    while os.getppid() == parent and all(since is not None and born(process) == since for process, since in watched):
        time.sleep(WATCH_S)
    said = f"rank {launcher.rank()}: the launcher is gone (kill -9?); stopping, the same command goes on"
    with contextlib.suppress(OSError):  # a pipe may have gone with the launcher
        print(said, file=sys.stderr, flush=True)  # noqa: T201
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORDERLY_S)
    os._exit(1)  # stuck: as being killed, the last checkpoint stands


def born(process: int) -> int | None:
    """When a process started, in clock ticks since the boot; 0 where the system does not tell; None where it does not live.

    A number is given again to another process, so the number alone names nobody. A zombie does not live.
    """
    if os.name != "posix":
        return 0
    if process <= 0:  # to `kill` that means a group
        return None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    state, *fields = _read(process, "stat").rpartition(b")")[2].split() or (b"", *[b"0"] * 19)
    return None if state in (b"Z", b"X") else int(fields[18])  # proc(5): field 22


def _parent(process: int) -> int:
    """0 where there is no such process."""
    return int((_read(process, "stat").rpartition(b")")[2].split() or (b"", b"0"))[1])


def _read(process: int, what: str) -> bytes:
    """A file of /proc; empty where there is none, or none for us."""
    try:
        return (_PROC / str(process) / what).read_bytes()
    except OSError:
        return b""


def processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
