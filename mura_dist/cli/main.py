"""`mura-dist`: the command group, the exit status of a command, and the line that explains a failure.

Exit status: 0 done; 1 failed; 2 invalid request; 3 stopped on request, the same command resumes. Progress goes to stderr,
results to files, the summary to stdout, and the terms of use to stderr at the end.
"""

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from mura_dist import __version__
from mura_dist.cli import benchmarks, data, evaluation, inference, training
from mura_dist.cli.options import Commands
from mura_dist.core.errors import (
    CollectiveRunError,
    RankLocalUserError,
    RunError,
    StopRequestedError,
    UserError,
    install_remedy,
    is_out_of_memory,
    mask_url,
    nearest,
)
from mura_dist.distributed import environment

DONE, FAILED, INVALID, STOPPED = 0, 1, 2, 3
EXAMPLES = (
    "mura-dist phantoms data/bones",
    "mura-dist shards data/bones shards/bones --size 64",
    "mura-dist train launch/recipes/demo.toml shards=shards/bones run=runs/bones",
    "mura-dist evaluate runs/bones shards/bones",
    "mura-dist export runs/bones",
    "mura-dist predict runs/bones/model.onnx data/bones/valid --out predictions",
)
"""Test all steps from phantoms to predictions."""


@click.group(
    cls=Commands, examples=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="mura-dist")
def cli() -> None:
    """From a folder of bone radiographs to a trained, honestly measured, deployable model.

    Research only, not a medical device. A disclaimer does not make clinical use lawful.
    """


for command in (
    *(data.phantoms, data.shards, data.verify, data.describe),
    *(training.train, training.ensemble),
    *(evaluation.evaluate, evaluation.score),
    *(inference.export, inference.predict, inference.page),
    benchmarks.bench,
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status. A failure prints one line on stderr."""
    try:
        cli.main(list(arguments) if arguments is not None else None, prog_name="mura-dist", standalone_mode=False)
    except UserError as error:
        return _end(INVALID, str(error), only_first=not isinstance(error, RankLocalUserError))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return INVALID
    except click.ClickException as error:
        text, command_line = _usage_text(error), sys.argv[1:] if arguments is None else arguments
        command = f"mura-dist {command_line[0]}" if command_line and command_line[0] in cli.commands else "mura-dist"
        # click quotes unexpected arguments, and a shell expands DIRECTORY/* to patients' names.
        if any(word.startswith("--pseudonyms") for word in command_line):
            text = f"{text.partition(' (')[0].rstrip('.')}."
        return _end(INVALID, f"{text} See {command} --help.", only_first=True)
    except StopRequestedError as error:
        return _end(STOPPED, str(error), only_first=True)
    except (KeyboardInterrupt, click.Abort):
        return _end(STOPPED, "stopped. The same command resumes.", only_first=True)
    except RunError as error:
        return _end(FAILED, str(error), only_first=isinstance(error, CollectiveRunError))
    except ModuleNotFoundError as error:
        from mura_dist.cli.extras import extras_of

        extras = extras_of(error.name or "")
        if not extras:
            raise
        line = f"this command needs {error.name}, which is not installed. Run {install_remedy(*extras)}."
        return _end(INVALID, line, only_first=True)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output has exited, as `| head` does
        return FAILED
    except (IsADirectoryError, NotADirectoryError) as error:
        problem = "is a folder, not a file" if isinstance(error, IsADirectoryError) else "is below a file, not a folder"
        return _end(
            INVALID, f"{error.filename or error} {problem}. Move it, then run the same command.", only_first=False
        )
    except OSError as error:
        resource = {errno.ENOSPC: "space", errno.ENOMEM: "memory"}.get(error.errno or 0)
        remedy = f"Free some {resource}" if resource else "Fix this"
        return _end(
            FAILED,
            f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}. {remedy}, then run the same command.",
            only_first=False,
        )
    except (MemoryError, RuntimeError, ImportError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error) or type(error).__name__
        line = f"out of memory ({reason}). Free some or raise the limit (ulimit -v), then run the same command."
        return _end(FAILED, line, only_first=False)
    return DONE


def _usage_text(error: click.ClickException) -> str:
    """Describe what is wrong with a command line. For an unknown option, name the nearest one."""
    if not isinstance(error, click.NoSuchOption) or error.ctx is None:
        return error.format_message()
    parameters = [item for item in error.ctx.command.get_params(error.ctx) if not getattr(item, "hidden", False)]
    names = [name for item in parameters for name in (*item.opts, *item.secondary_opts) if name.startswith("--")]
    return f"no option {error.option_name}{nearest(error.option_name, names)}."


def _prints_errors() -> bool:
    """Return whether this is the first rank of its machine. An error may concern one machine only."""
    try:
        return environment.local_rank() == 0
    except UserError:  # the rank is unknown; that is the error
        return True


def _end(status: int, line: str, *, only_first: bool) -> int:
    if not only_first or _prints_errors():
        click.echo(f"mura-dist: {mask_url(' '.join(line.split()))}", err=True)
    return status


def entry(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its status.

    If torch was loaded, exit without the interpreter's finalization. Threads of torch and gloo can abort it ("terminate called
    without an active exception"), and a finished run would count as failed. Everything is on disk and closed by then.
    """
    status = main(arguments)
    if "torch" not in sys.modules:
        sys.exit(status)
    logging.shutdown()
    with contextlib.suppress(OSError, ValueError):  # the reader of the output may have exited
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
