"""The table of mura_dist/data/gate.py: fits it, measures it, prints both.

python tools/fit_gate.py RADIOGRAPHS PHOTOGRAPHS [--also NAME=FOLDER ...]

    folders of files -> radiograph.read at 320, 128 and 64 px -> the same varied, drawings of no radiograph, phantoms
        -> gate.compute_statistics -> logistic regression on each statistic and its square -> the table
        -> the same by five folds, whole patients apart -> false alarms and misses, with Wilson's 95 % intervals

RADIOGRAPHS is in MURA's layout: `patient...` in a path says who is never on both sides of a fold. --also: folders that are only
measured, with the final table. The same files, NumPy, Pillow and scikit-learn give the same numbers. About ten minutes.
"""

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.linear_model import LogisticRegression

from mura_dist.data import gate, phantoms, radiograph
from mura_dist.metrics.intervals import compute_wilson_interval

SIZES, FOLDS, VARIED, DRAWINGS = (320, 128, 64), 5, (8, 3), 1500
# What each kind weighs in the fit, and its label; inverted radiographs teach which way round.
KINDS = {
    "radiographs": (1.0, 1),
    "phantoms": (0.15, 1),
    "inverted": (0.1, 0),
    "photographs": (1.0, 0),
    "drawn": (0.7, 0),
}
SIZE_NAMES = [f"{size} px" for size in SIZES]
STRENGTH = 0.03  # of the data against the penalty: scikit-learn's C
Random = np.random.Generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("radiographs", type=Path)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--also", action="append", default=[], metavar="NAME=FOLDER")
    asked = parser.parse_args()
    xrays, patients, types = Pictures(asked.radiographs, 1, VARIED[0]), [], []
    for name in xrays.names:
        patients.append((re.findall(r"patient\w+", name) or [name])[-1])
        types.append((re.findall(r"XR_\w+", name) or [""])[-1])
    photos = Pictures(asked.photographs, 2, VARIED[1])
    drawn = [drawing(np.random.default_rng((3, number))) for number in range(DRAWINGS)]
    drawn = [
        each if number % 2 else vary(each, np.random.default_rng((4, number))) for number, each in enumerate(drawn)
    ]
    others = np.array([values for each in drawn if (values := gate.compute_statistics(each)) is not None])
    with tempfile.TemporaryDirectory() as folder:
        phantoms.draw(Path(folder) / "set", studies=150, size=128, seed=0)
        bones = Pictures(Path(folder) / "set", 5, 1)

    fold = _folds(np.array(patients))
    sides = (
        fold,
        np.arange(len(photos.names)) % FOLDS,
        np.arange(len(others)) % FOLDS,
        np.arange(len(bones.names)) % FOLDS,
    )
    weight = np.array([1 / Counter(types)[kind] for kind in types])

    def fitted(without: int) -> tuple[float, np.ndarray]:
        a, b, c, d = (side != without for side in sides)
        return fit(xrays.of(a), np.repeat(weight[a], xrays.each), photos.of(b), others[c], bones.of(d))

    results: dict[str, list[np.ndarray]] = {}
    for number in range(FOLDS):
        table = fitted(number)
        for name, pictures, side in (
            ("radiographs", xrays, sides[0]),
            ("photographs", photos, sides[1]),
            ("phantoms", bones, sides[3]),
        ):
            for kind, values in pictures.by_kind(side == number):
                scored = gate.compute_scores(values, *table)
                results.setdefault(f"{name}, {kind}", []).append(scored.reshape(-1, 2))
                if kind in SIZE_NAMES:
                    with_colours = pictures.refused(scored, side == number)
                    results.setdefault(f"{name}, {kind}, and colours", []).append(with_colours)
        results.setdefault("drawings", []).append(gate.compute_scores(others[sides[2] == number], *table))
    print(f"held out by {FOLDS} folds")
    for name, found in sorted(results.items()):
        tell(name, np.concatenate(found))
    final = fitted(-1)
    print(f"with the final table; seen by the fit: {len(xrays.names)} radiographs, {len(photos.names)} photographs")
    tell("radiographs", gate.compute_scores(xrays.plain[320], *final))
    tell("photographs", gate.compute_scores(photos.plain[320], *final))
    print(f"_CONSTANT = {final[0]:.4f}")
    for name, row in zip(gate.STATISTICS, final[1].T, strict=True):
        print(f"    ({', '.join(f'{number:.4f}' for number in row)}),  # {name}", flush=True)
    for word in asked.also:
        name, _, folder = word.partition("=")
        also = Pictures(Path(folder), 6, 0)
        for kind, values in also.by_kind(np.arange(len(also.names)) >= 0):
            scored = gate.compute_scores(values, *final)
            tell(f"{name}, {kind}", also.refused(scored), also.num_blank)


