"""Draw phantoms: bones in MURA's layout, some broken, so that everything can be tried without radiographs.

    plan      -> studies: split, patient, study type, label (40 % positive), number of views
    skeleton  -> an arm from clavicle to finger tips, in cm; positive: one bone broken, its distal bones moved
    project   -> the field of view of the study type, seen from one side: 2-D bones in pixels
    attenuate -> length of bone and flesh that each X-ray crosses (a bone is a tube: dense wall, marrow inside)
    develop   -> window, exposure, grain, collimation, marker -> uint8 (H, W) -> PNG, gray or RGB

All views of a study show the same bones and the same break, which may be visible in some views only. Features other than breaks
(growth plates, skin folds, overlapping bones, markers, borders) occur with both labels. A radiograph is a pure function of
(seed, study, view). On another processor or NumPy, a pixel may differ by one gray level.
"""

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from mura_dist.core import files
from mura_dist.core.errors import UserError
from mura_dist.data.mura import STUDY_TYPES
from mura_dist.distributed.processes import num_processors, start_workers

VERSION = 1  # changes with the pixels
MARK = "phantoms.json"  # written last
STARTED = ".phantoms.started.json"  # written first, to recognize an unfinished set
ROOT = "MURA-v1.1"  # prefix of the paths in MURA's CSVs
MIN_STUDIES, MIN_SIZE_PX, MAX_SIZE_PX = 4, 64, 2048
VALID_SHARE = 0.22
PARALLEL_FROM = 100  # studies; for fewer, starting processes takes longer

Array = NDArray[np.float32]
Point = NDArray[np.float64]


class PhiloxRandom:
    """Random numbers from raw Philox bits, which NumPy guarantees to be stable, unlike its distributions."""

    def __init__(self, *key: int) -> None:
        seed, study, view = key
        self.bits = np.random.Philox(key=np.array([seed, study << 8 | view], dtype=np.uint64))

    def between(self, low: float, high: float) -> float:
        """Draw a number in [low, high)."""
        return low + (high - low) * (int(self.bits.random_raw()) >> 11) * 2.0**-53

    def chance(self, probability: float) -> bool:
        """Draw True with a probability."""
        return self.between(0, 1) < probability

    def below(self, n: int) -> int:
        """Draw an integer in [0, n)."""
        return int(self.between(0, n))

    def sign(self) -> float:
        """Draw 1 or -1."""
        return 1.0 if self.chance(0.5) else -1.0

    def normal(self, height: int, width: int) -> Array:
        """Draw grain, float32 (height, width), of mean 0 and deviation 1, each the sum of four random bytes."""
        bits = self.bits.random_raw((height * width + 1) // 2)
        quads = bits.view(np.uint8).reshape(-1, 4).sum(axis=1, dtype=np.float32)[: height * width]
        return ((quads - 510) / 147.8).reshape(height, width).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True, slots=True)
class PhantomStudy:
    """A planned study."""

    number: int  # 0-based over all splits; with the seed, it determines the drawing
    split: str
    study_type: str
    patient: int
    study: int
    label: int
    num_views: int

    @property
    def folder(self) -> str:
        """Path of the study's folder in MURA's layout."""
        suffix = "positive" if self.label else "negative"
        return f"{self.split}/{self.study_type}/patient{self.patient:05d}/study{self.study}_{suffix}"


def plan(studies: int, seed: int) -> list[PhantomStudy]:
    """Plan `studies` studies, 22 % of them in valid. Each patient is in one split, and each split has both labels."""
    num_valid = max(2, round(VALID_SHARE * studies))
    planned: list[PhantomStudy] = []
    for split, count in (("train", studies - num_valid), ("valid", num_valid)):
        planned += _plan_split(split, count, planned[-1].patient if planned else 0, len(planned), seed)
    return planned


