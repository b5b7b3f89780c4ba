"""Detect images that do not look like a bone radiograph, by 31 statistics at 64 x 64 and a fitted score.

    image (S, S) -> exposed field, without white or black borders -> resize to 64 x 64
        -> stretch from its 1 % to its 99 % level -> 31 statistics, of the image and of its inverse
        -> standardize, clip to +-3 -> sum of slope x value + bend x (value^2 - 1) -> score

The score of a radiograph is high, that of a photograph, page or noise low. Below THRESHOLD for both image and inverse, the
image is `not_a_radiograph`. Where the inverse is better by MARGIN, the image is `inverted`, which is only a warning. The result
does not depend on rotation by 90 degrees or flips.

A file whose colors are not a function of its gray level is no radiograph either. A tint passes, and so does a small arrow.

`tools/fit_gate.py` fits the table below. docs/benchmarks.md has its measured quality, docs/gate.md its limits.
"""

import numpy as np
from PIL import Image

NAMES = ("ok", "inverted", "not_a_radiograph", "blank")
BLOCKING = ("not_a_radiograph", "blank")
MESSAGES = {
    "inverted": "its contrast looks inverted (bone dark): the model may be wrong on it",
    "not_a_radiograph": "this does not look like a bone radiograph",
    "blank": "this does not look like a bone radiograph: it is blank, with a single gray level",
}

VERSION = 2  # changes whenever the same image may get another verdict
SIDE_PX = 64
LEAST_SPREAD = 4  # gray levels of 255 between the 1 % and the 99 % level; below, the image is blank
MOST = 3.0  # standard deviations at which statistics are clipped
THRESHOLD, MARGIN = -3.5, 1.0
# An image is colored where this share of its pixels lies this many levels of 255 off the color of their gray level.
COLORED_SHARE, COLORED = 0.2, 6.0
# A border row or column has this share of pixels within this distance of the darkest or brightest level.
BORDER_SHARE, BORDER_LEVEL = 0.95, 0.03
FADE, LEAST_FIELD = 2, 16  # of 64 rows or columns: margin between border and field; smallest field

# Names in _fine are measured at 64 x 64, in _coarse at 32 x 32, both slightly smoothed.
STATISTICS = (
    *("side_darkest", "side_second", "side_third"),  # mean level along each side, 4 wide, sorted
    *("corner_third", "corner_brightest"),  # mean level of the corners, 8 x 8, sorted
    *("level_25", "level_50", "white"),  # quantiles of the levels; share of the brightest sixteenth
    *("peak", "entropy", "spread"),  # of the histogram, 16 bins; deviation of the levels
    *("alike_2", "alike_8"),  # correlation with itself 2 and 8 pixels on, along the less alike axis
    *(
        f"{name}_{scale}"
        for scale in ("fine", "coarse")
        for name in (
            "edge_50",  # log of the median gradient
            "edge_90",  # and of higher quantiles
            "edge_98",
            "curved",  # log of the mean size of the Laplacian
            "texture",  # log of the Laplacian's energy by the gradient's
            "along",  # how much gradients of a block (an eighth of a side) share their direction
            "busy",  # log of the energy of a block that is among the busiest
            "ridged",  # bright against dark lines
            "toward",  # correlation of gradient and level: edges lie where it is bright
        )
    ),
)

