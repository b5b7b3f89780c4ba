"""Run torchrun for the launch scripts, without its own traceback after a signal or after its ranks failed.

    .venv/bin/python launch/torchrun.py OPTIONS -m mura_dist.train -- RECIPE.toml [key=value ...]

Exit status: torchrun's, or after a signal 128 and the signal's number.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def is_informative(record: logging.LogRecord) -> bool:
    """Return False for torchrun's lines on a signal that it passes on, and on a failed rank, which has logged the reason."""
    return not any(phrase in str(record.msg) for phrase in ("death signal", "closing signal", "exitcode:"))


if __name__ == "__main__":
    for module in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{module}").addFilter(is_informative)
    try:
        main()
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # killed by a signal, so the rank logged nothing
            name = signal.Signals(-failure.exitcode).name
            sys.stderr.write(f"launch/torchrun.py: rank {rank} was killed by {name}. The same command resumes.\n")
        sys.exit(1)
