"""The commands on data: phantoms, shards, verify, describe."""

from pathlib import Path
from typing import Any

import click

from mura_dist.cli.options import a_path, a_place, progress_bar, quiet_option, shared_option
from mura_dist.core.errors import Failure, Refusal, mask_url
from mura_dist.data import mura


@click.command(short_help="Draw bones in MURA's layout, some broken.")
@click.argument("out", type=a_path)
@click.option(
    "--studies", type=int, default=400, show_default=True, help="Studies over all splits, both labels in each."
)
@click.option("--size", type=int, default=512, show_default=True, help="Longest side of the largest, in pixels.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed draws the same bytes.")
@quiet_option
def phantoms(out: Path, studies: int, size: int, seed: int, quiet: bool) -> None:
    """Draw bones in MURA's own layout into OUT, some with breaks to find."""
    from mura_dist.data.phantoms import draw

    with progress_bar("drawing", quiet) as progress:
        counts = draw(out, studies=studies, size=size, seed=seed, progress=progress)
    click.echo(f"{out}: {', '.join(f'{value} {name}' for name, value in counts.items() if isinstance(value, int))}")


@click.command(short_help="Convert a folder in MURA's layout to shards.")
@click.argument("source", type=a_place)
@click.argument("out", type=a_place)
@click.option("--size", type=int, default=320, show_default=True, help="Pixels of a side; the aspect is not kept.")
@click.option("--encoding", default="raw", show_default=True, help="raw, png or jpeg: how pixels are stored.")
@click.option("--workers", type=int, default=None, help="Processes that read.  [default: one per processor]")
@click.option(
    "--tune", type=float, default=0.1, show_default=True, help="Share of the train patients that becomes tune."
)
@click.option("--labels", type=a_path, default=None, help="CSV of study,label lines that correct labels.")
@click.option("--strict", is_flag=True, help="Any defect of SOURCE, any unreadable file, is an error.")
@click.option(
    "--duplicates",
    default="keep",
    show_default=True,
    help="Byte-identical radiographs: keep, drop-train (train loses what valid or test has too) or group (train patients who "
    "share one stay together when tune is cut).",
)
@quiet_option
def shards(source: Path | str, out: Path | str, quiet: bool, **options: Any) -> None:
    """Convert SOURCE, a folder in MURA's layout, into WebDataset shards in OUT. Resumes.

    Both may be URLs (s3://bucket/folder; pip install '.[remote]' in the checkout). Started by torchrun or srun on several
    machines, the ranks share the work; the bytes are the same.
    """
    from mura_dist.data.shards.convert import convert
    from mura_dist.distributed.signals import as_interrupt

    with as_interrupt(), progress_bar("converting", quiet) as progress:
        index = convert(source, out, progress=progress, **options)
    if index is None:  # another rank's: the first one speaks
        return
    click.echo(_report_text(out))
    click.echo(f"{mask_url(str(out))}: {index['size']} px, {index['encoding']}; {mura.TERMS}")


def _report_text(out: Path | str) -> str:
    from mura_dist.core import files, storage
    from mura_dist.data.source import report

    try:
        return report.text(files.parse_json(storage.of(out).read("report.json")))
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError, IsADirectoryError) as error:
        raise Refusal(
            f"{out}/report.json is damaged ({type(error).__name__}); delete index.json, then the same command"
        ) from error


@click.command(short_help="Check shards to the bit.")
@click.argument("out", type=a_place)
@quiet_option
def verify(out: Path | str, quiet: bool) -> None:
    """Check shards: counts, digests, rows, readability; name each damaged sample."""
    from mura_dist.data.shards.reader import Shards
    from mura_dist.data.shards.verify import verify as problems_of

    problems = 0
    for problem in problems_of(out):
        problems += 1
        click.echo(problem)
    if problems:
        raise Failure(
            f"{out}: {problems} problems; delete the damaged shards' .json files and index.json, then convert again"
        )
    num = sum(part["num_radiographs"] for part in Shards.open(out).index["splits"].values())
    click.echo(f"{mask_url(str(out))}: {num} radiographs, all sound")


@click.command(short_help="Counts, sizes, exposure, defects, as a page.")
@click.argument("folder", metavar="SHARDS_OR_FOLDER", type=a_place)
@click.option("--out", type=a_path, default=Path("describe.html"), show_default=True, help="The page to write.")
@click.option(
    "--contact-sheet",
    is_flag=True,
    help="Also a page of small radiographs by study type and label, OUT-contact-sheet.html, LOCAL ONLY.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Which ones the contact sheet shows."
)
@shared_option
@quiet_option
def describe(folder: Path | str, out: Path, contact_sheet: bool, seed: int, shared: bool, quiet: bool) -> None:
    """Counts, sizes, exposure and defects of shards, or of a folder in MURA's layout, as a page, and as JSON beside it.

    The page holds no radiograph; the contact sheet does, and is made on request only. Without --shared both are
    their owner's alone.
    """
    from mura_dist.reports.dataset import contact_sheet_path, summary_text
    from mura_dist.reports.dataset import describe as page_of

    click.echo(summary_text(page_of(folder, out, with_contact_sheet=contact_sheet, seed=seed, shared=shared)))
    click.echo(f"page: {out}")
    click.echo(f"numbers: {out.with_suffix('.json')}")
    if contact_sheet:
        click.echo(f"contact sheet, LOCAL ONLY, it holds radiographs: {contact_sheet_path(out)}")
