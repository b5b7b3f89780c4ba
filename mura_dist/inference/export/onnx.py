"""Checkpoints -> one self-contained ONNX file, through a parity gate.

    model (torch, eval) -> torch.onnx -> tidy (no paths, no traces) + card -> checker
        -> parity gate: the same images through torch and through onnx_model.OnnxModel -> file

        below fp32 (precision.py): compared with the fp32 file on radiographs -> within limits -> file

    image uint8 (N, 1, S, S) -> logit float32 (N,), activation_map float32 (N, h, w)      N is any number; of 0, nothing

The file is written only after the gate has passed. Operator set 18 is the oldest that torch.onnx writes without a conversion, and
the IR version is the oldest that supports it, so that most runtimes can read the file. Producer and descriptions tell an ONNX
viewer what the model is. The metadata holds the complete card.
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
from mura_dist.inference import onnx_metadata
from mura_dist.inference.engine_onnxruntime import import_onnxruntime
from mura_dist.inference.export import int8, precision, triton
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.metrics.operating_points import PAPER_OPERATING_POINT, FittedThresholds
from mura_dist.models.card import KEY, PRODUCER, WEIGHT_BITS, Card, PrecisionChange, TrainedOn
from mura_dist.models.densenet import DenseNet
from mura_dist.models.ensemble import Ensemble
from mura_dist.models.target import Target
from mura_dist.training.stamp import Stamp
from mura_dist.training.weights import ModelWeights

OPSET = 18
BATCH_SIZES = (1, 2, 7, 64)
TORCH_BATCH = 7
NUM_RADIOGRAPHS = 16  # of the run's shards, for the gate
LIMIT_BYTES = 2**31 - 1  # of one protobuf message
OVERHEAD_BYTES = 2**20  # nodes and names of a member; 0.12 MB in a DenseNet-169


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        precision: One of card.PRECISIONS.
        shards: Folder of the run's shards. None uses the folder in the run's recipe.
        allow_change: Write a precision even if it exceeds its limits.
        triton_folder: Write a Triton model repository in this folder too.
        weight_bits: Bits of an int8 model's weights, one of card.WEIGHT_BITS. None chooses 7.
    """

    precision: str = "fp32"
    shards: Path | str | None = None
    allow_change: bool = False
    triton_folder: Path | None = None
    weight_bits: int | None = None


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote and measured.

    Attributes:
        card: Card of the file.
        num_bytes: Size of the file.
        max_logit_difference: Largest difference between the logits of torch and of the fp32 file.
        num_radiographs: Number of radiographs behind `change`, or else behind `max_logit_difference`.
        change: Measured change of a precision below fp32.
        over: One line per limit that `change` exceeds.
    """

    card: Card
    num_bytes: int
    max_logit_difference: float
    num_radiographs: int
    change: PrecisionChange | None = None
    over: Sequence[str] = ()


def export_target(
    target: Target,
    *,
    which: str,
    out: Path,
    options: ExportOptions = ExportOptions(),
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> ExportReport:
    """Export a checkpoint of a run, or the members of a list, which average their probabilities.

    The card contains the metrics.json and the thresholds that `evaluate` wrote, if they belong to these weights on `valid` of
    their own shards. Only study types that were measured there, with both classes, have a threshold.

    Args:
        target: A run or a model list.
        which: Checkpoint of a run: best, last or step-N.
        out: File to write.
        options: Options of the export.
        log: Called with lines of progress.
        progress: Called with the numbers of finished steps and of all steps.

    Raises:
        UserError: the target does not exist, or a file cannot be written.
        RunError: the parity gate or a limit of the precision failed.
    """
    _check(out, options)
    weights = ModelWeights.from_target(target, which)
    folders = [target.report_folder, *([target.path.parent] if target.kind == "list" else [])]
    return _export(weights, _find_metrics(weights, folders), out, options, log, progress)


def default_out(target: Target, precision: str) -> Path:
    """Return the default file of `target` in `precision`."""
    plain = target.onnx_file
    return plain if precision == "fp32" else plain.with_name(f"{plain.stem}-{precision}{plain.suffix}")


def _check(out: Path, options: ExportOptions) -> None:
    import_onnxruntime()  # the gate needs it: fail before the export, which takes minutes
    precision.check_precision(options.precision, options.weight_bits)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder. Give a file, such as {out / 'model.onnx'}.")
    files.check_folder(out.parent, "--out")
    if options.triton_folder is not None:
        triton.check(options.triton_folder)


def _export(
    weights: ModelWeights,
    metrics: dict[str, Any],
    out: Path,
    options: ExportOptions,
    log: Callable[[str], None],
    progress: Callable[[int, int | None], None],
) -> ExportReport:
    try:
        card = _build_card(weights, metrics)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = str(error).replace("\n", " ")[:160]
        raise UserError(
            f"metrics.json is invalid ({type(error).__name__}: {reason}). Run `mura-dist evaluate` again."
        ) from error
    shards = _open_shards(weights, options)
    stamp = _stamp(weights, metrics, out, options, shards)
    if (result := stamp.find()) is not None:
        log(f"nothing changed since the last export: {out} stays as it is")
        return _load_report(out, result)
    model = weights.load_model()
    if shards is None or options.precision == "fp32":
        images = precision.sample_images(shards, weights.settings.select_on, NUM_RADIOGRAPHS) if shards else None
        report = export(model, card, out, radiographs=images, progress=progress)
    else:
        assert isinstance(model, DenseNet | Ensemble)
        report = export_variant(model, card, out, options, shards, log)
    if options.triton_folder is not None:
        triton.write(options.triton_folder, out.read_bytes())
    measured = {key: getattr(report, key) for key in ("max_logit_difference", "num_radiographs", "over")}
    stamp.write([out], measured)
    return report


def _stamp(
    weights: ModelWeights, metrics: dict[str, Any], out: Path, options: ExportOptions, shards: Shards | None
) -> Stamp:
    """Return the stamp of this export. Reads the tars that the comparisons take radiographs from."""
    splits = [weights.settings.select_on, *(["train"] if options.precision == "int8" else [])]
    request = {
        "members": weights.inputs(),
        "list": [member.model_dump() for member in weights.members],
        "metrics_sha256": files.json_sha256(metrics),
        "shards": shards.digest(*splits) if shards else None,
        "options": [options.precision, options.weight_bits, options.allow_change],
    }
    outside = triton.list_files(options.triton_folder) if options.triton_folder is not None else {}
    return Stamp(out.with_name(f".export-{out.name}.json"), request, outside)


def _load_report(out: Path, measured: dict[str, Any]) -> ExportReport:
    """Return the report of the export that wrote `out`."""
    data = out.read_bytes()
    card = Card.parse(onnx_metadata.read(data, KEY), str(out))
    return ExportReport(card, len(data), change=card.change, **measured)


def _find_metrics(weights: ModelWeights, folders: Sequence[Path]) -> dict[str, Any]:
    """Return the first metrics.json of these weights on `valid` of their own shards, or {}."""
    digest = weights.data()["manifest_sha256"]
    expected = {"weights_sha256": weights.digests(), "split": "valid", "manifest_sha256": digest}
    for path in (folder / "metrics.json" for folder in folders if (folder / "metrics.json").is_file()):
        try:
            metrics = files.parse_json(path.read_bytes())
        except ValueError as error:
            remedy = "Run `mura-dist evaluate` again, or move the file away."
            raise UserError(f"{path} is invalid ({error}). {remedy}") from error
        if isinstance(metrics, dict) and all(metrics.get(key) == value for key, value in expected.items()):
            return metrics
    return {}


def _build_card(weights: ModelWeights, metrics: dict[str, Any]) -> Card:
    data, by_type = weights.data(), metrics.get("by_study_type", {})
    thresholds: dict[str, float] = metrics.get("thresholds") or dict.fromkeys(by_type, metrics.get("threshold", 0.5))
    return Card(
        size=data["size"],
        study_types=data["study_types"],
        thresholds={key: thresholds[key] for key, values in by_type.items() if values["kappa"] is not None},
        operating_point=metrics.get("operating_point", PAPER_OPERATING_POINT),
        calibration=FittedThresholds.model_validate(metrics.get("calibration") or {}),
        metrics=metrics,
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


def _open_shards(weights: ModelWeights, options: ExportOptions) -> Shards | None:
    """Return the run's shards; None if they have moved and an fp32 file, whose gate does without, needs none."""
    try:
        shards = precision.open_shards(weights, options.shards)
        shards.rows(weights.settings.select_on)
        shards.check_tars()
        return shards
    except UserError:
        if options.shards is not None or options.precision != "fp32":
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
    """Write `model` to `out` after the parity gate. If the gate fails, `out` stays as it is.

    Args:
        model: A DenseNet or an Ensemble in eval mode, on the CPU, fp32.
        card: Card of the file.
        out: File to write.
        tolerance: Largest difference of a logit, as in `parity`.
        radiographs: uint8 (N, 1, S, S) to compare beside the synthetic images.
        progress: Called with the numbers of finished steps and of all steps.

    Raises:
        UserError: the model is too large for one file.
        RunError: torch and ONNX Runtime disagree.
    """
    assert not model.training
    _check_size(model, card)
    num_steps = 1 + len(BATCH_SIZES)  # the graph, and each comparison
    progress(0, num_steps)
    data = build_onnx(model, card)
    images = probe_images(card.size)
    num_radiographs = 0 if radiographs is None else len(radiographs)
    if radiographs is not None:
        images = np.concatenate([images, radiographs])
    difference = parity(model, data, images, tolerance, lambda num_done: progress(1 + num_done, num_steps))
    files.write_bytes(out, data)
    progress(num_steps, num_steps)
    return ExportReport(card, len(data), difference, num_radiographs)


