"""`mura-dist`: the command group, the exit status of a command, the one line that says why it failed.

Exit status: 0 done; 1 the work failed; 2 the request was wrong; 3 stopped on request, the same command goes on. Progress goes
to stderr, results to files, the summary to stdout, the terms of use last, to stderr.
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

DONE, FAILED, WRONG, STOPPED = 0, 1, 2, 3
STORY = (
    "mura-dist phantoms data/bones",
    "mura-dist shards data/bones shards/bones --size 64",
    "mura-dist train launch/recipes/demo.toml shards=shards/bones run=runs/bones",
    "mura-dist evaluate runs/bones shards/bones",
    "mura-dist export runs/bones",
    "mura-dist predict runs/bones/model.onnx data/bones/valid --out predictions",
)
"""From nothing to predictions, on drawn bones."""


@click.group(
    cls=Commands, examples=STORY, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="mura-dist")
def cli() -> None:
    """From a folder of bone radiographs to a trained, honestly measured, deployable model.

    Research only, not a medical device; a disclaimer does not make clinical use lawful.
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
    """Run a command line; returns the exit status. One line on stderr says why it is not 0."""
    try:
        cli.main(list(arguments) if arguments is not None else None, prog_name="mura-dist", standalone_mode=False)
    except UserError as error:
        return _end(WRONG, str(error), only_first=not isinstance(error, RankLocalUserError))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return WRONG
    except click.ClickException as error:
        text, command_line = _usage_text(error), sys.argv[1:] if arguments is None else arguments
        command = f"mura-dist {command_line[0]}" if command_line and command_line[0] in cli.commands else "mura-dist"
        # What it did not expect click quotes, and a shell makes names of DIRECTORY/*.
        if any(word.startswith("--pseudonyms") for word in command_line):
            text = f"{text.partition(' (')[0].rstrip('.')}."
        return _end(WRONG, f"{text} See {command} --help.", only_first=True)
    except StopRequestedError as error:
        return _end(STOPPED, str(error), only_first=True)
    except (KeyboardInterrupt, click.Abort):
        return _end(STOPPED, "stopped; the same command goes on", only_first=True)
    except RunError as error:
        return _end(FAILED, str(error), only_first=isinstance(error, CollectiveRunError))
    except ModuleNotFoundError as error:
        from mura_dist.cli.extras import extras_of

        extras = extras_of(error.name or "")
        if not extras:
            raise
        line = f"this command needs {error.name}, which is not installed; {install_remedy(*extras)}"
        return _end(WRONG, line, only_first=True)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left, as `| head` does
        return FAILED
    except (IsADirectoryError, NotADirectoryError) as error:
        what = "is a folder, not a file" if isinstance(error, IsADirectoryError) else "lies below a file, not a folder"
        return _end(WRONG, f"{error.filename or error} {what}; move it away, then the same command", only_first=False)
    except OSError as error:
        free = {errno.ENOSPC: "space", errno.ENOMEM: "memory"}.get(error.errno or 0)
        remedy = f"free some {free}, then the same command goes on" if free else "mend it, then the same command"
        return _end(
            FAILED,
            f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}; {remedy}",
            only_first=False,
        )
    except (MemoryError, RuntimeError, ImportError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error) or type(error).__name__
        line = f"out of memory ({reason}); free some or raise the limit (ulimit -v), then the same command goes on"
        return _end(FAILED, line, only_first=False)
    return DONE


def _usage_text(error: click.ClickException) -> str:
    """Say what is wrong with a command line; an option that does not exist with the nearest one."""
    if not isinstance(error, click.NoSuchOption) or error.ctx is None:
        return error.format_message()
    parameters = [each for each in error.ctx.command.get_params(error.ctx) if not getattr(each, "hidden", False)]
    names = [name for each in parameters for name in (*each.opts, *each.secondary_opts) if name.startswith("--")]
    return f"no option {error.option_name}{nearest(error.option_name, names)}."


def _speaks() -> bool:
    """Each machine's first: what it lacks, the others may have."""
    try:
        return environment.local_rank() == 0
    except UserError:  # who knows which rank it is; that is what is being said
        return True


def _end(status: int, line: str, *, only_first: bool) -> int:
    if not only_first or _speaks():
        click.echo(f"mura-dist: {mask_url(' '.join(line.split()))}", err=True)
    return status


def entry(arguments: Sequence[str] | None = None) -> NoReturn:
    """The process of a command, from its arguments to its end.

    Where torch was loaded the interpreter is left without its finalisation: threads of torch's and gloo's own can abort it
    ("terminate called without an active exception", seen once in some 60 runs on a busy machine), and a finished run would
    count as a failed one. Everything is on disk and closed by then.
    """
    status = main(arguments)
    if "torch" not in sys.modules:
        sys.exit(status)
    logging.shutdown()
    with contextlib.suppress(OSError, ValueError):  # the reader of our output may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
