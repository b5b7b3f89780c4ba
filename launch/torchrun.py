"""torchrun, for the pages beside it: where a signal ends it, or its ranks failed, it adds nothing to what the ranks said.

    .venv/bin/python launch/torchrun.py OPTIONS -m mura_dist.train -- RECIPE.toml [key=value ...]

torchrun itself prints a traceback of its own then. Exit status: torchrun's; of a signal, 128 and its number.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def is_news(record: logging.LogRecord) -> bool:
    """Whether a line of torchrun's is more than that it heard the signal, passes it on, or lost a rank that said why."""
    return not any(words in str(record.msg) for words in ("death signal", "closing signal", "exitcode:"))


if __name__ == "__main__":
    for module in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{module}").addFilter(is_news)
    try:
        main()
    except SignalException as ended:
        sys.exit(128 + ended.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it could not say so itself
            name = signal.Signals(-failure.exitcode).name
            sys.stderr.write(f"launch/torchrun.py: rank {rank} was killed by {name}; the same words go on\n")
        sys.exit(1)
