"""Does a picture look like a bone radiograph? Some thirty statistics of it at 64 x 64, and a sum with known weights.

    image (S, S) -> the exposed field, without borders that are all white or all black -> reduced to 64 x 64
        -> stretched from its 1 % to its 99 % level -> 31 statistics, of it and of its inverse
        -> each by its mean and deviation, kept within +-3 -> sum of slope x value + bend x (value^2 - 1) -> score

A file in colors that its gray levels do not explain is no radiograph, whatever its score: a tint of film or screen is explained,
an arrow or a logo is small.

A radiograph's score is high, a photograph's, a page's, noise's low. Where the better of the two scores is below THRESHOLD,
the picture is `not_a_radiograph`; where the inverse is better by MARGIN, it is `inverted`, which warns and no more. Nothing
depends on how the picture is turned or flipped. `tools/fit_gate.py` made the table below and prints it and what it is worth;
docs/benchmarks.md has those numbers, docs/gate.md the limits.
"""

import numpy as np
from PIL import Image

NAMES = ("ok", "inverted", "not_a_radiograph", "blank")
BLOCKING = ("not_a_radiograph", "blank")
MESSAGES = {
    "inverted": "its contrast looks inverted (bone dark): the model may be wrong on it",
    "not_a_radiograph": "this does not look like a bone radiograph",
    "blank": "this does not look like a bone radiograph: it is blank, one gray level all over",
}

VERSION = 2  # of the verdicts: another number, other words for the same picture
SIDE_PX = 64
LEAST_SPREAD = 4  # gray levels of 255 between the 1 % and the 99 % level; below, the picture is blank
MOST = 3.0  # deviations: what lies farther out than any radiograph counts no more
THRESHOLD, MARGIN = -3.5, 1.0
# A picture is colored where so large a share of its pixels is so many levels of 255 off the color of their gray level.
COLORED_SHARE, COLORED = 0.2, 6.0
# A border: rows or columns along a side, of which so large a share lies so near to the darkest or the brightest level.
BORDER_SHARE, BORDER_LEVEL = 0.95, 0.03
FADE, LEAST_FIELD = 2, 16  # of 64 rows or columns: from a border to the field; a smaller field does not count

# What is measured. Names that end in _fine are of the picture at 64 x 64, in _coarse at 32 x 32; both a little smoothed.
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
            "ridged",  # bright lines against dark ones
            "toward",  # correlation of gradient and level: edges lie where it is bright
        )
    ),
)

# One line a statistic: mean and deviation of what it was fitted to, slope, bend.
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
    """image (S, S) uint8 gray, as radiograph.read gives it -> one of NAMES. colors: radiograph.RadiographDetails's, with a file at hand."""
    found = compute_statistics(image)
    if found is None:
        return "blank"
    if colors is not None and is_colored(colors):
        return "not_a_radiograph"
    upright, inverse = compute_scores(found)
    if max(upright, inverse) < THRESHOLD:
        return "not_a_radiograph"
    return "inverted" if inverse > upright + MARGIN else "ok"


def is_colored(colors: np.ndarray) -> bool:
    """colors (n, n, 3) uint8: whether COLORED_SHARE of them are COLORED off a smooth curve, gray level to color."""
    red, green, blue = colors.reshape(-1, 3).astype(np.float64).T
    gray = 0.299 * red + 0.587 * green + 0.114 * blue
    off = np.stack([red - gray, blue - gray], 1)  # (n * n, 2): nothing of a gray pixel
    if np.abs(off).max() <= COLORED:
        return False
    level = gray[:, None] / 255
    powers = np.concatenate([np.ones_like(level), level, level * level], 1)
    far = np.zeros(len(gray))
    for _ in range(3):  # the curve of those that lie near it: a few loud pixels must not bend it
        near = far <= np.quantile(far, 1 - COLORED_SHARE)
        curve = np.linalg.lstsq(powers[near], off[near], rcond=None)[0]
        far = np.hypot(*(off - powers @ curve).T)
    return bool(np.quantile(far, 1 - COLORED_SHARE) > COLORED)


