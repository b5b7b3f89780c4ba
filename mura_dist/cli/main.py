"""`mura-dist` and its subcommands: parse, call one function, print a short summary. Nothing is decided here.

Exit status: 0 done; 1 the work failed; 2 the request was wrong; 3 stopped on request, the same command goes on. Progress goes
to stderr, results to files, the summary to stdout.
"""

import contextlib
import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import click

from mura_dist import __version__
from mura_dist.core.errors import CommonFailure, Failure, OwnRefusal, Refusal, Stopped, nearest
from mura_dist.data import mura
from mura_dist.distributed import environment

DONE, FAILED, WRONG, STOPPED = 0, 1, 2, 3
_EXTRAS = dict.fromkeys(
    (
        "torch",
        "torchvision",
        "deepspeed",
        "nvidia",
        "cv2",
        "onnx",
        "onnxscript",
        "safetensors",
        "matplotlib",
        "webdataset",
    ),
    "train",
) | {"fsspec": "remote", "s3fs": "remote", "streamlit": "page", "starlette": "page"}


class Commands(click.Group):
    """A group that answers a mistyped command with the nearest one."""

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        command = super().get_command(context, name)
        if command is None:
            names = self.list_commands(context)
            raise Refusal(f"no command {name!r}{nearest(name, names)}; there are {', '.join(names)}")
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mura-dist")
def cli() -> None:
    """From a folder of bone radiographs to a trained, honestly measured, deployable model.

    Research only, not a medical device; a disclaimer does not make clinical use lawful.
    """


class Place(click.ParamType):
    """A folder of this machine (a Path), or a URL (a str), which a Path would mangle."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        return value if "://" in str(value) else Path(value)


quiet_option = click.option("--quiet", is_flag=True, help="No progress on stderr.")
a_path = click.Path(path_type=Path)
a_place = Place()


@contextlib.contextmanager
def progress_bar(what: str, quiet: bool) -> Iterator[Callable[[int, int | None], None]]:
    """A callable (done, total; None: not known yet) that moves a bar on a terminal, and is silent elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, quiet=quiet)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@cli.command(short_help="Draw bones in MURA's layout, some broken.")
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


@cli.command(short_help="Convert a folder in MURA's layout to shards.")
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
@quiet_option
def shards(source: Path | str, out: Path | str, quiet: bool, **options: Any) -> None:
    """Convert SOURCE, a folder in MURA's layout, into WebDataset shards in OUT. Resumes.

    Both may be URLs (s3://bucket/folder; pip install 'mura-dist[remote]'). Started by torchrun or srun on several machines, the
    ranks share the work; the bytes are the same.
    """
    from mura_dist.core import storage
    from mura_dist.data.shards.convert import convert
    from mura_dist.data.source import report
    from mura_dist.distributed.signals import as_interrupt

    with as_interrupt(), progress_bar("converting", quiet) as progress:
        index = convert(source, out, progress=progress, **options)
    if index is None:  # another rank's: the first one speaks
        return
    click.echo(report.text(json.loads(storage.of(out).read("report.json"))))
    click.echo(f"{out}: {index['size']} px, {index['encoding']}; {mura.TERMS}")


@cli.command(short_help="Check shards to the bit.")
@click.argument("out", type=a_place)
@quiet_option
def verify(out: Path | str, quiet: bool) -> None:
    """Check shards: counts, digests, rows, readability; name each damaged sample."""
    from mura_dist.data.shards.reader import Shards
    from mura_dist.data.shards.reader import verify as problems_of

    problems = 0
    for problem in problems_of(out):
        problems += 1
        click.echo(problem)
    if problems:
        raise Failure(
            f"{out}: {problems} problems; delete the damaged shards' .json files and index.json, then convert again"
        )
    num = sum(part["num_radiographs"] for part in Shards.open(out).index["splits"].values())
    click.echo(f"{out}: {num} radiographs, all sound")


@cli.command(short_help="Counts, sizes, exposure, defects, as a page.")
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
@quiet_option
def describe(folder: Path | str, out: Path, contact_sheet: bool, seed: int, quiet: bool) -> None:
    """Counts, sizes, exposure and defects of shards, or of a folder in MURA's layout, as a page, and as JSON beside it.

    The page holds no radiograph; the contact sheet does, and is made on request only.
    """
    from mura_dist.reports.dataset import contact_sheet_path, summary_text
    from mura_dist.reports.dataset import describe as page_of

    click.echo(summary_text(page_of(folder, out, with_contact_sheet=contact_sheet, seed=seed)))
    click.echo(f"page: {out}")
    click.echo(f"numbers: {out.with_suffix('.json')}")
    if contact_sheet:
        click.echo(f"contact sheet, LOCAL ONLY, it holds radiographs: {contact_sheet_path(out)}")


