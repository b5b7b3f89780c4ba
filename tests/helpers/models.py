"""Small models and images for them."""

from pathlib import Path

import numpy as np
import onnx
import torch

from mura_dist.models import densenet
from mura_dist.models.card import KEY, Card, TrainedOn

S = 64


def card_of(size: int = S, kind: str = "radiographs") -> Card:
    return Card(
        size=size,
        study_types=["XR_HAND", "XR_WRIST"],
        thresholds={"XR_HAND": 0.5, "XR_WRIST": 0.25},
        metrics={"overall": {"kappa": None, "reasons": {"kappa": "é"}}},
        trained_on=TrainedOn(kind=kind, manifest_sha256="0" * 64, num_radiographs=9, splits={"train": 8, "tune": 1}),
        selected_on="tune",
        recipe={"epochs": 3, "seed": 0},
        checkpoint="step-00000012",
    )


def tiny(seed: int = 0) -> densenet.DenseNet:
    """Build a model whose BatchNorm statistics differ from their initial values."""
    model = densenet.build("tiny", seed=seed)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randint(0, 256, (8, 1, S, S), dtype=torch.uint8))
    return model.eval()


def noise(number: int, size: int = S, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, 1, size, size), dtype=np.uint8)


def with_card(source: Path, card: Card, target: Path) -> Path:
    """Write an exported model with another card."""
    proto = onnx.load(source)
    next(entry for entry in proto.metadata_props if entry.key == KEY).value = card.to_json()
    onnx.save(proto, target)
    return target
