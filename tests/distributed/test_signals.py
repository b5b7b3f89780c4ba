"""Test the stop event that signals set.

Without patience, a second signal has its default effect. With patience, a late second SIGINT interrupts. Each case runs
in the main thread of its own process, since a signal that is handled wrongly kills the process.
"""

import subprocess
import sys

import pytest

SCRIPTS = {
    "without patience a second signal does what it always did": """
before = [signal.getsignal(number) for number in SIGNALS]
with signals.stop_event(patience_s=0) as stop:
    signal.raise_signal(signal.SIGTERM)
    assert stop.is_set()
    assert signal.getsignal(signal.SIGTERM) is before[1]
    signal.raise_signal(signal.SIGINT)  # the first of its kind
    interrupts_with(signal.SIGINT)
assert [signal.getsignal(number) for number in SIGNALS] == before
""",
    "with patience a late second interrupt ends at once": """
before = [signal.getsignal(number) for number in SIGNALS]
with signals.stop_event("SIGUSR2", patience_s=60) as stop:
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
        signal.raise_signal(number)
        assert stop.is_set()
with signals.stop_event("SIGUSR2", patience_s=1e-9):
    signal.raise_signal(signal.SIGTERM)
    interrupts_with(signal.SIGINT)
assert [signal.getsignal(number) for number in SIGNALS] == before
""",
    "another thread handles no signal": """
before, handlers = signal.getsignal(signal.SIGTERM), []
def work():
    with signals.stop_event() as stop:
        handlers.append(signal.getsignal(signal.SIGTERM))
        assert not stop.is_set()
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert handlers == [before]
""",
}
PREAMBLE = """
import signal, threading
from mura_dist.distributed import signals
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
signal.signal(signal.SIGINT, signal.default_int_handler)  # where it was started in the background it is ignored
def interrupts_with(number):
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:
        return
    raise AssertionError("no KeyboardInterrupt")
"""


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_stop_event_of_signals(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"{PREAMBLE}{script}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
