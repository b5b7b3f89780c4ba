"""The commands that make a model: train, ensemble."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import click

from mura_dist.cli.options import Command, WithSettings, a_path, quiet_option
from mura_dist.distributed import environment


@click.command(
    cls=WithSettings,
    terms=True,
    short_help="Train a run, or resume it.",
    context_settings={"ignore_unknown_options": True},
    examples=[
        "mura-dist train launch/recipes/mura.toml",
        "mura-dist train launch/recipes/mura.toml epochs=5 run=runs/short",
    ],
)
@click.argument("arguments", metavar="[RECIPE.toml] [key=value ...]", nargs=-1)
@click.option(
    "--local_rank",
    "--local-rank",
    type=int,
    hidden=True,
    help="Rank on this machine; the deepspeed launcher adds it, and the environment has it too.",
)
@quiet_option
@click.pass_context
def train(context: click.Context, arguments: tuple[str, ...], local_rank: int | None, quiet: bool) -> None:
    """Train the run that RECIPE.toml and key=value settings describe, or resume it. Settings after the recipe win.

    On several ranks: torchrun --nproc-per-node N -m mura_dist.train ..., or deepspeed --module mura_dist.train ...
    """
    from mura_dist.core import config

    recipe, overrides = _split(arguments, context)
    settings = config.load(recipe, overrides)
    from mura_dist.training.loop import summary_text
    from mura_dist.training.loop import train as run

    summary = run(settings, quiet=quiet)
    if environment.is_first():
        click.echo(summary_text(summary))


def _split(arguments: Sequence[str], context: click.Context) -> tuple[Path | None, list[str]]:
    """Return the recipe and the words after it.

    A setting written `--key value`, `key value` or `key = value` becomes one word, whose mistake config.load explains.

    Raises:
        NoSuchOption: a word with dashes that resembles no setting.
    """
    from mura_dist.core import config

    recipe, overrides, pending = None, list[str](), list(arguments)
    while pending:
        word = pending.pop(0)
        dashed = word.startswith("-")
        if dashed and not config.resembles(word):
            raise click.NoSuchOption(word.partition("=")[0], ctx=context)
        if "=" in word:
            overrides.append(word)
        elif dashed or (config.resembles(word, exactly=True) and not Path(word).exists()):
            if pending[:1] == ["="]:
                pending.pop(0)
            overrides.append(f"{word} {pending.pop(0)}" if pending and _is_value(pending[0]) else word)
        elif recipe is None:
            recipe = Path(word)
        else:
            overrides.append(word)
    return recipe, overrides


def _is_value(word: str) -> bool:
    """Return whether a word after a setting's name is its value. A number is one, also below 0."""
    with contextlib.suppress(ValueError):
        float(word)
        return True
    return not word.startswith("-") and "=" not in word and not word.endswith(".toml")


@click.command(
    cls=Command,
    terms=True,
    short_help="Choose the best checkpoints of runs as one model.",
    examples=["mura-dist ensemble runs/mura runs/mura-seed1 --out runs/five.json"],
)
@click.argument("runs", metavar="RUN [RUN ...]", type=a_path, nargs=-1, required=True)
@click.option("--out", type=a_path, required=True, metavar="FILE.json", help="Model list to write.")
@click.option(
    "--top", type=int, default=5, show_default=True, help="Number of checkpoints to choose, over all runs together."
)
@quiet_option
def ensemble(runs: tuple[Path, ...], out: Path, top: int, quiet: bool) -> None:
    """Choose the checkpoints of lowest tune loss among all checkpoints of the runs, and write their names as a model list.

    evaluate and export take the list in place of a run, and average the probabilities of its members. The runs must share
    shards and select_on. A run keeps its newest checkpoints, and the keep_best=N of lowest loss (a setting of train, default 1).
    The list names checkpoints and holds none, so move it together with its runs.
    """
    from rich.console import Console

    from mura_dist.training.ensemble import select_members

    made = select_members(runs, out, top=top, log=Console(stderr=True, quiet=quiet, soft_wrap=True).print)
    click.echo(f"{out}: {len(made.members)} members by their loss on {made.select_on}")
    for member in made.members:
        click.echo(f"  {member.select_loss:.6f}  {member.architecture}  {member.run}  {member.checkpoint}")
