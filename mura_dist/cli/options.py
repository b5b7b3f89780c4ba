"""What commands share: the group that answers a typing error, kinds of arguments, `--quiet`, a progress bar.

Little is imported here: every worker process comes through.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from mura_dist.core.errors import Refusal, nearest


class Commands(click.Group):
    """A group that answers a mistyped command with the nearest one."""

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        command = super().get_command(context, name)
        if command is None:
            names = self.list_commands(context)
            raise Refusal(f"no command {name!r}{nearest(name, names)}; there are {', '.join(names)}")
        return command


class Place(click.ParamType):
    """A folder of this machine (a Path), or a URL (a str), which a Path would mangle."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        return value if "://" in str(value) else Path(value)


class Choice(click.Choice):
    """One of a few names. A mistyped one is answered with the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self.choices:
            return value
        command = ctx.info_name if ctx else ""
        raise Refusal(f"{command} {value!r}{nearest(value, self.choices)}: must be one of {', '.join(self.choices)}")


shared_option = click.option(
    "--shared", is_flag=True, help="Let others read what is written, as the umask says.  [default: its owner alone]"
)
quiet_option = click.option("--quiet", is_flag=True, help="No progress on stderr.")
a_path = click.Path(path_type=Path)
a_place = Place()


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


class WithSettings(click.Command):
    """A command whose help ends with all settings; read then only: every worker process imports this file."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        from mura_dist.core import config

        formatter.write(f"\nSettings, in the recipe and as key=value alike:\n{config.help_text()}\n")