class WithSettings(click.Command):
    """A command whose help ends with all settings; read then only: every worker process imports this file."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        from mura_dist.core import config

        formatter.write(f"\nSettings, in the recipe and as key=value alike:\n{config.help_text()}\n")


@cli.command(cls=WithSettings, short_help="Train a run, or go on with it.")
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


@cli.command(short_help="Choose the best checkpoints of runs as one model.")
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


@cli.command(short_help="Measure a run, an ensemble or an exported model on a split.")
@click.argument("target", metavar="RUN_OR_LIST_OR_ONNX", type=a_path)
@click.argument("shards", type=a_place)
@click.option("--split", default="valid", show_default=True, help="train, tune or valid.")
@click.option(
    "--checkpoint", "which", default="best", show_default=True, help="best (by tune loss), last or step-N; of a run."
)
@click.option(
    "--out",
    type=a_path,
    default=None,
    help="Where to write.  [default: the run; of a list NAME.json, NAME; of an ONNX file it must be given]",
)
@click.option(
    "--operating-point",
    "operating_point",
    default=None,
    metavar="paper|sensitivity=W|specificity=W",
    help="Whose thresholds make the calls: the paper's 0.5, or those fitted on tune for W of 0.8, 0.9, 0.95 or 0.98.  "
    "[default: paper; of an ONNX file, its own]",
)
@click.option(
    "--prevalence", type=float, default=None, metavar="P", help="Share of abnormal studies to work PPV and NPV out for."
)
@click.option(
    "--gallery/--no-gallery",
    "with_gallery",
    default=True,
    show_default=True,
    help="Also pictures of radiographs with class activation maps: gallery.html, gallery/, LOCAL ONLY.",
)
@click.option(
    "--second",
    type=a_path,
    default=None,
    metavar="RUN_OR_LIST_OR_ONNX",
    help="A model trained separately: the gallery says how far the two models' maps agree.",
)
@click.option(
    "--provider", default="cpu", show_default=True, help="What computes an ONNX file: cpu, cuda, tensorrt or openvino."
)
@quiet_option
def evaluate(
    target: Path,
    shards: Path | str,
    split: str,
    which: str,
    out: Path | None,
    operating_point: str | None,
    prevalence: float | None,
    with_gallery: bool,
    second: Path | None,
    provider: str,
    quiet: bool,
) -> None:
    """Measure a run's checkpoint, a model list's ensemble, or an exported model, on a split.

    Of a run or a list, calibration, thresholds and the uncertain band are fitted on the tune split, which is scored too;
    export puts them into the model. Writes metrics.json, report.html and tables,
    none of which holds a radiograph; and gallery.html, gallery/ and gallery.json, which are LOCAL ONLY.
    """
    from rich.console import Console

    from mura_dist.evaluation import evaluate as room
    from mura_dist.metrics.operating_points import operating_point as named
    from mura_dist.metrics.summary import summary_table
    from mura_dist.models.model_list import is_list, report_folder

    if split not in mura.SPLITS:
        raise Refusal(f"--split {split!r}{nearest(split, mura.SPLITS)}: must be train, tune or valid")
    if prevalence is not None and not 0 < prevalence < 1:
        raise Refusal(f"--prevalence {prevalence:g}: must lie between 0 and 1; leave it out for this split's own")
    if provider != "cpu" and (is_list(target) or not target.is_file()):
        raise Refusal(f"--provider {provider}: {target} is no ONNX file, torch computes it; leave --provider out")
    say = Console(stderr=True, quiet=quiet or not environment.is_first()).print
    point = named(operating_point) if operating_point is not None else None
    asked = room.Asked(point, prevalence, _gallery(target, with_gallery, second))
    if is_list(target):
        _check_which(which, f"{target} is a list of chosen checkpoints")
        out = out or report_folder(target)
        measured = room.evaluate_list(target, shards, split=split, out=out, asked=asked, say=say)
    elif target.is_file():
        if out is None:
            raise Refusal(f"{target} is a file, so --out is needed; give --out DIR for the report")
        _check_which(which, f"{target} is one exported checkpoint")
        measured = _evaluate_onnx(target, shards, split, out, asked, say, provider)
    else:
        measured = room.evaluate_run(target, shards, split=split, which=which, out=out, asked=asked, say=say)
    if environment.is_first():
        click.echo(summary_table(measured))
        click.echo(f"report: {(out or target) / 'report.html'}")
        if asked.gallery is not None:
            click.echo(f"gallery, LOCAL ONLY, it holds radiographs: {(out or target) / 'gallery.html'}")


@cli.command(short_help="Score a file of predictions against labels.")
@click.argument("predictions", metavar="PREDICTIONS", type=a_path)
@click.argument("labels", metavar="LABELS", type=a_path)
@click.option(
    "--json", "as_json", is_flag=True, help="metrics.json on stdout, and nothing else; no report unless --out."
)
@click.option(
    "--out",
    type=a_path,
    default=None,
    metavar="DIR",
    help="Where to write.  [default: of PREDICTIONS NAME.csv, NAME-score beside it; with --json, nowhere]",
)
@click.option(
    "--against", type=a_path, default=None, metavar="B.csv", help="A second file of predictions, to compare with."
)
@click.option(
    "--threshold",
    type=float,
    default=None,
    metavar="T",
    help="Call abnormal what is above T.  [default: the calls in the file, else 0.5]",
)
@click.option(
    "--prevalence",
    type=float,
    default=None,
    metavar="P",
    help="Also predictive values where a share P of studies is abnormal.",
)
@click.option("--allow-inverted", is_flag=True, help="Score calls that are surely worse than chance.")
@quiet_option
def score(
    predictions: Path, labels: Path, as_json: bool, out: Path | None, against: Path | None, quiet: bool, **options: Any
) -> None:
    """Score PREDICTIONS, a line a study, against LABELS of the same studies. No model is needed.

    PREDICTIONS: `path/,1` without a header (the official format; a probability may stand in place of 0 or 1), or a table with
    a header: study and probability, call or prediction, such as studies.csv of predict or evaluate. LABELS: `Study,Label`,
    `Study,Rad1,Rad2,Rad3` (the majority counts), MURA's own valid_labeled_studies.csv, or
    study,label[,patient][,study_type] with a header. A study missing, unknown, or there twice is refused, and so is a line an
    image.

    Writes metrics.json, report.html, report.json, pictures/ and studies.csv.
    """
    from rich.console import Console

    from mura_dist.evaluation import score as room
    from mura_dist.metrics.summary import summary_table

    say = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True, markup=False).print
    out = out or (None if as_json else room.default_folder(predictions))
    measured = room.score(predictions, labels, against=against, out=out, say=say, **options)
    if as_json:
        click.echo(json.dumps(measured, indent=2, ensure_ascii=False, allow_nan=False))
        return
    click.echo(summary_table(measured))
    if against is not None:
        click.echo(room.summary_text(measured["comparison"], predictions.name, against.name))
    if measured["note"]:
        click.echo(f"note: {measured['note']}")
    click.echo(f"report: {out}/report.html")


def _check_which(which: str, why: str) -> None:
    if which != "best":
        raise Refusal(f"--checkpoint {which}: {why}; leave --checkpoint out, or give the run")


def _gallery(target: Path, with_gallery: bool, second: Path | None) -> Any:
    """gallery.Wanted, or None."""
    from mura_dist.evaluation import gallery, saliency
    from mura_dist.models.model_list import is_list
    from mura_dist.training.weights import Weights

    if second is None:
        return gallery.Wanted() if with_gallery else None
    if not with_gallery:
        raise Refusal(f"--second {second}: its maps are compared in the gallery; leave out --no-gallery or --second")
    if second.resolve() == target.resolve():
        raise Refusal(
            f"--second {second} is the model itself; give one that was trained separately, with another seed="
        )
    if second.is_file() and not is_list(second):
        from mura_dist.inference.onnx_model import Model

        return gallery.Wanted(_with_maps(second, Model.load(second)))
    weights = Weights.of_list(second) if is_list(second) else Weights.of_run(second, "best")
    return gallery.Wanted(saliency.Model.of_weights(weights, weights.model()))


def _with_maps(path: Path, model: Any) -> Any:
    """maps.Model of the predict.Model of an ONNX file."""
    from mura_dist.evaluation import saliency

    card = model.card
    named = [member.architecture for member in card.members] or [card.recipe.get("architecture")]
    known = tuple(name for name in named if isinstance(name, str))
    told = [member.sha256 for member in card.members] or card.metrics.get("weights_sha256") or []
    name = f"{path.name} {card.checkpoint}"
    return saliency.Model(name, model.outputs, model.size, card.trained_on.kind, known, weights=frozenset(told))


def _evaluate_onnx(
    target: Path, folder: Path | str, split: str, out: Path, asked: Any, say: Any, provider: str
) -> dict[str, Any]:
    from mura_dist.data.shards.reader import Shards
    from mura_dist.evaluation import evaluate as room
    from mura_dist.inference.onnx_model import Model

    opened, model = Shards.open(folder), Model.load(target, provider)
    if opened.size != model.size:
        raise Refusal(
            f"{folder} has radiographs of {opened.size} px, {target} wants {model.size}; convert with --size {model.size}"
        )
    facts = {
        "title": f"{target.name} on {split}",
        "checkpoint": model.card.checkpoint,
        "members": [member.model_dump() for member in model.card.members],
        "selected_on": model.card.selected_on,
        "trained_on": model.card.trained_on.kind,
        "settings": model.card.recipe,
    }
    return room.evaluate_scores(
        model.logits,
        opened,
        split=split,
        out=out,
        facts=facts,
        points=model.card.calibration,
        asked=replace(asked, operating_point=asked.operating_point or model.card.operating_point),
        shown=_with_maps(target, model),
        say=say,
    )


@cli.command(short_help="Write a checkpoint, or an ensemble, as one ONNX file.")
@click.argument("target", metavar="RUN_OR_LIST", type=a_path)
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
    target: Path,
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

    from mura_dist.inference.export.onnx import Asked, default_out, export_list, export_run
    from mura_dist.models.model_list import exported, is_list

    say = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True, markup=False).print
    asked = Asked(precision, shards, allow_change, triton)
    if is_list(target):
        _check_which(which, f"{target} is a list of chosen checkpoints")
        out = out or default_out(exported(target), precision)
        facts = export_list(target, out=out, asked=asked, say=say)
    else:
        out = out or default_out(target / "model.onnx", precision)
        facts = export_run(target, which=which, out=out, asked=asked, say=say)
    click.echo(
        f"{out}: {facts['bytes'] / 1e6:.1f} MB, operator set {facts['opset']}, {facts['checkpoint']}, "
        f"{_compared(facts, precision)}; {mura.TERMS}"
    )
    for line in facts.get("over", ()):
        click.echo(f"warning: {line}; written because of --allow-change")
    if triton is not None:
        click.echo(f"for Triton: tritonserver --model-repository={triton}")
    if facts["num_thresholds"] and facts["no_calibration"]:
        click.echo(f"no calibrated probability: {facts['no_calibration']}")
    if not facts["num_thresholds"]:
        click.echo(
            f"no threshold: predictions will have no call; first run `mura-dist evaluate {target} SHARDS`, then export again"
        )


def _compared(facts: dict[str, Any], precision: str) -> str:
    """What export measured, in words."""
    num = facts["num_radiographs"]
    if precision == "fp32":
        what = (
            f"{num} radiographs and drawn images"
            if num
            else "drawn images alone (the run's shards are not where they were; --shards says where)"
        )
        return f"logits within {facts['max_logit_difference']:.2g} of torch's on {what}"
    change = facts["change"]
    return (
        f"{precision} changes the probability of {num} radiographs by {change['mean_probability']:.4f} on average, "
        f"{change['max_probability']:.4f} at most, and {change['num_changed_calls']} of {change['num_studies']} calls"
    )


@cli.command(short_help="Predict a directory of radiographs.")
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
    help="What computes: cpu, cuda, tensorrt (ONNX Runtime's) or openvino (pip install 'mura-dist[openvino]').",
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
@click.option("--strict", is_flag=True, help="Any failure is an error, once all tables are written.")
@quiet_option
def predict(model: Path, directory: Path, out: Path, quiet: bool, **options: Any) -> None:
    """Predict every radiograph below DIRECTORY. Resumes; every file ends in exactly one table.

    Given a model list NAME.json, it takes NAME.onnx beside it, if that holds the members listed. Started by torchrun or srun,
    the ranks share the work; the bytes are the same.
    """
    from rich.console import Console

    from mura_dist.inference.predict import predict as run
    from mura_dist.reports import local_only

    say = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True, markup=False).print
    with progress_bar("predicting", quiet or not environment.is_first()) as progress:
        summary = run(
            model, directory, out, say=say, walking=lambda num: progress(num, None), progress=progress, **options
        )
    if summary is None:  # another rank's: the first one speaks
        return
    click.echo(
        f"{out}: {summary['num_radiographs']} radiographs of {summary['num_studies']} studies, "
        f"{summary['num_positive']} of {summary['num_calls']} calls positive, "
        f"{summary['num_failures']} failures, {summary['seconds']:.1f} s"
    )
    if summary["num_overlays"]:
        click.echo(
            f"overlays ({local_only.MARK}): {summary['num_overlays']}, {summary['num_overlays_withheld']} withheld"
        )
    for warning in summary["warnings"]:
        click.echo(f"warning: {warning}")
    click.echo(mura.TERMS)


@cli.command
@click.argument("model", type=a_path)
@click.option(
    "--address", default="127.0.0.1", show_default=True, help="Where to listen; the default is this machine alone."
)
@click.option("--port", type=int, default=8501, show_default=True, help="Where to listen.")
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
    'mura-dist[page]'.
    """
    from mura_dist.inference.page.server import serve

    click.echo(mura.TERMS)
    serve(model, say=lambda line: click.echo(line), **options)