def _plan_split(split: str, count: int, patient: int, number: int, seed: int) -> list[PhantomStudy]:
    planned: list[PhantomStudy] = []
    counts = dict.fromkeys(STUDY_TYPES, 0)
    first_patient = patient + 1
    while len(planned) < count:
        patient += 1
        rng = PhiloxRandom(seed, number + len(planned), 0)
        first_type = (patient - first_patient) % len(STUDY_TYPES)
        # The first two patients have one study each, with different labels, so that small splits have both.
        num_studies = 1 if patient - first_patient < 2 else (1, 1, 1, 1, 1, 1, 2, 2, 2, 3)[rng.below(10)]
        for study in range(1, min(num_studies, count - len(planned)) + 1):
            position = first_type if study == 1 or rng.chance(0.4) else rng.below(len(STUDY_TYPES))
            study_type = STUDY_TYPES[position]
            label = int((counts[study_type] + position) % 2 == 1 and counts[study_type] % 5 != 4)
            counts[study_type] += 1
            num_views = (1, 2, 2, 3, 3, 3, 4)[rng.below(7)]
            planned.append(PhantomStudy(number + len(planned), split, study_type, patient, study, label, num_views))
    return planned


# --------------------------------------------------------------------------------------------------------- skeleton


@dataclass(frozen=True, slots=True)
class Cut:
    """One face of a break: the bone on `side` of a jagged line at `position`, shortened by `gap`."""

    position: float  # 0 head .. 1 tail
    side: int  # -1 keeps the head, +1 the tail
    slope: float
    gap: float  # in radii
    phase: float
    callus: float  # swelling of the healing bone, in radii


@dataclass(frozen=True, slots=True)
class Bone:
    """A tube from head to tail. Lengths are in cm in the skeleton, and in pixels after projection."""

    name: str
    hangs_on: str
    head: Point  # (3,) x to the side, y towards the finger tips, z towards the viewer; (2,) once projected
    tail: Point
    radius: tuple[float, float, float]  # at head, shaft, tail
    flesh: float  # radius of the flesh around it
    bow: float = 0.0  # deflection of the shaft, in lengths
    density: float = 1.0
    growth_plates: tuple[float, ...] = ()
    cut: Cut | None = None


def _point_towards(start: Point, angle: float, length: float, lean: float = 0.0) -> Point:
    flat = length * math.cos(lean)
    return start + np.array([flat * math.sin(angle), flat * math.cos(angle), length * math.sin(lean)])


def skeleton(study_type: str, rng: PhiloxRandom) -> list[Bone]:
    """Return the bones of an arm, each after the one it hangs on. The shoulder is the origin."""
    flexion = rng.between(0.0, 1.5) if study_type == "XR_ELBOW" else rng.between(-0.1, 0.2)
    stout = rng.between(0.9, 1.2)
    origin = np.zeros(3)
    elbow = _point_towards(origin, 0.0, 27.0)
    wrist = _point_towards(elbow, flexion, 23.0)
    upper = Bone("humerus", "scapula", origin, _point_towards(elbow, 0.0, -1.1), (2.1, 1.15, 1.9), 4.2)
    bones = [*_shoulder(origin, rng), upper, *_forearm(elbow, wrist, flexion), *_hand(wrist, flexion, rng)]
    plates = (0.1, 0.9) if rng.chance(0.2) else ()
    return [
        replace(bone, radius=_scaled(bone.radius, stout), growth_plates=plates if bone.radius[1] < 1.3 else ())
        for bone in bones
    ]


def _scaled(radius: tuple[float, float, float], by: float) -> tuple[float, float, float]:
    return radius[0] * by, radius[1] * by, radius[2] * by


def _shoulder(joint: Point, rng: PhiloxRandom) -> Iterator[Bone]:
    sternum = joint + np.array([-13.0, -1.5 + rng.between(-1, 1), 1.0])
    yield Bone("clavicle", "", sternum, joint + np.array([-0.5, -3.0, 0.5]), (1.0, 0.72, 0.95), 2.5, rng.sign() * 0.06)
    blade = joint + np.array([-2.4, 0.4, -1.0])
    yield Bone("scapula", "clavicle", blade, blade + np.array([-5.0, 11.0, -1.0]), (2.0, 3.4, 0.7), 5.0, 0.0, 0.25)
    yield Bone(
        "acromion", "scapula", blade + np.array([-5.0, -1.0, 0]), blade + np.array([2.0, -3.0, 0]), (0.5, 0.6, 0.9), 3.0
    )
    for rib in range(4):
        start = joint + np.array([-17.0, 0.5 + 3.4 * rib, -4.0])
        yield Bone(f"rib{rib}", "", start, start + np.array([9.5, 3.0 + rib, 0.0]), (0.5, 0.55, 0.5), 3.0, -0.15, 0.5)


