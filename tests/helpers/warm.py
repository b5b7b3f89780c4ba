"""Python processes that need not import torch and DeepSpeed: forks of one that has, 0.1 s of processor time instead of 6.

    warm.py NUMBER   serves the listening socket with this file descriptor until its parent exits
    start(folder)    starts a server and returns an executable that takes the arguments of `python`

One server serves all workers of a session (conftest.py). It imports nothing before the first client connects.

The executable is a real process. It sends its arguments, environment, folder and open files to the server, forwards signals to
the fork and exits as the fork exits. The fork dies with it. The fork runs `python -m MODULE`, `python -c CODE` or
`python SCRIPT` without replacements. Do not use it to test imports at a start, variables that a library reads as it is loaded
(OMP_NUM_THREADS), the parent process, or the memory of a process.
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

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Few modules, of the standard library only: it starts in 20 ms.
CLIENT = """#!{python} -IS
import os, signal, socket, sys
forwarded = [name for name in {signals}]
signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)
import json
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
answers = server.makefile("rb")
fork = int(answers.readline() or sys.exit("the warm server is gone"))
for name in forwarded:
    signal.signal(name, lambda number, _: os.kill(fork, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
status = int(answers.readline() or sys.exit("the warm server is gone"))
if os.WIFSIGNALED(status):
    for name in forwarded:
        signal.signal(name, signal.SIG_DFL)
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), os.WTERMSIG(status))
os._exit(os.waitstatus_to_exitcode(status))
"""
ALLOCATOR = "jemalloc_bg_thd"  # a thread of pyarrow, which restarts in a fork
IMPORTED = (
    "deepspeed",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "mura_dist.cli.main",
    "mura_dist.evaluation.evaluate",
    "mura_dist.inference.predict",
    "mura_dist.training.loop",
    "pydicom",
    "torch._dynamo",  # by any optimizer
    "torch.distributed.run",
)
PARENTS_END = 1  # prctl(2): PR_SET_PDEATHSIG


def start(folder: Path) -> Path:
    """Start a server that lives as long as this process. Return the executable."""
    path, client = folder / "socket", folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, signals=[int(name) for name in FORWARDED], path=str(path)))
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen(64)  # clients wait here until the server has imported its packages
    subprocess.Popen([sys.executable, __file__, str(listening.fileno())], pass_fds=[listening.fileno()])
    listening.close()
    return client


def serve(listening: socket.socket) -> tuple[list[str], str, dict[str, str]]:
    """Fork for each client, forever. Return in the fork: its arguments, folder and environment."""
    selector = selectors.DefaultSelector()
    selector.register(listening, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if selector.get_map().get(key.fd) is not key:  # its counterpart was handled in this round
                continue
            if key.data is not None:
                _end(selector, key.fileobj, *key.data)
                continue
            client, _ = listening.accept()
            try:
                request, files = _receive_request(client)
            except (OSError, ValueError):  # the client exited meanwhile
                client.close()
                continue
            fork = os.fork()
            if not fork:
                for number, file in enumerate(files):
                    os.dup2(file, number)
                for number in (*files, client.detach(), *selector.get_map()):
                    os.close(number)
                selector.close()
                listening.detach()
                return request
            for file in files:
                os.close(file)
            with contextlib.suppress(OSError):  # the client has exited; handled below
                client.sendall(b"%d\n" % fork)
            exit_fd = os.pidfd_open(fork)
            for source in (client, exit_fd):
                selector.register(source, selectors.EVENT_READ, (fork, client, exit_fd))


def _end(
    selector: selectors.BaseSelector, event_source: object, fork: int, client: socket.socket, exit_fd: int
) -> None:
    """Handle the exit of the client, which kills its fork, or of the fork, whose status goes to its client."""
    if event_source is client:
        os.kill(fork, signal.SIGKILL)
    _, status = os.waitpid(fork, 0)
    for source in (client, exit_fd):
        selector.unregister(source)
    with contextlib.suppress(OSError):
        client.sendall(b"%d\n" % status)
    client.close()
    os.close(exit_fd)


def _receive_request(client: socket.socket) -> tuple[Any, list[int]]:
    length, files, _, _ = socket.recv_fds(client, 8, 3)
    if len(files) != 3:
        raise OSError("the client sent no files")
    with client.makefile("rb") as stream:
        return json.loads(stream.read(int.from_bytes(length, "big"))), files


def main() -> None:
    ctypes.CDLL(None).prctl(PARENTS_END, signal.SIGKILL)
    listening = socket.socket(fileno=int(sys.argv[1]))
    select.select([listening], [], [])
    import_packages()
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("[0-9]*/comm")]
    assert sum(name != ALLOCATOR for name in threads) == 1, f"{threads}: a fork has one thread only"
    gc.freeze()  # garbage collection in a fork would write to, and so copy, all of it
    arguments, folder, environment = serve(listening)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    ctypes.CDLL(None).prctl(PARENTS_END, signal.SIGKILL)  # the server's end
    if Path(arguments[0]).name == "deepspeed" or "deepspeed.launcher.launch" in arguments:
        sys.executable = environment["PYTHON_EXEC"]  # starts its launcher and its ranks
    status = run_python(arguments[1:] if arguments[0] == "-u" else arguments, folder)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the teardown of all modules takes 2 s


def run_python(arguments: list[str], folder: str) -> int:
    """Run `python ARGUMENTS` in this process and return its exit status."""
    try:
        if arguments[0] == "-m":
            sys.argv, sys.path[0] = arguments[1:], folder
            sys.modules.pop(arguments[1], None)  # as in a new process
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


def import_packages() -> None:
    """Import what a training run imports, as engine.py does."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for name in IMPORTED:
        importlib.import_module(name)


if __name__ == "__main__":
    main()
