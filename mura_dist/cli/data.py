"""The data commands: phantoms, shards, verify, describe."""

from pathlib import Path
from typing import Any

import click

from mura_dist.cli.options import LOCAL_PATH, STORAGE_PATH, Choice, Command, progress_bar, quiet_option, shared_option
from mura_dist.core.errors import RunError, UserError, mask_url


@click.command(
    cls=Command,
    short_help="Draw bone phantoms in MURA's layout.",
    examples=["mura-dist phantoms data/bones --studies 100 --size 256"],
)
@click.argument("out", type=LOCAL_PATH)
@click.option(
    "--studies",
    type=int,
    default=400,
    show_default=True,
    help="Number of studies over all splits; each split has both labels.",
)
@click.option("--size", type=int, default=512, show_default=True, help="Longest side of the largest image, in pixels.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed. The same seed gives the same bytes.")
@quiet_option
def phantoms(out: Path, studies: int, size: int, seed: int, quiet: bool) -> None:
    """Draw bone phantoms into OUT, a new folder in MURA's layout. Some have fractures."""
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
@click.argument("source", type=STORAGE_PATH)
@click.argument("out", type=STORAGE_PATH)
@click.option(
    "--size", type=int, default=320, show_default=True, help="Width and height in pixels. The aspect ratio changes."
)
@click.option(
    "--encoding", type=Choice(["raw", "png", "jpeg"]), default="raw", show_default=True, help="Encoding of the pixels."
)
@click.option("--workers", type=int, default=None, help="Number of reading processes.  [default: one per processor]")
@click.option(
    "--tune", type=float, default=0.1, show_default=True, help="Share of the train patients to move to the tune split."
)
@click.option("--labels", type=LOCAL_PATH, default=None, help="CSV of study,label lines that override labels.")
@click.option("--strict", is_flag=True, help="Fail on any defect of SOURCE and any unreadable file.")
@click.option(
    "--duplicates",
    type=Choice(["keep", "drop-train", "group"]),
    default="keep",
    show_default=True,
    help="Handling of byte-identical radiographs. keep: keep them; drop-train: drop from train those that are also in valid or "
    "test; group: keep train patients who share one together when the tune split is cut.",
)
@quiet_option
def shards(source: Path | str, out: Path | str, quiet: bool, **options: Any) -> None:
    """Convert SOURCE, a folder in MURA's layout, to WebDataset shards in OUT. The same command resumes.

    Both may be URLs (s3://bucket/folder). These need pip install '.[remote]' in the checkout. Under torchrun or srun the ranks
    share the conversion and write the same bytes.
    """
    from mura_dist.data.shards.convert import convert
    from mura_dist.distributed.signals import sigterm_as_interrupt

    with sigterm_as_interrupt(), progress_bar("converting", quiet) as progress:
        index = convert(source, out, progress=progress, **options)
    if index is None:  # only rank 0 prints
        return
    click.echo(_format_report(out))
    click.echo(f"{mask_url(str(out))}: {index['size']} px, {index['encoding']}")


def _format_report(out: Path | str) -> str:
    from mura_dist.core import files, storage
    from mura_dist.data.source import report

    try:
        return report.text(files.parse_json(storage.open_storage(out).read("report.json")))
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError, IsADirectoryError) as error:
        raise UserError(
            f"{out}/report.json is invalid ({type(error).__name__}). Delete index.json and run the same command again."
        ) from error


@click.command(cls=Command, short_help="Check shards bit by bit.", examples=["mura-dist verify shards/bones"])
@click.argument("out", type=STORAGE_PATH)
@quiet_option
def verify(out: Path | str, quiet: bool) -> None:
    """Check the shards in OUT bit by bit: counts, digests, rows, readability. Print each corrupt sample."""
    from mura_dist.data.shards.reader import Shards
    from mura_dist.data.shards.verify import verify as problems_of

    problems = 0
    for problem in problems_of(out):
        problems += 1
        click.echo(problem)
    if problems:
        raise RunError(
            f"{out}: {problems} problems. Delete the .json files of these shards and index.json, then convert again."
        )
    num = sum(split["num_radiographs"] for split in Shards.open(out).index["splits"].values())
    click.echo(f"{mask_url(str(out))}: {num} radiographs, all valid")


@click.command(
    cls=Command,
    short_help="Summarize a data set as an HTML page.",
    examples=["mura-dist describe shards/bones", "mura-dist describe data/bones --out bones.html --contact-sheet"],
)
@click.argument("folder", metavar="SHARDS_OR_FOLDER", type=STORAGE_PATH)
@click.option(
    "--out",
    type=LOCAL_PATH,
    default=Path("describe.html"),
    show_default=True,
    help="HTML page to write. The numbers go into a JSON file of the same name.",
)
@click.option(
    "--contact-sheet",
    is_flag=True,
    help="Also write OUT-contact-sheet.html: small radiographs by study type and label. LOCAL ONLY.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Seed for the choice of radiographs in the contact sheet.",
)
@shared_option
@quiet_option
def describe(folder: Path | str, out: Path, contact_sheet: bool, seed: int, shared: bool, quiet: bool) -> None:
    """Summarize shards, or a folder in MURA's layout, as an HTML page: counts, sizes, exposure, defects.

    The page contains no radiograph. The contact sheet does; it is only written with --contact-sheet.
    """
    from mura_dist.reports.dataset import contact_sheet_path, summary_text
    from mura_dist.reports.dataset import describe as page_of

    click.echo(summary_text(page_of(folder, out, with_contact_sheet=contact_sheet, seed=seed, shared=shared)))
    click.echo(f"page: {out}")
    click.echo(f"numbers: {out.with_suffix('.json')}")
    if contact_sheet:
        click.echo(f"contact sheet (LOCAL ONLY, contains radiographs): {contact_sheet_path(out)}")