@cli.command(short_help="Measure against what one would use instead.")
@click.argument("what")
@click.option("--data", type=a_path, default=None, help="A folder in MURA's layout.  [default: phantoms, drawn for it]")
@click.option(
    "--size", type=click.IntRange(32, 2048), default=None, help="Pixels of a side.  [default: 320, train 160]"
)
@click.option(
    "--radiographs", type=click.IntRange(16), default=None, help="How many are worked on.  [default: by WHAT]"
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each contender.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Processes or threads that load, on each side; peers of pipeline are tried with 1, 2 and 4.",
)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Radiographs of a batch.")
@click.option(
    "--model", type=a_path, default=None, metavar="MODEL.onnx", help="Of encodings: whose probabilities are compared."
)
@click.option("--plot", type=a_path, default=None, metavar="FILE.png", help="Also draw what was measured.")
@click.option("--json", "as_json", is_flag=True, help="The measurements as JSON on stdout.")
@quiet_option
def bench(what: str, plot: Path | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure WHAT (shards, pipeline, encodings, train or predict), side by side with what a user would use instead."""
    from mura_dist.bench import Options, plots, run, table

    if plot is not None:
        plots.check(plot)
    from rich.console import Console

    say = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True).print
    measured = run(what, say, Options(**options))
    click.echo(json.dumps(measured, indent=2) if as_json else table(measured))
    if plot is not None:
        plots.draw(measured, plot)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status. One line on stderr says why it is not 0."""
    try:
        cli.main(list(arguments) if arguments is not None else None, prog_name="mura-dist", standalone_mode=False)
    except Refusal as error:
        return _end(WRONG, str(error), only_first=not isinstance(error, OwnRefusal))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return WRONG
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "mura-dist"
        said, words = error.format_message(), sys.argv if arguments is None else arguments
        # What it did not expect click quotes, and a shell makes names of DIRECTORY/*.
        if any(word.startswith("--pseudonyms") for word in words):
            said = f"{said.partition(' (')[0].rstrip('.')}."
        return _end(WRONG, f"{said} See {command} --help.", only_first=True)
    except Stopped as error:
        return _end(STOPPED, str(error), only_first=True)
    except (KeyboardInterrupt, click.Abort):
        return _end(STOPPED, "stopped; the same command goes on", only_first=True)
    except Failure as error:
        return _end(FAILED, str(error), only_first=isinstance(error, CommonFailure))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _end(
            WRONG,
            f"this command needs {error.name}, which is not installed; pip install 'mura-dist[{extra}]'",
            only_first=True,
        )
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left, as `| head` does
        return FAILED
    except OSError as error:
        remedy = (
            "free some space, then the same command goes on"
            if error.errno == errno.ENOSPC
            else "mend it, then the same command"
        )
        return _end(
            FAILED,
            f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}; {remedy}",
            only_first=False,
        )
    return DONE


def _speaks() -> bool:
    """Each machine's first: what it lacks, the others may have."""
    try:
        return environment.local_rank() == 0
    except Refusal:  # who knows which rank it is; that is what is being said
        return True


def _end(status: int, line: str, *, only_first: bool) -> int:
    if not only_first or _speaks():
        click.echo(f"mura-dist: {' '.join(line.split())}", err=True)
    return status


def entry(arguments: Sequence[str] | None = None) -> NoReturn:
    """The process of a command, from its arguments to its end.

    Where torch was loaded the interpreter is left without its finalisation: threads of torch's and gloo's own can abort it
    ("terminate called without an active exception", seen once in some 60 runs on a busy machine), and a finished run would
    count as a failed one. Everything is on disk and closed by then.
    """
    status = main(arguments)
    if "torch" not in sys.modules:
        sys.exit(status)
    logging.shutdown()
    with contextlib.suppress(OSError, ValueError):  # the reader of our output may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
