"""The commands for exported models: export, predict, page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mura_dist.cli.options import (
    LOCAL_PATH,
    STORAGE_PATH,
    Choice,
    Command,
    echo_terms,
    progress_bar,
    quiet_option,
    shared_option,
)
from mura_dist.distributed import environment
from mura_dist.reports.plurals import pluralize

if TYPE_CHECKING:
    from mura_dist.inference.export.onnx import ExportReport


@click.command(
    cls=Command,
    terms=True,
    short_help="Export a checkpoint or an ensemble as one ONNX file.",
    examples=["mura-dist export runs/bones", "mura-dist export runs/bones --precision int8"],
)
@click.argument("path", metavar="RUN_OR_LIST", type=LOCAL_PATH)
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
    help="File to write.  [default: RUN/model.onnx, or RUN/model-int8.onnx; NAME.onnx for a list NAME.json]",
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    metavar="fp32|fp16|bf16|int8",
    help="Precision of the model: int8 for CPUs, fp16 for GPUs, bf16 for OpenVINO on processors that support it.",
)
@click.option(
    "--weight-bits",
    type=int,
    default=None,
    metavar="7|8",
    help="Bits of int8 weights. 8 changes predictions less, but such a file runs only on processors with VNNI or ARM's dot "
    "product, under Linux.  [default: 7]",
)
@click.option(
    "--shards",
    type=STORAGE_PATH,
    default=None,
    metavar="FOLDER",
    help="Folder or URL of the run's shards, if it has changed.  [default: as in the run]",
)
@click.option(
    "--allow-change",
    is_flag=True,
    help="Write fp16, bf16 or int8 even if it changes predictions more than the limits allow.",
)
@click.option(
    "--triton", type=LOCAL_PATH, default=None, metavar="DIR", help="Also write a model repository for NVIDIA Triton."
)
@quiet_option
def export(
    path: Path,
    which: str,
    out: Path | None,
    precision: str,
    weight_bits: int | None,
    shards: Path | str | None,
    allow_change: bool,
    triton: Path | None,
    quiet: bool,
) -> None:
    """Export a run's checkpoint, or an ensemble from a model list, as one self-describing ONNX file.

    The file takes `image` uint8 (N, 1, S, S) and returns `logit` (N,) and `activation_map` (N, h, w). Its metadata contains
    calibration, thresholds, metrics and terms.

    export compares the file with torch at batch sizes 1, 2, 7 and 64, on the run's own radiographs and on drawn images. It fails
    if a logit differs by more than 1e-4. DenseNet-169 at 320 px takes a minute on 2 cores, and 3 GB.

    Below fp32, export measures the change on the split that selected the model. It fails above 0.005 of a probability on average
    or 1 % of the calls (fp16: 0.001 and 0.5 %). int8 takes some minutes.

    With --triton, a stock Triton server loads DIR/mura_dist. Other models in DIR are not changed.
    """
    from rich.console import Console

    from mura_dist.inference.export.onnx import OPSET, ExportOptions, default_out, export_target
    from mura_dist.models.target import Target

    log = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True, markup=False).print
    target = Target.parse(path)
    out = out or default_out(target, precision)
    options = ExportOptions(precision, shards, allow_change, triton, weight_bits)
    with progress_bar("exporting", quiet) as progress:
        report = export_target(target, which=which, out=out, options=options, log=log, progress=progress)
    card = report.card
    click.echo(
        f"{out}: {report.num_bytes / 1e6:.1f} MB, operator set {OPSET}, {card.checkpoint}, {_describe_change(report)}"
    )
    for line in report.over:
        click.echo(f"warning: {line} (written because of --allow-change)")
    if triton is not None:
        click.echo(f"for Triton: tritonserver --model-repository={triton}")
    if card.thresholds and card.calibration.reason:
        click.echo(f"no calibrated probability: {card.calibration.reason}")
    if not card.thresholds:
        click.echo(
            f"no thresholds, so predictions will have no calls. Run `mura-dist evaluate {path} SHARDS`, then export again."
        )


def _describe_change(report: ExportReport) -> str:
    """Describe what export measured."""
    num, change = report.num_radiographs, report.change
    if change is None:
        images = (
            f"{num} radiographs and drawn images"
            if num
            else "drawn images only (the run's shards were not found; --shards FOLDER names them)"
        )
        return f"logits within {report.max_logit_difference:.2g} of torch's on {images}"
    return (
        f"{report.card.precision} changes the probability of {num} radiographs by {change.mean_probability:.4f} on average, "
        f"{change.max_probability:.4f} at most, and {change.num_changed_calls} of {change.num_studies} calls"
    )


@click.command(
    cls=Command,
    terms=True,
    short_help="Predict radiographs: files or a folder.",
    examples=[
        "mura-dist predict runs/bones/model.onnx data/bones/valid --out predictions",
        "mura-dist predict model.onnx left.dcm right.dcm --out both --study-type hand",
    ],
)
@click.argument("model", metavar="MODEL.onnx", type=LOCAL_PATH)
@click.argument("inputs", metavar="FILE_OR_FOLDER...", type=STORAGE_PATH, nargs=-1, required=True)
@click.option("--out", type=LOCAL_PATH, required=True, help="Output folder for predictions, studies and failures.")
@click.option(
    "--study-by",
    type=Choice(["auto", "folder", "file"]),
    default="auto",
    show_default=True,
    help="Definition of a study. folder: the files of one folder; file: each file; auto: MURA's folders and DICOM's "
    "identifiers, else each file.",
)
@click.option(
    "--study-type",
    default=None,
    metavar="TYPE|CSV",
    help="Study type of all radiographs, such as hand or XR_HAND, or a CSV of path,study_type.  [default: by path and DICOM]",
)
@click.option(
    "--overlays",
    is_flag=True,
    help="Also write OUT/overlays: a PNG of each radiograph with its class activation map. LOCAL ONLY: they contain "
    "radiographs, and any text that is burned into a PNG or JPEG.",
)
@click.option(
    "--allow-pixels",
    is_flag=True,
    help="Also write overlays of DICOMs whose pixels may show a name: BurnedInAnnotation, secondary captures.",
)
@click.option(
    "--pseudonyms",
    "keytable",
    type=LOCAL_PATH,
    default=None,
    metavar="KEYTABLE",
    help="Replace the names of files and studies in all output by pseudonyms. KEYTABLE, a CSV outside OUT, maps them back.",
)
@click.option(
    "--provider",
    default="cpu",
    show_default=True,
    help="Execution provider: cpu, cuda, tensorrt or openvino. cpu, cuda and openvino are extras, such as pip install "
    "'.[cpu]' in the checkout. tensorrt needs cuda and TensorRT 10.",
)
@click.option(
    "--format", type=Choice(["csv", "parquet"]), default="csv", show_default=True, help="Format of the tables."
)
@click.option(
    "--batch-size",
    type=int,
    default=None,
    help="Number of radiographs per batch.  [default: the result of --autotune, else by provider]",
)
@click.option(
    "--autotune",
    is_flag=True,
    help="First find the fastest configuration of this model on this machine (about a minute). Later commands use it too.",
)
@click.option(
    "--workers", type=int, default=None, help="Number of reading processes.  [default: by files and processors]"
)
@click.option(
    "--batch-limit",
    "batch_limit_s",
    type=float,
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Longest time to compute a batch, in seconds, before the command fails.",
)
@click.option("--strict", is_flag=True, help="Exit with status 1 after all tables are written if a file failed.")
@shared_option
@quiet_option
def predict(model: Path, inputs: tuple[Path | str, ...], out: Path, quiet: bool, **options: Any) -> None:
    """Predict radiographs: files, and all files in folders. The same command resumes.

    Each file appears in exactly one table, predictions or failures. Its path there is relative to the folder, if there is only
    one, else to the deepest common folder.

    MODEL.onnx may be a model list NAME.json if NAME.onnx in the same folder contains its members. Under torchrun or srun the
    ranks share the work and write the same bytes.
    """
    from rich.console import Console

    from mura_dist.inference.prediction_tables import predict_directory
    from mura_dist.reports import local_only

    log = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True, markup=False).print
    with progress_bar("predicting", quiet or not environment.is_first()) as progress:
        summary = predict_directory(inputs, model=model, out=out, log=log, progress=progress, **options).summary
    if summary is None:  # only rank 0 prints
        return
    click.echo(
        f"{out}: {pluralize(summary['num_radiographs'], 'radiograph')} of {pluralize(summary['num_studies'], 'study')}, "
        f"{_calls(summary)}, {pluralize(summary['num_failures'], 'failure')}, {summary['seconds']:.1f} s"
    )
    if throughput := summary.get("throughput"):  # absent if an earlier command computed everything
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


def _calls(summary: dict[str, Any]) -> str:
    """Describe the calls. A model of phantoms makes none, nor does a model without thresholds."""
    num_calls = summary["num_calls"]
    return f"{summary['num_positive']:,} of {num_calls:,} calls positive" if num_calls else "no calls"


@click.command(
    cls=Command,
    short_help="Serve a web page that predicts uploaded studies.",
    examples=["mura-dist page runs/bones/model.onnx --examples data/bones/valid"],
)
@click.argument("model", metavar="MODEL.onnx", type=LOCAL_PATH)
@click.option(
    "--address",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. The default is reachable from this machine only.",
)
@click.option("--port", type=int, default=8501, show_default=True, help="Port to listen on.")
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="Further host name under which browsers reach the page, such as a proxy's. May be repeated.",
)
@click.option(
    "--examples",
    type=LOCAL_PATH,
    default=None,
    metavar="FOLDER",
    help="Folder in MURA's layout with example studies for visitors to choose.",
)
def page(model: Path, **options: Any) -> None:
    """Serve a web page for an exported MODEL.onnx: upload a study, read the prediction. Ctrl-C stops it.

    Uploads stay in memory until their session ends. They are not written to disk and not sent anywhere. The page needs pip
    install '.[cpu,page]' in the checkout.
    """
    from mura_dist.inference.page.server import serve

    def announce(lines: list[str]) -> None:
        for line in lines:
            click.echo(line)
        echo_terms()  # at once: the command runs until it is stopped

    serve(model, announce=announce, **options)
