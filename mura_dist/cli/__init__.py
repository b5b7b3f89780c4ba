"""The command line: one file per command group. It parses arguments, calls one function, prints a summary."""

from mura_dist.cli.main import entry as entry
