"""Phantoms: bones drawn in MURA's own layout, some broken, so that all can be tried without a radiograph.

    plan      -> which studies: split, patient, study type, label (40 % positive), number of views
    skeleton  -> an arm from collar bone to finger tips, in cm; positive: one bone broken, what hangs on it moved
    project   -> the part of the arm that the study type shows, seen from one side: 2-D bones in pixels
    attenuate -> length of bone and flesh that each X-ray crosses (a bone is a tube: dense wall, marrow inside)
    develop   -> window, exposure, grain, collimation, marker -> uint8 (H, W) -> PNG, gray or RGB

All views of a study show the same bones and the same break, so a break may hide in one view and show in the next. What
is not a break (growth plates, skin folds, overlapping bones, markers, borders) is drawn for both labels alike. A
radiograph is a pure function of (seed, study, view); on another processor or NumPy a pixel may differ by a gray level.
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
from mura_dist.distributed.processes import num_processors
from mura_dist.distributed.processes import start_workers

VERSION = 1  # of the drawings: another number, other pixels
MARK = "phantoms.json"  # written last: the set is complete
STARTED = ".phantoms.started.json"  # written first: what stands here is ours, whole or not
ROOT = "MURA-v1.1"  # what the paths in MURA's CSVs begin with
MIN_STUDIES, MIN_SIZE_PX, MAX_SIZE_PX = 4, 64, 2048
VALID_SHARE = 0.22
PARALLEL_FROM = 100  # studies; below, starting processes costs more than it saves

Array = NDArray[np.float32]
Point = NDArray[np.float64]


class PhiloxRandom:
    """Numbers from raw Philox bits: NumPy promises those across versions, not what its distributions make of them."""

    def __init__(self, *key: int) -> None:
        seed, study, view = key
        self.bits = np.random.Philox(key=np.array([seed, study << 8 | view], dtype=np.uint64))

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * (int(self.bits.random_raw()) >> 11) * 2.0**-53

    def chance(self, probability: float) -> bool:
        return self.between(0, 1) < probability

    def below(self, n: int) -> int:
        return int(self.between(0, n))

    def sign(self) -> float:
        return 1.0 if self.chance(0.5) else -1.0

    def normal(self, height: int, width: int) -> Array:
        """(height, width) float32 of mean 0 and deviation 1: four random bytes summed will do for grain."""
        words = self.bits.random_raw((height * width + 1) // 2)
        quads = words.view(np.uint8).reshape(-1, 4).sum(axis=1, dtype=np.float32)[: height * width]
        return ((quads - 510) / 147.8).reshape(height, width).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True, slots=True)
class PhantomStudy:
    number: int  # 0-based over all splits: with the seed, all that its drawing depends on
    split: str
    study_type: str
    patient: int
    study: int
    label: int
    num_views: int

    @property
    def folder(self) -> str:
        suffix = "positive" if self.label else "negative"
        return f"{self.split}/{self.study_type}/patient{self.patient:05d}/study{self.study}_{suffix}"


def plan(studies: int, seed: int) -> list[PhantomStudy]:
    """`studies` studies, 22 % of them in valid, each patient in one split; both labels in each split."""
    num_valid = max(2, round(VALID_SHARE * studies))
    planned: list[PhantomStudy] = []
    for split, count in (("train", studies - num_valid), ("valid", num_valid)):
        planned += _plan_split(split, count, planned[-1].patient if planned else 0, len(planned), seed)
    return planned


def _plan_split(split: str, count: int, patient: int, number: int, seed: int) -> list[PhantomStudy]:
    planned: list[PhantomStudy] = []
    seen = dict.fromkeys(STUDY_TYPES, 0)
    first_patient = patient + 1
    while len(planned) < count:
        patient += 1
        dice = PhiloxRandom(seed, number + len(planned), 0)
        first_type = (patient - first_patient) % len(STUDY_TYPES)
        # The first two patients have one study each: their labels differ, however small the split.
        num_studies = 1 if patient - first_patient < 2 else (1, 1, 1, 1, 1, 1, 2, 2, 2, 3)[dice.below(10)]
        for study in range(1, min(num_studies, count - len(planned)) + 1):
            place = first_type if study == 1 or dice.chance(0.4) else dice.below(len(STUDY_TYPES))
            study_type = STUDY_TYPES[place]
            label = int((seen[study_type] + place) % 2 == 1 and seen[study_type] % 5 != 4)
            seen[study_type] += 1
            num_views = (1, 2, 2, 3, 3, 3, 4)[dice.below(7)]
            planned.append(PhantomStudy(number + len(planned), split, study_type, patient, study, label, num_views))
    return planned


# --------------------------------------------------------------------------------------------------------- skeleton


@dataclass(frozen=True, slots=True)
class Cut:
    """One face of a break: keep what lies on `side` of a jagged line across the bone at `place`, `gap` short of it."""

    place: float  # 0 head .. 1 tail
    side: int  # -1 keeps the head, +1 the tail
    slope: float
    gap: float  # in radii
    phase: float
    callus: float  # how much the healing bone swells, in radii


@dataclass(frozen=True, slots=True)
class Bone:
    """A tube from head to tail. Lengths in cm in the skeleton, in pixels once projected."""

    name: str
    hangs_on: str
    head: Point  # (3,) x to the side, y towards the finger tips, z towards the viewer; (2,) once projected
    tail: Point
    radius: tuple[float, float, float]  # at head, shaft, tail
    flesh: float  # radius of the flesh around it
    bow: float = 0.0  # how far the shaft bends aside, in lengths
    density: float = 1.0
    growth_plates: tuple[float, ...] = ()
    cut: Cut | None = None


def _towards(start: Point, angle: float, length: float, lean: float = 0.0) -> Point:
    flat = length * math.cos(lean)
    return start + np.array([flat * math.sin(angle), flat * math.cos(angle), length * math.sin(lean)])


def skeleton(study_type: str, dice: PhiloxRandom) -> list[Bone]:
    """An arm, each bone after the one that it hangs on. The shoulder is at the origin."""
    flexion = dice.between(0.0, 1.5) if study_type == "XR_ELBOW" else dice.between(-0.1, 0.2)
    stout = dice.between(0.9, 1.2)
    origin = np.zeros(3)
    elbow = _towards(origin, 0.0, 27.0)
    wrist = _towards(elbow, flexion, 23.0)
    upper = Bone("humerus", "scapula", origin, _towards(elbow, 0.0, -1.1), (2.1, 1.15, 1.9), 4.2)
    bones = [*_shoulder(origin, dice), upper, *_forearm(elbow, wrist, flexion), *_hand(wrist, flexion, dice)]
    plates = (0.1, 0.9) if dice.chance(0.2) else ()
    return [
        replace(bone, radius=_scaled(bone.radius, stout), growth_plates=plates if bone.radius[1] < 1.3 else ())
        for bone in bones
    ]


def _scaled(radius: tuple[float, float, float], by: float) -> tuple[float, float, float]:
    return radius[0] * by, radius[1] * by, radius[2] * by


def _shoulder(joint: Point, dice: PhiloxRandom) -> Iterator[Bone]:
    sternum = joint + np.array([-13.0, -1.5 + dice.between(-1, 1), 1.0])
    yield Bone("clavicle", "", sternum, joint + np.array([-0.5, -3.0, 0.5]), (1.0, 0.72, 0.95), 2.5, dice.sign() * 0.06)
    blade = joint + np.array([-2.4, 0.4, -1.0])
    yield Bone("scapula", "clavicle", blade, blade + np.array([-5.0, 11.0, -1.0]), (2.0, 3.4, 0.7), 5.0, 0.0, 0.25)
    yield Bone(
        "acromion", "scapula", blade + np.array([-5.0, -1.0, 0]), blade + np.array([2.0, -3.0, 0]), (0.5, 0.6, 0.9), 3.0
    )
    for rib in range(4):
        start = joint + np.array([-17.0, 0.5 + 3.4 * rib, -4.0])
        yield Bone(f"rib{rib}", "", start, start + np.array([9.5, 3.0 + rib, 0.0]), (0.5, 0.55, 0.5), 3.0, -0.15, 0.5)


def _forearm(elbow: Point, wrist: Point, flexion: float) -> Iterator[Bone]:
    aside = np.array([math.cos(flexion), -math.sin(flexion), 0.0])
    along = np.array([math.sin(flexion), math.cos(flexion), 0.0])
    radius_head, ulna_head = elbow + 1.2 * aside + 2.0 * along, elbow - 0.9 * aside + 0.2 * along
    yield Bone("radius", "humerus", radius_head, wrist + 1.1 * aside, (1.0, 0.72, 1.5), 2.6, 0.035)
    yield Bone("ulna", "humerus", ulna_head, wrist - 1.3 * aside - 0.4 * along, (1.5, 0.68, 0.75), 2.8, -0.02)


# Of thumb to little finger: where the metacarpal begins, in which direction it goes, how long its bones are (cm).
_FINGERS = (
    (1.9, 1.5, 0.62, (4.4, 3.2, 2.4)),
    (1.3, 2.6, 0.17, (6.3, 4.2, 2.6, 1.9)),
    (0.3, 2.8, 0.03, (6.0, 4.6, 3.0, 2.0)),
    (-0.7, 2.6, -0.11, (5.4, 4.2, 2.8, 2.0)),
    (-1.6, 2.3, -0.26, (5.0, 3.4, 2.1, 1.8)),
)
# Middle of each carpal bone, cm from the wrist joint, and its radius.
_CARPALS = (
    (1.3, 0.7, 0.75),
    (0.2, 0.6, 0.7),
    (-0.9, 0.7, 0.6),
    (1.6, 1.6, 0.5),
    (0.9, 1.8, 0.5),
    (0.2, 1.9, 0.7),
    (-0.8, 1.8, 0.65),
)


def _hand(wrist: Point, angle: float, dice: PhiloxRandom) -> Iterator[Bone]:
    angle += dice.between(-0.2, 0.2)
    aside = np.array([math.cos(angle), -math.sin(angle), 0.0])
    along = np.array([math.sin(angle), math.cos(angle), 0.0])
    for i, (x, y, radius) in enumerate(_CARPALS):
        middle = wrist + x * aside + (y + 0.5) * along
        tip = _towards(middle, angle + dice.between(-0.8, 0.8), 0.35 * radius)
        yield Bone(f"carpal{i}", "radius", middle, tip, (radius, radius, radius), 1.9, 0.0, 0.8)
    spread, curl = dice.between(0.7, 1.5), dice.between(0.0, 0.25)
    for finger, (x, y, direction, lengths) in enumerate(_FINGERS):
        joint, hangs_on = wrist + x * aside + (y + 0.5) * along, "radius"
        heading, lean = angle + direction * spread + dice.between(-0.05, 0.05), 0.0
        for part, length in enumerate(lengths):
            thick = 0.5 - 0.045 * part
            name, head = f"finger{finger}.{part}", _towards(joint, heading, thick, lean)
            tip = _towards(joint, heading, length - thick, lean)
            yield Bone(name, hangs_on, head, tip, (thick * 1.35, thick, thick * 1.3), (1.5, 0.95, 0.9, 0.8)[part])
            joint, hangs_on = _towards(joint, heading, length, lean), name
            lean += dice.between(0, 1) * curl
            heading += dice.between(-0.06, 0.06)


@dataclass(frozen=True, slots=True)
class FieldOfView:
    """What a study type shows: a point (a share of the way down a bone), how much around it, which breaks."""

    bone: str
    place: float
    extent: tuple[float, float]  # cm, the longer side of the picture
    turns: tuple[float, ...]  # radians about the arm's axis: the usual projections
    breaks: tuple[tuple[str, float, float], ...]  # a bone, and between which places it breaks


_NECK = (("humerus", 0.12, 0.19),)  # of the humerus, where it breaks most often near the shoulder
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


def break_bone(bones: list[Bone], study_type: str, dice: PhiloxRandom) -> list[Bone]:
    """The skeleton with one bone in two pieces, the lower one and all that hangs on it moved."""
    breaks = FIELDS_OF_VIEW[study_type].breaks
    name, low, high = breaks[dice.below(len(breaks))]
    place = dice.between(low, high)
    whole = next(bone for bone in bones if bone.name == name)
    severity = dice.between(0.6, 1.0)
    radius = whole.radius[1]
    center = whole.head + place * (whole.tail - whole.head)
    aside, around = dice.between(0, 2 * math.pi), dice.between(0, 2 * math.pi)
    shift = severity * dice.between(1.0, 2.2) * radius * np.array([math.cos(aside), 0.0, math.sin(aside)])
    shift = shift + severity * dice.between(-0.2, 0.9) * radius * np.array([0.0, 1.0, 0.0])
    turn = _rotation(around, severity * dice.between(0.25, 0.7))
    move = partial(_moved, center=center, turn=turn, shift=shift)
    callus = max(0.0, dice.between(-0.6, 1.0))
    cut = Cut(place, -1, dice.between(-0.9, 0.9), dice.between(0.3, 0.8), dice.between(0, 2 * math.pi), callus)
    moved, pieces = {name}, []
    for bone in bones:
        if bone.name == name:
            pieces += [replace(bone, cut=cut), replace(move(bone), cut=replace(cut, side=1))]
        elif bone.hangs_on in moved:
            moved.add(bone.name)
            pieces.append(move(bone))
        else:
            pieces.append(bone)
    return [*pieces, *_splinters(center, radius, dice)]


def _splinters(center: Point, radius: float, dice: PhiloxRandom) -> Iterator[Bone]:
    for number in range(dice.below(4)):
        start = _towards(center, dice.between(0, 6.28), dice.between(0.6, 1.6) * radius, dice.between(-1, 1))
        tip = _towards(start, dice.between(0, 6.28), dice.between(0.3, 1.0) * radius)
        thick = dice.between(0.2, 0.4) * radius
        yield Bone(f"splinter{number}", "", start, tip, (thick, thick, thick), 0.0, 0.0, 1.3)


def _moved(bone: Bone, *, center: Point, turn: NDArray[np.float64], shift: Point) -> Bone:
    head, tail = (center + turn @ (point - center) + shift for point in (bone.head, bone.tail))
    return replace(bone, head=head, tail=tail)


def _rotation(around: float, angle: float) -> NDArray[np.float64]:
    """(3, 3): by `angle` about a horizontal axis; 0 is the line of sight of the first projection (Rodrigues)."""
    x, z = math.sin(around), math.cos(around)
    cross = np.array([[0.0, -z, 0.0], [z, 0.0, -x], [0.0, x, 0.0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


# ---------------------------------------------------------------------------------------------------------- project


def project(bones: list[Bone], study_type: str, height: int, width: int, dice: PhiloxRandom) -> list[Bone]:
    """The skeleton seen from one side: head and tail (2,) as x, y; lengths in pixels of a (height, width) picture."""
    field = FIELDS_OF_VIEW[study_type]
    aim = next(bone for bone in bones if bone.name == field.bone)
    extent = dice.between(*field.extent)
    scale = max(height, width) / extent
    center = aim.head + field.place * (aim.tail - aim.head)
    turn = field.turns[dice.below(len(field.turns))] + dice.between(-0.25, 0.25)
    flip, roll = dice.sign(), dice.between(-0.6, 0.6)
    middle = np.array([width, height]) * (0.5 + np.array([dice.between(-0.15, 0.15), dice.between(-0.1, 0.1)]))

    def seen(point: Point) -> Point:
        x, y, z = point - center
        x = flip * (x * math.cos(turn) + z * math.sin(turn))
        x, y = x * math.cos(roll) - y * math.sin(roll), x * math.sin(roll) + y * math.cos(roll)
        return middle + scale * np.array([x, y])

    def flat(bone: Bone) -> Bone:
        head, tail, radius = seen(bone.head), seen(bone.tail), _scaled(bone.radius, scale)
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
    """Length of dense bone that the ray through each pixel crosses, in pixels. float32, the pixels' shape."""
    along, across, length = _along_and_across(bone, x, y)
    head, shaft, tail = (np.float32(radius) for radius in bone.radius)
    near_head, near_tail = np.exp(-((along / (1.8 * head)) ** 2)), np.exp(-(((along - length) / (1.8 * tail)) ** 2))
    radius = shaft + (head - shaft) * near_head + (tail - shaft) * near_tail
    if bone.cut:
        near_cut = np.exp(-(((along - bone.cut.place * length) / (1.3 * shaft)) ** 2))
        radius = radius + bone.cut.callus * shaft * near_cut
    over = np.maximum(-along / (0.7 * head), (along - length) / (0.7 * tail))  # beyond an end, the tube rounds off
    outer = radius**2 * (1 - np.maximum(over, 0) ** 2)
    ends = np.maximum(near_head, near_tail)
    inner = outer * (1 - wall * (1 - 0.6 * ends)) ** 2
    depth = 2 * np.sqrt(np.maximum(outer - across**2, 0))
    depth -= (1.5 - 0.55 * ends) * np.sqrt(np.maximum(inner - across**2, 0))  # marrow; spongy towards the ends
    for place in bone.growth_plates:
        depth *= 1 - 0.4 * np.exp(-(((along - place * length) / (0.16 * shaft)) ** 2))
    if bone.cut:
        depth *= _kept(bone.cut, along - bone.cut.place * length, across, float(shaft))
    return depth * np.float32(bone.density)


