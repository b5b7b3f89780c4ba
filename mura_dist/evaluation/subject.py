"""What is evaluated and how: the records that evaluate, results and gallery hand to each other.

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
    """`num_sampled`: radiographs behind the numbers."""

    num_studies: int = 24
    num_sampled: int = 64
    seed: int = 0


@dataclass(frozen=True)
class EvaluateOptions:
    """How to evaluate. `gallery` None: write none.

    operating_point: whose thresholds make the calls; None: the paper's, of an exported model its own. prevalence: share of
    abnormal studies to work PPV and NPV out for. shared: others may read the gallery too, as the umask says.
    """

    out: Path
    split: str = "valid"
    operating_point: str | None = None
    prevalence: float | None = None
    gallery: GalleryOptions | None = None
    shared: bool = False


@dataclass(frozen=True)
class EvaluationSubject:
    """The model that is evaluated, as metrics.json, the report and the gallery describe it."""

    title: str  # of the report
    name: str  # of the model, in the gallery
    outputs: ForwardFunction
    checkpoint: str
    trained_on: str  # phantoms or radiographs
    selected_on: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    members: list[dict[str, Any]] = field(default_factory=list)  # of an ensemble
    weights_sha256: list[str] | None = None  # of each checkpoint; None of an exported model
    same_data: bool | None = None  # whether these are the shards it was trained on; None of an exported model
    history: list[dict[str, Any]] = field(default_factory=list)  # metrics.jsonl's lines, of a run


@dataclass(frozen=True)
class SplitScores:
    """The scores of a split, and the points fitted for them. `num_scored`: radiographs, with tune's; None: the split's alone."""

    scores: Scores
    points: FittedThresholds
    seconds: float
    num_scored: int | None = None
