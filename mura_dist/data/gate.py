"""Does a picture look like a bone radiograph? Some thirty statistics of it at 64 x 64, and a sum with known weights.

    image (S, S) -> box-reduced to 64 x 64, stretched from its 1 % to its 99 % level -> 31 statistics, of it and of its inverse
        -> each by its mean and deviation, kept within +-3 -> sum of slope x value + bend x (value^2 - 1) -> score

A file in colours that its grey levels do not explain is no radiograph, whatever its score: a tint of film or screen is explained,
an arrow or a logo is small.

A radiograph's score is high, a photograph's, a page's, noise's low. Where the better of the two scores is below THRESHOLD,
the picture is `not_a_radiograph`; where the inverse is better by MARGIN, it is `inverted`, which warns and no more. Nothing
depends on how the picture is turned or flipped. `tools/fit_gate.py` made the table below and prints it and what it is worth;
docs/gate.md has those numbers, and what this cannot do.
"""

import numpy as np
from PIL import Image

NAMES = ("ok", "inverted", "not_a_radiograph", "blank")
BLOCKING = ("not_a_radiograph", "blank")
WORDS = {
    "inverted": "its contrast looks inverted (bone dark): the model may be wrong on it",
    "not_a_radiograph": "this does not look like a bone radiograph",
    "blank": "this does not look like a bone radiograph: it is blank, one grey level all over",
}

VERSION = 1  # of the verdicts: another number, other words for the same picture
SIDE_PX = 64
LEAST_SPREAD = 4  # grey levels of 255 between the 1 % and the 99 % level; below, the picture is blank
MOST = 3.0  # deviations: what lies farther out than any radiograph counts no more
THRESHOLD, MARGIN = -3.5, 1.0
# A picture is coloured where so large a share of its pixels is so many levels of 255 off the colour of their grey level.
COLOURED_SHARE, COLOURED = 0.2, 6.0

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
_CONSTANT = -2.6101
_TABLE = np.array(
    [
        (0.3058, 0.2480, -0.5621, 0.2862),  # side_darkest
        (0.4253, 0.2754, -0.0851, 0.2354),  # side_second
        (0.5420, 0.2774, 0.5239, 0.1216),  # side_third
        (0.5550, 0.3117, -0.3474, -0.2619),  # corner_third
        (0.6789, 0.2924, 0.2564, 0.0172),  # corner_brightest
        (0.3079, 0.2519, -0.5037, -0.0852),  # level_25
        (0.4896, 0.2717, -0.6751, -0.0811),  # level_50
        (0.1328, 0.1837, -0.4737, 0.1311),  # white
        (0.3127, 0.1976, 1.1654, -0.0755),  # peak
        (2.1708, 0.5136, 0.7927, -0.1166),  # entropy
        (0.2634, 0.0622, 0.3258, 0.1018),  # spread
        (0.7502, 0.1943, -0.7103, -0.0859),  # alike_2
        (0.3361, 0.2399, -0.2079, -0.1024),  # alike_8
        (-3.2860, 1.1021, -0.2844, -0.2053),  # edge_50_fine
        (-1.5032, 0.4895, 0.2345, -0.2025),  # edge_90_fine
        (-0.8997, 0.4126, -0.0224, 0.1323),  # edge_98_fine
        (-3.2577, 0.6161, -0.4049, -0.2874),  # curved_fine
        (-1.5899, 0.5983, -0.4562, -0.9091),  # texture_fine
        (0.7407, 0.1538, 1.1200, -0.2184),  # along_fine
        (-2.9931, 0.7700, 0.0826, 0.3340),  # busy_fine
        (0.0038, 0.1281, 0.0120, -0.1309),  # ridged_fine
        (0.0157, 0.3384, 1.2051, -0.1457),  # toward_fine
        (-2.6836, 1.0383, 0.4278, 0.1460),  # edge_50_coarse
        (-1.0408, 0.4247, -0.4090, 0.0814),  # edge_90_coarse
        (-0.5529, 0.3468, -0.8881, -0.3039),  # edge_98_coarse
        (-2.3440, 0.5891, -0.8523, -0.6485),  # curved_coarse
        (-0.6370, 0.6420, -0.6103, -0.0200),  # texture_coarse
        (0.7743, 0.1357, 0.1867, -0.0676),  # along_coarse
        (-2.1542, 0.6942, -0.5537, -0.1515),  # busy_coarse
        (0.0048, 0.1401, -0.4536, 0.0081),  # ridged_coarse
        (0.0166, 0.3455, -0.4525, 0.1760),  # toward_coarse
    ]
).T  # (4, len(STATISTICS))


def verdict(image: np.ndarray, colours: np.ndarray | None = None) -> str:
    """image (S, S) uint8 grey, as radiograph.read gives it -> one of NAMES. colours: radiograph.Look's, with a file at hand."""
    found = statistics(image)
    if found is None:
        return "blank"
    if colours is not None and coloured(colours):
        return "not_a_radiograph"
    upright, inverse = scores(found)
    if max(upright, inverse) < THRESHOLD:
        return "not_a_radiograph"
    return "inverted" if inverse > upright + MARGIN else "ok"


def coloured(colours: np.ndarray) -> bool:
    """colours (n, n, 3) uint8: whether COLOURED_SHARE of them are COLOURED off a smooth curve, grey level to colour."""
    red, green, blue = colours.reshape(-1, 3).astype(np.float64).T
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    off = np.stack([red - grey, blue - grey], 1)  # (n * n, 2): nothing of a grey pixel
    if np.abs(off).max() <= COLOURED:
        return False
    level = grey[:, None] / 255
    powers = np.concatenate([np.ones_like(level), level, level * level], 1)
    far = np.zeros(len(grey))
    for _ in range(3):  # the curve of those that lie near it: a few loud pixels must not bend it
        near = far <= np.quantile(far, 1 - COLOURED_SHARE)
        curve = np.linalg.lstsq(powers[near], off[near], rcond=None)[0]
        far = np.hypot(*(off - powers @ curve).T)
    return bool(np.quantile(far, 1 - COLOURED_SHARE) > COLOURED)


def scores(found: np.ndarray, constant: float = _CONSTANT, table: np.ndarray = _TABLE) -> np.ndarray:
    """(..., len(STATISTICS)) -> (...): how much each looks like a bone radiograph."""
    mean, deviation, slope, bend = table
    value = np.clip((found - mean) / deviation, -MOST, MOST)
    return value @ slope + (value * value - 1) @ bend + constant


def statistics(image: np.ndarray) -> np.ndarray | None:
    """(2, len(STATISTICS)) float64: of the picture, and of its inverse; None of a blank one."""
    small = Image.fromarray(np.ascontiguousarray(image)).resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
    x = np.asarray(small, np.float32)  # (64, 64)
    order = np.sort(x, axis=None)
    low, high = order[_place(order, 0.01)], order[_place(order, 0.99)]
    if high - low < LEAST_SPREAD:
        return None
    x, order = (np.clip((each - low) / (high - low), 0, 1) for each in (x, order))
    tones, (shapes, odd) = _tones(x, order), _shapes(x)
    either = [*_histogram(order), *_alike(x)]
    return np.array(
        [
            [*tones[k], *either, *shapes[0], *(sign * odd[0]), *shapes[1], *(sign * odd[1])]
            for k, sign in enumerate((1, -1))
        ],
        np.float64,
    )


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
