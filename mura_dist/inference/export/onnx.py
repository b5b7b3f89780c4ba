"""Checkpoints -> one self-contained ONNX file, through a parity gate.

    model (torch, eval) -> torch.onnx -> tidy (no paths, no traces) + card -> checker
        -> parity: the same images through torch and through onnx_model.Model -> written, or nothing is

        below fp32 (precision.py): compared with the fp32 file on radiographs -> within limits -> written, or nothing is

    image uint8 (N, 1, S, S) -> logit float32 (N,), activation_map float32 (N, h, w)      N is any number; of 0, nothing

The file is written when the gate has passed, never before. Operator set 18 is the oldest that torch.onnx writes without
a conversion, and the format is the oldest that has it, hence what most runtimes read. What ONNX viewers show (producer,
descriptions) says what the model is; the card, in the metadata, says all.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from mura_dist import __version__
from mura_dist.core import files
from mura_dist.core.errors import RunError, UserError
from mura_dist.data.shards.reader import Shards
from mura_dist.inference.engine_onnxruntime import import_onnxruntime
from mura_dist.inference.export import int8, precision, triton
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.metrics.operating_points import PAPER_OPERATING_POINT, FittedThresholds
from mura_dist.models.card import KEY, PRODUCER, Card, PrecisionChange, TrainedOn
from mura_dist.models.densenet import DenseNet
from mura_dist.models.ensemble import Ensemble
from mura_dist.models.target import Target
from mura_dist.training.weights import ModelWeights

OPSET = 18
BATCH_SIZES = (1, 2, 7, 64)
TORCH_BATCH = 7  # more would only cost memory
NUM_RADIOGRAPHS = 16  # of the run's own, for the gate
LIMIT_BYTES = 2**31 - 1  # protobuf's, of one message
OTHER_BYTES = 2**20  # nodes and names of a member; 0.12 MB of a DenseNet-169


@dataclass(frozen=True)
class ExportOptions:
    """precision: one of card.PRECISIONS; shards: where the run's are now, None where the run found them; allow_change: write
    a precision whatever it changes; triton_folder: also a model repository there."""

    precision: str = "fp32"
    shards: Path | str | None = None
    allow_change: bool = False
    triton_folder: Path | None = None


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what was measured before. `change`: of a precision below fp32, with the limits it passes, `over`."""

    card: Card
    num_bytes: int
    max_logit_difference: float  # from torch's, in fp32
    num_radiographs: int  # behind `change`, or else behind that difference
    change: PrecisionChange | None = None
    over: Sequence[str] = ()


def _silent(line: str) -> None:
    """For callers that want no words."""


