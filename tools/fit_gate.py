"""Fit the table of mura_dist/data/gate.py, measure its error rates and print both.

python tools/fit_gate.py RADIOGRAPHS PHOTOGRAPHS [--also NAME=FOLDER ...]

    folders of files -> radiograph.read at 320, 128 and 64 px -> augmented images, random drawings, phantoms
        -> gate.compute_statistics -> logistic regression on each statistic and its square -> the table
        -> the same in five folds grouped by patient -> false alarms and misses with Wilson's 95 % intervals

RADIOGRAPHS is in MURA's layout. `patient...` in a path names the patient, and all images of a patient are in one fold. The
folders of --also are only measured, with the final table. The same files and the same versions of NumPy, Pillow and scikit-learn
give the same numbers. It takes about ten minutes.
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

SIZES, FOLDS, NUM_AUGMENTED, DRAWINGS = (320, 128, 64), 5, (8, 3), 1500
# The weight of each kind in the fit, and its label. Inverted radiographs train the score of the contrast.
KINDS = {
    "radiographs": (1.0, 1),
    "phantoms": (0.15, 1),
    "inverted": (0.1, 0),
    "photographs": (1.0, 0),
    "drawn": (0.7, 0),
}
SIZE_NAMES = [f"{size} px" for size in SIZES]
INVERSE_PENALTY = 0.03  # scikit-learn's C
Random = np.random.Generator


def main() -> None:
    """Read the folders, cross-validate, fit, and print the rates and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("radiographs", type=Path)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--also", action="append", default=[], metavar="NAME=FOLDER")
    options = parser.parse_args()
    radiographs, patients, types = ImageSet(options.radiographs, 1, NUM_AUGMENTED[0]), [], []
    for name in radiographs.names:
        patients.append((re.findall(r"patient\w+", name) or [name])[-1])
        types.append((re.findall(r"XR_\w+", name) or [""])[-1])
    photographs = ImageSet(options.photographs, 2, NUM_AUGMENTED[1])
    drawings = [random_drawing(np.random.default_rng((3, number))) for number in range(DRAWINGS)]
    drawings = [
        each if number % 2 else augment(each, np.random.default_rng((4, number)))
        for number, each in enumerate(drawings)
    ]
    drawing_values = np.array([values for each in drawings if (values := gate.compute_statistics(each)) is not None])
    with tempfile.TemporaryDirectory() as folder:
        phantoms.draw(Path(folder) / "set", studies=150, size=128, seed=0)
        phantom_set = ImageSet(Path(folder) / "set", 5, 1)

    fold = _folds(np.array(patients))
    sides = (
        fold,
        np.arange(len(photographs.names)) % FOLDS,
        np.arange(len(drawing_values)) % FOLDS,
        np.arange(len(phantom_set.names)) % FOLDS,
    )
    weight = np.array([1 / Counter(types)[kind] for kind in types])

    def fit_without(held_out: int) -> tuple[float, np.ndarray]:
        """Fit the table to all folds but one, or to all with -1."""
        a, b, c, d = (side != held_out for side in sides)
        return fit(
            radiographs.select(a),
            np.repeat(weight[a], radiographs.num_per_file),
            photographs.select(b),
            drawing_values[c],
            phantom_set.select(d),
        )

    results: dict[str, list[np.ndarray]] = {}
    for number in range(FOLDS):
        table = fit_without(number)
        for name, images, side in (
            ("radiographs", radiographs, sides[0]),
            ("photographs", photographs, sides[1]),
            ("phantoms", phantom_set, sides[3]),
        ):
            for kind, values in images.by_kind(side == number):
                scores = gate.compute_scores(values, *table)
                results.setdefault(f"{name}, {kind}", []).append(scores.reshape(-1, 2))
                if kind in SIZE_NAMES:
                    with_color_check = images.reject_colored(scores, side == number)
                    results.setdefault(f"{name}, {kind}, and colors", []).append(with_color_check)
        results.setdefault("drawings", []).append(gate.compute_scores(drawing_values[sides[2] == number], *table))
    print(f"held out by {FOLDS} folds")
    for name, fold_scores in sorted(results.items()):
        print_rates(name, np.concatenate(fold_scores))
    final = fit_without(-1)
    print(f"with the final table, fitted to {len(radiographs.names)} radiographs, {len(photographs.names)} photographs")
    print_rates("radiographs", gate.compute_scores(radiographs.plain[320], *final))
    print_rates("photographs", gate.compute_scores(photographs.plain[320], *final))
    print(f"_CONSTANT = {final[0]:.4f}")
    for name, row in zip(gate.STATISTICS, final[1].T, strict=True):
        print(f"    ({', '.join(f'{number:.4f}' for number in row)}),  # {name}", flush=True)
    for word in options.also:
        name, _, folder = word.partition("=")
        also = ImageSet(Path(folder), 6, 0)
        for kind, values in also.by_kind(np.arange(len(also.names)) >= 0):
            scores = gate.compute_scores(values, *final)
            print_rates(f"{name}, {kind}", also.reject_colored(scores), also.num_blank)


