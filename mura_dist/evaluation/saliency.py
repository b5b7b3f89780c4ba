"""How far a class activation map can be trusted: is it stable, and would another model draw it too.

    images -> outputs -> map ------------------------------------------------.
    images, mirrored or turned -> outputs -> map, mirrored or turned back ---+--> correlation over cells -> mean, spread
    images -> outputs of another model, of random weights -> map ------------'

A map is (h, w) float: the logit of each cell, whose mean is the logit of the view; 10 x 10 at 320 px. The correlation is
Pearson's, of two maps of one radiograph over the same cells; a map without any contrast has none, and is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from mura_dist.data.loaders.opencv import augment
from mura_dist.models import densenet
from mura_dist.models.ensemble import Ensemble
from mura_dist.training.weights import Weights

ANGLE_DEG = 10.0
MIN_CELLS = 3  # two always lie on a line
CORRELATION = "Pearson, of the cells' logits, one value a radiograph"
_BATCH = 16
_NUM_RESAMPLES = 2000
_NUM_RANDOM = 4  # networks behind the floor: of single ones it lay anywhere between 0.05 and 0.30 (tiny, phantoms)
_NUM_WARMING = 8  # radiographs
_FLOOR_SEED = 1_000_003  # no run's own: its starting weights are not strangers to the trained ones
_NO_CONTRAST = 1e-9  # a map's deviation over its cells, in logits


class Outputs(Protocol):
    """images (B, 1, S, S) uint8 -> logit (B,), activation_map (B, h, w); NumPy. A run's network, or an ONNX file's session."""

    def __call__(self, images: np.ndarray, /) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Model:
    """Something that draws maps. `architectures`: of its networks, empty where nobody told; `apart`: two of its networks that
    were trained separately, where it has such; `weights`: the digests of its networks' weights, empty where nobody told."""

    name: str
    outputs: Outputs
    size: int  # pixels of a side
    trained_on: str  # phantoms or radiographs
    architectures: tuple[str, ...] = ()
    apart: "tuple[Model, Model] | None" = None
    weights: frozenset[str] = frozenset()

    @classmethod
    def of_weights(cls, weights: Weights, module: nn.Module) -> "Model":
        """`module`: what `weights.model()` gave."""
        size, trained_on = weights.data()["size"], weights.data()["holds"]
        named = [run.settings.architecture for run in weights.runs]
        folders = [run.folder.resolve() for run in weights.runs]
        other = next((place for place, folder in enumerate(folders) if folder != folders[0]), None)
        apart = None
        if other is not None and isinstance(module, Ensemble):
            one, two = (
                cls(
                    f"{folders[place].name} {weights.checkpoints[place].name}",
                    of_module(module.networks[place]),
                    *(size, trained_on, (named[place],)),
                )
                for place in (0, other)
            )
            apart = (one, two)
        run_name = "" if weights.members else f"{folders[0].name} "
        digests = frozenset(weights.digests())
        return cls(f"{run_name}{weights.name}", of_module(module), size, trained_on, tuple(named), apart, digests)


def of_module(module: nn.Module) -> Outputs:
    """Of a network in eval mode; computes on the GPU where there is one."""

    def outputs(images: np.ndarray, /) -> tuple[np.ndarray, np.ndarray]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.inference_mode():
            logit, cells = module.to(device)(torch.from_numpy(images).to(device))
        return logit.cpu().numpy(), cells.cpu().numpy()

    return outputs


def randomised(architectures: Sequence[str], images: np.ndarray, seed: int) -> Outputs:
    """The same networks, freshly initialised: what the radiograph and the architecture alone draw.

    BatchNorm's statistics are those of `images` (B, 1, S, S); without them each layer is flatter than the one before.
    """
    networks = []
    for place, architecture in enumerate(architectures):
        network = densenet.build(architecture, seed=_FLOOR_SEED + 1000 * place + seed)
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0
        of_module(network.train())(images)
        networks.append(network.eval())
    return of_module(Ensemble(networks).eval())


