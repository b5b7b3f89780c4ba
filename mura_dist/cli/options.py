"""Shared parts of commands: groups and commands with examples in their help, terms of use, parameter types, progress bar.

Imports here stay few, since every worker process executes them.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from mura_dist.core.errors import UserError, nearest
from mura_dist.data import mura
from mura_dist.distributed import environment

TERMS_VARIABLE = "MURA_DIST_TERMS"


def echo_terms() -> None:
    """Print the terms of use on stderr, on rank 0 only, unless a script that runs several commands prints them."""
    if environment.is_first() and os.environ.get(TERMS_VARIABLE) != "end":
        click.echo(mura.TERMS, err=True)


def write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    """Write command lines as the last section of a help text, one per line."""
    formatter.write_paragraph()
    formatter.write("Examples:\n" if len(examples) > 1 else "Example:\n")
    for example in examples:
        formatter.write(f"  {example}\n")


class Command(click.Command):
    """A command whose help ends with examples.

    Args:
        examples: Command lines that work as written.
        terms: Whether to print the terms of use at the end: for models, metrics, predictions and data for these.
    """

    def __init__(self, *args: Any, examples: Sequence[str], terms: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples, self.terms = examples, terms

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        write_examples(formatter, self.examples)

    def invoke(self, context: click.Context) -> Any:
        """Run the command, then print the terms of use."""
        result = super().invoke(context)
        if self.terms:
            echo_terms()
        return result


class Commands(click.Group):
    """A group whose help ends with examples, and which names the nearest command for a mistyped one."""

    def __init__(self, *args: Any, examples: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Return a command. Raises UserError if it does not exist."""
        command = super().get_command(context, name)
        if command is None:
            names = self.list_commands(context)
            raise UserError(f"no command {name!r}{nearest(name, names)}. Commands: {', '.join(names)}.")
        return command

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        write_examples(formatter, self.examples)


def _parameter_name(parameter: click.Parameter | None, context: click.Context | None) -> str:
    """Return the name of a parameter for messages: --OPTION, or an argument as in the usage line."""
    if isinstance(parameter, click.Option):
        return parameter.opts[-1]
    return parameter.make_metavar(context) if parameter is not None and context is not None else ""


class StorageParam(click.ParamType):
    """A folder of this machine (Path), or a URL (str: a Path would change it)."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        """Return a Path, or a URL unchanged."""
        return value if "://" in str(value) else Path(value)


class LocalPathParam(click.ParamType):
    """A file or folder of this machine (Path). A URL raises UserError."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return a Path."""
        if "://" in str(value):
            name = _parameter_name(param, ctx)
            raise UserError(
                f"{name} {value}: must be a path of this machine, not a URL. Copy it to this machine and give that path."
            )
        return Path(value)


class Choice(click.Choice):
    """Choice of several names. The error for a mistyped name contains the nearest one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value if it is a choice."""
        if value in self.choices:
            return value
        name = _parameter_name(param, ctx)
        raise UserError(f"{name} {value!r}{nearest(value, self.choices)}: must be one of {', '.join(self.choices)}.")


shared_option = click.option(
    "--shared",
    is_flag=True,
    help="Let the umask decide who may read the output.  [default: only its owner]",
)
quiet_option = click.option(
    "--quiet", is_flag=True, help="Print no progress on stderr. Errors and the terms of use are still printed."
)
LOCAL_PATH = LocalPathParam()
STORAGE_PATH = StorageParam()


@contextlib.contextmanager
def progress_bar(label: str, quiet: bool) -> Iterator[Callable[[int, int | None], None]]:
    """Yield a function of (done, total; None: unknown) that shows a bar on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    # The current stream: while stderr is redirected (as around torch.onnx), the bar stays on the terminal.
    console = Console(file=sys.stderr, quiet=quiet)
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class WithSettings(Command):
    """A command whose help lists all settings before its examples. They are imported only for that."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the settings and the examples."""
        from mura_dist.core import config

        formatter.write("\nSettings (key = value in the recipe, key=value after it):\n\n")
        formatter.write(f"{config.help_text(formatter.width)}\n")
        super().format_epilog(context, formatter)