class ImageSet:
    """The statistics of a folder's images, float64.

    plain[size] and framed[name] are (n, 2, k), augmented is (n, v, 2, k). Blank images are skipped and counted.
    """

    def __init__(self, folder: Path, seed: int, num_augmented: int) -> None:
        self.names: list[str] = []
        self.num_blank, self.num_per_file = 0, len(SIZES) + num_augmented
        plain, augmented, framed, colored = [], [], [], []
        for number, path in enumerate(sorted(each for each in folder.rglob("*") if each.is_file())):
            try:
                details = [radiograph.read_details(path, size) for size in SIZES]
            except radiograph.UnreadableFileError:
                continue
            images = [detail.image for detail in details]
            values = [gate.compute_statistics(image) for image in images]
            if any(value is None for value in values):
                self.num_blank += 1
                continue
            self.names.append(path.as_posix())
            colored.append(details[0].colors is not None and gate.is_colored(details[0].colors))
            plain.append(values)
            augmented.append(
                [
                    _augmented_statistics(images[0], np.random.default_rng((seed, number, k)))
                    for k in range(num_augmented)
                ]
            )
            framed.append(
                [
                    _framed_statistics(images[0], frame, np.random.default_rng((seed, number)))
                    for frame in FRAMES.values()
                ]
            )
        self.colored = np.array(colored, bool)
        shape = (len(self.names), -1, 2, len(gate.STATISTICS))
        self.plain = dict(zip(SIZES, np.array(plain, float).reshape(shape).swapaxes(0, 1), strict=True))
        self.augmented = np.array(augmented, float).reshape(len(self.names), num_augmented, 2, len(gate.STATISTICS))
        self.framed = dict(zip(FRAMES, np.array(framed, float).reshape(shape).swapaxes(0, 1), strict=True))

    def select(self, side: np.ndarray) -> np.ndarray:
        """Return the statistics of the selected files, plain and augmented, file by file: (m, 2, k)."""
        statistics = np.concatenate([np.stack(list(self.plain.values()), 1), self.augmented], 1)[side]
        return statistics.reshape(-1, 2, len(gate.STATISTICS))

    def by_kind(self, side: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """Return the name and the statistics (..., 2, k) of each kind of measurement of the selected files.

        An inverted image has the same statistics with the two contrasts swapped.
        """
        kinds = [(f"{size} px", self.plain[size][side]) for size in SIZES]
        kinds += [("augmented", self.augmented[side])] if self.augmented.size else []
        kinds += [(name, values[side]) for name, values in self.framed.items()]
        return kinds + [(f"{name}, inverted", values[..., ::-1, :]) for name, values in kinds]

    def reject_colored(self, scores: np.ndarray, side: np.ndarray | None = None) -> np.ndarray:
        """Return the scores (n, 2) with minus infinity for color files."""
        colored = self.colored if side is None else self.colored[side]
        return np.where(colored[:, None], -np.inf, scores)


def _framed_statistics(
    image: np.ndarray, frame: Callable[[np.ndarray, Random], np.ndarray], random: Random
) -> np.ndarray:
    """Compute the statistics of an image in a frame, or of the augmented image if the framed one is blank."""
    statistics = gate.compute_statistics(frame(image, random))
    return _augmented_statistics(image, random) if statistics is None else statistics


def _augmented_statistics(image: np.ndarray, random: Random) -> np.ndarray:
    """Compute the statistics of an augmented image that is not blank."""
    while (statistics := gate.compute_statistics(augment(image, random))) is None:
        pass
    return statistics


def _folds(groups: np.ndarray) -> np.ndarray:
    names = np.unique(groups)
    fold_of_group = dict(zip(names, np.random.default_rng(0).permutation(len(names)) % FOLDS, strict=True))
    return np.array([fold_of_group[name] for name in groups])


def fit(
    radiographs: np.ndarray, weight: np.ndarray, photographs: np.ndarray, drawings: np.ndarray, phantom_set: np.ndarray
) -> tuple[float, np.ndarray]:
    """Fit the logistic regression to statistics, photographs and drawings in both contrasts.

    Args:
        radiographs: (n, 2, k), as are photographs, drawings and phantom_set.
        weight: (n,), of the radiographs.

    Returns:
        The constant and the table (4, k) of gate.py.
    """
    groups = {"radiographs": radiographs[:, 0], "phantoms": phantom_set[:, 0], "inverted": radiographs[:, 1]}
    groups |= {
        name: each.reshape(-1, each.shape[-1]) for name, each in (("photographs", photographs), ("drawn", drawings))
    }
    values = np.concatenate(list(groups.values()))
    label = np.concatenate([np.full(len(values), KINDS[name][1]) for name, values in groups.items()])
    shares = {name: np.full(len(values), KINDS[name][0] / len(values)) for name, values in groups.items()}
    shares["radiographs"] = weight / weight.sum()  # equal weight per study type
    mean, deviation = values.mean(0), values.std(0)
    x = np.clip((values - mean) / deviation, -gate.MOST, gate.MOST)
    model = LogisticRegression(C=INVERSE_PENALTY, max_iter=500)
    model.fit(np.hstack([x, x * x - 1]), label, sample_weight=np.concatenate(list(shares.values())) * len(x) / 2)
    slope, bend = model.coef_[0].reshape(2, -1)
    return round(float(model.intercept_[0]), 4), np.round([mean, deviation, slope, bend], 4)


def print_rates(name: str, scores: np.ndarray, num_blank: int = 0) -> None:
    """Print how many of the scores (..., 2) are refused, inverted and passed. Blank images count as refused."""
    upright, inverse = scores.reshape(-1, 2).T
    is_rejected = np.maximum(upright, inverse) < gate.THRESHOLD
    inverted = int((~is_rejected & (inverse > upright + gate.MARGIN)).sum())
    num, num_refused = len(is_rejected) + num_blank, int(is_rejected.sum()) + num_blank
    print(f"  {name}: n {num}", end=f", {num_blank} of them blank" if num_blank else "")
    for word, count in (("refused", num_refused), ("inverted", inverted), ("passed", num - num_refused)):
        low, high = compute_wilson_interval(count, num)
        print(f"; {word} {count} = {100 * count / num:.2f} % ({100 * low:.2f} to {100 * high:.2f})", end="")
    print()


# ---- augmentation of radiographs and photographs


def augment(image: np.ndarray, random: Random) -> np.ndarray:
    """Return a random rotation, flip, crop, enhancement and tone of an image, with borders, labels and grain: (S, S) uint8."""
    image = np.rot90(image, int(random.integers(4)))[:, :: random.choice([1, -1])]
    steps: list[tuple[float, Callable[[np.ndarray, Random], np.ndarray]]] = [
        (0.5, crop),
        (0.35, enhance),
        (0.6, change_tone),
        (0.3, add_border),
        (0.1, add_collimation),
        (0.3, add_label),
        (0.2, add_grain),
    ]
    for share, step in steps:
        if random.random() < share:
            image = step(image, random)
    return resize(image, int(random.choice([64, 128, 224, 320])))


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize an image to (size, size)."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.BILINEAR))


def crop(image: np.ndarray, random: Random) -> np.ndarray:
    """Crop a random rectangle and resize it to the original size."""
    side = len(image)
    height, width = (int(side * random.uniform(0.3, 1)) for _ in range(2))
    y0, x0 = int(random.integers(side - height + 1)), int(random.integers(side - width + 1))
    return resize(image[y0 : y0 + height, x0 : x0 + width], side)


def enhance(image: np.ndarray, random: Random) -> np.ndarray:
    """Amplify or flatten structures of one size, as the software of detectors does."""
    image = np.ascontiguousarray(image)
    radius = float(len(image) * np.exp(random.uniform(np.log(0.01), np.log(0.15))))
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)), np.float32)
    amount = random.uniform(-0.5, 2.5)
    x = image + amount * (image - blurred) if random.random() < 0.6 else image - random.uniform(0.2, 0.9) * blurred
    low, high = np.percentile(x, [0.5, 99.5])
    return (np.clip((x - low) / max(high - low, 1), 0, 1) * 255).astype(np.uint8)


