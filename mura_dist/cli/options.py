"""What commands share: groups and commands with examples in their help, the terms of use at their end, kinds of arguments,
`--quiet`, a progress bar.

Little is imported here: every worker process comes through.
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
    """Print the terms of use on stderr, on the first rank alone; not where a page that runs several commands prints them."""
    if environment.is_first() and os.environ.get(TERMS_VARIABLE) != "end":
        click.echo(mura.TERMS, err=True)


def write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    """Write command lines as the last section of a help text, each on a line of its own, so that it can be copied."""
    formatter.write_paragraph()
    formatter.write("Examples:\n" if len(examples) > 1 else "Example:\n")
    for example in examples:
        formatter.write(f"  {example}\n")


class Command(click.Command):
    """A command whose help ends with examples, and which ends with the terms of use where they are due.

    examples: command lines that work as they stand; terms: it makes a model, a metric, a prediction, or data for these.
    """

    def __init__(self, *args: Any, examples: Sequence[str], terms: bool = False, **more: Any) -> None:
        super().__init__(*args, **more)
        self.examples, self.terms = examples, terms

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(formatter, self.examples)

    def invoke(self, context: click.Context) -> Any:
        result = super().invoke(context)
        if self.terms:
            echo_terms()
        return result


class Commands(click.Group):
    """A group whose help ends with examples, and which answers a mistyped command with the nearest one."""

    def __init__(self, *args: Any, examples: Sequence[str], **more: Any) -> None:
        super().__init__(*args, **more)
        self.examples = examples

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        command = super().get_command(context, name)
        if command is None:
            names = self.list_commands(context)
            raise UserError(f"no command {name!r}{nearest(name, names)}; there are {', '.join(names)}")
        return command

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(formatter, self.examples)


def _parameter_name(parameter: click.Parameter | None, context: click.Context | None) -> str:
    """Return what a message calls a parameter: --OPTION, or an argument as the usage has it."""
    if isinstance(parameter, click.Option):
        return parameter.opts[-1]
    return parameter.make_metavar(context) if parameter is not None and context is not None else ""


class StorageParam(click.ParamType):
    """A folder of this machine (a Path), or a URL (a str), which a Path would mangle."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        return value if "://" in str(value) else Path(value)


class LocalPathParam(click.ParamType):
    """A file or folder of this machine (a Path). A URL is refused; a Path would mangle it."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if "://" in str(value):
            name = _parameter_name(param, ctx)
            raise UserError(
                f"{name} {value}: must be a path of this machine, not a URL; copy it here, then give that path"
            )
        return Path(value)


class Choice(click.Choice):
    """One of a few names. A mistyped one is answered with the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self.choices:
            return value
        name = _parameter_name(param, ctx)
        raise UserError(f"{name} {value!r}{nearest(value, self.choices)}: must be one of {', '.join(self.choices)}")


shared_option = click.option(
    "--shared",
    is_flag=True,
    help="Let the umask decide who may read what is written.  [default: its owner alone]",
)
quiet_option = click.option(
    "--quiet", is_flag=True, help="Print no progress on stderr. Errors and the terms of use stay."
)
a_path = LocalPathParam()
a_place = StorageParam()


@contextlib.contextmanager
def progress_bar(what: str, quiet: bool) -> Iterator[Callable[[int, int | None], None]]:
    """A callable (done, total; None: not known yet) that moves a bar on a terminal, and is silent elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    # This very stream: what is redirected while the bar stands (torch.onnx's words) takes no bar with it.
    console = Console(file=sys.stderr, quiet=quiet)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class WithSettings(Command):
    """A command whose help has all settings before its examples; they are read then only."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        from mura_dist.core import config

        formatter.write("\nSettings, in the recipe as key = value, after it as key=value:\n\n")
        formatter.write(f"{config.help_text(formatter.width)}\n")
        super().format_epilog(context, formatter)
