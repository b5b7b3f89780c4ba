"""Precisions below fp32: conversion, and the measured change of probabilities and calls against limits.

    weights, precision -> graph      fp16: the network's layers in half precision, its outputs in fp32
                                     bf16: the fp32 graph, whose card requests bf16 from the runtime
                                     int8: int8.py, with grids from radiographs of the train split
        -> radiographs of the split that selected the model through both files, in one runtime -> PrecisionChange -> limits

Calls are compared by study, with the card's thresholds, or 0.5 for a study type without one.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mura_dist.core.errors import RunError, UserError, nearest
from mura_dist.data.shards.reader import CorruptSampleError, Shards
from mura_dist.inference.engine import OPENVINO, SessionConfig, on_cpu
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.inference.processor import check_weight_bits
from mura_dist.metrics import classification
from mura_dist.models.card import PRECISIONS, WEIGHT_BITS, Card, PrecisionChange
from mura_dist.models.densenet import DenseNet
from mura_dist.models.ensemble import Ensemble
from mura_dist.training.weights import ModelWeights

NUM_MEASURED, NUM_CALIBRATED = 1000, 256  # radiographs
FP16_LIMIT = 32_000.0
_BATCH = 4


class ChangeLimits(NamedTuple):
    """Limits of a precision: mean change of a radiograph's probability, and share of studies whose call changes."""

    mean_probability: float
    changed_calls: float


LIMITS = {"fp16": ChangeLimits(0.001, 0.005), "bf16": ChangeLimits(0.005, 0.01), "int8": ChangeLimits(0.005, 0.01)}
ENGINES = {"fp16": "cpu", "bf16": OPENVINO, "int8": "cpu"}  # provider that measures the change
_BATCH_SIZES = (1, 2, 7, 64)


def check_precision(precision: str, weight_bits: int | None = None) -> None:
    """Raise UserError for an unknown precision or number of bits, or one that cannot be measured on this machine."""
    if precision not in PRECISIONS:
        raise UserError(
            f"--precision {precision}{nearest(precision, PRECISIONS)}: must be one of {', '.join(PRECISIONS)}"
        )
    if weight_bits is not None:
        if precision != "int8":
            raise UserError(
                f"--weight-bits {weight_bits}: only int8 has a choice of bits (--precision is {precision}). Give --precision "
                "int8, or no --weight-bits."
            )
        if weight_bits not in WEIGHT_BITS:
            raise UserError(f"--weight-bits {weight_bits}: must be 7, the default, or 8.")
        check_weight_bits(
            weight_bits,
            f"--weight-bits {weight_bits}",
            "Give --weight-bits 7, or export on a processor with VNNI or ARM's dot product.",
        )
    if precision == "bf16":
        from mura_dist.inference.engine_openvino import supports_bf16

        if not supports_bf16():
            raise UserError(
                "--precision bf16: its change is measured before the export, and this processor has no instructions for it. "
                "Export on a processor with AVX-512 BF16 or AMX, or give --precision int8."
            )


def open_shards(weights: ModelWeights, folder: str | Path | None) -> Shards:
    """Open the run's shards in `folder`, or where the run read them. Raises UserError if they are other shards."""
    location = folder or weights.settings.shards
    shards, data = Shards.open(location), weights.data()
    if shards.index["manifest"]["sha256"] != data["manifest_sha256"] or shards.size != data["size"]:
        raise UserError(f"{location}: not the shards that this run was trained on. Give them with --shards FOLDER.")
    return shards


def to_half_precision(model: DenseNet | Ensemble) -> nn.Module:
    """Return a copy with fp16 convolutions and norms. Normalization of the image and both outputs stay fp32."""
    copied = copy.deepcopy(model)
    for network in copied.networks if isinstance(copied, Ensemble) else [copied]:
        assert isinstance(network, DenseNet)
        network.features.half()
        network.classifier.half()
    return copied


