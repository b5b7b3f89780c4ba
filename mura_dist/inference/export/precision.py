"""A model in fewer bits than fp32, and what they change: measured before it is written, refused above a limit.

    weights, precision -> graph      fp16: the network's own layers in half precision, its outputs in fp32
                                     bf16: the fp32 graph, whose card asks the runtime for bf16
                                     int8: int8.py, its grids from radiographs of the train split
        -> the same radiographs of the split that chose the model through both files, in one runtime -> PrecisionChange -> limits

A call is of a study, by the thresholds of the card; where it has none, by 1/2.
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
from mura_dist.metrics import classification
from mura_dist.models.card import PRECISIONS, Card, PrecisionChange
from mura_dist.models.densenet import DenseNet
from mura_dist.models.ensemble import Ensemble
from mura_dist.training.weights import ModelWeights

NUM_MEASURED, NUM_CALIBRATED = 1000, 256  # radiographs
FP16_LIMIT = 32_000.0
_BATCH = 4


class ChangeLimits(NamedTuple):
    """What a precision may change: the mean over radiographs, and the share of studies whose call is another one."""

    mean_probability: float
    changed_calls: float


LIMITS = {"fp16": ChangeLimits(0.001, 0.005), "bf16": ChangeLimits(0.005, 0.01), "int8": ChangeLimits(0.005, 0.01)}
ENGINES = {"fp16": "cpu", "bf16": OPENVINO, "int8": "cpu"}  # provider that measures
_BATCH_SIZES = (1, 2, 7, 64)


def check_precision(precision: str) -> None:
    """Raises UserError for what is no precision, and for one that cannot be measured here."""
    if precision not in PRECISIONS:
        raise UserError(
            f"--precision {precision}{nearest(precision, PRECISIONS)}: must be one of {', '.join(PRECISIONS)}"
        )
    if precision == "bf16":
        from mura_dist.inference.engine_openvino import supports_bf16

        if not supports_bf16():
            raise UserError(
                "--precision bf16: what it changes is measured before it is written, and this processor has no instructions "
                "for it; export on one that has (AVX-512 BF16 or AMX), or give --precision int8"
            )


def open_shards(weights: ModelWeights, given: str | Path | None) -> Shards:
    """The run's own shards, where it found them or where `given` says they are now. Raises UserError."""
    place = given or weights.settings.shards
    shards, data = Shards.open(place), weights.data()
    if shards.index["manifest"]["sha256"] != data["manifest_sha256"] or shards.size != data["size"]:
        raise UserError(f"{place}: not the shards this run was trained on; give --shards FOLDER, where those are")
    return shards


def to_half_precision(model: DenseNet | Ensemble) -> nn.Module:
    """A copy whose convolutions and norms are fp16; the normalisation of the image and both outputs stay fp32."""
    copied = copy.deepcopy(model)
    for network in copied.networks if isinstance(copied, Ensemble) else [copied]:
        assert isinstance(network, DenseNet)
        network.features.half()
        network.classifier.half()
    return copied


def sample_images(shards: Shards, split: str, number: int) -> np.ndarray:
    """About `number` radiographs of a split, evenly over it, hence over study types: uint8 (N, 1, S, S)."""
    images = [image for _, image in _sound(shards, _evenly(shards.rows(split), number))]
    return np.stack(images)[:, None] if images else np.empty((0, 1, shards.size, shards.size), np.uint8)


def _evenly(rows: np.ndarray, number: int) -> np.ndarray:
    return rows[np.unique(np.linspace(0, len(rows) - 1, number).astype(np.int64))]