# One line per statistic: mean and deviation of the fitted data, slope, bend.
_CONSTANT = -2.5361
_TABLE = np.array(
    [
        (0.3219, 0.2291, -0.4108, 0.1535),  # side_darkest
        (0.4336, 0.2414, -0.2766, 0.3048),  # side_second
        (0.5381, 0.2420, 0.2435, -0.3582),  # side_third
        (0.5548, 0.2886, -0.3971, -0.0120),  # corner_third
        (0.6847, 0.2746, 0.3722, 0.1711),  # corner_brightest
        (0.3217, 0.2459, -0.0818, 0.1231),  # level_25
        (0.4910, 0.2675, -0.6416, -0.1243),  # level_50
        (0.1172, 0.1734, -0.6249, 0.0809),  # white
        (0.2973, 0.1948, 1.2209, -0.0575),  # peak
        (2.2137, 0.4995, 0.9087, -0.1006),  # entropy
        (0.2534, 0.0562, 0.4871, -0.0048),  # spread
        (0.7486, 0.1987, -0.7085, -0.1405),  # alike_2
        (0.3269, 0.2505, -0.2574, -0.0780),  # alike_8
        (-3.2172, 1.0463, -0.1489, -0.2442),  # edge_50_fine
        (-1.5419, 0.4973, 0.0437, -0.1163),  # edge_90_fine
        (-0.9549, 0.4211, 0.1705, -0.1855),  # edge_98_fine
        (-3.2844, 0.6419, -0.7497, -0.0158),  # curved_fine
        (-1.5997, 0.6320, -0.3185, -0.9884),  # texture_fine
        (0.7324, 0.1533, 1.3254, -0.0765),  # along_fine
        (-3.0957, 0.7966, -0.2274, 0.4763),  # busy_fine
        (0.0031, 0.1309, 0.3524, -0.2423),  # ridged_fine
        (0.0152, 0.3445, 1.2919, -0.1175),  # toward_fine
        (-2.6515, 1.0042, 0.4375, 0.1710),  # edge_50_coarse
        (-1.0926, 0.4213, -0.2169, -0.0256),  # edge_90_coarse
        (-0.5957, 0.3544, -0.8381, -0.0547),  # edge_98_coarse
        (-2.3734, 0.6138, -0.7857, -0.9542),  # curved_coarse
        (-0.6404, 0.6754, -0.2283, 0.0720),  # texture_coarse
        (0.7664, 0.1350, -0.0345, 0.0747),  # along_coarse
        (-2.2543, 0.7042, -0.4908, -0.2081),  # busy_coarse
        (0.0045, 0.1391, -0.8880, 0.0674),  # ridged_coarse
        (0.0161, 0.3499, -0.3992, 0.2200),  # toward_coarse
    ]
).T  # (4, len(STATISTICS))


def classify(image: np.ndarray, colors: np.ndarray | None = None) -> str:
    """Classify an image as one of NAMES.

    Args:
        image: Gray image of radiograph.read, uint8 (S, S).
        colors: RadiographDetails.colors of its file, uint8 (n, n, 3), or None.
    """
    statistics = compute_statistics(image)
    if statistics is None:
        return "blank"
    if colors is not None and is_colored(colors):
        return "not_a_radiograph"
    upright, inverse = compute_scores(statistics)
    if max(upright, inverse) < THRESHOLD:
        return "not_a_radiograph"
    return "inverted" if inverse > upright + MARGIN else "ok"


def is_colored(colors: np.ndarray) -> bool:
    """Return whether COLORED_SHARE of `colors`, uint8 (n, n, 3), lie COLORED off a smooth curve from gray level to color."""
    red, green, blue = colors.reshape(-1, 3).astype(np.float64).T
    gray = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = np.stack([red - gray, blue - gray], 1)  # (n * n, 2), 0 for a gray pixel
    if np.abs(chroma).max() <= COLORED:
        return False
    level = gray[:, None] / 255
    powers = np.concatenate([np.ones_like(level), level, level * level], 1)
    distance = np.zeros(len(gray))
    for _ in range(3):  # fitted to nearby pixels only, so that a few saturated ones do not bend the curve
        is_near = distance <= np.quantile(distance, 1 - COLORED_SHARE)
        curve = np.linalg.lstsq(powers[is_near], chroma[is_near], rcond=None)[0]
        distance = np.hypot(*(chroma - powers @ curve).T)
    return bool(np.quantile(distance, 1 - COLORED_SHARE) > COLORED)