def look(outputs: Outputs, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """images (n, S, S) uint8 -> logit (n,), maps (n, h, w) float64; a few at a time."""
    parts = [outputs(images[start : start + _BATCH, None]) for start in range(0, len(images), _BATCH)]
    logit, maps = (np.concatenate(part).astype(np.float64) for part in zip(*parts, strict=True))
    return logit, maps


# ---- the numbers


def stability(
    outputs: Outputs, images: np.ndarray, maps: np.ndarray, patients: Sequence[str], seed: int
) -> dict[str, Any]:
    """images (n, S, S) uint8 and their maps (n, h, w) -> {"mirror": .., "rotation": ..}, see `summary`."""
    _, mirrored = look(outputs, np.ascontiguousarray(images[:, :, ::-1]))
    every = np.ones(maps.shape[1:], bool)
    mirror = correlation(maps, mirrored[:, :, ::-1], every)
    rotation, inside = np.empty(len(images)), every
    for start, angle_deg in enumerate((ANGLE_DEG, -ANGLE_DEG)):
        part = slice(start, None, 2)
        rotation[part], inside = _turned_and_back(outputs, images[part], maps[part], angle_deg)
    return {
        "mirror": summary(mirror, patients, seed) | {"num_cells": every.size},
        "rotation": summary(rotation, patients, seed) | {"num_cells": int(inside.sum()), "angle_deg": ANGLE_DEG},
    }


def _turned_and_back(
    outputs: Outputs, images: np.ndarray, maps: np.ndarray, angle_deg: float
) -> tuple[np.ndarray, np.ndarray]:
    """Correlations (n,), and the cells (h, w) they are over."""
    back, inside = turn(look(outputs, _turned(images, angle_deg))[1], -angle_deg) if len(images) else turn(maps, 0)
    return correlation(maps, back, inside), inside


def _turned(images: np.ndarray, angle_deg: float) -> np.ndarray:
    """images (n, S, S) uint8, as the training turns them."""
    turned = np.empty_like(images)
    for image, out in zip(images, turned, strict=True):
        augment(image, angle_deg, False, out)
    return turned


def agreement(
    one: Model, other: Model, images: np.ndarray, maps: np.ndarray | None, patients: Sequence[str], seed: int
) -> dict[str, Any]:
    """How alike the maps of two models are on images (n, S, S), and the floor below which that says nothing.

    maps: those of `one` where they are known.
    """
    ours = look(one.outputs, images)[1] if maps is None else maps
    theirs = look(other.outputs, images)[1]
    if theirs.shape != ours.shape:
        sizes = " and ".join(f"{found.shape[1]} x {found.shape[2]}" for found in (ours, theirs))
        return {"measured": False, "reason": f"maps of {sizes} cells cannot be compared"}
    every = np.ones(ours.shape[1:], bool)
    found = summary(correlation(ours, theirs, every), patients, seed)
    floor: dict[str, Any] = {"measured": False, "reason": "the architecture of the model is not known"}
    if one.architectures and all(name in densenet.ARCHITECTURES for name in one.architectures):
        values = _with_random(one.architectures, images, ours, seed)
        floor = {"measured": True} | summary(values, patients, seed)
        means = [float(part.mean()) for part in _parts_with_contrast(values)]
        # The interval is over patients; from one random network to the next the mean moves further than that.
        floor |= {"mean_of_each": means}
        floor |= {"with": f"{_NUM_RANDOM} sets of random weights", "architectures": list(one.architectures)}
    return {"measured": True, "models": [one.name, other.name]} | found | {"num_cells": every.size, "floor": floor}


def _with_random(architectures: Sequence[str], images: np.ndarray, maps: np.ndarray, seed: int) -> np.ndarray:
    """Correlation of each of maps (n, h, w) with that of one of _NUM_RANDOM random networks: (n,).

    A random head is as likely as its negative, which turns the signs of all its maps; of the two the one that agrees counts.
    """
    found = np.empty(len(images))
    for number in range(min(_NUM_RANDOM, len(images))):
        part = slice(number, None, _NUM_RANDOM)
        noise = look(
            randomised(architectures, images[part][:_NUM_WARMING, None], _NUM_RANDOM * seed + number), images[part]
        )
        values = correlation(maps[part], noise[1], np.ones(maps.shape[1:], bool))
        found[part] = values * (1 if np.nansum(values) >= 0 else -1)
    return found


def _parts_with_contrast(values: np.ndarray) -> list[np.ndarray]:
    """The values of each random network that has some."""
    parts = [values[number::_NUM_RANDOM] for number in range(_NUM_RANDOM)]
    return [part[np.isfinite(part)] for part in parts if np.isfinite(part).any()]


def turn(maps: np.ndarray, angle_deg: float) -> tuple[np.ndarray, np.ndarray]:
    """maps (n, h, w) turned about their centre, counter-clockwise, bilinear, as the training's radiographs are.

    Also inside (h, w): the cells that came from within the maps; the others are 0.
    """
    h, w = maps.shape[1:]
    cosine, sine = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
    dy, dx = np.mgrid[:h, :w] - np.array([(h - 1) / 2, (w - 1) / 2])[:, None, None]
    y, x = (h - 1) / 2 + sine * dx + cosine * dy, (w - 1) / 2 + cosine * dx - sine * dy  # where each cell comes from
    slack = 1e-9
    inside = (y >= -slack) & (y <= h - 1 + slack) & (x >= -slack) & (x <= w - 1 + slack)
    y0, x0 = (np.clip(np.floor(at + slack), 0, end).astype(int) for at, end in ((y, h - 1), (x, w - 1)))
    y1, x1 = np.minimum(y0 + 1, h - 1), np.minimum(x0 + 1, w - 1)
    fy, fx = np.clip(y - y0, 0, 1), np.clip(x - x0, 0, 1)
    above = maps[:, y0, x0] * (1 - fx) + maps[:, y0, x1] * fx
    below = maps[:, y1, x0] * (1 - fx) + maps[:, y1, x1] * fx
    return np.where(inside, above * (1 - fy) + below * fy, 0.0), inside


def correlation(a: np.ndarray, b: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Pearson's, of each pair of maps (n, h, w) over the cells of inside (h, w): (n,).

    NaN where a map has no contrast, and where there are fewer than MIN_CELLS.
    """
    if inside.sum() < MIN_CELLS:
        return np.full(len(a), np.nan)
    parts = [maps[:, inside] - maps[:, inside].mean(axis=1, keepdims=True) for maps in (a, b)]  # (n, cells)
    spreads = [np.sqrt((part**2).mean(axis=1)) for part in parts]
    flat = ~((spreads[0] > _NO_CONTRAST) & (spreads[1] > _NO_CONTRAST))  # also where a model has diverged
    product = np.where(flat, 1.0, spreads[0] * spreads[1])
    return np.where(flat, np.nan, (parts[0] * parts[1]).mean(axis=1) / product)


def summary(values: np.ndarray, patients: Sequence[str], seed: int) -> dict[str, Any]:
    """Mean with its 95 % interval (bootstrap over patients, percentiles), quartiles, how many; what cannot be had is None."""
    defined = np.isfinite(values)
    known = values[defined]
    cluster = np.unique(np.asarray(patients, dtype=object)[defined].astype(str), return_inverse=True)[1]
    num_patients = int(cluster.max()) + 1 if len(cluster) else 0
    found: dict[str, Any] = dict.fromkeys(("mean", "mean_low", "mean_high", "quartile_1", "median", "quartile_3"))
    if len(known):
        quartiles = np.quantile(known, (0.25, 0.5, 0.75)).tolist()
        found |= {"mean": float(known.mean())} | dict(
            zip(("quartile_1", "median", "quartile_3"), quartiles, strict=True)
        )
    if num_patients > 1:
        times = np.random.default_rng(seed).multinomial(
            num_patients, np.full(num_patients, 1 / num_patients), _NUM_RESAMPLES
        )
        sums, counts = np.bincount(cluster, weights=known), np.bincount(cluster)
        found["mean_low"], found["mean_high"] = np.quantile((times @ sums) / (times @ counts), (0.025, 0.975)).tolist()
    return found | {
        "num_radiographs": len(known),
        "num_patients": num_patients,
        "num_without_contrast": int((~defined).sum()),
    }
