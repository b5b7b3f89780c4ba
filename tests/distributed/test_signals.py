"""signals.py: a signal asks to stop; a second one of prediction's does what it always did, training's SIGINT after a while."""

import signal
import threading
from collections.abc import Iterator

import pytest

from mura_dist.distributed import signals

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def _no_signal_ends_the_suite() -> Iterator[None]:
    """Handle each signal harmlessly, whatever handlers earlier tests left: a wrong handler fails the test and not its process."""
    before = [signal.getsignal(number) for number in SIGNALS]
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else lambda number, frame: None)
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def test_without_patience_a_second_signal_does_what_it_always_did() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with signals.asked_to_stop(patience_s=0) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        assert signal.getsignal(signal.SIGTERM) is before[1]
        signal.raise_signal(signal.SIGINT)  # the first of its kind
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_with_patience_a_late_second_interrupt_ends_at_once() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with signals.asked_to_stop("SIGUSR2", patience_s=60) as stop:
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            signal.raise_signal(number)
            assert stop.is_set()
    with signals.asked_to_stop("SIGUSR2", patience_s=1e-9):
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_another_thread_handles_no_signal() -> None:
    before, handlers = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with signals.asked_to_stop() as stop:
            handlers.append(signal.getsignal(signal.SIGTERM))
            assert not stop.is_set()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [before]
