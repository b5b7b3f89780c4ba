"""The evaluation commands: evaluate, score."""

import json
from pathlib import Path
from typing import Any

import click

from mura_dist.cli.options import LOCAL_PATH, STORAGE_PATH, Command, progress_bar, quiet_option, shared_option
from mura_dist.core.errors import UserError, nearest
from mura_dist.data import mura
from mura_dist.distributed import environment


@click.command(
    cls=Command,
    terms=True,
    short_help="Evaluate a run, an ensemble or an exported model on a split.",
    examples=[
        "mura-dist evaluate runs/bones shards/bones",
        "mura-dist evaluate runs/bones/model.onnx shards/bones --out runs/bones-onnx",
    ],
)
@click.argument("path", metavar="RUN_OR_LIST_OR_ONNX", type=LOCAL_PATH)
@click.argument("shards", type=STORAGE_PATH)
@click.option("--split", default="valid", show_default=True, help="Split to evaluate: train, tune or valid.")
@click.option(
    "--checkpoint",
    "which",
    default="best",
    show_default=True,
    help="Checkpoint of a run: best (lowest tune loss), last or step-N.",
)
@click.option(
    "--out",
    type=LOCAL_PATH,
    default=None,
    help="Output folder.  [default: the run; NAME for a list NAME.json; required for an ONNX file]",
)
@click.option(
    "--operating-point",
    "operating_point",
    default=None,
    metavar="paper|sensitivity=W|specificity=W",
    help="Thresholds of the calls: 0.5 as in the MURA paper, or fitted on tune for W of 0.8, 0.9, 0.95 or 0.98.  [default: "
    "paper; for an ONNX file its own]",
)
@click.option(
    "--prevalence",
    type=float,
    default=None,
    metavar="P",
    help="Share of abnormal studies for PPV and NPV.  [default: the split's]",
)
@click.option(
    "--gallery/--no-gallery",
    "with_gallery",
    default=True,
    show_default=True,
    help="Also write gallery.html and gallery/: radiographs with class activation maps. LOCAL ONLY.",
)
@click.option(
    "--provider",
    default="cpu",
    show_default=True,
    help="Execution provider of an ONNX file: cpu, cuda, tensorrt or openvino.",
)
@shared_option
@quiet_option
def evaluate(
    path: Path,
    shards: Path | str,
    split: str,
    which: str,
    out: Path | None,
    operating_point: str | None,
    prevalence: float | None,
    with_gallery: bool,
    shared: bool,
    provider: str,
    quiet: bool,
) -> None:
    """Evaluate a run's checkpoint, an ensemble from a model list, or an exported model on a split.

    For a run or a list, calibration, thresholds and the uncertain band are also fitted on the tune split. export writes them
    into the model. metrics.json, report.html and the tables contain no radiograph. gallery.html, gallery/ and gallery.json do.
    They are LOCAL ONLY.
    """
    from rich.console import Console

    from mura_dist.evaluation.subject import EvaluateOptions, GalleryOptions
    from mura_dist.metrics.operating_points import parse_operating_point as named
    from mura_dist.metrics.summary import format_summary_table
    from mura_dist.models.target import Target

    target = Target.parse(path)
    if split not in mura.SPLITS:
        raise UserError(f"--split {split!r}{nearest(split, mura.SPLITS)}: must be train, tune or valid.")
    if prevalence is not None and not 0 < prevalence < 1:
        raise UserError(f"--prevalence {prevalence:g}: must be between 0 and 1. Omit it to use the split's own.")
    if provider != "cpu" and target.kind != "onnx":
        raise UserError(
            f"--provider {provider}: only ONNX files have providers, and {path} is not one. Omit --provider."
        )
    point = named(operating_point) if operating_point is not None else None
    if out is None and target.kind == "onnx":
        raise UserError(f"{path} is an ONNX file, so --out is required. Give --out DIR for the report.")
    target.check_checkpoint(which)
    out = out or target.report_folder
    log = Console(stderr=True, quiet=quiet or not environment.is_first()).print
    options = EvaluateOptions(out, split, point, prevalence, GalleryOptions() if with_gallery else None, shared)
    with progress_bar("evaluating", quiet or not environment.is_first()) as progress:
        if target.kind == "onnx":
            from mura_dist.evaluation.exported import evaluate_onnx

            measured = evaluate_onnx(target, shards, options, provider=provider, log=log, progress=progress)
        else:
            from mura_dist.evaluation.evaluate import evaluate_target

            measured = evaluate_target(target, shards, options, which=which, log=log, progress=progress)
    if environment.is_first():
        click.echo(format_summary_table(measured))
        if measured["num_damaged"]:
            click.echo(f"{measured['num_damaged']} radiographs of {split} are not included: their samples are corrupt")
        click.echo(f"report: {out / 'report.html'}")
        if with_gallery:
            click.echo(f"gallery (LOCAL ONLY, contains radiographs): {out / 'gallery.html'}")


