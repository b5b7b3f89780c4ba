"""Simulated studies for evaluations."""

import numpy as np
import pandas as pd


def simulated(num: int, num_patients: int, seed: int = 0, noise: float = 1.3) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, num)
    logit = 2 * label - 1 + rng.normal(0, noise, num)
    return pd.DataFrame(
        {
            "study_type": rng.choice(["XR_ELBOW", "XR_HAND"], num),
            "patient": [f"patient{i:05}" for i in rng.integers(0, num_patients, num)],
            "label": label,
            "probability": np.round(1 / (1 + np.exp(-logit)), 2),  # rounded: many ties
        }
    )
