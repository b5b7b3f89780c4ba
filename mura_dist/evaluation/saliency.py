"""Measure how stable class activation maps are under mirroring and rotation.

    images -> forward -> map -------------------------------------------------.
    images, mirrored or rotated -> forward -> map, mirrored or rotated back --+--> correlation over cells -> mean, spread

A map is (h, w) float: the logit of each cell. Its mean is the logit of the view. It has 10 x 10 cells at 320 px. The correlation
is Pearson's, of two maps of one radiograph over the same cells. A map without contrast has no correlation and is counted.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

ANGLE_DEG = 10.0
MIN_CELLS = 3  # two always correlate perfectly
CORRELATION_TEXT = "Pearson, of the cells' logits, one value per radiograph"
_BATCH = 16
_NUM_RESAMPLES = 2000
_MIN_CONTRAST = 1e-9  # standard deviation of a map over its cells, in logits


class ForwardFunction(Protocol):
    """The forward pass of a run's network or an ONNX session, on NumPy arrays."""

    def __call__(self, images: np.ndarray, /) -> tuple[np.ndarray, np.ndarray]:
        """Map images (B, 1, S, S) uint8 to logit (B,) and activation_map (B, h, w)."""
        ...


def compute_maps(forward: ForwardFunction, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute logit (n,) and maps (n, h, w) float64 of images (n, S, S) uint8, in small batches."""
    batches = [forward(images[start : start + _BATCH, None]) for start in range(0, len(images), _BATCH)]
    logit, maps = (np.concatenate(arrays).astype(np.float64) for arrays in zip(*batches, strict=True))
    return logit, maps


def compute_stability(
    forward: ForwardFunction, images: np.ndarray, maps: np.ndarray, patients: Sequence[str], seed: int
) -> dict[str, Any]:
    """Measure the stability of maps under mirroring and rotation by ANGLE_DEG.

    Args:
        forward: the network.
        images: uint8 (n, S, S).
        maps: of the images, (n, h, w).
        patients: of the images.
        seed: of the bootstrap.

    Returns:
        {"mirror": {...}, "rotation": {...}}, see `summarize_correlations`.
    """
    _, mirrored = compute_maps(forward, np.ascontiguousarray(images[:, :, ::-1]))
    all_cells = np.ones(maps.shape[1:], bool)
    mirror = compute_correlation(maps, mirrored[:, :, ::-1], all_cells)
    rotation, inside = np.empty(len(images)), all_cells
    for start, angle_deg in enumerate((ANGLE_DEG, -ANGLE_DEG)):
        subset = slice(start, None, 2)
        rotation[subset], inside = _correlate_rotated(forward, images[subset], maps[subset], angle_deg)
    return {
        "mirror": summarize_correlations(mirror, patients, seed) | {"num_cells": all_cells.size},
        "rotation": summarize_correlations(rotation, patients, seed)
        | {"num_cells": int(inside.sum()), "angle_deg": ANGLE_DEG},
    }


def _correlate_rotated(
    forward: ForwardFunction, images: np.ndarray, maps: np.ndarray, angle_deg: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return correlations (n,) and the cells (h, w) they are computed over."""
    back, inside = (
        rotate(compute_maps(forward, _rotate_images(images, angle_deg))[1], -angle_deg)
        if len(images)
        else rotate(maps, 0)
    )
    return compute_correlation(maps, back, inside), inside


def _rotate_images(images: np.ndarray, angle_deg: float) -> np.ndarray:
    """Rotate images (n, S, S) uint8 as the training does; one at a time, since float64 takes 8 times the memory."""
    rotated = np.empty_like(images)
    for image, out in zip(images, rotated, strict=True):
        np.rint(rotate(image[None], angle_deg)[0][0], out=out, casting="unsafe")
    return rotated


def rotate(maps: np.ndarray, angle_deg: float) -> tuple[np.ndarray, np.ndarray]:
    """Rotate maps (n, h, w) about their center, counter-clockwise, bilinear, as the training rotates radiographs.

    Returns:
        The rotated maps, and inside (h, w) bool: the cells whose source is within the maps. The others are 0.
    """
    h, w = maps.shape[1:]
    cosine, sine = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
    dy, dx = np.mgrid[:h, :w] - np.array([(h - 1) / 2, (w - 1) / 2])[:, None, None]
    y, x = (h - 1) / 2 + sine * dx + cosine * dy, (w - 1) / 2 + cosine * dx - sine * dy  # where each cell comes from
    slack = 1e-9  # for rounding at the border
    inside = (y >= -slack) & (y <= h - 1 + slack) & (x >= -slack) & (x <= w - 1 + slack)
    y0, x0 = (np.clip(np.floor(at + slack), 0, end).astype(int) for at, end in ((y, h - 1), (x, w - 1)))
    y1, x1 = np.minimum(y0 + 1, h - 1), np.minimum(x0 + 1, w - 1)
    fy, fx = np.clip(y - y0, 0, 1), np.clip(x - x0, 0, 1)
    above = maps[:, y0, x0] * (1 - fx) + maps[:, y0, x1] * fx
    below = maps[:, y1, x0] * (1 - fx) + maps[:, y1, x1] * fx
    return np.where(inside, above * (1 - fy) + below * fy, 0.0), inside


def compute_correlation(a: np.ndarray, b: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Compute Pearson's correlation (n,) of each pair of maps (n, h, w) over the cells in `inside` (h, w).

    NaN where a map has no contrast, or where there are fewer than MIN_CELLS cells.
    """
    if inside.sum() < MIN_CELLS:
        return np.full(len(a), np.nan)
    centered = [maps[:, inside] - maps[:, inside].mean(axis=1, keepdims=True) for maps in (a, b)]  # (n, cells)
    spreads = [np.sqrt((values**2).mean(axis=1)) for values in centered]
    flat = ~((spreads[0] > _MIN_CONTRAST) & (spreads[1] > _MIN_CONTRAST))  # also true for NaN, of a diverged model
    product = np.where(flat, 1.0, spreads[0] * spreads[1])
    return np.where(flat, np.nan, (centered[0] * centered[1]).mean(axis=1) / product)


def summarize_correlations(values: np.ndarray, patients: Sequence[str], seed: int) -> dict[str, Any]:
    """Summarize correlations (n,): mean with its 95 % percentile interval (bootstrap over patients), quartiles, counts.

    What is undefined is None.
    """
    defined = np.isfinite(values)
    correlations = values[defined]
    cluster = np.unique(np.asarray(patients, dtype=object)[defined].astype(str), return_inverse=True)[1]
    num_patients = int(cluster.max()) + 1 if len(cluster) else 0
    summary: dict[str, Any] = dict.fromkeys(("mean", "mean_low", "mean_high", "quartile_1", "median", "quartile_3"))
    if len(correlations):
        quartiles = np.quantile(correlations, (0.25, 0.5, 0.75)).tolist()
        summary |= {"mean": float(correlations.mean())} | dict(
            zip(("quartile_1", "median", "quartile_3"), quartiles, strict=True)
        )
    if num_patients > 1:
        counts = np.random.default_rng(seed).multinomial(
            num_patients, np.full(num_patients, 1 / num_patients), _NUM_RESAMPLES
        )
        sums, sizes = np.bincount(cluster, weights=correlations), np.bincount(cluster)
        summary["mean_low"], summary["mean_high"] = np.quantile(
            (counts @ sums) / (counts @ sizes), (0.025, 0.975)
        ).tolist()
    return summary | {
        "num_radiographs": len(correlations),
        "num_patients": num_patients,
        "num_without_contrast": int((~defined).sum()),
    }