def export_variant(
    model: DenseNet | Ensemble,
    card: Card,
    out: Path,
    options: ExportOptions,
    shards: Shards,
    log: Callable[[str], None],
) -> ExportReport:
    """Write `model` to `out` in a precision below fp32, if its change on `shards` lies within precision.LIMITS.

    The fp32 file of the comparison passes the parity gate first. If a check fails, `out` stays as it is.

    Args:
        model: In eval mode, on the CPU, fp32.
        card: Card of the fp32 file.
        out: File to write.
        options: Options of the export.
        shards: Shards of the run.
        log: Called with lines of progress.

    Raises:
        UserError: the model is too large for one file.
        RunError: the parity gate failed, or the change exceeds a limit.
    """
    _check_size(model, card)
    card = card.model_copy(update={"precision": options.precision})
    fp32_file = build_onnx(model, card.model_copy(update={"precision": "fp32"}))
    radiographs = precision.sample_images(shards, card.selected_on, NUM_RADIOGRAPHS)
    probes = np.concatenate([probe_images(card.size), radiographs])
    difference = parity(model, fp32_file, probes)
    calibrated_on = 0
    if options.precision == "fp16":
        precision.check_range(model, probes)
    if options.precision == "int8":
        card = card.model_copy(update={"weight_bits": options.weight_bits or WEIGHT_BITS[0]})
        images = precision.sample_images(shards, "train", precision.NUM_CALIBRATED)
        calibrated_on = len(images)
        log(f"int8: ranges of {calibrated_on} radiographs of train")
        data = finalize(int8.build_int8_graph(model, images, card.weight_bits or WEIGHT_BITS[0]), card)
    else:
        data = (
            build_onnx(precision.to_half_precision(model), card)
            if options.precision == "fp16"
            else _with_card(fp32_file, card)
        )
    change = precision.measure_change(card, fp32_file, data, shards, log).model_copy(
        update={"calibrated_on": calibrated_on}
    )
    over = precision.check_limits(options.precision, change, options.allow_change)
    data = _with_card(data, card.model_copy(update={"change": change}))
    files.write_bytes(out, data)
    return ExportReport(card, len(data), difference, change.num_radiographs, change, over)