def compute_scores(statistics: np.ndarray, constant: float = _CONSTANT, table: np.ndarray = _TABLE) -> np.ndarray:
    """Score statistics, (..., len(STATISTICS)) -> (...). A radiograph's score is high."""
    mean, deviation, slope, bend = table
    value = np.clip((statistics - mean) / deviation, -MOST, MOST)
    return value @ slope + (value * value - 1) @ bend + constant


def compute_statistics(image: np.ndarray) -> np.ndarray | None:
    """Measure the exposed field and its inverse. Return float64 (2, len(STATISTICS)), or None for a blank image."""
    x = _resize(image)
    levels = _levels(x)
    if levels is None:
        return None
    field = _exposed_field(np.clip((x - levels[0]) / (levels[1] - levels[0]), 0, 1), image.shape)
    if field is not None:
        cropped = _resize(image[field])
        cropped_levels = _levels(cropped)
        x, levels = (cropped, cropped_levels) if cropped_levels is not None else (x, levels)
    low, high = levels
    x = np.clip((x - low) / (high - low), 0, 1)
    order = np.sort(x, axis=None)
    tones, (shapes, odd) = _tones(x, order), _shapes(x)
    invariant = [*_histogram(order), *_autocorrelation(x)]
    return np.array(
        [
            [*tones[k], *invariant, *shapes[0], *(sign * odd[0]), *shapes[1], *(sign * odd[1])]
            for k, sign in enumerate((1, -1))
        ],
        np.float64,
    )


def _resize(image: np.ndarray) -> np.ndarray:
    """Resize to float32 (64, 64), by area averaging or, if smaller, bilinear."""
    resampling = Image.Resampling.BOX if min(image.shape) >= SIDE_PX else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((SIDE_PX, SIDE_PX), resampling), np.float32)


def _levels(x: np.ndarray) -> tuple[float, float] | None:
    """Return the 1 % and the 99 % level, or None where they differ by less than LEAST_SPREAD."""
    order = np.sort(x, axis=None)
    low, high = float(order[_quantile_index(order, 0.01)]), float(order[_quantile_index(order, 0.99)])
    return (low, high) if high - low >= LEAST_SPREAD else None


