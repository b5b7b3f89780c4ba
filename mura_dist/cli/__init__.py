"""The command line: one file per command group. It parses arguments, calls one function, prints a summary."""

from .main import entry as entry