def change_tone(image: np.ndarray, random: Random) -> np.ndarray:
    """Apply a random gamma, contrast and window."""
    x = (image / 255.0) ** np.exp(random.uniform(-0.9, 0.9))
    contrast = random.uniform(0.25, 1)
    x = random.uniform(0, 1 - contrast) + contrast * x
    if random.random() < 0.3:
        x = (x - 0.5) * random.uniform(1, 2) + random.uniform(0.3, 0.7)
    return (np.clip(x, 0, 1) * 255).astype(np.uint8)


def add_border(image: np.ndarray, random: Random) -> np.ndarray:
    """Add borders of one level along random sides."""
    level = int(random.choice([0, 255, int(random.integers(256))]))
    for _ in range(4):
        image = np.rot90(image).copy()
        if random.random() < 0.6:
            image[: int(len(image) * random.uniform(0.02, 0.2))] = level
    return image


def add_collimation(image: np.ndarray, random: Random) -> np.ndarray:
    """Add round collimation. The circle may extend beyond the sides."""
    return mask_outside(image, random, int(random.choice([0, 255])), random.uniform(0.38, 0.65))


def mask_outside(image: np.ndarray, random: Random, level: int, radius: float) -> np.ndarray:
    """Set the pixels outside a circle to a level. The radius is a share of the side."""
    y, x = np.mgrid[: len(image), : len(image)] / len(image) - 0.5
    far = np.hypot(x - random.uniform(-0.02, 0.02), y - random.uniform(-0.02, 0.02)) > radius
    return np.where(far, np.uint8(level), image)