class Pictures:
    """The statistics of a folder's pictures: plain[size] and framed[name] (n, 2, k), varied (n, v, 2, k).

    Blank ones are left out, and counted.
    """

    def __init__(self, folder: Path, seed: int, num_varied: int) -> None:
        self.names: list[str] = []
        self.num_blank, self.each = 0, len(SIZES) + num_varied
        plain, varied, framed, coloured = [], [], [], []
        for number, path in enumerate(sorted(each for each in folder.rglob("*") if each.is_file())):
            try:
                looks = [radiograph.read_details(path, size) for size in SIZES]
            except radiograph.UnreadableFileError:
                continue
            images = [look.image for look in looks]
            values = [gate.compute_statistics(image) for image in images]
            if any(value is None for value in values):
                self.num_blank += 1
                continue
            self.names.append(path.as_posix())
            coloured.append(looks[0].colors is not None and gate.is_colored(looks[0].colors))
            plain.append(values)
            varied.append([_sure(images[0], np.random.default_rng((seed, number, k))) for k in range(num_varied)])
            framed.append(
                [_framed(images[0], frame, np.random.default_rng((seed, number))) for frame in FRAMES.values()]
            )
        self.coloured = np.array(coloured, bool)
        shape = (len(self.names), -1, 2, len(gate.STATISTICS))
        self.plain = dict(zip(SIZES, np.array(plain, float).reshape(shape).swapaxes(0, 1), strict=True))
        self.varied = np.array(varied, float).reshape(len(self.names), num_varied, 2, len(gate.STATISTICS))
        self.framed = dict(zip(FRAMES, np.array(framed, float).reshape(shape).swapaxes(0, 1), strict=True))

    def of(self, side: np.ndarray) -> np.ndarray:
        """(m, 2, k): all of those pictures, plain and varied, picture by picture."""
        whole = np.concatenate([np.stack(list(self.plain.values()), 1), self.varied], 1)[side]
        return whole.reshape(-1, 2, len(gate.STATISTICS))

    def by_kind(self, side: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """By name, (..., 2, k): what is measured of some of those pictures; inverted is the same with its scores swapped."""
        kinds = [(f"{size} px", self.plain[size][side]) for size in SIZES]
        kinds += [("varied", self.varied[side])] if self.varied.size else []
        kinds += [(name, values[side]) for name, values in self.framed.items()]
        return kinds + [(f"{name}, inverted", values[..., ::-1, :]) for name, values in kinds]

    def refused(self, scores: np.ndarray, side: np.ndarray | None = None) -> np.ndarray:
        """(n, 2): scores at any size, those of files in colour as low as can be."""
        coloured = self.coloured if side is None else self.coloured[side]
        return np.where(coloured[:, None], -np.inf, scores)


def _framed(image: np.ndarray, frame: Callable[[np.ndarray, Random], np.ndarray], random: Random) -> np.ndarray:
    """Of a picture within a border; of the picture alone where too little of it is left."""
    found = gate.compute_statistics(frame(image, random))
    return _sure(image, random) if found is None else found


def _sure(image: np.ndarray, random: Random) -> np.ndarray:
    """Of a varied picture that is not blank."""
    while (found := gate.compute_statistics(vary(image, random))) is None:
        pass
    return found


def _folds(groups: np.ndarray) -> np.ndarray:
    names = np.unique(groups)
    place = dict(zip(names, np.random.default_rng(0).permutation(len(names)) % FOLDS, strict=True))
    return np.array([place[name] for name in groups])


def fit(
    xrays: np.ndarray, weight: np.ndarray, photos: np.ndarray, drawn: np.ndarray, bones: np.ndarray
) -> tuple[float, np.ndarray]:
    """Each (n, 2, k), weight (n,) of the radiographs -> constant, table (4, k) of gate.py. Photographs both ways round."""
    parts = {"radiographs": xrays[:, 0], "phantoms": bones[:, 0], "inverted": xrays[:, 1]}
    parts |= {name: each.reshape(-1, each.shape[-1]) for name, each in (("photographs", photos), ("drawn", drawn))}
    values = np.concatenate(list(parts.values()))
    label = np.concatenate([np.full(len(part), KINDS[name][1]) for name, part in parts.items()])
    shares = {name: np.full(len(part), KINDS[name][0] / len(part)) for name, part in parts.items()}
    shares["radiographs"] = weight / weight.sum()  # study types alike
    mean, deviation = values.mean(0), values.std(0)
    x = np.clip((values - mean) / deviation, -gate.MOST, gate.MOST)
    model = LogisticRegression(C=STRENGTH, max_iter=500)
    model.fit(np.hstack([x, x * x - 1]), label, sample_weight=np.concatenate(list(shares.values())) * len(x) / 2)
    slope, bend = model.coef_[0].reshape(2, -1)
    return round(float(model.intercept_[0]), 4), np.round([mean, deviation, slope, bend], 4)


def tell(name: str, scores: np.ndarray, num_blank: int = 0) -> None:
    """scores (..., 2): how many are refused, inverted, passed; the blank ones are refused."""
    upright, inverse = scores.reshape(-1, 2).T
    refused = np.maximum(upright, inverse) < gate.THRESHOLD
    inverted = int((~refused & (inverse > upright + gate.MARGIN)).sum())
    num, num_refused = len(refused) + num_blank, int(refused.sum()) + num_blank
    print(f"  {name}: n {num}", end=f", {num_blank} of them blank" if num_blank else "")
    for word, count in (("refused", num_refused), ("inverted", inverted), ("passed", num - num_refused)):
        low, high = compute_wilson_interval(count, num)
        print(f"; {word} {count} = {100 * count / num:.2f} % ({100 * low:.2f} to {100 * high:.2f})", end="")
    print()


# ---- what a radiograph, or a photograph, may have been through


def vary(image: np.ndarray, random: Random) -> np.ndarray:
    """Turned, flipped, cropped, processed, of another tone, with borders, labels and grain; (S, S), S one of four."""
    image = np.rot90(image, int(random.integers(4)))[:, :: random.choice([1, -1])]
    steps: list[tuple[float, Callable[[np.ndarray, Random], np.ndarray]]] = [
        (0.5, cropped),
        (0.35, processed),
        (0.6, toned),
        (0.3, bordered),
        (0.1, rounded),
        (0.3, labelled),
        (0.2, grainy),
    ]
    for share, step in steps:
        if random.random() < share:
            image = step(image, random)
    return resized(image, int(random.choice([64, 128, 224, 320])))


def resized(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.BILINEAR))