def _forearm(elbow: Point, wrist: Point, flexion: float) -> Iterator[Bone]:
    sideways = np.array([math.cos(flexion), -math.sin(flexion), 0.0])
    along = np.array([math.sin(flexion), math.cos(flexion), 0.0])
    radius_head, ulna_head = elbow + 1.2 * sideways + 2.0 * along, elbow - 0.9 * sideways + 0.2 * along
    yield Bone("radius", "humerus", radius_head, wrist + 1.1 * sideways, (1.0, 0.72, 1.5), 2.6, 0.035)
    yield Bone("ulna", "humerus", ulna_head, wrist - 1.3 * sideways - 0.4 * along, (1.5, 0.68, 0.75), 2.8, -0.02)


# From thumb to little finger: start of the metacarpal (x, y in cm), direction, lengths of the bones (cm).
_FINGERS = (
    (1.9, 1.5, 0.62, (4.4, 3.2, 2.4)),
    (1.3, 2.6, 0.17, (6.3, 4.2, 2.6, 1.9)),
    (0.3, 2.8, 0.03, (6.0, 4.6, 3.0, 2.0)),
    (-0.7, 2.6, -0.11, (5.4, 4.2, 2.8, 2.0)),
    (-1.6, 2.3, -0.26, (5.0, 3.4, 2.1, 1.8)),
)
# Center of each carpal bone, in cm from the wrist joint, and its radius.
_CARPALS = (
    (1.3, 0.7, 0.75),
    (0.2, 0.6, 0.7),
    (-0.9, 0.7, 0.6),
    (1.6, 1.6, 0.5),
    (0.9, 1.8, 0.5),
    (0.2, 1.9, 0.7),
    (-0.8, 1.8, 0.65),
)


def _hand(wrist: Point, angle: float, rng: PhiloxRandom) -> Iterator[Bone]:
    angle += rng.between(-0.2, 0.2)
    sideways = np.array([math.cos(angle), -math.sin(angle), 0.0])
    along = np.array([math.sin(angle), math.cos(angle), 0.0])
    for i, (x, y, radius) in enumerate(_CARPALS):
        middle = wrist + x * sideways + (y + 0.5) * along
        tip = _point_towards(middle, angle + rng.between(-0.8, 0.8), 0.35 * radius)
        yield Bone(f"carpal{i}", "radius", middle, tip, (radius, radius, radius), 1.9, 0.0, 0.8)
    spread, curl = rng.between(0.7, 1.5), rng.between(0.0, 0.25)
    for finger, (x, y, direction, lengths) in enumerate(_FINGERS):
        joint, hangs_on = wrist + x * sideways + (y + 0.5) * along, "radius"
        heading, lean = angle + direction * spread + rng.between(-0.05, 0.05), 0.0
        for segment, length in enumerate(lengths):
            thick = 0.5 - 0.045 * segment
            name, head = f"finger{finger}.{segment}", _point_towards(joint, heading, thick, lean)
            tip = _point_towards(joint, heading, length - thick, lean)
            yield Bone(name, hangs_on, head, tip, (thick * 1.35, thick, thick * 1.3), (1.5, 0.95, 0.9, 0.8)[segment])
            joint, hangs_on = _point_towards(joint, heading, length, lean), name
            lean += rng.between(0, 1) * curl
            heading += rng.between(-0.06, 0.06)


@dataclass(frozen=True, slots=True)
class FieldOfView:
    """What a study type shows: a center (position along a bone), the extent around it, the possible breaks."""

    bone: str
    position: float
    extent: tuple[float, float]  # cm, of the longer side
    turns: tuple[float, ...]  # radians about the arm's axis: usual projections
    breaks: tuple[tuple[str, float, float], ...]  # a bone, and between which places it breaks


