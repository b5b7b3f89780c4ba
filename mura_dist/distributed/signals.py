"""Stop signals. A signal sets an event, and the loop saves and exits at its next step or chunk boundary."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from mura_dist.core.errors import UserError, nearest

_SECOND_SIGNAL_S = 2.0  # launchers send SIGINT and SIGTERM at once; a person's second Ctrl-C comes later


@contextlib.contextmanager
def stop_event(signal_name: str | None = None, *, patience_s: float = _SECOND_SIGNAL_S) -> Iterator[threading.Event]:
    """Yield an event that SIGTERM, SIGINT and the signal `signal_name` set. Only the main thread receives signals.

    Args:
        signal_name: Name of a further signal, such as SIGUSR2.
        patience_s: Seconds after the first signal from which on a SIGINT raises KeyboardInterrupt. 0: a second signal of any
            kind has its previous handler.

    Raises:
        UserError: no signal has that name.
    """
    event, first_s = threading.Event(), [0.0]
    numbers = {signal.SIGTERM, signal.SIGINT} | ({_signal_number(signal_name)} if signal_name is not None else set())

    def handle(number: int, frame: object) -> None:
        now = time.monotonic()
        if event.is_set() and number == signal.SIGINT and now - first_s[0] > patience_s > 0:
            raise KeyboardInterrupt
        if not event.is_set():
            first_s[0] = now
            event.set()
        if not patience_s:
            signal.signal(number, previous[number])

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous: dict[int, Any] = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}
    for number in numbers:
        signal.signal(number, handle)
    try:
        yield event
    finally:
        for number in numbers:
            signal.signal(number, previous[number])


def default_signal_handlers() -> contextlib.AbstractContextManager[None]:
    """Let SIGINT and SIGTERM end the process: for waits in C++, where Python's handlers do not run."""
    return _handlers({signal.SIGINT: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL})


def sigterm_as_interrupt() -> contextlib.AbstractContextManager[None]:
    """Let SIGTERM raise KeyboardInterrupt, as Ctrl-C does."""
    return _handlers({signal.SIGTERM: signal.default_int_handler})


def call_on_stop(stop: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
    """Call `stop` on SIGINT and SIGTERM: for a server that raises signals again after it has stopped."""

    def handler(number: int, frame: Any) -> None:
        stop()

    return _handlers({signal.SIGINT: handler, signal.SIGTERM: handler})


@contextlib.contextmanager
def _handlers(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    """Install `handlers` while the block runs. Only the main thread may: in another thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _signal_number(name: str) -> signal.Signals:
    names = [number.name for number in signal.valid_signals() if isinstance(number, signal.Signals)]
    usable = sorted(set(names) - {"SIGKILL", "SIGSTOP"})
    if name not in usable:
        raise UserError(f"stop_signal={name!r}{nearest(name, usable)}: must be one of {', '.join(usable)}.")
    return signal.Signals[name]
