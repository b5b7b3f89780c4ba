"""Errors that end a command with one line instead of a traceback.

`UserError`: the request was wrong (exit status 2). Its line names the value, the limit and the remedy.
`RunError`: the request was valid and the command failed (exit status 1).
`StopRequestedError`: stopped on request (exit status 3). The same command resumes.
"""

import difflib
import errno
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MASK = "***"
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
_URL = re.compile(rf"({_SCHEME})((?:(?!{_SCHEME})[^\s'\"<>`])*)")
_PORT = re.compile(r"(.*\]|[^:]*):[0-9]*")

_DISK = "EIO EREMOTEIO ENXIO ENODEV ENOMEDIUM EUCLEAN ESTALE"
_NETWORK = "ENOTCONN ESHUTDOWN EPIPE ENOLINK ECOMM ETIMEDOUT EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENETRESET"
_CONNECTION = "ECONNRESET ECONNREFUSED ECONNABORTED"
_MACHINE = "EMFILE ENFILE ENOMEM ENOBUFS EAGAIN EBUSY"  # resources that are exhausted at the moment
_IO_FAULTS = {getattr(errno, name, None) for name in f"{_DISK} {_NETWORK} {_CONNECTION} {_MACHINE}".split()} - {None}
_OUT_OF_MEMORY = (
    *("can't allocate memory", "annot allocate memory", "CUDA error: out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
    *("can't start new thread", "failed to map segment from shared object"),
)


def mask_url(text: str) -> str:
    """Return `text` with the user, password, query and fragment of each URL replaced by `MASK`.

    A secret that is not percent-encoded may contain any character: in `s3://KEY:SEC/RET@bucket` it ends at the last @.
    """
    return _URL.sub(lambda match: match[1] + _mask_rest(match[2]), text)


def _mask_rest(rest: str) -> str:
    """Mask the text that follows `scheme://`."""
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    user = ""
    if "@" in authority:
        user, rest = MASK + "@", rest[authority.rindex("@") + 1 :]
    elif ":" in authority and "@" in rest and not _PORT.fullmatch(authority):
        user, rest = MASK + "@", rest[rest.rindex("@") + 1 :]
    path, mark, query = rest.partition("?") if "?" in rest else rest.partition("#")
    if mark == "#" and "=" not in query:  # belongs to a file's name
        return f"{user}{rest}"
    secret = query.rstrip(".,;:)]")  # punctuation after the URL
    return f"{user}{path}{mark}{MASK if secret else ''}{query[len(secret) :]}"


class _OneLineError:
    """Base of exceptions whose text is one line to print, with the secrets of URLs masked."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(mask_url(arg) if isinstance(arg, str) else arg for arg in args))


class UserError(_OneLineError, ValueError):
    """An invalid request (exit status 2)."""


class RankLocalUserError(UserError):
    """An invalid request that only this rank has noticed, so this rank prints it."""


class StopRequestedError(_OneLineError, Exception):
    """A stop by a signal (exit status 3). All finished work is on disk."""


class RunError(_OneLineError, RuntimeError):
    """A failure of a valid request (exit status 1)."""


class CollectiveRunError(RunError):
    """A failure that every rank raises with the same text; rank 0 prints it."""


def nearest(word: str, names: Iterable[str]) -> str:
    """Return ` (did you mean X?)` where `word` begins exactly one of `names` or resembles one; else ""."""
    names = list(names)
    longer = [name for name in names if word and name.startswith(word)]
    matches = longer if len(longer) == 1 else difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f" (did you mean {matches[0]}?)" if matches else ""


def install_remedy(*extras: str) -> str:
    """Return the commands that install one of `extras`, such as `pip install '.[page]' in the checkout`.

    They use launch/setup.sh where it created this environment; it leaves a file `installed`.
    """
    command = "bash launch/setup.sh {}" if Path(sys.prefix, "installed").is_file() else "pip install '.[{}]'"
    return f"{' or '.join(map(command.format, extras))} in the checkout"


def is_io_fault(error: BaseException) -> bool:
    """Return whether a read failed because of the disk, the network or the machine, and not because of the file.

    True for EIO, ESTALE, ENOTCONN, EMFILE, ENOMEM and similar errors, and for a timeout or lost connection without a number.
    False where the file or its name is at fault: no such file, permission denied, a folder, a loop of links.
    """
    if not isinstance(error, OSError):
        return False
    return error.errno in _IO_FAULTS or (error.errno is None and isinstance(error, TimeoutError | ConnectionError))


def os_reason(error: OSError) -> str:
    """Return the system's reason in lower case, such as `permission denied`."""
    return (error.strerror or type(error).__name__).lower()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory is exhausted.

    True for MemoryError, and by the text where an allocator, a thread's start or a library's loading failed: libraries have no
    type of their own for it.
    """
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)
