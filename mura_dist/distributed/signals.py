"""Signals that ask a run or a prediction to stop: an event is set, the loop saves at a step or chunk boundary and leaves."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from mura_dist.core.errors import UserError, nearest

_IMPATIENT_S = 2.0  # launchers send SIGINT and SIGTERM in one breath; a person's second Ctrl-C comes later


@contextlib.contextmanager
def asked_to_stop(also: str | None = None, *, patience_s: float = _IMPATIENT_S) -> Iterator[threading.Event]:
    """Yield an event that SIGTERM, SIGINT, or the signal named `also` sets; in another thread than the main one none does.

    A second SIGINT, `patience_s` after the first signal, raises KeyboardInterrupt; other signals are heard once. Without patience
    (0) a second signal of any kind does what it always did.

    Raises UserError where there is no signal of that name.
    """
    event, first_s = threading.Event(), [0.0]
    numbers = {signal.SIGTERM, signal.SIGINT} | ({_number(also)} if also is not None else set())

    def handle(number: int, frame: object) -> None:
        now = time.monotonic()
        if event.is_set() and number == signal.SIGINT and now - first_s[0] > patience_s > 0:
            raise KeyboardInterrupt
        if not event.is_set():
            first_s[0] = now
            event.set()
        if not patience_s:
            signal.signal(number, before[number])

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield event
        return
    before: dict[int, Any] = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}
    for number in numbers:
        signal.signal(number, handle)
    try:
        yield event
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def at_once() -> contextlib.AbstractContextManager[None]:
    """Let SIGINT and SIGTERM end the process: where there is nothing to save and Python's handlers may not be heard."""
    return _heard({signal.SIGINT: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL})


def as_interrupt() -> contextlib.AbstractContextManager[None]:
    """Let SIGTERM, a scheduler's, raise KeyboardInterrupt as Ctrl-C does."""
    return _heard({signal.SIGTERM: signal.default_int_handler})


def handled_by(stop: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
    """Call `stop` on SIGINT and SIGTERM: around a server that handles them while it runs, and raises them again when it ends."""

    def handler(number: int, frame: Any) -> None:
        stop()

    return _heard({signal.SIGINT: handler, signal.SIGTERM: handler})


@contextlib.contextmanager
def _heard(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    """Install `handlers` while the block runs. Signals are the main thread's: in another one nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _number(name: str) -> signal.Signals:
    known = [one.name for one in signal.valid_signals() if isinstance(one, signal.Signals)]
    usable = sorted(set(known) - {"SIGKILL", "SIGSTOP"})
    if name not in usable:
        raise UserError(f"stop_signal={name!r}{nearest(name, usable)}: must be one of {', '.join(usable)}")
    return signal.Signals[name]