def _check_size(model: torch.nn.Module, card: Card) -> None:
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values()) + OVERHEAD_BYTES * max(
        1, len(card.members)
    )
    if num_bytes > LIMIT_BYTES:
        raise UserError(
            f"{card.checkpoint}: the weights need a file of {num_bytes / 1e9:.2f} GB (limit of an ONNX file: "
            f"{LIMIT_BYTES / 1e9:.2f} GB). Give fewer members (mura-dist ensemble --top)."
        )


def build_onnx(model: torch.nn.Module, card: Card) -> bytes:
    """Return the content of the ONNX file of `model`, with `card` inside. It takes any batch size."""
    example = torch.zeros(
        2, 1, card.size, card.size, dtype=torch.uint8
    )  # torch.export would treat a batch of 1 as a constant
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
    """Put `card` into a graph, check it, and return the content of the file."""
    _tidy(proto, card)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def _with_card(data: bytes, card: Card) -> bytes:
    return finalize(onnx.load_from_string(data), card)


def _tidy(proto: onnx.ModelProto, card: Card) -> None:
    """Remove torch's traces, which contain paths of this machine, and add producer, descriptions and card."""
    del proto.graph.value_info[:]
    for element in (
        proto,
        proto.graph,
        *proto.graph.node,
        *proto.graph.input,
        *proto.graph.output,
        *proto.graph.initializer,
    ):
        del element.metadata_props[:]
        element.doc_string = ""
    # torch writes a newer version, which older servers do not load.
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    proto.producer_name, proto.producer_version = PRODUCER, __version__
    proto.doc_string = _describe(card)
    proto.graph.name = KEY
    for value in (*proto.graph.input, *proto.graph.output):
        value.doc_string = _VALUES[value.name].format(size=card.size, resize=card.resize)
    onnx.helper.set_model_props(proto, {KEY: card.model_copy(update={"opset": OPSET}).to_json()})