def cropped(image: np.ndarray, random: Random) -> np.ndarray:
    side = len(image)
    height, width = (int(side * random.uniform(0.3, 1)) for _ in range(2))
    top, left = int(random.integers(side - height + 1)), int(random.integers(side - width + 1))
    return resized(image[top : top + height, left : left + width], side)


def processed(image: np.ndarray, random: Random) -> np.ndarray:
    """What makers of detectors do: structures of one size raised or flattened."""
    image = np.ascontiguousarray(image)
    radius = float(len(image) * np.exp(random.uniform(np.log(0.01), np.log(0.15))))
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)), np.float32)
    amount = random.uniform(-0.5, 2.5)
    x = image + amount * (image - blurred) if random.random() < 0.6 else image - random.uniform(0.2, 0.9) * blurred
    low, high = np.percentile(x, [0.5, 99.5])
    return (np.clip((x - low) / max(high - low, 1), 0, 1) * 255).astype(np.uint8)


def toned(image: np.ndarray, random: Random) -> np.ndarray:
    x = (image / 255.0) ** np.exp(random.uniform(-0.9, 0.9))
    contrast = random.uniform(0.25, 1)
    x = random.uniform(0, 1 - contrast) + contrast * x
    if random.random() < 0.3:
        x = (x - 0.5) * random.uniform(1, 2) + random.uniform(0.3, 0.7)
    return (np.clip(x, 0, 1) * 255).astype(np.uint8)