def add_unexposed_border(image: np.ndarray, random: Random, level: int, soft: bool) -> np.ndarray:
    """Add a border of 3 to 30 % along one to four sides. A `soft` border fades over another 1 to 8 %."""
    for quarter_turns in random.permutation(4)[: random.integers(1, 5)]:
        image = np.rot90(image, quarter_turns).copy()
        width, fade = int(len(image) * random.uniform(0.03, 0.3)), int(len(image) * random.uniform(0.01, 0.08)) * soft
        image[:width] = level
        share = np.linspace(0, 1, fade + 2)[1:-1, None]
        image[width : width + fade] = image[width : width + fade] * share + level * (1 - share)
        image = np.rot90(image, -quarter_turns)
    return image


# Frames of the images of every set. They are measured, not used in the fit. Each framed image is also measured inverted.
FRAMES: dict[str, Callable[[np.ndarray, Random], np.ndarray]] = {
    "white border": lambda image, random: add_unexposed_border(image, random, 255, False),
    "white border, soft": lambda image, random: add_unexposed_border(image, random, 255, True),
    "black border": lambda image, random: add_unexposed_border(image, random, 0, False),
    "black border, soft": lambda image, random: add_unexposed_border(image, random, 0, True),
    "white around a circle": lambda image, random: mask_outside(image, random, 255, random.uniform(0.38, 0.5)),
    "black around a circle": lambda image, random: mask_outside(image, random, 0, random.uniform(0.38, 0.5)),
}


def add_label(image: np.ndarray, random: Random) -> np.ndarray:
    """Add a rectangle with a line of marks, as a label has."""
    image, side, level = image.copy(), len(image), int(random.choice([0, 255]))
    width, height = int(side * random.uniform(0.05, 0.25)), int(side * random.uniform(0.03, 0.1))
    x0, y0 = int(random.integers(side - width)), int(random.integers(side - height))
    image[y0 : y0 + height, x0 : x0 + width] = level
    if random.random() < 0.5:
        image[y0 + height // 4 : y0 + height // 2 + 1, x0 + width // 8 : x0 + width * 3 // 4 : 2] = 255 - level
    return image


def add_grain(image: np.ndarray, random: Random) -> np.ndarray:
    """Add Gaussian noise."""
    return np.clip(image + random.normal(0, random.uniform(1, 8), image.shape), 0, 255).astype(np.uint8)


# ---- drawings, which are neither radiographs nor photographs


def random_drawing(random: Random, side: int = 320) -> np.ndarray:
    """Draw waves, a ramp, noise, a page of text, shapes, stripes or a chart: (side, side) uint8."""
    kinds = (waves, ramp, noise, page, shapes, stripes, chart)
    x = kinds[int(random.integers(len(kinds)))](random, side)
    x = x - x.min()
    image = (255 * x / max(x.max(), 1e-6)).astype(np.uint8)
    if random.random() < 0.3:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(float(random.uniform(0.5, 8)))))
    return add_grain(image, random) if random.random() < 0.3 else image