def _sound(shards: Shards, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Those that are as the conversion wrote them; training and evaluation name the others."""
    for row in rows:
        try:
            yield row, shards.read_pixels(row)
        except CorruptSampleError:
            continue


def measure_change(
    card: Card, plain: bytes, narrowed: bytes, shards: Shards, log: Callable[[str], None]
) -> PrecisionChange:
    """What `narrowed`, the file in card.precision, changes against `plain`, in fp32, both by the provider of ENGINES."""
    provider = _provider(card.precision, narrowed)

    def load(data: bytes, batch_size: int) -> OnnxModel:
        return OnnxModel.from_bytes(data, "the exported model", provider, SessionConfig(batch_size))

    models = [load(data, _BATCH) for data in (plain, narrowed)]
    # A model on a GPU runs one batch size, that on a CPU runs any.
    of_batch_size = (lambda number: models[1]) if on_cpu(provider) else (lambda number: load(narrowed, number))
    _same_over_batches(of_batch_size, batch_limit(card.precision, provider))
    rows = _some_studies(shards, card.selected_on)
    log(f"{card.precision}: comparing with fp32 on {len(rows):,} radiographs of {card.selected_on}")
    used: list[int] = []
    one: list[np.ndarray] = []
    two: list[np.ndarray] = []
    for batch in _batches(_sound(shards, rows)):
        images = np.stack([image for _, image in batch])[:, None]
        used += [row for row, _ in batch]
        for found, model in zip((one, two), models, strict=True):
            found.append(model.logits(images))
    known = np.array(used, np.int64)
    views = [classification.sigmoid(np.concatenate(found)) for found in (one, two)]
    studies = [classification.build_study_table(known, view, shards.manifest.frame) for view in views]
    cut = studies[0]["study_type"].map(dict(card.thresholds)).astype(np.float64).fillna(0.5)
    calls = [classification.is_positive(study["probability"], cut) for study in studies]
    difference = np.abs(views[0] - views[1])
    if not np.isfinite(difference).all():
        raise RunError(
            f"{card.precision} gives {np.count_nonzero(~np.isfinite(difference))} of {len(known)} radiographs no number; nothing "
            "was written; keep fp32"
        )
    return PrecisionChange(
        engine=models[1].provider,
        num_radiographs=len(known),
        num_studies=len(cut),
        mean_probability=float(difference.mean()),
        max_probability=float(difference.max()),
        num_changed_calls=int((calls[0] != calls[1]).sum()),
    )


def _provider(precision: str, data: bytes) -> str:
    """What measures: for fp16 a GPU where there is one. A CPU stores fp16 and computes in fp32 between."""
    if precision == "fp16":
        with contextlib.suppress(UserError):
            OnnxModel.from_bytes(data, "the exported model", "cuda", SessionConfig(_BATCH))
            return "cuda"
    return ENGINES[precision]


@torch.no_grad()
def check_range(model: nn.Module, images: np.ndarray) -> None:
    """Raises RunError where an activation of the fp32 `model` on `images` comes near what fp16 cannot hold, which a CPU's
    arithmetic would not show."""
    largest = [0.0]

    def look(module: nn.Module, given: object, found: object) -> None:
        if isinstance(found, Tensor):
            largest.append(float(found.abs().max()))

    handles = [part.register_forward_hook(look) for part in model.modules() if not list(part.children())]
    try:
        for batch in torch.from_numpy(images).split(_BATCH):
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not max(largest) <= FP16_LIMIT:
        raise RunError(
            f"fp16: an activation reaches {max(largest):.3g}, the limit is {FP16_LIMIT:g} (fp16 ends at 65504); nothing was "
            "written; keep fp32, or give --precision int8"
        )


def _some_studies(shards: Shards, split: str) -> np.ndarray:
    """The rows of whole studies of a split, evenly over it, about NUM_MEASURED."""
    rows = shards.rows(split)
    studies = shards.manifest.frame.loc[rows, "study"].to_numpy()
    names = list(dict.fromkeys(studies))
    chosen = set(_evenly(np.array(names, object), max(1, len(names) * NUM_MEASURED // max(len(rows), NUM_MEASURED))))
    return rows[[study in chosen for study in studies]]


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
    """Return how far a logit may move with the batch size, for a precision computed by a provider, as it is asked for.

    On a GPU cuDNN takes other algorithms for other batch sizes, and fp16 rounds what each of 169 layers sums to 11 bits, where
    the sums differ in their order: 1e-3 to 1e-2 of a logit is to be expected (reckoned, not measured). A CPU computes fp16 in
    fp32 between, hence passes fp32's limit.
    """
    return 2e-2 if precision == "fp16" and not on_cpu(provider) else 1e-4


def _same_over_batches(of_batch_size: Callable[[int], OnnxModel], limit: float) -> None:
    """A logit must not depend on which images came along. Raises RunError where one moves by more than `limit`.

    of_batch_size: gives the model that runs a batch size.
    """
    wanted: np.ndarray | None = None
    for number in _BATCH_SIZES:
        model = of_batch_size(number)
        random = np.random.Generator(np.random.Philox(key=[model.size, 1]))
        images = random.integers(0, 256, (max(_BATCH_SIZES), 1, model.size, model.size), dtype=np.uint8)
        found = np.concatenate([model.logits(images[at : at + number]) for at in range(0, len(images), number)])
        wanted = found if wanted is None else wanted
        with np.errstate(invalid="ignore"):  # infinite less infinite
            worst = float(np.abs(found - wanted).max())
        if not worst <= limit:
            raise RunError(
                f"a logit of the {model.card.precision} model moves by {worst:.2g} with the batch size ({number} against 1), "
                f"the limit is {limit:g}; nothing was written; report it with the versions of onnxruntime and openvino"
            )


def check_limits(precision: str, found: PrecisionChange, allowed: bool) -> list[str]:
    """What lies above its limit, a line each. Raises RunError unless `allowed`."""
    limit = LIMITS[precision]
    calls = max(1, int(limit.changed_calls * found.num_studies))  # one may always change: a tiny split has few
    over = []
    if not found.mean_probability <= limit.mean_probability:  # so written, a NaN is over too
        over.append(
            f"{precision} changes a probability by {found.mean_probability:.4f} on average, the limit is "
            f"{limit.mean_probability:g}"
        )
    if found.num_changed_calls > calls:
        over.append(
            f"{precision} changes {found.num_changed_calls} of {found.num_studies} calls, the limit is {calls} "
            f"({limit.changed_calls:.1%}, at least one)"
        )
    if over and not allowed:
        raise RunError(
            f"{'; '.join(over)}; nothing was written; keep fp32, or give --allow-change to have it all the same"
        )
    return over
