"""Test the loss of training and evaluation: the paper's weighted cross-entropy."""

import math

import numpy as np
import pytest
import torch

from mura_dist.data.loaders.loader import RowTargets
from mura_dist.training.loss import weighted_bce
from mura_dist.training.scores import Scores
from mura_dist.training.validation import weighted_loss


def test_loss_equals_the_papers() -> None:
    """XR_HAND has w1 .732275, w0 .267725: loss(y=1, p=.9) = .077153, loss(y=0, p=.9) = .616460."""
    logit = torch.tensor([math.log(9), math.log(9)], dtype=torch.float64).float()
    label, weight = torch.tensor([1.0, 0.0]), torch.tensor([0.732275, 0.267725])
    assert weighted_bce(logit[:1], label[:1], weight[:1]).item() == pytest.approx(0.077153, abs=1e-6)
    assert weighted_bce(logit[1:], label[1:], weight[1:]).item() == pytest.approx(0.616460, abs=1e-6)
    assert weighted_bce(logit, label, weight).item() == pytest.approx(0.693613, abs=2e-6)
    targets = RowTargets(label.numpy(), weight.numpy())
    scores = Scores.from_split(np.array([0, 1]), logit.numpy(), np.ones(2, bool))
    assert weighted_loss(scores, targets) == pytest.approx(0.693613 / 2, abs=1e-6)


def test_loss_is_finite_for_large_logits() -> None:
    logit = torch.tensor([1e4, -1e4, 0.0])
    assert torch.isfinite(weighted_bce(logit, torch.tensor([0.0, 1.0, 1.0]), torch.ones(3)))
    scores = Scores.from_split(np.arange(3), logit.numpy(), np.ones(3, bool))
    assert np.isfinite(weighted_loss(scores, RowTargets(np.ones(3, np.float32), np.ones(3, np.float32))))