def export_target(
    target: Target,
    *,
    which: str,
    out: Path,
    options: ExportOptions = ExportOptions(),
    log: Callable[[str], None] = _silent,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> ExportReport:
    """Export a checkpoint (best, last or step-N) of a run, or the members of a list, which average their probabilities.

    Writes `out`. The card carries the metrics.json that `evaluate` wrote, and what was fitted on tune, where it is of these very
    weights on `valid` of their own shards; only study types measured there, with both classes, get a threshold. Of a list it is
    looked for beside it, too. Raises UserError where there is no such run, list or checkpoint, or where the files cannot go,
    RunError where the gate stays shut.
    """
    _check(out, options)
    weights = ModelWeights.from_target(target, which)
    beside = [target.path.parent] if target.kind == "list" else []
    return _export(weights, _measured(weights, [target.report_folder, *beside]), out, options, log, progress)


def default_out(target: Target, precision: str) -> Path:
    """Where the file of `target` in `precision` goes."""
    plain = target.onnx_file
    return plain if precision == "fp32" else plain.with_name(f"{plain.stem}-{precision}{plain.suffix}")


def _check(out: Path, options: ExportOptions) -> None:
    import_onnxruntime()  # the gate computes with it: said before the minutes that come first
    precision.check_precision(options.precision)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file, {out / 'model.onnx'} for example")
    files.check_folder(out.parent, "--out")
    if options.triton_folder is not None:
        triton.check(options.triton_folder)


def _export(
    weights: ModelWeights,
    measured: dict[str, Any],
    out: Path,
    options: ExportOptions,
    log: Callable[[str], None],
    progress: Callable[[int, int | None], None],
) -> ExportReport:
    try:
        card = _card(weights, measured)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = str(error).replace("\n", " ")[:160]
        raise UserError(
            f"metrics.json is damaged ({type(error).__name__}: {reason}); run `mura-dist evaluate` again"
        ) from error
    model = weights.load_model()
    if options.precision == "fp32":
        report = export(model, card, out, radiographs=_some_radiographs(weights, options.shards), progress=progress)
    else:
        shards = precision.open_shards(weights, options.shards)
        assert isinstance(model, DenseNet | Ensemble)
        report = export_variant(model, card, out, options, shards, log)
    if options.triton_folder is not None:
        triton.write(options.triton_folder, out.read_bytes())
    return report


def _measured(weights: ModelWeights, folders: Sequence[Path]) -> dict[str, Any]:
    """The first metrics.json in `folders` that is of these very weights on `valid` of their own shards; {} where none is."""
    digest = weights.data()["manifest_sha256"]
    wanted = {"weights_sha256": weights.digests(), "split": "valid", "manifest_sha256": digest}
    for path in (folder / "metrics.json" for folder in folders if (folder / "metrics.json").is_file()):
        try:
            found = files.parse_json(path.read_bytes())
        except ValueError as error:
            again = "run `mura-dist evaluate` again, or move the file away"
            raise UserError(f"{path} is damaged ({error}); {again}") from error
        if isinstance(found, dict) and all(found.get(key) == value for key, value in wanted.items()):
            return found
    return {}


def _card(weights: ModelWeights, measured: dict[str, Any]) -> Card:
    data, by_type = weights.data(), measured.get("by_study_type", {})
    cuts: dict[str, float] = measured.get("thresholds") or dict.fromkeys(by_type, measured.get("threshold", 0.5))
    return Card(
        size=data["size"],
        study_types=data["study_types"],
        thresholds={key: cuts[key] for key, found in by_type.items() if found["kappa"] is not None},
        operating_point=measured.get("operating_point", PAPER_OPERATING_POINT),
        calibration=FittedThresholds.model_validate(measured.get("calibration") or {}),
        metrics=measured,
        trained_on=TrainedOn(
            kind=data["holds"],
            manifest_sha256=data["manifest_sha256"],
            num_radiographs=data["splits"]["train"],
            splits=data["splits"],
        ),
        selected_on=weights.settings.select_on,
        recipe=weights.recipe(),
        checkpoint=weights.name,
        members=list(weights.members),
    )


def _some_radiographs(weights: ModelWeights, given: Path | str | None) -> np.ndarray | None:
    """A few of the run's own shards for the gate, uint8 (N, 1, S, S); None where the shards are elsewhere by now."""
    try:
        return precision.sample_images(
            precision.open_shards(weights, given), weights.settings.select_on, NUM_RADIOGRAPHS
        )
    except UserError:
        if given is not None:
            raise
        return None


def export(
    model: torch.nn.Module,
    card: Card,
    out: Path,
    *,
    tolerance: float = 1e-4,
    radiographs: np.ndarray | None = None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> ExportReport:
    """Write `model` (a DenseNet or an Ensemble in eval mode, on the CPU, fp32) to `out`; returns what was measured.

    tolerance: largest difference of a logit, see `parity`; radiographs: uint8 (N, 1, S, S) to compare on besides the
    drawn images; progress: called with the number of steps done and of all. Raises UserError where the model is too large for
    one file, RunError where torch and ONNX Runtime disagree; then `out` is as it was before.
    """
    assert not model.training
    _fits(model, card)
    steps = 1 + len(BATCH_SIZES)  # the graph, and each comparison
    progress(0, steps)
    data = build_onnx(model, card)
    drawn = probe_images(card.size)
    real = drawn[:0] if radiographs is None else radiographs
    difference = parity(model, data, np.concatenate([drawn, real]), tolerance, lambda done: progress(1 + done, steps))
    files.write_bytes(out, data)
    progress(steps, steps)
    return ExportReport(card, len(data), difference, len(real))


def export_variant(
    model: DenseNet | Ensemble,
    card: Card,
    out: Path,
    options: ExportOptions,
    shards: Shards,
    log: Callable[[str], None],
) -> ExportReport:
    """Write `model` in a precision below fp32 to `out`, if what that changes on `shards` lies within precision.LIMITS.

    The fp32 file it is compared with passes the gate first. Returns what was measured. Raises RunError where the gate
    stays shut or a limit is passed; then `out` is as it was before.
    """
    _fits(model, card)
    card = card.model_copy(update={"precision": options.precision})
    plain = build_onnx(model, card.model_copy(update={"precision": "fp32"}))
    real = precision.sample_images(shards, card.selected_on, NUM_RADIOGRAPHS)
    probes = np.concatenate([probe_images(card.size), real])
    difference = parity(model, plain, probes)
    calibrated_on = 0
    if options.precision == "fp16":
        precision.check_range(model, probes)
    if options.precision == "int8":
        images = precision.sample_images(shards, "train", precision.NUM_CALIBRATED)
        calibrated_on = len(images)
        log(f"int8: ranges of {calibrated_on} radiographs of train")
        data = finalize(int8.build_int8_graph(model, images), card)
    else:
        data = (
            build_onnx(precision.to_half_precision(model), card)
            if options.precision == "fp16"
            else _with_card(plain, card)
        )
    change = precision.measure_change(card, plain, data, shards, log).model_copy(
        update={"calibrated_on": calibrated_on}
    )
    over = precision.check_limits(options.precision, change, options.allow_change)
    data = _with_card(data, card.model_copy(update={"change": change}))
    files.write_bytes(out, data)
    return ExportReport(card, len(data), difference, change.num_radiographs, change, over)


def _fits(model: torch.nn.Module, card: Card) -> None:
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values()) + OTHER_BYTES * max(1, len(card.members))
    if num_bytes > LIMIT_BYTES:
        raise UserError(
            f"{card.checkpoint}: the weights would make a file of {num_bytes / 1e9:.2f} GB, the limit of one ONNX file is "
            f"{LIMIT_BYTES / 1e9:.2f} GB; give fewer members (mura-dist ensemble --top)"
        )


def build_onnx(model: torch.nn.Module, card: Card) -> bytes:
    """The ONNX file's content: the graph of `model` for images of `card.size`, any batch size, with `card` inside."""
    example = torch.zeros(2, 1, card.size, card.size, dtype=torch.uint8)  # a batch of 1 would be taken for a constant
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logit", "activation_map"],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None
    return finalize(program.model_proto, card)


def finalize(proto: onnx.ModelProto, card: Card) -> bytes:
    """The content of the file of a graph, with `card` inside, checked."""
    _tidy(proto, card)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def _with_card(data: bytes, card: Card) -> bytes:
    return finalize(onnx.load_from_string(data), card)


def _tidy(proto: onnx.ModelProto, card: Card) -> None:
    """Drop torch's traces (they hold the paths of this machine), add who made it, what is what, and the card."""
    del proto.graph.value_info[:]
    for thing in (
        proto,
        proto.graph,
        *proto.graph.node,
        *proto.graph.input,
        *proto.graph.output,
        *proto.graph.initializer,
    ):
        del thing.metadata_props[:]
        thing.doc_string = ""
    # torch writes a newer one, which older servers refuse.
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    proto.producer_name, proto.producer_version = PRODUCER, __version__
    proto.doc_string = _in_words(card)
    proto.graph.name = KEY
    for value in (*proto.graph.input, *proto.graph.output):
        value.doc_string = _VALUES[value.name].format(size=card.size, resize=card.resize)
    onnx.helper.set_model_props(proto, {KEY: card.model_copy(update={"opset": OPSET}).text()})


def _in_words(card: Card) -> str:
    """The card in three sentences, for ONNX viewers."""
    what = "drawn phantoms, no radiographs" if card.of_drawings else "radiographs"
    return (
        f"Bone radiograph -> normal or abnormal ({', '.join(card.study_types)}): {card.checkpoint}, trained on "
        f"{card.trained_on.num_radiographs} {what}. {card.terms[:1].upper()}{card.terms[1:]}. The JSON under {KEY!r} in the "
        "metadata says more: thresholds, calibration, metrics, licence."
    )


_VALUES = {
    "image": "uint8 (batch, 1, {size}, {size}): grey radiographs, 0 black to 255 white; resized by {resize}",
    "logit": "float32 (batch,): probability of abnormal = 1 / (1 + exp(-logit)); a study's is the mean over its views",
    "activation_map": "float32 (batch, h, w): its mean is the logit (of an ensemble: the mean of its members' logits)",
}


def probe_images(size: int) -> np.ndarray:
    """Images that a preprocessing or a border handled differently would show up on: uint8 (7, 1, size, size)."""
    random = np.random.Generator(np.random.Philox(key=[size, 0]))
    ramp = np.broadcast_to(np.linspace(0, 255, size), (size, size))
    point = np.zeros((size, size))
    point[size // 3, size // 4] = 255
    faint, loud = random.normal(128, 4, (size, size)), random.integers(0, 256, (size, size))
    images = [np.zeros((size, size)), np.full((size, size), 255), ramp, ramp.T, point, faint, loud]
    return np.stack(images).round().astype(np.uint8)[:, None]  # (7, 1, size, size) uint8


def parity(
    model: torch.nn.Module,
    data: bytes,
    images: np.ndarray,
    tolerance: float = 1e-4,
    progress: Callable[[int], None] = lambda done: None,
) -> float:
    """The largest difference of a logit between `model` and the ONNX file `data`, on `images` uint8 (N, 1, S, S).

    Compared at BATCH_SIZES, whose last takes the images again from the first where there are fewer: logits, maps, and the
    mean of a map with its logit (not of an ensemble: its map's mean is the mean of the logits, its logit that of the mean
    probability). The limit is `tolerance`, relative to the value beyond +-1: fp32 carries about 7 digits. Raises RunError
    naming value and limit.
    """
    exported = OnnxModel.from_bytes(data, "the exported model")
    torch_logit, torch_map = _torch_outputs(model, images)
    worst = 0.0
    for done, batch_size in enumerate(BATCH_SIZES):
        progress(done)
        places = np.arange(max(len(images), batch_size)) % len(images)  # (M,)
        batches = [
            exported.outputs(images[places[start : start + batch_size]]) for start in range(0, len(places), batch_size)
        ]
        logit, cells = (np.concatenate(part) for part in zip(*batches, strict=True))  # (M,), (M, h, w)
        wanted_logit, wanted_map = torch_logit[places], torch_map[places]
        _compare("logit", logit, wanted_logit, tolerance, batch_size)
        _compare("activation_map", cells, wanted_map, tolerance, batch_size)
        if len(exported.card.members) <= 1:
            mean = cells.mean(axis=(1, 2), dtype=np.float64)
            _compare("mean of activation_map", mean, wanted_logit, tolerance, batch_size)
        worst = max(worst, float(np.abs(logit - wanted_logit).max()))
    return worst


def _torch_outputs(model: torch.nn.Module, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """logit (N,), activation_map (N, h, w), both float32."""
    with torch.inference_mode():
        batches = [model(batch) for batch in torch.from_numpy(images).split(TORCH_BATCH)]
    logit, cells = (torch.cat(part).numpy() for part in zip(*batches, strict=True))
    return logit, cells


def _compare(what: str, got: np.ndarray, wanted: np.ndarray, tolerance: float, batch_size: int) -> None:
    if got.shape != wanted.shape:
        raise RunError(
            f"{what} of the exported model has shape {got.shape}, torch's has {wanted.shape}; nothing was written"
        )
    excess = np.abs(got - wanted) / np.maximum(1, np.abs(wanted))
    if not (excess <= tolerance).all():  # so written, a NaN fails too
        worst = np.unravel_index(np.nanargmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
        raise RunError(
            f"{what} of the exported model is {got[worst]:.6g} where torch gives {wanted[worst]:.6g} (batch size "
            f"{batch_size}), the limit of the difference is {tolerance:g}; nothing was written; look for NaN in the "
            "checkpoint, try another one, or report it with the versions of torch and onnxruntime"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch.onnx tells its progress on stdout and its worries in logs; what matters of them, the gate measures."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(disabled)