_NECK = (("humerus", 0.12, 0.19),)  # of the humerus, its most frequent break near the shoulder
_METACARPALS = tuple((f"finger{finger}.0", 0.3, 0.75) for finger in (1, 2, 3))
FIELDS_OF_VIEW = {
    "XR_SHOULDER": FieldOfView(
        "humerus", 0.06, (12, 14), (0.0, 0.5), (*_NECK, *_NECK, *_NECK, ("clavicle", 0.78, 0.88))
    ),
    "XR_HUMERUS": FieldOfView("humerus", 0.5, (14, 18), (0.0, 1.5), (("humerus", 0.4, 0.62),)),
    "XR_ELBOW": FieldOfView("humerus", 1.0, (11.5, 14), (0.0, 0.4), (("humerus", 0.86, 0.91), ("ulna", 0.08, 0.14))),
    "XR_FOREARM": FieldOfView("radius", 0.5, (12, 15), (0.0, 1.2), (("radius", 0.38, 0.62), ("ulna", 0.38, 0.62))),
    "XR_WRIST": FieldOfView("radius", 0.97, (8, 10), (0.0, 1.2), (("radius", 0.85, 0.92), ("ulna", 0.85, 0.92))),
    "XR_HAND": FieldOfView("finger2.0", 0.7, (8.5, 10), (0.0, 0.6), (*_METACARPALS, ("finger2.1", 0.2, 0.5))),
    "XR_FINGER": FieldOfView("finger2.1", 0.65, (6.5, 8), (0.0, 1.0), (("finger2.1", 0.25, 0.75),)),
}


def break_bone(bones: list[Bone], study_type: str, rng: PhiloxRandom) -> list[Bone]:
    """Break one bone of a skeleton into two pieces, and move the distal piece with all bones that hang on it."""
    breaks = FIELDS_OF_VIEW[study_type].breaks
    name, low, high = breaks[rng.below(len(breaks))]
    position = rng.between(low, high)
    intact = next(bone for bone in bones if bone.name == name)
    severity = rng.between(0.6, 1.0)
    radius = intact.radius[1]
    center = intact.head + position * (intact.tail - intact.head)
    sideways, around = rng.between(0, 2 * math.pi), rng.between(0, 2 * math.pi)
    shift = severity * rng.between(1.0, 2.2) * radius * np.array([math.cos(sideways), 0.0, math.sin(sideways)])
    shift = shift + severity * rng.between(-0.2, 0.9) * radius * np.array([0.0, 1.0, 0.0])
    turn = _rotation(around, severity * rng.between(0.25, 0.7))
    move = partial(_moved, center=center, turn=turn, shift=shift)
    callus = max(0.0, rng.between(-0.6, 1.0))
    cut = Cut(position, -1, rng.between(-0.9, 0.9), rng.between(0.3, 0.8), rng.between(0, 2 * math.pi), callus)
    moved, pieces = {name}, []
    for bone in bones:
        if bone.name == name:
            pieces += [replace(bone, cut=cut), replace(move(bone), cut=replace(cut, side=1))]
        elif bone.hangs_on in moved:
            moved.add(bone.name)
            pieces.append(move(bone))
        else:
            pieces.append(bone)
    return [*pieces, *_splinters(center, radius, rng)]


def _splinters(center: Point, radius: float, rng: PhiloxRandom) -> Iterator[Bone]:
    for number in range(rng.below(4)):
        start = _point_towards(center, rng.between(0, 6.28), rng.between(0.6, 1.6) * radius, rng.between(-1, 1))
        tip = _point_towards(start, rng.between(0, 6.28), rng.between(0.3, 1.0) * radius)
        thick = rng.between(0.2, 0.4) * radius
        yield Bone(f"splinter{number}", "", start, tip, (thick, thick, thick), 0.0, 0.0, 1.3)


def _moved(bone: Bone, *, center: Point, turn: NDArray[np.float64], shift: Point) -> Bone:
    head, tail = (center + turn @ (point - center) + shift for point in (bone.head, bone.tail))
    return replace(bone, head=head, tail=tail)