def _kept(cut: Cut, along: Array, across: Array, radius: float) -> Array:
    """1 on the kept side of the break, 0 beyond, one pixel of transition."""
    teeth = np.sin(across * (3.1 / radius) + cut.phase) + 0.6 * np.sin(across * (7.3 / radius) + cut.phase)
    beyond = along - cut.slope * across - 0.22 * radius * teeth
    return np.clip(0.5 + cut.side * beyond - cut.gap * radius / 2, 0, 1)


def bone_depth(bones: list[Bone], height: int, width: int, wall: float) -> Array:
    """(height, width) float32: bone on each ray, pixels."""
    depth = np.zeros((height, width), np.float32)
    y, x = np.ogrid[:height, :width]
    x, y = x.astype(np.float32), y.astype(np.float32)
    for bone in bones:
        rows, columns = _box(bone, height, width)
        if rows.stop > rows.start and columns.stop > columns.start:
            depth[rows, columns] += _bone_depth(bone, x[:, columns], y[rows], wall)
    return depth


def flesh_depth(bones: list[Bone], height: int, width: int) -> Array:
    """(height, width) float32: flesh on each ray, pixels. Smooth, hence computed on every fourth pixel."""
    coarse = (-(-height // 4), -(-width // 4))
    half_squared = np.zeros(coarse, np.float32)
    y, x = np.ogrid[: coarse[0], : coarse[1]]
    x, y = 4 * x.astype(np.float32), 4 * y.astype(np.float32)
    for bone in bones:
        along, across, length = _along_and_across(bone, x, y)
        beyond = np.maximum(0, np.maximum(-along, along - length))
        half_squared = np.maximum(half_squared, bone.flesh**2 - across**2 - beyond**2)
    return _enlarged(2 * np.sqrt(half_squared), height, width)


def _enlarged(picture: Array, height: int, width: int) -> Array:
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


# ---------------------------------------------------------------------------------------------------------- develop


def _folds(height: int, width: int, dice: PhiloxRandom) -> Array:
    """(height, width) float32 in 0..1: skin folds and vessels, faint lines that cross bones without breaking them."""
    layer = Image.new("L", (width, height))
    pen = ImageDraw.Draw(layer)
    for _ in range(dice.below(5)):
        x, y, heading = dice.between(0, width), dice.between(0, height), dice.between(0, 2 * math.pi)
        bend, points = dice.between(-0.12, 0.12), [(x, y)]
        for _ in range(dice.below(14) + 6):
            x, y, heading = x + 0.035 * width * math.cos(heading), y + 0.035 * width * math.sin(heading), heading + bend
            points.append((x, y))
        pen.line(points, fill=int(dice.between(60, 200)), width=max(1, round(max(height, width) / 130)), joint="curve")
    blurred = layer.filter(ImageFilter.GaussianBlur(max(height, width) / 250))
    return np.asarray(blurred, np.float32) / np.float32(255)


def _slope(height: int, width: int, dice: PhiloxRandom) -> Array:
    """(height, width) float32 of mean 0: an exposure that falls off in some direction, and slow blotches."""
    y, x = np.ogrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
    gradient = dice.between(-0.3, 0.3) * x + dice.between(-0.3, 0.3) * y
    blotches = _enlarged(dice.normal(6, 6), height, width) * dice.between(0.01, 0.05)
    return (gradient + blotches).astype(np.float32)


def _collimated(gray: Array, dice: PhiloxRandom) -> Array:
    """Dark beyond the shutters: a turned rectangle."""
    height, width = gray.shape
    angle, border = dice.between(-0.12, 0.12), dice.between(0.0, 0.08)
    y, x = np.ogrid[-height / 2 : height / 2 : height * 1j, -width / 2 : width / 2 : width * 1j]
    across, down = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    inside = np.minimum(dice.between(0.4, 0.53) * width - abs(across), dice.between(0.4, 0.53) * height - abs(down))
    return np.where(inside > 0, gray, border).astype(np.float32)


_LETTERS = {
    "L": (((0, 0), (0, 1), (0.6, 1)),),
    "R": (((0, 1), (0, 0), (0.5, 0), (0.6, 0.25), (0.5, 0.5), (0, 0.5)), ((0.25, 0.5), (0.65, 1))),
}


def _marker(gray: Array, dice: PhiloxRandom) -> Array:
    """A lead letter, somewhere towards the edge."""
    height, width = gray.shape
    side, angle = max(height, width) * dice.between(0.05, 0.09), dice.between(0, 2 * math.pi)
    x0, y0 = dice.between(0.02, 0.9) * width, (dice.between(0.02, 0.2) + (0.7 if dice.chance(0.5) else 0)) * height
    layer = Image.new("L", (width, height))
    pen = ImageDraw.Draw(layer)
    cos, sin = math.cos(angle), math.sin(angle)
    for stroke in _LETTERS["LR"[dice.below(2)]]:
        turned = [(x * cos - y * sin, x * sin + y * cos) for x, y in stroke]
        pen.line([(x0 + side * x, y0 + side * y) for x, y in turned], fill=255, width=max(1, round(side / 6)))
    return np.maximum(gray, np.asarray(layer, np.float32) / 255 * dice.between(0.85, 1.0))


def develop(bone: Array, flesh: Array, dice: PhiloxRandom) -> NDArray[np.uint8]:
    """Depths of bone and flesh (H, W), pixels -> the radiograph (H, W) uint8."""
    height, width = bone.shape
    absorbed = bone * dice.between(0.9, 1.4) + flesh * dice.between(0.12, 0.3)
    low, high = float(np.percentile(absorbed, 2)), float(np.percentile(absorbed, 99.5))
    window = (absorbed - low) / max(high - low, 1e-3) * dice.between(0.65, 1.0)
    window -= 0.07 * dice.sign() * _folds(height, width, dice)
    window += _slope(height, width, dice) * dice.between(0, 1)
    noise = dice.between(0.01, 0.04) * (0.5 + np.clip(window, 0, 1))  # fewer photons where more is absorbed
    window += noise * dice.normal(height, width)
    gray: Array = np.clip(window * dice.between(0.8, 1.05) + dice.between(0.0, 0.12), 0, 1).astype(np.float32)
    gray **= np.float32(dice.between(0.7, 1.4))
    if dice.chance(0.5):
        gray = _collimated(gray, dice)
    if dice.chance(0.6):
        gray = _marker(gray, dice)
    if dice.chance(0.02):
        gray = 1 - gray  # MURA has a few inverted ones
    return np.rint(gray * 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------- draw


def radiograph(study: PhantomStudy, view: int, *, size: int, seed: int) -> Image.Image:
    """View `view` (from 1) of a study: mode L or RGB (three equal bands), longest side 0.55 to 1 times `size`."""
    dice = PhiloxRandom(seed, study.number, 1)
    bones = skeleton(study.study_type, dice)
    wall = dice.between(0.28, 0.5)
    if study.label:
        bones = break_bone(bones, study.study_type, dice)
    dice = PhiloxRandom(seed, study.number, 1 + view)
    longest = round(size * dice.between(0.55, 1.0))
    shortest = round(longest * dice.between(0.68, 1.0))
    height, width = (longest, shortest) if dice.chance(0.75) else (shortest, longest)
    seen = project(bones, study.study_type, height, width, dice)
    pixels = develop(bone_depth(seen, height, width, wall), flesh_depth(seen, height, width), dice)
    picture = Image.fromarray(pixels)
    return picture.convert("RGB") if dice.chance(0.3) else picture


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
    """Draw a phantom set under `out` in MURA's layout, with its CSVs; the same call again finishes what a kill left.

    `progress(done, studies)` is called as studies are drawn. Returns the counts of the set. The bytes do not depend on
    `workers` (by default one for each processor). Raises UserError for a request that cannot be drawn or an `out` that
    holds something else.
    """
    if studies < MIN_STUDIES:
        raise UserError(
            f"studies={studies}: both labels in train and valid need at least {MIN_STUDIES}; raise --studies"
        )
    if not MIN_SIZE_PX <= size <= MAX_SIZE_PX:
        raise UserError(f"size={size}: a radiograph is drawn {MIN_SIZE_PX} to {MAX_SIZE_PX} pixels long; change --size")
    if not 0 <= seed < 2**64:
        raise UserError(f"seed={seed}: the seed is a whole number from 0 to 2**64 - 1; change --seed")
    planned = plan(studies, seed)
    mark = {"phantoms": True, "studies": studies, "size": size, "seed": seed, "version": VERSION}
    if not _finished(out, mark):
        files.write_json(out / STARTED, mark)
        work = partial(_draw_study, out=out, size=size, seed=seed)
        for done, _ in enumerate(_each(work, planned, workers), start=1):
            if progress:
                progress(done, studies)
        _write_tables(out, planned)
        files.write_json(out / MARK, mark)
    (out / STARTED).unlink(missing_ok=True)
    return _counts(planned)


def _finished(out: Path, mark: dict[str, Any]) -> bool:
    """Whether `out` holds this very set; raises UserError where it holds anything that is not the beginning of it."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file; a phantom set is a folder; give another path")
    for name in (MARK, STARTED):
        if (out / name).is_file():
            there = _read_mark(out / name)
            if there != mark:
                told = ", ".join(f"{key}={there.get(key)}" for key in ("studies", "size", "seed", "version"))
                raise UserError(f"out={out} holds another set ({told}); one folder holds one set; give a new folder")
            return name == MARK
    if out.is_dir() and any(not there.name.endswith(".partial") for there in out.iterdir()):
        raise UserError(f"out={out} is not empty and holds no phantoms; they are not mixed in; give a new folder")
    return False


def _read_mark(path: Path) -> dict[str, Any]:
    try:
        there = files.parse_json(path.read_bytes())
    except ValueError:
        there = None
    return there if isinstance(there, dict) else {}


@dataclass(frozen=True)
class PhantomSet:
    """A finished set as this version draws it. `studies`: by folder."""

    studies: Mapping[str, PhantomStudy]
    size: int
    seed: int

    @classmethod
    def open(cls, out: Path) -> "PhantomSet | None":
        """Return the set in a folder; None where there is none, or another version drew it."""
        mark = _read_mark(out / MARK) if (out / MARK).is_file() else {}
        studies, size, seed, version = (mark.get(key) for key in ("studies", "size", "seed", "version"))
        if not (type(studies) is type(size) is type(seed) is int and version == VERSION):
            return None
        if not (studies >= MIN_STUDIES and MIN_SIZE_PX <= size <= MAX_SIZE_PX and 0 <= seed < 2**64):
            return None
        return cls({study.folder: study for study in plan(studies, seed)}, size, seed)

    def holds(self, path: str, data: bytes) -> bool:
        """Return whether a file is what the set has there, which is drawn anew to compare: every pixel, to a gray level.

        Args:
            path: The file's path below the set, "/" between its parts.
            data: The file's content.
        """
        match = re.fullmatch(r"(.+)/image([1-9])\.png", path)
        study = self.studies.get(match[1]) if match else None
        if match is None or study is None or int(match[2]) > study.num_views:
            return False
        wanted = radiograph(study, int(match[2]), size=self.size, seed=self.seed)
        try:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                if (image.size, image.mode) != (wanted.size, wanted.mode):
                    return False
                off = np.abs(np.asarray(image).astype(int) - np.asarray(wanted))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return False
        return bool(off.max() <= 1)


def _each(work: Callable[[PhantomStudy], int], planned: list[PhantomStudy], count: int | None) -> Iterator[int]:
    count = count or min(num_processors(), 32)
    if count == 1 or len(planned) < PARALLEL_FROM:
        yield from map(work, planned)
        return
    with start_workers(count) as pool:
        yield from pool.map(work, planned, chunksize=8)


def _write_tables(out: Path, planned: list[PhantomStudy]) -> None:
    """MURA's four CSVs: no header; a path a line; a study's path ends in a slash and is followed by its label."""
    for split in ("train", "valid"):
        mine = [study for study in planned if study.split == split]
        images = [f"{ROOT}/{s.folder}/image{view}.png\n" for s in mine for view in range(1, s.num_views + 1)]
        files.write_text(out / f"{split}_image_paths.csv", "".join(images))
        labels = [f"{ROOT}/{study.folder}/,{study.label}\n" for study in mine]
        files.write_text(out / f"{split}_labeled_studies.csv", "".join(labels))


def _counts(planned: list[PhantomStudy]) -> dict[str, Any]:
    by_split = {split: [study for study in planned if study.split == split] for split in ("train", "valid")}
    return {
        "studies": len(planned),
        "radiographs": sum(study.num_views for study in planned),
        "patients": len({study.patient for study in planned}),
        "positive_studies": sum(study.label for study in planned),
        **{f"{split}_studies": len(mine) for split, mine in by_split.items()},
    }
