"""signals.py: a signal asks to stop; a second one of prediction's does what it always did, training's SIGINT after a while.

Each law is held by a process of its own, in its main thread: a signal that is handled wrongly ends it, and not the suite.
"""

import subprocess
import sys

import pytest

LAWS = {
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
COMMON = """
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


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_the_law_holds(law: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"{COMMON}{law}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
