"""How sure a number is. NumPy only."""

import math

import numpy as np

from .metrics import agreement, kappa

Z = 1.96  # two-sided 95 % of the normal distribution, as the official scorer rounds it


def fce_standard_error(confusion: np.ndarray) -> float:
    """Kappa's asymptotic standard error (Fleiss, Cohen, Everitt 1969), studies taken as independent. confusion (4,)."""
    n = float(np.sum(confusion))
    share = np.asarray(confusion, dtype=np.float64).reshape(2, 2) / n  # label by call
    by_label, by_call = share.sum(axis=1), share.sum(axis=0)
    value, chance = float(kappa(confusion)), float(by_label @ by_call)
    agreeing = sum(share[i, i] * (1 - (by_label[i] + by_call[i]) * (1 - value)) ** 2 for i in (0, 1))
    differing = sum(share[i, 1 - i] * (by_call[i] + by_label[1 - i]) ** 2 for i in (0, 1))
    variance = agreeing + (1 - value) ** 2 * differing - (value - chance * (1 - value)) ** 2
    return math.sqrt(max(variance, 0.0) / n) / (1 - chance)


def official_interval(confusion: np.ndarray) -> tuple[float, float]:
    """The official scorer's interval of kappa, too narrow: a variance in place of a standard error. confusion (4,)."""
    observed, chance = agreement(confusion)
    half = Z * observed * (1 - observed) / (np.sum(confusion) * (1 - chance) ** 2)
    value = kappa(confusion)
    return float(value - half), float(value + half)