def _rotation(around: float, angle: float) -> NDArray[np.float64]:
    """Return the rotation (3, 3) by `angle` about a horizontal axis (Rodrigues). Axis 0 is the first line of sight."""
    x, z = math.sin(around), math.cos(around)
    cross = np.array([[0.0, -z, 0.0], [z, 0.0, -x], [0.0, x, 0.0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


# ---------------------------------------------------------------------------------------------------------- project


def project(bones: list[Bone], study_type: str, height: int, width: int, rng: PhiloxRandom) -> list[Bone]:
    """Project the skeleton to one side: head and tail (2,) as x, y, in pixels of an image (height, width)."""
    field = FIELDS_OF_VIEW[study_type]
    aim = next(bone for bone in bones if bone.name == field.bone)
    extent = rng.between(*field.extent)
    scale = max(height, width) / extent
    center = aim.head + field.position * (aim.tail - aim.head)
    turn = field.turns[rng.below(len(field.turns))] + rng.between(-0.25, 0.25)
    flip, roll = rng.sign(), rng.between(-0.6, 0.6)
    middle = np.array([width, height]) * (0.5 + np.array([rng.between(-0.15, 0.15), rng.between(-0.1, 0.1)]))

    def to_pixels(point: Point) -> Point:
        x, y, z = point - center
        x = flip * (x * math.cos(turn) + z * math.sin(turn))
        x, y = x * math.cos(roll) - y * math.sin(roll), x * math.sin(roll) + y * math.cos(roll)
        return middle + scale * np.array([x, y])

    def flat(bone: Bone) -> Bone:
        head, tail, radius = to_pixels(bone.head), to_pixels(bone.tail), _scaled(bone.radius, scale)
        return replace(bone, head=head, tail=tail, radius=radius, flesh=bone.flesh * scale, bow=bone.bow * flip)

    return [flat(bone) for bone in bones]


# -------------------------------------------------------------------------------------------------------- attenuate


def _along_and_across(bone: Bone, x: Array, y: Array) -> tuple[Array, Array, float]:
    """Pixels in the bone's own frame: along from its head, across from its bowed axis; and its length."""
    span = bone.tail - bone.head
    length = max(float(np.hypot(*span)), 1e-3)
    cos, sin = np.float32(span[0] / length), np.float32(span[1] / length)
    dx, dy = x - np.float32(bone.head[0]), y - np.float32(bone.head[1])
    along = dx * cos + dy * sin
    across = dy * cos - dx * sin
    if bone.bow:
        share = np.clip(along / np.float32(length), 0, 1)
        across = across - np.float32(4 * bone.bow * length) * share * (1 - share)
    return along, across, length


def _box(bone: Bone, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns outside of which the bone is not."""
    reach = 1.05 * max(bone.radius) + (bone.cut.callus * bone.radius[1] if bone.cut else 0)
    reach += abs(bone.bow) * float(np.hypot(*(bone.tail - bone.head)))
    low, high = np.minimum(bone.head, bone.tail) - reach, np.maximum(bone.head, bone.tail) + reach
    x0, x1 = np.clip([math.floor(low[0]), math.ceil(high[0])], 0, width)
    y0, y1 = np.clip([math.floor(low[1]), math.ceil(high[1])], 0, height)
    return slice(int(y0), int(y1)), slice(int(x0), int(x1))


def _bone_depth(bone: Bone, x: Array, y: Array, wall: float) -> Array:
    """Return the length of dense bone on the ray through each pixel, float32, in pixels."""
    along, across, length = _along_and_across(bone, x, y)
    head, shaft, tail = (np.float32(radius) for radius in bone.radius)
    near_head, near_tail = np.exp(-((along / (1.8 * head)) ** 2)), np.exp(-(((along - length) / (1.8 * tail)) ** 2))
    radius = shaft + (head - shaft) * near_head + (tail - shaft) * near_tail
    if bone.cut:
        near_cut = np.exp(-(((along - bone.cut.position * length) / (1.3 * shaft)) ** 2))
        radius = radius + bone.cut.callus * shaft * near_cut
    over = np.maximum(-along / (0.7 * head), (along - length) / (0.7 * tail))  # beyond its ends, the tube is rounded
    outer = radius**2 * (1 - np.maximum(over, 0) ** 2)
    ends = np.maximum(near_head, near_tail)
    inner = outer * (1 - wall * (1 - 0.6 * ends)) ** 2
    depth = 2 * np.sqrt(np.maximum(outer - across**2, 0))
    depth -= (1.5 - 0.55 * ends) * np.sqrt(np.maximum(inner - across**2, 0))  # marrow, and spongy bone near the ends
    for position in bone.growth_plates:
        depth *= 1 - 0.4 * np.exp(-(((along - position * length) / (0.16 * shaft)) ** 2))
    if bone.cut:
        depth *= _kept_share(bone.cut, along - bone.cut.position * length, across, float(shaft))
    return depth * np.float32(bone.density)


def _kept_share(cut: Cut, along: Array, across: Array, radius: float) -> Array:
    """Return 1 on the kept side of the break, 0 beyond, with a transition of one pixel."""
    teeth = np.sin(across * (3.1 / radius) + cut.phase) + 0.6 * np.sin(across * (7.3 / radius) + cut.phase)
    beyond = along - cut.slope * across - 0.22 * radius * teeth
    return np.clip(0.5 + cut.side * beyond - cut.gap * radius / 2, 0, 1)


def bone_depth(bones: list[Bone], height: int, width: int, wall: float) -> Array:
    """Return the bone on each ray in pixels, float32 (height, width)."""
    depth = np.zeros((height, width), np.float32)
    y, x = np.ogrid[:height, :width]
    x, y = x.astype(np.float32), y.astype(np.float32)
    for bone in bones:
        rows, columns = _box(bone, height, width)
        if rows.stop > rows.start and columns.stop > columns.start:
            depth[rows, columns] += _bone_depth(bone, x[:, columns], y[rows], wall)
    return depth


def flesh_depth(bones: list[Bone], height: int, width: int) -> Array:
    """Return the flesh on each ray in pixels, float32 (height, width), computed on every fourth pixel."""
    coarse = (-(-height // 4), -(-width // 4))
    half_squared = np.zeros(coarse, np.float32)
    y, x = np.ogrid[: coarse[0], : coarse[1]]
    x, y = 4 * x.astype(np.float32), 4 * y.astype(np.float32)
    for bone in bones:
        along, across, length = _along_and_across(bone, x, y)
        beyond = np.maximum(0, np.maximum(-along, along - length))
        half_squared = np.maximum(half_squared, bone.flesh**2 - across**2 - beyond**2)
    return _enlarged(2 * np.sqrt(half_squared), height, width)


def _enlarged(image: Array, height: int, width: int) -> Array:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


# ---------------------------------------------------------------------------------------------------------- develop


def _folds(height: int, width: int, rng: PhiloxRandom) -> Array:
    """Draw skin folds and vessels, float32 (height, width) in 0..1: faint lines across bones."""
    layer = Image.new("L", (width, height))
    pen = ImageDraw.Draw(layer)
    for _ in range(rng.below(5)):
        x, y, heading = rng.between(0, width), rng.between(0, height), rng.between(0, 2 * math.pi)
        bend, points = rng.between(-0.12, 0.12), [(x, y)]
        for _ in range(rng.below(14) + 6):
            x, y, heading = x + 0.035 * width * math.cos(heading), y + 0.035 * width * math.sin(heading), heading + bend
            points.append((x, y))
        pen.line(points, fill=int(rng.between(60, 200)), width=max(1, round(max(height, width) / 130)), joint="curve")
    blurred = layer.filter(ImageFilter.GaussianBlur(max(height, width) / 250))
    return np.asarray(blurred, np.float32) / np.float32(255)


def _slope(height: int, width: int, rng: PhiloxRandom) -> Array:
    """Draw an exposure gradient and slow blotches, float32 (height, width) of mean 0."""
    y, x = np.ogrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
    gradient = rng.between(-0.3, 0.3) * x + rng.between(-0.3, 0.3) * y
    blotches = _enlarged(rng.normal(6, 6), height, width) * rng.between(0.01, 0.05)
    return (gradient + blotches).astype(np.float32)


def _collimated(gray: Array, rng: PhiloxRandom) -> Array:
    """Darken the image outside a rotated rectangle."""
    height, width = gray.shape
    angle, border = rng.between(-0.12, 0.12), rng.between(0.0, 0.08)
    y, x = np.ogrid[-height / 2 : height / 2 : height * 1j, -width / 2 : width / 2 : width * 1j]
    across, down = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    inside = np.minimum(rng.between(0.4, 0.53) * width - abs(across), rng.between(0.4, 0.53) * height - abs(down))
    return np.where(inside > 0, gray, border).astype(np.float32)


_LETTERS = {
    "L": (((0, 0), (0, 1), (0.6, 1)),),
    "R": (((0, 1), (0, 0), (0.5, 0), (0.6, 0.25), (0.5, 0.5), (0, 0.5)), ((0.25, 0.5), (0.65, 1))),
}


def _marker(gray: Array, rng: PhiloxRandom) -> Array:
    """Draw a lead letter near the edge."""
    height, width = gray.shape
    side, angle = max(height, width) * rng.between(0.05, 0.09), rng.between(0, 2 * math.pi)
    x0, y0 = rng.between(0.02, 0.9) * width, (rng.between(0.02, 0.2) + (0.7 if rng.chance(0.5) else 0)) * height
    layer = Image.new("L", (width, height))
    pen = ImageDraw.Draw(layer)
    cos, sin = math.cos(angle), math.sin(angle)
    for stroke in _LETTERS["LR"[rng.below(2)]]:
        turned = [(x * cos - y * sin, x * sin + y * cos) for x, y in stroke]
        pen.line([(x0 + side * x, y0 + side * y) for x, y in turned], fill=255, width=max(1, round(side / 6)))
    return np.maximum(gray, np.asarray(layer, np.float32) / 255 * rng.between(0.85, 1.0))


def develop(bone: Array, flesh: Array, rng: PhiloxRandom) -> NDArray[np.uint8]:
    """Develop depths of bone and flesh, (H, W) in pixels, to a radiograph, uint8 (H, W)."""
    height, width = bone.shape
    absorbed = bone * rng.between(0.9, 1.4) + flesh * rng.between(0.12, 0.3)
    low, high = float(np.percentile(absorbed, 2)), float(np.percentile(absorbed, 99.5))
    window = (absorbed - low) / max(high - low, 1e-3) * rng.between(0.65, 1.0)
    window -= 0.07 * rng.sign() * _folds(height, width, rng)
    window += _slope(height, width, rng) * rng.between(0, 1)
    noise = rng.between(0.01, 0.04) * (0.5 + np.clip(window, 0, 1))  # fewer photons where more is absorbed
    window += noise * rng.normal(height, width)
    gray: Array = np.clip(window * rng.between(0.8, 1.05) + rng.between(0.0, 0.12), 0, 1).astype(np.float32)
    gray **= np.float32(rng.between(0.7, 1.4))
    if rng.chance(0.5):
        gray = _collimated(gray, rng)
    if rng.chance(0.6):
        gray = _marker(gray, rng)
    if rng.chance(0.02):
        gray = 1 - gray  # MURA has some inverted radiographs
    return np.rint(gray * 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------- draw


def radiograph(study: PhantomStudy, view: int, *, size: int, seed: int) -> Image.Image:
    """Draw a view, counted from 1, of a study: mode L or RGB (three equal bands), longest side 0.55 to 1 times `size`."""
    rng = PhiloxRandom(seed, study.number, 1)
    bones = skeleton(study.study_type, rng)
    wall = rng.between(0.28, 0.5)
    if study.label:
        bones = break_bone(bones, study.study_type, rng)
    rng = PhiloxRandom(seed, study.number, 1 + view)
    longest = round(size * rng.between(0.55, 1.0))
    shortest = round(longest * rng.between(0.68, 1.0))
    height, width = (longest, shortest) if rng.chance(0.75) else (shortest, longest)
    projected = project(bones, study.study_type, height, width, rng)
    pixels = develop(bone_depth(projected, height, width, wall), flesh_depth(projected, height, width), rng)
    image = Image.fromarray(pixels)
    return image.convert("RGB") if rng.chance(0.3) else image


def _draw_study(study: PhantomStudy, *, out: Path, size: int, seed: int) -> int:
    folder = out / study.folder
    folder.mkdir(parents=True, exist_ok=True)
    for view in range(1, study.num_views + 1):
        radiograph(study, view, size=size, seed=seed).save(folder / f"image{view}.png", compress_level=6)
    return study.num_views


def draw(
    out: Path,
    *,
    studies: int = 400,
    size: int = 512,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Draw a phantom set in MURA's layout with its CSVs, or finish an interrupted one.

    Args:
        out: Folder of the set.
        studies: Number of studies.
        size: Largest side of a radiograph in pixels.
        seed: Seed of the drawings.
        workers: Worker processes, which do not affect the result. Default: one per processor.
        progress: Called with the numbers of drawn and of all studies.

    Returns:
        Counts of the set.

    Raises:
        UserError: A value is out of range, or `out` holds something else.
    """
    if studies < MIN_STUDIES:
        raise UserError(
            f"studies={studies}: both labels in train and valid need at least {MIN_STUDIES}. Raise --studies."
        )
    if not MIN_SIZE_PX <= size <= MAX_SIZE_PX:
        raise UserError(
            f"size={size}: a radiograph is drawn {MIN_SIZE_PX} to {MAX_SIZE_PX} pixels long. Change --size."
        )
    if not 0 <= seed < 2**64:
        raise UserError(f"seed={seed}: the seed is a whole number from 0 to 2**64 - 1. Change --seed.")
    planned = plan(studies, seed)
    mark = {"phantoms": True, "studies": studies, "size": size, "seed": seed, "version": VERSION}
    if not _finished(out, mark):
        files.write_json(out / STARTED, mark)
        work = partial(_draw_study, out=out, size=size, seed=seed)
        for done, _ in enumerate(_map_studies(work, planned, workers), start=1):
            if progress:
                progress(done, studies)
        _write_tables(out, planned)
        files.write_json(out / MARK, mark)
    (out / STARTED).unlink(missing_ok=True)
    return _counts(planned)


def _finished(out: Path, mark: dict[str, Any]) -> bool:
    """Return whether `out` holds this finished set. Raises UserError where it holds anything but its beginning."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file, but a phantom set is a folder. Give another path.")
    for name in (MARK, STARTED):
        if (out / name).is_file():
            existing = _read_mark(out / name)
            if existing != mark:
                settings = ", ".join(f"{key}={existing.get(key)}" for key in ("studies", "size", "seed", "version"))
                raise UserError(f"out={out} holds another set ({settings}). Give a new folder.")
            return name == MARK
    if out.is_dir() and any(not path.name.endswith(".partial") for path in out.iterdir()):
        raise UserError(f"out={out} is not empty and holds no phantoms. Give a new folder.")
    return False


def _read_mark(path: Path) -> dict[str, Any]:
    try:
        mark = files.parse_json(path.read_bytes())
    except ValueError:
        mark = None
    return mark if isinstance(mark, dict) else {}


@dataclass(frozen=True)
class PhantomSet:
    """A finished set of this version, its studies by folder."""

    studies: Mapping[str, PhantomStudy]
    size: int
    seed: int

    @classmethod
    def open(cls, out: Path) -> "PhantomSet | None":
        """Open the set in a folder. Return None without one, or for a set of another version."""
        mark = _read_mark(out / MARK) if (out / MARK).is_file() else {}
        studies, size, seed, version = (mark.get(key) for key in ("studies", "size", "seed", "version"))
        if not (type(studies) is type(size) is type(seed) is int and version == VERSION):
            return None
        if not (studies >= MIN_STUDIES and MIN_SIZE_PX <= size <= MAX_SIZE_PX and 0 <= seed < 2**64):
            return None
        return cls({study.folder: study for study in plan(studies, seed)}, size, seed)

    def holds(self, path: str, data: bytes) -> bool:
        """Return whether a file is that of the set: the same pixels, to one gray level, as a new drawing.

        Args:
            path: Path within the set, separated by "/".
            data: Content of the file.
        """
        match = re.fullmatch(r"(.+)/image([1-9])\.png", path)
        study = self.studies.get(match[1]) if match else None
        if match is None or study is None or int(match[2]) > study.num_views:
            return False
        expected = radiograph(study, int(match[2]), size=self.size, seed=self.seed)
        try:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                if (image.size, image.mode) != (expected.size, expected.mode):
                    return False
                difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return False
        return bool(difference.max() <= 1)


def _map_studies(work: Callable[[PhantomStudy], int], planned: list[PhantomStudy], count: int | None) -> Iterator[int]:
    count = count or min(num_processors(), 32)
    if count == 1 or len(planned) < PARALLEL_FROM:
        yield from map(work, planned)
        return
    with start_workers(count) as pool:
        yield from pool.map(work, planned, chunksize=8)


def _write_tables(out: Path, planned: list[PhantomStudy]) -> None:
    """Write MURA's four CSVs, without headers: one path per line, and one study (with a slash) and label per line."""
    for split in ("train", "valid"):
        of_split = [study for study in planned if study.split == split]
        images = [f"{ROOT}/{s.folder}/image{view}.png\n" for s in of_split for view in range(1, s.num_views + 1)]
        files.write_text(out / f"{split}_image_paths.csv", "".join(images))
        labels = [f"{ROOT}/{study.folder}/,{study.label}\n" for study in of_split]
        files.write_text(out / f"{split}_labeled_studies.csv", "".join(labels))


def _counts(planned: list[PhantomStudy]) -> dict[str, Any]:
    by_split = {split: [study for study in planned if study.split == split] for split in ("train", "valid")}
    return {
        "studies": len(planned),
        "radiographs": sum(study.num_views for study in planned),
        "patients": len({study.patient for study in planned}),
        "positive_studies": sum(study.label for study in planned),
        **{f"{split}_studies": len(group) for split, group in by_split.items()},
    }
