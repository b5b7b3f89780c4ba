"""The commands on an exported model: export, predict, page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mura_dist.cli.options import a_path, a_place, progress_bar, quiet_option, shared_option
from mura_dist.data import mura
from mura_dist.distributed import environment

if TYPE_CHECKING:
    from mura_dist.inference.export.onnx import ExportReport


@click.command(short_help="Write a checkpoint, or an ensemble, as one ONNX file.")
@click.argument("path", metavar="RUN_OR_LIST", type=a_path)
@click.option(
    "--checkpoint", "which", default="best", show_default=True, help="best (by tune loss), last or step-N; of a run."
)
@click.option(
    "--out",
    type=a_path,
    default=None,
    help="The file to write.  [default: RUN/model.onnx, RUN/model-int8.onnx; of a list NAME.json, NAME.onnx]",
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    metavar="fp32|fp16|bf16|int8",
    help="What it computes in. int8: for CPUs; fp16: for GPUs; bf16: for OpenVINO on processors that have it.",
)
@click.option(
    "--shards", type=a_place, default=None, help="Where the run's shards are now.  [default: where the run found them]"
)
@click.option(
    "--allow-change", is_flag=True, help="Write fp16, bf16 or int8 even where it changes more than its limits."
)
@click.option(
    "--triton", type=a_path, default=None, metavar="DIR", help="Also write a model repository for NVIDIA Triton."
)
@quiet_option
def export(
    path: Path,
    which: str,
    out: Path | None,
    precision: str,
    shards: Path | str | None,
    allow_change: bool,
    triton: Path | None,
    quiet: bool,
) -> None:
    """Write a run's checkpoint, or a model list's ensemble, as one self-describing ONNX file, if it agrees with torch.

    Input `image` uint8 (N, 1, S, S), outputs `logit` (N,) and `activation_map` (N, h, w); calibration, thresholds, metrics and
    terms are in its metadata. It is compared with torch at batch sizes 1, 2, 7 and 64, on the run's own radiographs and on drawn
    images; where a logit differs by more than 1e-4, nothing is written (DenseNet-169 at 320 px: a minute on 2 cores, 3 GB).
    Below fp32, what fewer bits change is measured against that on the split that chose the model, and refused above limits: 0.005
    of a probability on average and 1 % of the calls (fp16: 0.001 and 0.5 %). int8 takes some minutes.
    With --triton, DIR/mura_dist is what a stock Triton server loads; other models in DIR are left alone.
    """
    from rich.console import Console

    from mura_dist.inference.export.onnx import OPSET, ExportOptions, default_out, export_target
    from mura_dist.models.target import Target

    say = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True, markup=False).print
    target = Target.parse(path)
    out = out or default_out(target, precision)
    options = ExportOptions(precision, shards, allow_change, triton)
    with progress_bar("exporting", quiet) as progress:
        report = export_target(target, which=which, out=out, options=options, say=say, progress=progress)
    card = report.card
    click.echo(
        f"{out}: {report.num_bytes / 1e6:.1f} MB, operator set {OPSET}, {card.checkpoint}, "
        f"{_measured(report)}; {mura.TERMS}"
    )
    for line in report.over:
        click.echo(f"warning: {line}; written because of --allow-change")
    if triton is not None:
        click.echo(f"for Triton: tritonserver --model-repository={triton}")
    if card.thresholds and card.calibration.reason:
        click.echo(f"no calibrated probability: {card.calibration.reason}")
    if not card.thresholds:
        click.echo(
            f"no threshold: predictions will have no call; first run `mura-dist evaluate {path} SHARDS`, then export again"
        )


def _measured(report: ExportReport) -> str:
    """What export measured, in words."""
    num, change = report.num_radiographs, report.change
    if change is None:
        what = (
            f"{num} radiographs and drawn images"
            if num
            else "drawn images alone (the run's shards are not where they were; --shards says where)"
        )
        return f"logits within {report.max_logit_difference:.2g} of torch's on {what}"
    return (
        f"{report.card.precision} changes the probability of {num} radiographs by {change.mean_probability:.4f} on average, "
        f"{change.max_probability:.4f} at most, and {change.num_changed_calls} of {change.num_studies} calls"
    )


@click.command(short_help="Predict a directory of radiographs.")
@click.argument("model", metavar="MODEL.onnx", type=a_path)
@click.argument("directory", type=a_path)
@click.option("--out", type=a_path, required=True, help="Folder for predictions, studies and failures.")
@click.option("--study-by", default="auto", show_default=True, help="auto, folder or file: what makes a study.")
@click.option(
    "--study-type",
    default=None,
    help="A study type for all, or a CSV of path,study_type.  [default: as paths and DICOM tell]",
)
@click.option(
    "--overlays",
    is_flag=True,
    help="Also a PNG of each radiograph and its class activation map, into OUT/overlays. LOCAL ONLY: they hold radiographs, "
    "and what text is burned into a PNG or JPEG shows.",
)
@click.option(
    "--allow-pixels",
    is_flag=True,
    help="Overlays of DICOMs too whose pixels may show a name: BurnedInAnnotation, secondary captures.",
)
@click.option(
    "--pseudonyms",
    "keytable",
    type=a_path,
    default=None,
    metavar="KEYTABLE",
    help="Files and studies go by pseudonyms in all that is written and said; KEYTABLE, a CSV outside OUT, leads back.",
)
@click.option(
    "--provider",
    default="cpu",
    show_default=True,
    help="What computes: cpu, cuda, tensorrt or openvino. Each but tensorrt is an extra: pip install '.[cpu]' in the checkout; "
    "tensorrt needs cuda and TensorRT 10.",
)
@click.option("--format", default="csv", show_default=True, help="csv or parquet.")
@click.option(
    "--batch-size", type=int, default=None, help="Radiographs at once.  [default: as --autotune found, or by provider]"
)
@click.option(
    "--autotune",
    is_flag=True,
    help="First measure what runs this model fastest on this machine, and keep it for later commands: about a minute.",
)
@click.option("--workers", type=int, default=None, help="Processes that read.  [default: by files and processors]")
@click.option(
    "--batch-limit",
    "batch_limit_s",
    type=float,
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="What computing one batch may take; a model that never answers ends the command.",
)
@click.option("--strict", is_flag=True, help="Any failure is an error, once all tables are written.")
@shared_option
@quiet_option
def predict(model: Path, directory: Path, out: Path, quiet: bool, **options: Any) -> None:
    """Predict every radiograph below DIRECTORY. Resumes; every file ends in exactly one table.

    Given a model list NAME.json, it takes NAME.onnx beside it, if that holds the members listed. Started by torchrun or srun,
    the ranks share the work; the bytes are the same.
    """
    from rich.console import Console

    from mura_dist.inference.predict import PredictOptions
    from mura_dist.inference.predict import predict as run
    from mura_dist.reports import local_only

    say = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True, markup=False).print
    with progress_bar("predicting", quiet or not environment.is_first()) as progress:
        summary = run(model, directory, out, PredictOptions(**options), say=say, progress=progress)
    if summary is None:  # another rank's: the first one speaks
        return
    click.echo(
        f"{out}: {summary['num_radiographs']} radiographs of {summary['num_studies']} studies, "
        f"{_calls(summary)}, {summary['num_failures']} failures, {summary['seconds']:.1f} s"
    )
    if throughput := summary.get("throughput"):  # not where an earlier command had computed everything
        decoding, computing = throughput["decoding"], throughput["computing"]
        click.echo(
            f"limited by {throughput['limited_by']}: {decoding['files_per_s']:.1f} files/s decoded by "
            f"{decoding['num_processes']} processes, {computing['radiographs_per_s']:.1f} radiographs/s computed"
        )
    if summary["num_overlays"]:
        click.echo(
            f"overlays ({local_only.MARK}): {summary['num_overlays']}, {summary['num_overlays_withheld']} withheld"
        )
    for note, number in summary.get("radiographs_by_note", {}).items():
        click.echo(f"note: {note} in {number} of {summary['num_radiographs']} radiographs")
    for warning in summary["warnings"]:
        click.echo(f"warning: {warning}")
    click.echo(mura.TERMS)


def _calls(summary: dict[str, Any]) -> str:
    """Say how many calls are positive. A model of drawings makes none, and one without thresholds neither."""
    num_calls = summary["num_calls"]
    return f"{summary['num_positive']} of {num_calls} calls positive" if num_calls else "no calls"


@click.command
@click.argument("model", type=a_path)
@click.option(
    "--address", default="127.0.0.1", show_default=True, help="Where to listen; the default is this machine alone."
)
@click.option("--port", type=int, default=8501, show_default=True, help="Where to listen.")
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="A further name by which browsers reach the page, such as a proxy's. May be given several times.",
)
@click.option(
    "--examples",
    type=a_path,
    default=None,
    metavar="FOLDER",
    help="A folder in MURA's layout: some of its studies may be chosen instead of uploading one.",
)
def page(model: Path, **options: Any) -> None:
    """Serve the web page on an exported MODEL.onnx: upload a study, see the answer. Ctrl-C ends it.

    Nothing uploaded is written to a disk or kept after its session; nothing is sent anywhere. Needs pip install
    '.[cpu,page]' in the checkout.
    """
    from mura_dist.inference.page.server import serve

    click.echo(mura.TERMS)
    serve(model, say=lambda line: click.echo(line), **options)