def compute_scores(found: np.ndarray, constant: float = _CONSTANT, table: np.ndarray = _TABLE) -> np.ndarray:
    """(..., len(STATISTICS)) -> (...): how much each looks like a bone radiograph."""
    mean, deviation, slope, bend = table
    value = np.clip((found - mean) / deviation, -MOST, MOST)
    return value @ slope + (value * value - 1) @ bend + constant


def compute_statistics(image: np.ndarray) -> np.ndarray | None:
    """(2, len(STATISTICS)) float64: of the exposed field, and of its inverse; None of a blank one."""
    x = _reduced(image)
    levels = _levels(x)
    if levels is None:
        return None
    field = _exposed_field(np.clip((x - levels[0]) / (levels[1] - levels[0]), 0, 1), image.shape)
    if field is not None:
        within = _reduced(image[field])
        of_field = _levels(within)
        x, levels = (within, of_field) if of_field is not None else (x, levels)
    low, high = levels
    x = np.clip((x - low) / (high - low), 0, 1)
    order = np.sort(x, axis=None)
    tones, (shapes, odd) = _tones(x, order), _shapes(x)
    either = [*_histogram(order), *_alike(x)]
    return np.array(
        [
            [*tones[k], *either, *shapes[0], *(sign * odd[0]), *shapes[1], *(sign * odd[1])]
            for k, sign in enumerate((1, -1))
        ],
        np.float64,
    )


def _reduced(image: np.ndarray) -> np.ndarray:
    """(64, 64) float32; what is smaller is enlarged without steps."""
    how = Image.Resampling.BOX if min(image.shape) >= SIDE_PX else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((SIDE_PX, SIDE_PX), how), np.float32)


def _levels(x: np.ndarray) -> tuple[float, float] | None:
    """The 1 % and the 99 % level; None where they are LEAST_SPREAD apart or less."""
    order = np.sort(x, axis=None)
    low, high = float(order[_place(order, 0.01)]), float(order[_place(order, 0.99)])
    return (low, high) if high - low >= LEAST_SPREAD else None


