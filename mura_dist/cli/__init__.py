"""The command line: one file per command group. Each command parses arguments, calls one function and prints a summary."""

import sys
from collections.abc import Sequence
from typing import NoReturn


def entry(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit; see main.entry. Ctrl-C during the imports prints one line too."""
    try:
        from mura_dist.cli import main
    except KeyboardInterrupt:
        sys.stderr.write("mura-dist: stopped. The same command resumes.\n")
        sys.exit(3)
    main.entry(arguments)
