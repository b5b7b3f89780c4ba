"""The three ways a command ends without its result, none of them a traceback.

`UserError`: the request was wrong (exit status 2). Its text is one line that names the value, the limit and the remedy.
`RunError`: the request was right, the work failed (exit status 1).
`StopRequestedError`: stopped on request (exit status 3); the same command goes on.
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
_MACHINE = "EMFILE ENFILE ENOMEM ENOBUFS EAGAIN EBUSY"  # what it has too little of at the moment
_IO_FAULTS = {getattr(errno, name, None) for name in f"{_DISK} {_NETWORK} {_CONNECTION} {_MACHINE}".split()} - {None}
_OUT_OF_MEMORY = (
    *("can't allocate memory", "annot allocate memory", "CUDA error: out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
    *("can't start new thread", "failed to map segment from shared object"),
)


def mask_url(text: str) -> str:
    """Return `text` with the user, password, query and fragment of every URL in it replaced by `MASK`: they are secrets.

    A secret that was not percent-encoded may hold any sign, so that of `s3://KEY:SEC/RET@bucket` all before the last @ is one.
    """
    return _URL.sub(lambda match: match[1] + _mask_rest(match[2]), text)


def _mask_rest(rest: str) -> str:
    """Mask what follows `scheme://`."""
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    user = ""
    if "@" in authority:
        user, rest = MASK + "@", rest[authority.rindex("@") + 1 :]
    elif ":" in authority and "@" in rest and not _PORT.fullmatch(authority):
        user, rest = MASK + "@", rest[rest.rindex("@") + 1 :]
    path, mark, query = rest.partition("?") if "?" in rest else rest.partition("#")
    if mark == "#" and "=" not in query:  # a part of a name
        return f"{user}{rest}"
    secret = query.rstrip(".,;:)]")  # the signs of a sentence end no URL
    return f"{user}{path}{mark}{MASK if secret else ''}{query[len(secret) :]}"


class _Line:
    """An exception whose text is a line to print, and to keep: no secret of a URL is in it."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*(mask_url(word) if isinstance(word, str) else word for word in words))


class UserError(_Line, ValueError):
    """The user asked for something that cannot be done as asked. `str(refusal)` is the line to print."""


class RankLocalUserError(UserError):
    """Of one rank, whichever it is: the others know nothing of it, so that it has to say it itself."""


class StopRequestedError(_Line, Exception):
    """A signal asked the work to stop; everything done so far is on disk."""


class RunError(_Line, RuntimeError):
    """The request was right and the work failed (exit status 1). `str(failure)` is the line to print."""


class CollectiveRunError(RunError):
    """Raised on every rank in the same words: the first one prints them for all."""


def nearest(word: str, names: Iterable[str]) -> str:
    """Return ` (did you mean X?)` where `word` is the beginning of one of `names` alone, or else near one; else nothing."""
    names = list(names)
    longer = [name for name in names if word and name.startswith(word)]
    matches = longer if len(longer) == 1 else difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f" (did you mean {matches[0]}?)" if matches else ""


def install_remedy(*extras: str) -> str:
    """Return the commands that install one of `extras`, for the middle of a line: `pip install '.[page]' in the checkout`.

    launch/setup.sh where it made this environment (it leaves a file `installed`). No command asks an index for mura-dist.
    """
    command = "bash launch/setup.sh {}" if Path(sys.prefix, "installed").is_file() else "pip install '.[{}]'"
    return f"{' or '.join(map(command.format, extras))} in the checkout"


def is_io_fault(error: BaseException) -> bool:
    """Return whether an error of reading is the disk's, the network's or the machine's: it says nothing about the file.

    True for EIO, ESTALE, ENOTCONN, EMFILE, ENOMEM and the like, and for a timeout or a lost connection that has no number.
    False for what is wrong with the file or its name: no such file, permission denied, a folder, a loop of links.
    """
    if not isinstance(error, OSError):
        return False
    return error.errno in _IO_FAULTS or (error.errno is None and isinstance(error, TimeoutError | ConnectionError))


def os_reason(error: OSError) -> str:
    """Say why the system refused, for the middle of a line: `permission denied`."""
    return (error.strerror or type(error).__name__).lower()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is no memory left. Libraries have no kind of their own for it.

    True for MemoryError, and by its text where an allocator, the start of a thread or the loading of a library failed.
    """
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)