def _exposed_field(x: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, slice] | None:
    """The rows and columns of an image of `shape` that lie within its borders; None where it has none.

    x (64, 64): the image from 0 to 1. Of a round field the square within the circle is returned.
    """
    extreme = np.stack([x <= BORDER_LEVEL, x >= 1 - BORDER_LEVEL])  # (2, 64, 64): darkest, brightest
    top, bottom, left, right = 0, SIDE_PX, 0, SIDE_PX
    before = None
    while before != (top, bottom, left, right):  # a row that is no border may be one within the columns that are left
        before = (top, bottom, left, right)
        inner = extreme[:, top:bottom, left:right]
        rows = np.flatnonzero((inner.mean(2) < BORDER_SHARE).all(0))
        columns = np.flatnonzero((inner.mean(1) < BORDER_SHARE).all(0))
        if min(len(rows), len(columns)) < LEAST_FIELD:
            return None
        top, bottom = top + int(rows[0]), top + int(rows[-1]) + 1
        left, right = left + int(columns[0]), left + int(columns[-1]) + 1
    spans = [_trimmed(top, bottom, FADE), _trimmed(left, right, FADE)]
    if _is_round(extreme[:, top:bottom, left:right]):
        spans = [_trimmed(*span, round((span[1] - span[0]) * (1 - 0.5**0.5) / 2), always=True) for span in spans]
    if spans == [(0, SIDE_PX), (0, SIDE_PX)] or min(last - first for first, last in spans) < LEAST_FIELD:
        return None
    first, second = (
        slice(-(-start * side // SIDE_PX), end * side // SIDE_PX)
        for (start, end), side in zip(spans, shape, strict=True)
    )
    return first, second


def _trimmed(first: int, last: int, cells: int, *, always: bool = False) -> tuple[int, int]:
    """A span less so many cells at each end that is not the image's."""
    return first + cells * (always or first > 0), last - cells * (always or last < SIDE_PX)


def _is_round(extreme: np.ndarray) -> bool:
    """extreme (2, h, w): whether what lies outside of the ellipse in a field is all dark, or all bright."""
    if not extreme[:, [0, 0, -1, -1], [0, -1, 0, -1]].all(1).any():  # the corners: most pictures end here
        return False
    y, x = (np.linspace(-1, 1, length) ** 2 for length in extreme.shape[1:])
    return bool((extreme[:, y[:, None] + x > 1.05].mean(1) >= BORDER_SHARE).any())


def _place(order: np.ndarray, quantile: float) -> int:
    return round(quantile * (order.size - 1))


def _tones(x: np.ndarray, order: np.ndarray) -> list[list[float]]:
    """What depends on light and dark, of the picture and of its inverse."""
    block = x.reshape(8, 8, 8, 8).mean((1, 3))
    side = np.sort([x[:4].mean(), x[-4:].mean(), x[:, :4].mean(), x[:, -4:].mean()])
    corner = np.sort(block[[0, 0, -1, -1], [0, -1, 0, -1]])
    level = order[[_place(order, quantile) for quantile in (0.25, 0.5, 0.75)]]
    white, black = float((order >= 15 / 16).mean()), float((order <= 1 / 16).mean())
    return [
        [*side[:3], *corner[2:], *level[:2], white],
        [*(1 - side[:0:-1]), *(1 - corner[1::-1]), *(1 - level[:0:-1]), black],
    ]


def _histogram(order: np.ndarray) -> list[float]:
    share = np.bincount((order * 15.999).astype(np.int64), minlength=16) / order.size
    return [share.max(), -(share * np.log(share + 1e-6)).sum(), order.std()]


def _alike(x: np.ndarray) -> list[float]:
    z = x - x.mean()
    energy = (z * z).mean()
    return [min((z[lag:] * z[:-lag]).mean(), (z[:, lag:] * z[:, :-lag]).mean()) / energy for lag in (2, 8)]


def _shapes(x: np.ndarray) -> tuple[list[list[float]], list[np.ndarray]]:
    """Of the two scales: what the inverse shares with the picture, and what changes its sign."""
    shared, odd = [], []
    padded = np.pad(x, 1, mode="edge")
    x = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    x = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
    for _ in range(2):
        padded = np.pad(x, 1, mode="edge")
        left, right, up, down = padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]
        across, along = right - left, down - up
        xx, yy, xy = across * across, along * along, across * along
        edge = np.sqrt(xx + yy)
        curve = 4 * x - left - right - up - down
        energy, bent = (xx + yy).sum(), (curve * curve).sum()
        xx, yy, xy = (_blocks(each) for each in (xx, yy, xy))
        sharp, busy = np.sort(edge, axis=None), np.sort(xx + yy, axis=None)
        aligned = np.sqrt((xx - yy) ** 2 + 4 * xy * xy).sum()
        logs = [*(sharp[_place(sharp, q)] for q in (0.5, 0.9, 0.98)), np.abs(curve).mean(), bent / (energy + 1e-3)]
        size = edge.size / busy.size
        shared.append([*np.log(np.array(logs) + 1e-3), aligned / (energy + 1e-3), np.log(busy[57] / size + 1e-4)])
        ridged = (curve * np.abs(curve)).sum() / (bent + 1e-3)
        toward = ((edge - edge.mean()) * (x - x.mean())).mean() / (edge.std() * x.std() + 1e-4)
        odd.append(np.array([ridged, toward]))
        half = len(x) // 2
        x = x.reshape(half, 2, half, 2).mean((1, 3))
    return shared, odd


def _blocks(x: np.ndarray) -> np.ndarray:
    side = len(x) // 8
    return x.reshape(8, side, 8, side).sum((1, 3))
