"""The command line: one file per command group. It parses arguments, calls one function, prints a summary."""

import sys
from collections.abc import Sequence
from typing import NoReturn


def entry(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the process of a command, from its arguments to its end; see main.entry. Ctrl-C while it loads is one line too."""
    try:
        from mura_dist.cli import main
    except KeyboardInterrupt:
        sys.stderr.write("mura-dist: stopped; the same command goes on\n")
        sys.exit(3)
    main.entry(arguments)
