"""How far a class activation map can be trusted: is it stable.

    images -> outputs -> map -----------------------------------------------.
    images, mirrored or turned -> outputs -> map, mirrored or turned back --+--> correlation over cells -> mean, spread

A map is (h, w) float: the logit of each cell, whose mean is the logit of the view; 10 x 10 at 320 px. The correlation is
Pearson's, of two maps of one radiograph over the same cells; a map without any contrast has none, and is counted.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

ANGLE_DEG = 10.0
MIN_CELLS = 3  # two always lie on a line
CORRELATION_TEXT = "Pearson, of the cells' logits, one value a radiograph"
_BATCH = 16
_NUM_RESAMPLES = 2000
_MIN_CONTRAST = 1e-9  # a map's deviation over its cells, in logits


class ForwardFunction(Protocol):
    """images (B, 1, S, S) uint8 -> logit (B,), activation_map (B, h, w); NumPy. A run's network, or an ONNX file's session."""

    def __call__(self, images: np.ndarray, /) -> tuple[np.ndarray, np.ndarray]: ...


def compute_maps(outputs: ForwardFunction, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """images (n, S, S) uint8 -> logit (n,), maps (n, h, w) float64; a few at a time."""
    parts = [outputs(images[start : start + _BATCH, None]) for start in range(0, len(images), _BATCH)]
    logit, maps = (np.concatenate(part).astype(np.float64) for part in zip(*parts, strict=True))
    return logit, maps


# ---- the numbers


def compute_stability(
    outputs: ForwardFunction, images: np.ndarray, maps: np.ndarray, patients: Sequence[str], seed: int
) -> dict[str, Any]:
    """images (n, S, S) uint8 and their maps (n, h, w) -> {"mirror": .., "rotation": ..}, see `summary`."""
    _, mirrored = compute_maps(outputs, np.ascontiguousarray(images[:, :, ::-1]))
    every = np.ones(maps.shape[1:], bool)
    mirror = compute_correlation(maps, mirrored[:, :, ::-1], every)
    rotation, inside = np.empty(len(images)), every
    for start, angle_deg in enumerate((ANGLE_DEG, -ANGLE_DEG)):
        part = slice(start, None, 2)
        rotation[part], inside = _correlate_rotated(outputs, images[part], maps[part], angle_deg)
    return {
        "mirror": summarize_correlations(mirror, patients, seed) | {"num_cells": every.size},
        "rotation": summarize_correlations(rotation, patients, seed)
        | {"num_cells": int(inside.sum()), "angle_deg": ANGLE_DEG},
    }


def _correlate_rotated(
    outputs: ForwardFunction, images: np.ndarray, maps: np.ndarray, angle_deg: float
) -> tuple[np.ndarray, np.ndarray]:
    """Correlations (n,), and the cells (h, w) they are over."""
    back, inside = (
        rotate(compute_maps(outputs, _rotate_images(images, angle_deg))[1], -angle_deg)
        if len(images)
        else rotate(maps, 0)
    )
    return compute_correlation(maps, back, inside), inside


def _rotate_images(images: np.ndarray, angle_deg: float) -> np.ndarray:
    """Turn images (n, S, S) uint8 as the training does; one at a time, since float64 takes 8 times the memory."""
    turned = np.empty_like(images)
    for image, out in zip(images, turned, strict=True):
        np.rint(rotate(image[None], angle_deg)[0][0], out=out, casting="unsafe")
    return turned


def rotate(maps: np.ndarray, angle_deg: float) -> tuple[np.ndarray, np.ndarray]:
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


def compute_correlation(a: np.ndarray, b: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Pearson's, of each pair of maps (n, h, w) over the cells of inside (h, w): (n,).

    NaN where a map has no contrast, and where there are fewer than MIN_CELLS.
    """
    if inside.sum() < MIN_CELLS:
        return np.full(len(a), np.nan)
    parts = [maps[:, inside] - maps[:, inside].mean(axis=1, keepdims=True) for maps in (a, b)]  # (n, cells)
    spreads = [np.sqrt((part**2).mean(axis=1)) for part in parts]
    flat = ~((spreads[0] > _MIN_CONTRAST) & (spreads[1] > _MIN_CONTRAST))  # also where a model has diverged
    product = np.where(flat, 1.0, spreads[0] * spreads[1])
    return np.where(flat, np.nan, (parts[0] * parts[1]).mean(axis=1) / product)


def summarize_correlations(values: np.ndarray, patients: Sequence[str], seed: int) -> dict[str, Any]:
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