def sample_images(shards: Shards, split: str, num_images: int) -> np.ndarray:
    """Return about `num_images` radiographs evenly over a split, hence over study types: uint8 (N, 1, S, S)."""
    images = [image for _, image in _valid_samples(shards, _spread(shards.rows(split), num_images))]
    return np.stack(images)[:, None] if images else np.empty((0, 1, shards.size, shards.size), np.uint8)


def _spread(items: np.ndarray, num_items: int) -> np.ndarray:
    return items[np.unique(np.linspace(0, len(items) - 1, num_items).astype(np.int64))]


def _valid_samples(shards: Shards, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (row, image) without corrupt samples, which training and evaluation report."""
    for row in rows:
        try:
            yield row, shards.read_pixels(row)
        except CorruptSampleError:
            continue


def measure_change(
    card: Card, fp32_file: bytes, variant_file: bytes, shards: Shards, log: Callable[[str], None]
) -> PrecisionChange:
    """Measure how a variant changes probabilities and calls, with the provider of ENGINES.

    Args:
        card: Card of the variant.
        fp32_file: Content of the fp32 ONNX file.
        variant_file: Content of the ONNX file in `card.precision`.
        shards: Shards of the run.
        log: Called with a line of progress.

    Raises:
        RunError: a logit of the variant is not finite, or depends on its batch.
    """
    provider = _measuring_provider(card.precision, variant_file)

    def load(data: bytes, batch_size: int) -> OnnxModel:
        return OnnxModel.from_bytes(data, "the exported model", provider, SessionConfig(batch_size))

    models = [load(data, _BATCH) for data in (fp32_file, variant_file)]

    def load_variant(batch_size: int) -> OnnxModel:  # on a GPU a model runs one batch size, on a CPU any
        return models[1] if on_cpu(provider) else load(variant_file, batch_size)

    _check_batch_invariance(load_variant, batch_limit(card.precision, provider))
    candidate_rows = _sample_studies(shards, card.selected_on)
    log(f"{card.precision}: comparing with fp32 on {len(candidate_rows):,} radiographs of {card.selected_on}")
    rows: list[int] = []
    logits: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for batch in _batches(_valid_samples(shards, candidate_rows)):
        images = np.stack([image for _, image in batch])[:, None]
        rows += [row for row, _ in batch]
        for batch_logits, model in zip(logits, models, strict=True):
            batch_logits.append(model.logits(images))
    row_array = np.array(rows, np.int64)
    probabilities = [classification.sigmoid(np.concatenate(batch_logits)) for batch_logits in logits]
    studies = [classification.build_study_table(row_array, values, shards.manifest.frame) for values in probabilities]
    thresholds = studies[0]["study_type"].map(dict(card.thresholds)).astype(np.float64).fillna(0.5)
    calls = [classification.is_positive(study["probability"], thresholds) for study in studies]
    difference = np.abs(probabilities[0] - probabilities[1])
    if not np.isfinite(difference).all():
        num_invalid = np.count_nonzero(~np.isfinite(difference))
        raise RunError(
            f"{card.precision}: the logit is NaN or infinite for {num_invalid} of {len(rows)} radiographs. Nothing was written. "
            "Keep fp32."
        )
    return PrecisionChange(
        engine=models[1].provider,
        num_radiographs=len(rows),
        num_studies=len(thresholds),
        mean_probability=float(difference.mean()),
        max_probability=float(difference.max()),
        num_changed_calls=int((calls[0] != calls[1]).sum()),
    )


def _measuring_provider(precision: str, data: bytes) -> str:
    """Return the provider that measures: for fp16 a GPU if available. A CPU stores fp16 but computes in fp32."""
    if precision == "fp16":
        with contextlib.suppress(UserError):
            OnnxModel.from_bytes(data, "the exported model", "cuda", SessionConfig(_BATCH))
            return "cuda"
    return ENGINES[precision]


@torch.no_grad()
def check_range(model: nn.Module, images: np.ndarray) -> None:
    """Check that the activations of the fp32 `model` on `images` fit into fp16. A CPU's arithmetic would not show an overflow.

    Raises:
        RunError: an activation exceeds FP16_LIMIT.
    """
    maxima = [0.0]

    def record_maximum(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            maxima.append(float(output.abs().max()))

    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [module.register_forward_hook(record_maximum) for module in leaves]
    try:
        for batch in torch.from_numpy(images).split(_BATCH):
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not max(maxima) <= FP16_LIMIT:
        raise RunError(
            f"fp16: an activation reaches {max(maxima):.3g} (limit {FP16_LIMIT:g}; fp16 ends at 65504). Nothing was written. "
            "Keep fp32, or give --precision int8."
        )


def _sample_studies(shards: Shards, split: str) -> np.ndarray:
    """Return the rows of complete studies evenly over a split, about NUM_MEASURED rows."""
    rows = shards.rows(split)
    studies = shards.manifest.frame.loc[rows, "study"].to_numpy()
    names = list(dict.fromkeys(studies))
    num_studies = max(1, len(names) * NUM_MEASURED // max(len(rows), NUM_MEASURED))
    sampled = set(_spread(np.array(names, object), num_studies))
    return rows[[study in sampled for study in studies]]


def _batches(pairs: Iterator[tuple[int, np.ndarray]]) -> Iterator[list[tuple[int, np.ndarray]]]:
    batch: list[tuple[int, np.ndarray]] = []
    for pair in pairs:
        batch.append(pair)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def batch_limit(precision: str, provider: str) -> float:
    """Return the largest allowed change of a logit with the batch size.

    On a GPU cuDNN uses other algorithms for other batch sizes, whose sums differ in order, and fp16 rounds the sums of 169 layers
    to 11 bits. The expected change is 1e-3 to 1e-2 (estimated, not measured). A CPU computes fp16 in fp32 and meets fp32's limit.

    Args:
        precision: Precision of the file.
        provider: Provider as named in `--provider`.
    """
    return 2e-2 if precision == "fp16" and not on_cpu(provider) else 1e-4


def _check_batch_invariance(load_model: Callable[[int], OnnxModel], limit: float) -> None:
    """Check that a logit does not depend on the batch size.

    Args:
        load_model: Returns a model for a batch size.
        limit: Largest allowed difference.

    Raises:
        RunError: a logit differs by more than `limit`.
    """
    expected: np.ndarray | None = None
    for batch_size in _BATCH_SIZES:
        model = load_model(batch_size)
        random = np.random.Generator(np.random.Philox(key=[model.size, 1]))
        images = random.integers(0, 256, (max(_BATCH_SIZES), 1, model.size, model.size), dtype=np.uint8)
        batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
        logits = np.concatenate([model.logits(batch) for batch in batches])
        expected = logits if expected is None else expected
        with np.errstate(invalid="ignore"):  # infinite minus infinite
            worst = float(np.abs(logits - expected).max())
        if not worst <= limit:
            raise RunError(
                f"a logit of the {model.card.precision} model differs by {worst:.2g} (limit {limit:g}) between batch sizes "
                f"{batch_size} and 1. Nothing was written. Report it with the versions of onnxruntime and openvino."
            )


def check_limits(precision: str, change: PrecisionChange, allow_change: bool) -> list[str]:
    """Return one line per exceeded limit. Raises RunError unless there are none or `allow_change`."""
    limit = LIMITS[precision]
    max_calls = max(
        1, int(limit.changed_calls * change.num_studies)
    )  # one call may always change: a tiny split has few
    exceeded = []
    if not change.mean_probability <= limit.mean_probability:  # True for NaN
        exceeded.append(
            f"{precision} changes a probability by {change.mean_probability:.4f} on average (limit "
            f"{limit.mean_probability:g})"
        )
    if change.num_changed_calls > max_calls:
        exceeded.append(
            f"{precision} changes {change.num_changed_calls} of {change.num_studies} calls (limit {max_calls}: "
            f"{limit.changed_calls:.1%}, at least one)"
        )
    if exceeded and not allow_change:
        raise RunError(
            f"{'; '.join(exceeded)}. Nothing was written. Keep fp32, or give --allow-change to write it anyway."
        )
    return exceeded
