"""The three ways a command ends without its result, none of them a traceback.

`Refusal`: the request was wrong (exit status 2). Its text is one line that names the value, the limit and the remedy.
`Failure`: the request was right, the work failed (exit status 1).
`Stopped`: stopped on request (exit status 3); the same command goes on.
"""

import difflib
from collections.abc import Iterable


class Refusal(ValueError):
    """The user asked for something that cannot be done as asked. `str(refusal)` is the line to print."""


class OwnRefusal(Refusal):
    """Of one rank, whichever it is: the others know nothing of it, so that it has to say it itself."""


class Stopped(Exception):
    """A signal asked the work to stop; everything done so far is on disk."""


class Failure(RuntimeError):
    """The request was right and the work failed (exit status 1). `str(failure)` is the line to print."""


class CommonFailure(Failure):
    """Raised on every rank in the same words: the first one prints them for all."""


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` where something known is near, else nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]}?)" if matches else ""


def os_reason(error: OSError) -> str:
    """Say why the system refused, for the middle of a line: `permission denied`."""
    return (error.strerror or type(error).__name__).lower()
