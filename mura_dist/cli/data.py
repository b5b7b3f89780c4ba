"""The commands on data: phantoms, shards, verify, describe."""

from pathlib import Path
from typing import Any

import click

from mura_dist.cli.options import Choice, Command, a_path, a_place, progress_bar, quiet_option, shared_option
from mura_dist.core.errors import RunError, UserError, mask_url


@click.command(
    cls=Command,
    short_help="Draw bones in MURA's layout, some broken.",
    examples=["mura-dist phantoms data/bones --studies 100 --size 256"],
)
@click.argument("out", type=a_path)
@click.option(
    "--studies",
    type=int,
    default=400,
    show_default=True,
    help="Number of studies over all splits, of both labels in each.",
)
@click.option(
    "--size", type=int, default=512, show_default=True, help="Longest side of the largest drawing, in pixels."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the drawings: the same seed draws the same bytes."
)
@quiet_option
def phantoms(out: Path, studies: int, size: int, seed: int, quiet: bool) -> None:
    """Draw bones into OUT, a new folder in MURA's layout. Some have breaks to find."""
    from mura_dist.data.phantoms import draw

    with progress_bar("drawing", quiet) as progress:
        counts = draw(out, studies=studies, size=size, seed=seed, progress=progress)
    click.echo(f"{out}: {', '.join(f'{value} {name}' for name, value in counts.items() if isinstance(value, int))}")


@click.command(
    cls=Command,
    terms=True,
    short_help="Convert a folder in MURA's layout to shards.",
    examples=[
        "mura-dist shards data/bones shards/bones --size 64",
        "mura-dist shards /data/MURA-v1.1 shards/mura",
        "mura-dist shards s3://bucket/MURA-v1.1 s3://bucket/shards",
    ],
)
@click.argument("source", type=a_place)
@click.argument("out", type=a_place)
@click.option(
    "--size", type=int, default=320, show_default=True, help="Width and height in pixels; the aspect is not kept."
)
@click.option(
    "--encoding", type=Choice(["raw", "png", "jpeg"]), default="raw", show_default=True, help="How to store pixels."
)
@click.option("--workers", type=int, default=None, help="Number of reading processes.  [default: one per processor]")
@click.option(
    "--tune", type=float, default=0.1, show_default=True, help="Share of the train patients to move to the tune split."
)
@click.option("--labels", type=a_path, default=None, help="CSV of study,label lines that correct labels.")
@click.option("--strict", is_flag=True, help="Fail at any defect of SOURCE and any unreadable file.")
@click.option(
    "--duplicates",
    type=Choice(["keep", "drop-train", "group"]),
    default="keep",
    show_default=True,
    help="What to do with byte-identical radiographs: keep them; drop from train those that valid or test has too; or group "
    "the train patients who share one, so that they stay together when tune is cut.",
)
@quiet_option
def shards(source: Path | str, out: Path | str, quiet: bool, **options: Any) -> None:
    """Convert SOURCE, a folder in MURA's layout, to WebDataset shards in OUT. The same command resumes.

    Both may be URLs (s3://bucket/folder), which need pip install '.[remote]' in the checkout. Under torchrun or srun the ranks
    share the work and write the same bytes.
    """
    from mura_dist.data.shards.convert import convert
    from mura_dist.distributed.signals import sigterm_as_interrupt

    with sigterm_as_interrupt(), progress_bar("converting", quiet) as progress:
        index = convert(source, out, progress=progress, **options)
    if index is None:  # another rank's: the first one speaks
        return
    click.echo(_report_text(out))
    click.echo(f"{mask_url(str(out))}: {index['size']} px, {index['encoding']}")


def _report_text(out: Path | str) -> str:
    from mura_dist.core import files, storage
    from mura_dist.data.source import report

    try:
        return report.text(files.parse_json(storage.open_storage(out).read("report.json")))
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError, IsADirectoryError) as error:
        raise UserError(
            f"{out}/report.json is damaged ({type(error).__name__}); delete index.json, then the same command"
        ) from error


@click.command(cls=Command, short_help="Check shards to the bit.", examples=["mura-dist verify shards/bones"])
@click.argument("out", type=a_place)
@quiet_option
def verify(out: Path | str, quiet: bool) -> None:
    """Check the shards in OUT to the bit: counts, digests, rows, readability. Name each corrupt sample."""
    from mura_dist.data.shards.reader import Shards
    from mura_dist.data.shards.verify import verify as problems_of

    problems = 0
    for problem in problems_of(out):
        problems += 1
        click.echo(problem)
    if problems:
        raise RunError(
            f"{out}: {problems} problems; delete the damaged shards' .json files and index.json, then convert again"
        )
    num = sum(part["num_radiographs"] for part in Shards.open(out).index["splits"].values())
    click.echo(f"{mask_url(str(out))}: {num} radiographs, all sound")


@click.command(
    cls=Command,
    short_help="Summarize a data set as an HTML page.",
    examples=["mura-dist describe shards/bones", "mura-dist describe data/bones --out bones.html --contact-sheet"],
)
@click.argument("folder", metavar="SHARDS_OR_FOLDER", type=a_place)
@click.option(
    "--out",
    type=a_path,
    default=Path("describe.html"),
    show_default=True,
    help="HTML page to write; its numbers go beside it as JSON.",
)
@click.option(
    "--contact-sheet",
    is_flag=True,
    help="Write OUT-contact-sheet.html too: small radiographs by study type and label. LOCAL ONLY.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Seed that chooses the contact sheet's radiographs.",
)
@shared_option
@quiet_option
def describe(folder: Path | str, out: Path, contact_sheet: bool, seed: int, shared: bool, quiet: bool) -> None:
    """Summarize shards, or a folder in MURA's layout, as an HTML page: counts, sizes, exposure, defects.

    The page holds no radiograph. The contact sheet does, and is written on request only.
    """
    from mura_dist.reports.dataset import contact_sheet_path, summary_text
    from mura_dist.reports.dataset import describe as page_of

    click.echo(summary_text(page_of(folder, out, with_contact_sheet=contact_sheet, seed=seed, shared=shared)))
    click.echo(f"page: {out}")
    click.echo(f"numbers: {out.with_suffix('.json')}")
    if contact_sheet:
        click.echo(f"contact sheet, LOCAL ONLY, it holds radiographs: {contact_sheet_path(out)}")
