"""The benchmark command: bench."""

import json
from pathlib import Path
from typing import Any

import click

from mura_dist.bench.runner import BENCHES
from mura_dist.cli.options import LOCAL_PATH, Choice, Command, quiet_option

*_FIRST, _LAST = BENCHES


@click.command(
    cls=Command,
    short_help="Measure speed against the usual alternatives.",
    examples=["mura-dist bench pipeline", "mura-dist bench train --rounds 3 --plot train.png"],
    help=f"Measure WHAT ({', '.join(_FIRST)} or {_LAST}) side by side with the usual alternatives.",
)
@click.argument("what", metavar="WHAT", type=Choice(BENCHES))
@click.option("--data", type=LOCAL_PATH, default=None, help="Folder in MURA's layout.  [default: drawn phantoms]")
@click.option(
    "--size", type=click.IntRange(32, 2048), default=None, help="Width and height in pixels.  [default: by WHAT]"
)
@click.option("--radiographs", type=click.IntRange(16), default=None, help="Number of radiographs.  [default: by WHAT]")
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="Number of measurements of each contender."
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Number of loading processes or threads per contender; `pipeline` also tries 1, 2 and 4 for other loaders.",
)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Radiographs per batch.")
@click.option(
    "--model",
    type=LOCAL_PATH,
    default=None,
    metavar="MODEL.onnx",
    help="Model for WHAT=encodings: compare its probabilities between encodings.",
)
@click.option("--plot", type=LOCAL_PATH, default=None, metavar="FILE.png", help="Plot to write.")
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON on stdout.")
@quiet_option
def bench(what: str, plot: Path | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure and print a table; its help text is above."""
    from mura_dist.bench import plots
    from mura_dist.bench.runner import run, table
    from mura_dist.bench.workload import Options

    if plot is not None:
        plots.check(plot)
    from rich.console import Console

    log = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True).print
    measured = run(what, log, Options(**options))
    click.echo(json.dumps(measured, indent=2) if as_json else table(measured))
    if plot is not None:
        plots.draw(measured, plot)
