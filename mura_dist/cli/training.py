"""The commands that make a model: train, ensemble."""

from pathlib import Path

import click

from mura_dist.cli.options import WithSettings, a_path, quiet_option
from mura_dist.distributed import environment


@click.command(cls=WithSettings, short_help="Train a run, or go on with it.")
@click.argument("words", metavar="RECIPE.toml [key=value ...]", nargs=-1)
@click.option(
    "--local_rank",
    "--local-rank",
    type=int,
    hidden=True,
    help="The deepspeed launcher adds it; the environment says it too.",
)
@quiet_option
def train(words: tuple[str, ...], local_rank: int | None, quiet: bool) -> None:
    """Train, or go on with, the run that RECIPE.toml and key=value settings describe.

    On several ranks: `torchrun --nproc-per-node N -m mura_dist.train ...` or `deepspeed --module mura_dist.train ...`.
    """
    recipe = next((word for word in words if "=" not in word), None)
    from mura_dist.core import config

    settings = config.load(Path(recipe) if recipe is not None else None, [word for word in words if word != recipe])
    from mura_dist.training.loop import summary_text
    from mura_dist.training.loop import train as run

    summary = run(settings, quiet=quiet)
    if environment.is_first():
        click.echo(summary_text(summary))


@click.command(short_help="Choose the best checkpoints of runs as one model.")
@click.argument("runs", metavar="RUN [RUN ...]", type=a_path, nargs=-1, required=True)
@click.option("--out", type=a_path, required=True, metavar="FILE.json", help="The model list to write.")
@click.option("--top", type=int, default=5, show_default=True, help="How many checkpoints, over all runs together.")
@quiet_option
def ensemble(runs: tuple[Path, ...], out: Path, top: int, quiet: bool) -> None:
    """Choose, of all checkpoints in the runs, the --top of lowest tune loss; write their names as a model list.

    evaluate and export take the list in place of a run: a model that averages the members' probabilities. The runs must share
    shards and select_on. A run keeps its newest checkpoints and the keep_best=N of lowest loss (a setting of train, 1 unless
    set). The list names checkpoints, it holds none: move it together with its runs.
    """
    from rich.console import Console

    from mura_dist.training.ensemble import choose

    made = choose(runs, out, top=top, say=Console(stderr=True, quiet=quiet, soft_wrap=True).print)
    click.echo(f"{out}: {len(made.members)} members by their loss on {made.select_on}")
    for member in made.members:
        click.echo(f"  {member.select_loss:.6f}  {member.architecture}  {member.run}  {member.checkpoint}")
