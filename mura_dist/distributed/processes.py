"""Processes that exit with the process that started them: workers with their parent, ranks with their launcher.

Worker processes load and draw. They are never ranks.
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

from mura_dist.distributed import environment
from mura_dist.distributed.spawn import CONTEXT

POLL_S = 1.0  # time between two checks of the launcher
GRACE_S = 15.0  # time to save and exit for a rank whose launcher has ended
_PROC = Path("/proc")


def start_workers(count: int, prepare: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """Return a pool of `count` spawned processes, each of which first calls `prepare(*arguments)`. Everything must pickle."""
    return ProcessPoolExecutor(count, CONTEXT, _initialize, (prepare, arguments))


def _initialize(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    if prepare is not None:
        prepare(*arguments)


def processor_flags(cpuinfo: str) -> list[set[str]]:
    """Return the flags of each processor in the text of Linux's /proc/cpuinfo: "flags" of x86, "Features" of ARM."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return [set(flags.split()) for name, _, flags in lines if name.strip().lower() in ("flags", "features")]


def end_with_parent() -> None:
    """Ignore Ctrl-C in this worker process, and exit when its parent exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_after, args=(parent,), daemon=True, name="watch-parent").start()


def _exit_after(parent: BaseProcess) -> None:
    """Exit after `parent`. A worker whose parent was killed would wait for tasks forever."""
    parent.join()
    os._exit(1)


def end_with_launcher() -> None:
    """Stop this rank as on SIGTERM when torchrun or deepspeed ends; exit GRACE_S later at the latest.

    `kill -9` of torchrun leaves its ranks running in their own sessions. `deepspeed` on one machine does not forward signals:
    to its ranks, SIGTERM looks like `kill -9`. Without a launcher nothing is watched, so a training under `nohup` outlives its
    shell.
    """
    if os.name == "posix" and environment.has_launcher():
        launchers = _find_launchers(os.getppid())
        threading.Thread(target=_stop_after, args=(launchers,), daemon=True, name="watch-launcher").start()


def _find_launchers(parent: int) -> list[tuple[int, int | None]]:
    """Return (process, its start time; None: it has ended) of each process that this rank must not outlive.

    These are the parent and, where that is deepspeed's inner launcher, the outer one: `deepspeed` starts
    `deepspeed.launcher.launch`, which starts the ranks.
    """
    launchers = [(parent, process_start_time(parent) if _is_launcher(parent) else None)]
    if b"deepspeed.launcher.launch" in _read_proc(parent, "cmdline"):
        runner = _parent_of(parent)
        if b"deepspeed" in _read_proc(runner, "cmdline"):
            launchers.append((runner, process_start_time(runner)))
        elif runner == 1:  # an orphan; with any other parent, a user started the inner launcher directly
            launchers.append((runner, None))
    return launchers


def _is_launcher(process: int) -> bool:
    """Return whether `process` can have started this rank: it runs Python or has a launcher's environment (a script).

    Otherwise the launcher ended before the watch began, and `process` is the system's process that adopts orphans.
    """
    if not (_PROC / "self").exists():
        return process != 1
    try:
        program = os.readlink(_PROC / str(process) / "exe")
    except OSError:  # it has ended, or is another user's
        return False
    variables = _read_proc(process, "environ")
    return "python" in Path(program).name or any(
        f"{name}=".encode() in variables for name in environment.LAUNCHER_VARIABLES
    )


def _stop_after(launchers: Sequence[tuple[int, int | None]]) -> None:
    parent = launchers[0][0]
    while os.getppid() == parent and all(
        start is not None and process_start_time(process) == start for process, start in launchers
    ):
        time.sleep(POLL_S)
    line = f"rank {environment.rank()}: the launcher has ended (kill -9?). Stopping; the same command resumes."
    with contextlib.suppress(OSError):  # a pipe may have closed with the launcher
        print(line, file=sys.stderr, flush=True)  # noqa: T201
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)  # stuck; the last checkpoint is intact


def process_start_time(process: int) -> int | None:
    """Return when a process started, in clock ticks since boot; 0 where unknown; None where it is not alive.

    Number and start time together identify a process, since numbers are reused. A zombie is not alive.
    """
    if os.name != "posix":
        return 0
    if process <= 0:  # `kill` would take it as a group
        return None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    state, *fields = _read_proc(process, "stat").rpartition(b")")[2].split() or (b"", *[b"0"] * 19)
    return None if state in (b"Z", b"X") else int(fields[18])  # proc(5): field 22


def _parent_of(process: int) -> int:
    """Return the parent's number, or 0 where there is no such process."""
    return int((_read_proc(process, "stat").rpartition(b")")[2].split() or (b"", b"0"))[1])


def _read_proc(process: int, name: str) -> bytes:
    """Return the content of /proc/PROCESS/NAME; empty where it is missing or not readable."""
    try:
        return (_PROC / str(process) / name).read_bytes()
    except OSError:
        return b""


def num_processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