def bordered(image: np.ndarray, random: Random) -> np.ndarray:
    level = int(random.choice([0, 255, int(random.integers(256))]))
    for _ in range(4):
        image = np.rot90(image).copy()
        if random.random() < 0.6:
            image[: int(len(image) * random.uniform(0.02, 0.2))] = level
    return image


def rounded(image: np.ndarray, random: Random) -> np.ndarray:
    """Round collimation, also of a circle that reaches beyond the sides."""
    return in_circle(image, random, int(random.choice([0, 255])), random.uniform(0.38, 0.65))


def in_circle(image: np.ndarray, random: Random, level: int, radius: float) -> np.ndarray:
    y, x = np.mgrid[: len(image), : len(image)] / len(image) - 0.5
    far = np.hypot(x - random.uniform(-0.02, 0.02), y - random.uniform(-0.02, 0.02)) > radius
    return np.where(far, np.uint8(level), image)


def unexposed(image: np.ndarray, random: Random, level: int, soft: bool) -> np.ndarray:
    """A border along one to four sides, of 3 to 30 % each; `soft`: it fades over 1 to 8 % more."""
    for turn in random.permutation(4)[: random.integers(1, 5)]:
        image = np.rot90(image, turn).copy()
        width, fade = int(len(image) * random.uniform(0.03, 0.3)), int(len(image) * random.uniform(0.01, 0.08)) * soft
        image[:width] = level
        share = np.linspace(0, 1, fade + 2)[1:-1, None]
        image[width : width + fade] = image[width : width + fade] * share + level * (1 - share)
        image = np.rot90(image, -turn)
    return image


# What is done to pictures of every set, each as it is and inverted afterwards: it is measured, not fitted to.
FRAMES: dict[str, Callable[[np.ndarray, Random], np.ndarray]] = {
    "white border": lambda image, random: unexposed(image, random, 255, False),
    "white border, soft": lambda image, random: unexposed(image, random, 255, True),
    "black border": lambda image, random: unexposed(image, random, 0, False),
    "black border, soft": lambda image, random: unexposed(image, random, 0, True),
    "white around a circle": lambda image, random: in_circle(image, random, 255, random.uniform(0.38, 0.5)),
    "black around a circle": lambda image, random: in_circle(image, random, 0, random.uniform(0.38, 0.5)),
}


def labelled(image: np.ndarray, random: Random) -> np.ndarray:
    image, side, level = image.copy(), len(image), int(random.choice([0, 255]))
    width, height = int(side * random.uniform(0.05, 0.25)), int(side * random.uniform(0.03, 0.1))
    left, top = int(random.integers(side - width)), int(random.integers(side - height))
    image[top : top + height, left : left + width] = level
    if random.random() < 0.5:
        image[top + height // 4 : top + height // 2 + 1, left + width // 8 : left + width * 3 // 4 : 2] = 255 - level
    return image


def grainy(image: np.ndarray, random: Random) -> np.ndarray:
    return np.clip(image + random.normal(0, random.uniform(1, 8), image.shape), 0, 255).astype(np.uint8)


# ---- what is no radiograph and no photograph


def drawing(random: Random, side: int = 320) -> np.ndarray:
    """Waves, ramps, noise, pages of words, shapes, stripes, charts."""
    kinds = (waves, ramp, noise, page, shapes, stripes, chart)
    x = kinds[int(random.integers(len(kinds)))](random, side)
    x = x - x.min()
    image = (255 * x / max(x.max(), 1e-6)).astype(np.uint8)
    if random.random() < 0.3:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(float(random.uniform(0.5, 8)))))
    return grainy(image, random) if random.random() < 0.3 else image