def _describe(card: Card) -> str:
    """Return the card in three sentences, for ONNX viewers."""
    images = "drawn phantoms, no radiographs" if card.trained_on_phantoms else "radiographs"
    return (
        f"Bone radiograph -> normal or abnormal ({', '.join(card.study_types)}): {card.checkpoint}, trained on "
        f"{card.trained_on.num_radiographs} {images}. {card.terms[:1].upper()}{card.terms[1:]}. The JSON under {KEY!r} in the "
        "metadata has more: thresholds, calibration, metrics, licence."
    )


_VALUES = {
    "image": "uint8 (batch, 1, {size}, {size}): grayscale radiographs, 0 black to 255 white; resized by {resize}",
    "logit": "float32 (batch,): probability of abnormal = 1 / (1 + exp(-logit)); a study's is the mean over its views",
    "activation_map": "float32 (batch, h, w): its mean is the logit (of an ensemble: the mean of its members' logits)",
}


def probe_images(size: int) -> np.ndarray:
    """Return synthetic images that reveal differences of preprocessing and borders: uint8 (7, 1, size, size)."""
    random = np.random.Generator(np.random.Philox(key=[size, 0]))
    ramp = np.broadcast_to(np.linspace(0, 255, size), (size, size))
    point = np.zeros((size, size))
    point[size // 3, size // 4] = 255
    weak_noise, noise = random.normal(128, 4, (size, size)), random.integers(0, 256, (size, size))
    images = [np.zeros((size, size)), np.full((size, size), 255), ramp, ramp.T, point, weak_noise, noise]
    return np.stack(images).round().astype(np.uint8)[:, None]  # (7, 1, size, size) uint8


def parity(
    model: torch.nn.Module,
    data: bytes,
    images: np.ndarray,
    tolerance: float = 1e-4,
    progress: Callable[[int], None] = lambda num_done: None,
) -> float:
    """Compare `model` in torch with its ONNX file at each of BATCH_SIZES.

    Compared are logits, maps, and the mean of a map with its logit. An ensemble's map has the mean of the logits, which is not
    the logit of the mean probability.

    Args:
        model: In eval mode, on the CPU, fp32.
        data: Content of the ONNX file.
        images: uint8 (N, 1, S, S). They repeat to fill the largest batch.
        tolerance: Largest difference, absolute for values within +-1 and relative beyond. fp32 has about 7 digits.
        progress: Called with the number of finished batch sizes.

    Returns:
        The largest absolute difference of a logit.

    Raises:
        RunError: a difference exceeds `tolerance`.
    """
    exported = OnnxModel.from_bytes(data, "the exported model")
    torch_logit, torch_map = _torch_outputs(model, images)
    worst = 0.0
    for num_done, batch_size in enumerate(BATCH_SIZES):
        progress(num_done)
        indices = np.arange(max(len(images), batch_size)) % len(images)  # (M,)
        batches = [
            exported.outputs(images[indices[start : start + batch_size]])
            for start in range(0, len(indices), batch_size)
        ]
        logit, cells = map(np.concatenate, zip(*batches, strict=True))  # (M,), (M, h, w)
        expected_logit, expected_map = torch_logit[indices], torch_map[indices]
        _compare("logit", logit, expected_logit, tolerance, batch_size)
        _compare("activation_map", cells, expected_map, tolerance, batch_size)
        if len(exported.card.members) <= 1:
            mean = cells.mean(axis=(1, 2), dtype=np.float64)
            _compare("mean of activation_map", mean, expected_logit, tolerance, batch_size)
        worst = max(worst, float(np.abs(logit - expected_logit).max()))
    return worst


def _torch_outputs(model: torch.nn.Module, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return logit (N,) and activation_map (N, h, w), both float32."""
    with torch.inference_mode():
        batches = [model(batch) for batch in torch.from_numpy(images).split(TORCH_BATCH)]
    logit, cells = (torch.cat(tensors).numpy() for tensors in zip(*batches, strict=True))
    return logit, cells


def _compare(name: str, actual: np.ndarray, expected: np.ndarray, tolerance: float, batch_size: int) -> None:
    if actual.shape != expected.shape:
        raise RunError(
            f"{name} of the exported model has shape {actual.shape}, torch's has {expected.shape}. Nothing was written."
        )
    difference = np.abs(actual - expected) / np.maximum(1, np.abs(expected))
    if not (difference <= tolerance).all():  # False for NaN
        worst = np.unravel_index(np.nanargmax(np.where(np.isnan(difference), np.inf, difference)), difference.shape)
        raise RunError(
            f"{name} of the exported model is {actual[worst]:.6g}, torch computes {expected[worst]:.6g} (batch size "
            f"{batch_size}, largest allowed difference {tolerance:g}). Nothing was written. Look for NaN in the checkpoint, "
            "try another checkpoint, or report it with the versions of torch and onnxruntime."
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress torch.onnx's output, logs and warnings. The gate checks what matters."""
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