def waves(random: Random, side: int) -> np.ndarray:
    """Draw a sum of plane waves."""
    y, x = np.mgrid[:side, :side] / side
    image = np.zeros((side, side))
    for angle in random.uniform(0, 6.3, random.integers(1, 4)):
        frequency = random.uniform(0.2, 8) * np.pi
        image += random.uniform(0.2, 1) * np.cos(
            frequency * (x * np.cos(angle) + y * np.sin(angle)) + random.uniform(0, 6.3)
        )
    return image * np.hypot(x - random.random(), y - random.random()) if random.random() < 0.4 else image


def ramp(random: Random, side: int) -> np.ndarray:
    """Draw a linear or radial ramp."""
    y, x = np.mgrid[:side, :side] / side
    angle = random.uniform(0, 6.3)
    image = x * np.cos(angle) + y * np.sin(angle)
    if random.random() < 0.5:
        image = np.hypot(x - random.random(), y - random.random()) ** random.uniform(0.3, 2)
    return np.abs(image - image.mean()) if random.random() < 0.3 else image


def noise(random: Random, side: int) -> np.ndarray:
    """Draw Gaussian noise of a random grain."""
    grain = int(random.choice([4, 16, 64, side]))
    resampling = Image.Resampling.BICUBIC if random.random() < 0.5 else Image.Resampling.NEAREST
    return np.asarray(
        Image.fromarray(random.normal(size=(grain, grain)).astype(np.float32)).resize((side, side), resampling)
    )


def page(random: Random, side: int) -> np.ndarray:
    """Draw a page of text."""
    paper, size = Image.new("L", (side, side), 255), int(random.choice([8, 12, 16, 24, 40]))
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(size=size)
    for y0 in range(int(random.integers(30)), side, int(size * 1.3)):
        pen.text((int(random.integers(4, 60)), y0), random_text(random, 13), fill=int(random.integers(120)), font=font)
    x = np.asarray(paper, np.float64)
    return -x if random.random() < 0.5 else x


def random_text(random: Random, max_words: int) -> str:
    """Return 1 to `max_words` words of random letters."""
    letters = list("etaoinshrdlucmwfgypbvk,.0123456789")
    return " ".join(
        "".join(random.choice(letters, random.integers(1, 10))) for _ in range(random.integers(1, max_words + 1))
    )


def shapes(random: Random, side: int) -> np.ndarray:
    """Draw rectangles, ellipses, lines and large letters."""
    paper = Image.new("L", (side, side), int(random.integers(256)))
    pen = ImageDraw.Draw(paper)
    for _ in range(random.integers(1, 14)):
        corners, level = random.integers(-40, side, (2, 2)), int(random.integers(256))
        (x0, y0), (x1, y1) = corners.min(0).tolist(), (corners.max(0) + 1).tolist()
        match int(random.integers(4)):
            case 0:
                pen.rectangle((x0, y0, x1, y1), fill=level)
            case 1:
                pen.ellipse((x0, y0, x1, y1), fill=level)
            case 2:
                pen.line([tuple(corner) for corner in corners.tolist()], fill=level, width=int(random.integers(1, 12)))
            case _:
                font = ImageFont.load_default(size=int(random.choice([12, 30, 90, 200])))
                pen.text((x0, y0), random_text(random, 1), fill=level, font=font)
    return np.asarray(paper, np.float64)


def stripes(random: Random, side: int) -> np.ndarray:
    """Draw stripes or a grid."""
    y, x = np.mgrid[:side, :side] / side
    image = (x * random.integers(1, 24)).astype(int) % random.integers(2, 5)
    if random.random() < 0.5:
        return image + (y * random.integers(1, 24)).astype(int) % random.integers(2, 5) * random.uniform(-1, 1)
    return image.astype(np.float64)


def chart(random: Random, side: int) -> np.ndarray:
    """Draw a line chart with axes."""
    paper = Image.new("L", (side, side), 255)
    pen = ImageDraw.Draw(paper)
    for _ in range(random.integers(1, 5)):
        heights = side * random.random() + np.cumsum(random.normal(size=20)) * side * 0.08
        line = [(side * (0.1 + 0.04 * index), height) for index, height in enumerate(heights.tolist())]
        pen.line(line, fill=int(random.integers(150)), width=int(random.integers(1, 5)))
    pen.line([(30, 10), (30, side - 30), (side - 20, side - 30)], fill=0, width=2)
    x = np.asarray(paper, np.float64)
    return -x if random.random() < 0.3 else x


if __name__ == "__main__":
    main()
