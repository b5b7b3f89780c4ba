"""Python processes that need not import torch and DeepSpeed again: forks of one that has, 0.1 s of processor time instead of 6.

    warm.py NUMBER   serves the listening socket that is its file of this number, until its parent ends
    start(folder)    starts a server; returns an executable that takes the words of `python`

One server serves all workers of a session (conftest.py). It imports nothing before the first client connects.

The executable is a real process to whoever starts it: it hands its words, environment, folder and open files to the server,
passes signals on to the fork, ends as the fork ends, and the fork dies with it. The fork runs `python -m MODULE`, `python -c
CODE` or `python SCRIPT` with nothing replaced. Not for what this would hide: what a start imports, what the environment says to
a library as it is loaded (OMP_NUM_THREADS), who the parent is, how much memory a process has.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import runpy
import select
import selectors
import signal
import socket
import stat
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Only the standard library, and little of it: it starts in 20 ms.
CLIENT = """#!{python} -IS
import os, signal, socket, sys
known = [name for name in {heard}]
signal.pthread_sigmask(signal.SIG_BLOCK, known)
import json
words = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
socket.send_fds(server, [len(words).to_bytes(8, "big")], [0, 1, 2])
server.sendall(words)
answers = server.makefile("rb")
fork = int(answers.readline() or sys.exit("the warm server is gone"))
for name in known:
    signal.signal(name, lambda number, _: os.kill(fork, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, known)
status = int(answers.readline() or sys.exit("the warm server is gone"))
if os.WIFSIGNALED(status):
    for name in known:
        signal.signal(name, signal.SIG_DFL)
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), os.WTERMSIG(status))
os._exit(os.waitstatus_to_exitcode(status))
"""
ALLOCATOR = "jemalloc_bg_thd"  # pyarrow's, which starts it anew in a fork
IMPORTED = (
    "deepspeed",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "mura_dist.cli.main",
    "mura_dist.evaluation.evaluate",
    "mura_dist.inference.predict",
    "mura_dist.training.loop",
    "pydicom",
    "torch._dynamo",  # by any optimiser
    "torch.distributed.run",
)
PARENTS_END = 1  # prctl(2): PR_SET_PDEATHSIG


def start(folder: Path) -> Path:
    """A server that lives as long as this process; returns the executable."""
    path, client = folder / "socket", folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, heard=[int(name) for name in HEARD], path=str(path)))
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen(64)  # before it has imported anything: the first to come wait
    subprocess.Popen([sys.executable, __file__, str(listening.fileno())], pass_fds=[listening.fileno()])
    listening.close()
    return client


def serve(listening: socket.socket) -> tuple[list[str], str, dict[str, str]]:
    """Forks for each who asks, for ever. Returns in the fork: its words, folder and environment."""
    waiting = selectors.DefaultSelector()
    waiting.register(listening, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if waiting.get_map().get(key.fd) is not key:  # its other half was seen to in this round
                continue
            if key.data is not None:
                _end(waiting, key.fileobj, *key.data)
                continue
            client, _ = listening.accept()
            try:
                request, files = _receive_request(client)
            except (OSError, ValueError):  # it ended meanwhile
                client.close()
                continue
            fork = os.fork()
            if not fork:
                for number, file in enumerate(files):
                    os.dup2(file, number)
                for number in (*files, client.detach(), *waiting.get_map()):
                    os.close(number)
                waiting.close()
                listening.detach()
                return request
            for file in files:
                os.close(file)
            with contextlib.suppress(OSError):  # then the client says no more, below
                client.sendall(b"%d\n" % fork)
            ended = os.pidfd_open(fork)
            for source in (client, ended):
                waiting.register(source, selectors.EVENT_READ, (fork, client, ended))


def _end(waiting: selectors.BaseSelector, of: object, fork: int, client: socket.socket, ended: int) -> None:
    """`of` the client: it ended, and so does its fork. Of the fork: its client hears how."""
    if of is client:
        os.kill(fork, signal.SIGKILL)
    _, status = os.waitpid(fork, 0)
    for source in (client, ended):
        waiting.unregister(source)
    with contextlib.suppress(OSError):
        client.sendall(b"%d\n" % status)
    client.close()
    os.close(ended)


def _receive_request(client: socket.socket) -> tuple[Any, list[int]]:
    length, files, _, _ = socket.recv_fds(client, 8, 3)
    if len(files) != 3:
        raise OSError("it sent no files")
    with client.makefile("rb") as sent:
        return json.loads(sent.read(int.from_bytes(length, "big"))), files


def main() -> None:
    ctypes.CDLL(None).prctl(PARENTS_END, signal.SIGKILL)
    listening = socket.socket(fileno=int(sys.argv[1]))
    select.select([listening], [], [])
    imported()
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("[0-9]*/comm")]
    assert sum(name != ALLOCATOR for name in threads) == 1, f"{threads}: a fork would miss all but one"
    gc.freeze()  # a fork that collects would write to, and so copy, all of it
    arguments, folder, environment = serve(listening)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    ctypes.CDLL(None).prctl(PARENTS_END, signal.SIGKILL)  # the server's end
    if Path(arguments[0]).name == "deepspeed" or "deepspeed.launcher.launch" in arguments:
        sys.executable = environment["PYTHON_EXEC"]  # what starts its launcher, and its ranks
    status = ran(arguments[1:] if arguments[0] == "-u" else arguments, folder)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # to take all modules apart takes 2 s


def ran(arguments: list[str], folder: str) -> int:
    """The exit status of `python WORDS`."""
    try:
        if arguments[0] == "-m":
            sys.argv, sys.path[0] = arguments[1:], folder
            sys.modules.pop(arguments[1], None)  # as it is in a new process
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(arguments[1], "<string>", "exec"), vars(sys.modules["__main__"]))
        else:
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def imported() -> None:
    """What a training imports, as engine.py does."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for name in IMPORTED:
        importlib.import_module(name)


if __name__ == "__main__":
    main()
