"""The training commands: train, ensemble."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import click

from mura_dist.cli.options import LOCAL_PATH, Command, WithSettings, quiet_option
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
    help="Local rank. The deepspeed launcher adds it; the environment contains it too.",
)
@quiet_option
@click.pass_context
def train(context: click.Context, arguments: tuple[str, ...], local_rank: int | None, quiet: bool) -> None:
    """Train the run of RECIPE.toml and key=value settings, or resume it. Settings after the recipe override it.

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
    """Return the recipe and the settings after it.

    A setting written `--key value`, `key value` or `key = value` becomes one word, whose form config.load corrects.

    Raises:
        NoSuchOption: an option that resembles no setting.
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
    """Return whether the word after a setting's name is its value. Negative numbers are values too."""
    with contextlib.suppress(ValueError):
        float(word)
        return True
    return not word.startswith("-") and "=" not in word and not word.endswith(".toml")


@click.command(
    cls=Command,
    terms=True,
    short_help="Combine the best checkpoints of runs into an ensemble.",
    examples=["mura-dist ensemble runs/mura runs/mura-seed1 --out runs/five.json"],
)
@click.argument("runs", metavar="RUN [RUN ...]", type=LOCAL_PATH, nargs=-1, required=True)
@click.option("--out", type=LOCAL_PATH, required=True, metavar="FILE.json", help="Model list to write.")
@click.option("--top", type=int, default=5, show_default=True, help="Number of checkpoints to choose over all runs.")
@quiet_option
def ensemble(runs: tuple[Path, ...], out: Path, top: int, quiet: bool) -> None:
    """Choose the checkpoints with the lowest tune loss over all runs, and write their names as a model list.

    evaluate and export take the list in place of a run, and average the probabilities of its members. The runs must have the
    same shards and select_on. A run keeps its newest checkpoints, and the keep_best=N (default 1) with the lowest loss. The list
    contains only names of checkpoints, so move it together with its runs.
    """
    from rich.console import Console

    from mura_dist.training.ensemble import select_members

    model_list = select_members(runs, out, top=top, log=Console(stderr=True, quiet=quiet, soft_wrap=True).print)
    click.echo(f"{out}: {len(model_list.members)} members by their loss on {model_list.select_on}")
    for member in model_list.members:
        click.echo(f"  {member.select_loss:.6f}  {member.architecture}  {member.run}  {member.checkpoint}")