def waves(random: Random, side: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side] / side
    image = np.zeros((side, side))
    for turn in random.uniform(0, 6.3, random.integers(1, 4)):
        pace = random.uniform(0.2, 8) * np.pi
        image += random.uniform(0.2, 1) * np.cos(pace * (x * np.cos(turn) + y * np.sin(turn)) + random.uniform(0, 6.3))
    return image * np.hypot(x - random.random(), y - random.random()) if random.random() < 0.4 else image


def ramp(random: Random, side: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side] / side
    turn = random.uniform(0, 6.3)
    image = x * np.cos(turn) + y * np.sin(turn)
    if random.random() < 0.5:
        image = np.hypot(x - random.random(), y - random.random()) ** random.uniform(0.3, 2)
    return np.abs(image - image.mean()) if random.random() < 0.3 else image


def noise(random: Random, side: int) -> np.ndarray:
    grain = int(random.choice([4, 16, 64, side]))
    how = Image.Resampling.BICUBIC if random.random() < 0.5 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(random.normal(size=(grain, grain)).astype(np.float32)).resize((side, side), how))


def page(random: Random, side: int) -> np.ndarray:
    paper, size = Image.new("L", (side, side), 255), int(random.choice([8, 12, 16, 24, 40]))
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(size=size)
    for top in range(int(random.integers(30)), side, int(size * 1.3)):
        pen.text((int(random.integers(4, 60)), top), words(random, 13), fill=int(random.integers(120)), font=font)
    x = np.asarray(paper, np.float64)
    return -x if random.random() < 0.5 else x


def words(random: Random, most: int) -> str:
    letters = list("etaoinshrdlucmwfgypbvk,.0123456789")
    return " ".join(
        "".join(random.choice(letters, random.integers(1, 10))) for _ in range(random.integers(1, most + 1))
    )


def shapes(random: Random, side: int) -> np.ndarray:
    paper = Image.new("L", (side, side), int(random.integers(256)))
    pen = ImageDraw.Draw(paper)
    for _ in range(random.integers(1, 14)):
        corners, level = random.integers(-40, side, (2, 2)), int(random.integers(256))
        (left, top), (right, bottom) = corners.min(0).tolist(), (corners.max(0) + 1).tolist()
        match int(random.integers(4)):
            case 0:
                pen.rectangle((left, top, right, bottom), fill=level)
            case 1:
                pen.ellipse((left, top, right, bottom), fill=level)
            case 2:
                pen.line([tuple(corner) for corner in corners.tolist()], fill=level, width=int(random.integers(1, 12)))
            case _:
                font = ImageFont.load_default(size=int(random.choice([12, 30, 90, 200])))
                pen.text((left, top), words(random, 1), fill=level, font=font)
    return np.asarray(paper, np.float64)


def stripes(random: Random, side: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side] / side
    image = (x * random.integers(1, 24)).astype(int) % random.integers(2, 5)
    if random.random() < 0.5:
        return image + (y * random.integers(1, 24)).astype(int) % random.integers(2, 5) * random.uniform(-1, 1)
    return image.astype(np.float64)


def chart(random: Random, side: int) -> np.ndarray:
    paper = Image.new("L", (side, side), 255)
    pen = ImageDraw.Draw(paper)
    for _ in range(random.integers(1, 5)):
        heights = side * random.random() + np.cumsum(random.normal(size=20)) * side * 0.08
        line = [(side * (0.1 + 0.04 * place), height) for place, height in enumerate(heights.tolist())]
        pen.line(line, fill=int(random.integers(150)), width=int(random.integers(1, 5)))
    pen.line([(30, 10), (30, side - 30), (side - 20, side - 30)], fill=0, width=2)
    x = np.asarray(paper, np.float64)
    return -x if random.random() < 0.3 else x


if __name__ == "__main__":
    main()
