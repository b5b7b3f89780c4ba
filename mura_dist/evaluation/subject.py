"""Define the records that evaluate, results and gallery pass to each other.

run, list or ONNX file -> EvaluationSubject, SplitScores          command line -> EvaluateOptions, GalleryOptions
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mura_dist.evaluation.saliency import ForwardFunction
from mura_dist.metrics.operating_points import FittedThresholds
from mura_dist.training.scores import Scores


@dataclass(frozen=True)
class GalleryOptions:
    """How to write a gallery."""

    num_studies: int = 24
    num_sampled: int = 64  # radiographs that the stability of the maps is measured on
    seed: int = 0


@dataclass(frozen=True)
class EvaluateOptions:
    """How to evaluate."""

    out: Path
    split: str = "valid"
    operating_point: str | None = None  # its thresholds make the calls; None: the paper's, or an exported model's own
    prevalence: float | None = None  # share of abnormal studies to compute PPV and NPV for
    gallery: GalleryOptions | None = None  # None: write no gallery
    shared: bool = False  # the gallery is readable by others, as the umask allows


@dataclass(frozen=True)
class EvaluationSubject:
    """The evaluated model, as metrics.json, the report and the gallery describe it."""

    title: str  # of the report
    name: str  # of the model, in the gallery
    forward: ForwardFunction
    checkpoint: str
    trained_on: str  # phantoms or radiographs
    selected_on: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    members: list[dict[str, Any]] = field(default_factory=list)  # of an ensemble
    weights_sha256: list[str] | None = None  # of each checkpoint; None of an exported model
    same_data: bool | None = None  # whether these are the shards it was trained on; None of an exported model
    history: list[dict[str, Any]] = field(default_factory=list)  # lines of metrics.jsonl, of a run


@dataclass(frozen=True)
class SplitScores:
    """The scores of a split, and the thresholds fitted for them."""

    scores: Scores
    thresholds: FittedThresholds
    seconds: float
    num_scored: int | None = None  # radiographs, including tune's; None: the split's alone