def _exposed_field(x: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, slice] | None:
    """Return the rows and columns within the borders of an image of `shape`, or None where it has no borders.

    `x` is the image from 0 to 1 at (64, 64). A round field gives the square within its circle.
    """
    extreme = np.stack([x <= BORDER_LEVEL, x >= 1 - BORDER_LEVEL])  # (2, 64, 64): darkest, brightest
    y0, y1, x0, x1 = 0, SIDE_PX, 0, SIDE_PX
    previous = None
    while previous != (y0, y1, x0, x1):  # cropping columns may turn further rows into borders
        previous = (y0, y1, x0, x1)
        inner = extreme[:, y0:y1, x0:x1]
        rows = np.flatnonzero((inner.mean(2) < BORDER_SHARE).all(0))
        columns = np.flatnonzero((inner.mean(1) < BORDER_SHARE).all(0))
        if min(len(rows), len(columns)) < LEAST_FIELD:
            return None
        y0, y1 = y0 + int(rows[0]), y0 + int(rows[-1]) + 1
        x0, x1 = x0 + int(columns[0]), x0 + int(columns[-1]) + 1
    spans = [_trim(y0, y1, FADE), _trim(x0, x1, FADE)]
    if _is_round(extreme[:, y0:y1, x0:x1]):
        spans = [_trim(*span, round((span[1] - span[0]) * (1 - 0.5**0.5) / 2), always=True) for span in spans]
    if spans == [(0, SIDE_PX), (0, SIDE_PX)] or min(last - first for first, last in spans) < LEAST_FIELD:
        return None
    first, second = (
        slice(-(-start * side // SIDE_PX), end * side // SIDE_PX)
        for (start, end), side in zip(spans, shape, strict=True)
    )
    return first, second


def _trim(first: int, last: int, cells: int, *, always: bool = False) -> tuple[int, int]:
    """Shorten a span by `cells` at each end that is not the image's edge."""
    return first + cells * (always or first > 0), last - cells * (always or last < SIDE_PX)


def _is_round(extreme: np.ndarray) -> bool:
    """Return whether the field outside its inscribed ellipse is all dark or all bright; `extreme` is (2, h, w)."""
    if not extreme[:, [0, 0, -1, -1], [0, -1, 0, -1]].all(1).any():  # the corners
        return False
    y, x = (np.linspace(-1, 1, length) ** 2 for length in extreme.shape[1:])
    return bool((extreme[:, y[:, None] + x > 1.05].mean(1) >= BORDER_SHARE).any())


def _quantile_index(order: np.ndarray, quantile: float) -> int:
    return round(quantile * (order.size - 1))


def _tones(x: np.ndarray, order: np.ndarray) -> list[list[float]]:
    """Measure brightness, for the image and for its inverse."""
    block = x.reshape(8, 8, 8, 8).mean((1, 3))
    side = np.sort([x[:4].mean(), x[-4:].mean(), x[:, :4].mean(), x[:, -4:].mean()])
    corner = np.sort(block[[0, 0, -1, -1], [0, -1, 0, -1]])
    level = order[[_quantile_index(order, quantile) for quantile in (0.25, 0.5, 0.75)]]
    white, black = float((order >= 15 / 16).mean()), float((order <= 1 / 16).mean())
    return [
        [*side[:3], *corner[2:], *level[:2], white],
        [*(1 - side[:0:-1]), *(1 - corner[1::-1]), *(1 - level[:0:-1]), black],
    ]


def _histogram(order: np.ndarray) -> list[float]:
    share = np.bincount((order * 15.999).astype(np.int64), minlength=16) / order.size
    return [share.max(), -(share * np.log(share + 1e-6)).sum(), order.std()]


def _autocorrelation(x: np.ndarray) -> list[float]:
    z = x - x.mean()
    energy = (z * z).mean()
    return [min((z[lag:] * z[:-lag]).mean(), (z[:, lag:] * z[:, :-lag]).mean()) / energy for lag in (2, 8)]


def _shapes(x: np.ndarray) -> tuple[list[list[float]], list[np.ndarray]]:
    """Measure both scales: statistics that the inverse shares with the image, and those whose sign it flips."""
    shared, odd = [], []
    padded = np.pad(x, 1, mode="edge")
    x = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    x = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
    for _ in range(2):
        padded = np.pad(x, 1, mode="edge")
        west, east, north, south = padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]
        dx, dy = east - west, south - north
        xx, yy, xy = dx * dx, dy * dy, dx * dy
        edge = np.sqrt(xx + yy)
        laplacian = 4 * x - west - east - north - south
        energy, curvature = (xx + yy).sum(), (laplacian * laplacian).sum()
        xx, yy, xy = (_sum_blocks(product) for product in (xx, yy, xy))
        sharp, busy = np.sort(edge, axis=None), np.sort(xx + yy, axis=None)
        aligned = np.sqrt((xx - yy) ** 2 + 4 * xy * xy).sum()
        quantiles = [sharp[_quantile_index(sharp, q)] for q in (0.5, 0.9, 0.98)]
        logs = [*quantiles, np.abs(laplacian).mean(), curvature / (energy + 1e-3)]
        size = edge.size / busy.size
        shared.append([*np.log(np.array(logs) + 1e-3), aligned / (energy + 1e-3), np.log(busy[57] / size + 1e-4)])
        ridged = (laplacian * np.abs(laplacian)).sum() / (curvature + 1e-3)
        toward = ((edge - edge.mean()) * (x - x.mean())).mean() / (edge.std() * x.std() + 1e-4)
        odd.append(np.array([ridged, toward]))
        half = len(x) // 2
        x = x.reshape(half, 2, half, 2).mean((1, 3))
    return shared, odd


def _sum_blocks(x: np.ndarray) -> np.ndarray:
    side = len(x) // 8
    return x.reshape(8, side, 8, side).sum((1, 3))