@click.command(
    cls=Command,
    terms=True,
    short_help="Score a file of predictions against labels.",
    examples=[
        "mura-dist score runs/bones/predictions-official.csv labels.csv",
        "mura-dist score predictions/studies.csv labels.csv --json",
    ],
)
@click.argument("predictions", metavar="PREDICTIONS", type=LOCAL_PATH)
@click.argument("labels", metavar="LABELS", type=LOCAL_PATH)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print only metrics.json on stdout, and write a report only with --out.",
)
@click.option(
    "--out",
    type=LOCAL_PATH,
    default=None,
    metavar="DIR",
    help="Output folder.  [default: NAME-score next to PREDICTIONS NAME.csv; none with --json]",
)
@click.option(
    "--against", type=LOCAL_PATH, default=None, metavar="B.csv", help="Second file of predictions, to compare with."
)
@click.option(
    "--threshold",
    type=float,
    default=None,
    metavar="T",
    help="Probability above which a study is abnormal.  [default: the calls in the file, else 0.5]",
)
@click.option(
    "--prevalence",
    type=float,
    default=None,
    metavar="P",
    help="Share of abnormal studies for PPV and NPV.  [default: the studies' own]",
)
@click.option(
    "--allow-inverted", is_flag=True, help="Score predictions even if they are significantly worse than chance."
)
@quiet_option
def score(
    predictions: Path, labels: Path, as_json: bool, out: Path | None, against: Path | None, quiet: bool, **options: Any
) -> None:
    """Score PREDICTIONS, one line per study, against LABELS of the same studies. No model is needed.

    PREDICTIONS: lines `path/,1` without a header (MURA's official format; a probability may replace 0 or 1), or a table with
    the columns study and probability, call or prediction, such as studies.csv of predict or evaluate. LABELS: `Study,Label`,
    `Study,Rad1,Rad2,Rad3` (majority vote), MURA's valid_labeled_studies.csv, or study,label[,patient][,study_type] with a header.
    A missing, unknown or repeated study is an error, and so is a line per image.

    score writes metrics.json, report.html, report.json, pictures/ and studies.csv.
    """
    from rich.console import Console

    from mura_dist.evaluation.score import default_report_folder, evaluate_predictions, format_comparison
    from mura_dist.metrics.summary import format_summary_table

    log = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True, markup=False).print
    out = out or (None if as_json else default_report_folder(predictions))
    measured = evaluate_predictions(predictions, labels, against=against, out=out, log=log, **options)
    if as_json:
        click.echo(json.dumps(measured, indent=2, ensure_ascii=False, allow_nan=False))
        return
    click.echo(format_summary_table(measured))
    if against is not None:
        click.echo(format_comparison(measured["comparison"], predictions.name, against.name))
    if measured["note"]:
        click.echo(f"note: {measured['note']}")
    click.echo(f"report: {out}/report.html")
