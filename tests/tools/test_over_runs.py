"""tools/over_runs.py: mean and standard deviation over runs that differ by their seed."""

import runpy

import pytest
from helpers.commands import ROOT

from mura_dist.core.errors import UserError

TOOL = runpy.run_path(str(ROOT / "tools" / "over_runs.py"))


def run_of(kappa: float | None, auroc: float = 0.9, **facts: object) -> dict:
    """As much of a metrics.json as runs are compared by."""
    group = {"kappa": kappa, "auroc": auroc, "sensitivity": 0.5, "specificity": 0.75}
    alike = {"split": "valid", "manifest_sha256": "a", "operating_point": "paper", "selected_on": "tune"}
    return {"overall": group, "by_study_type": {"XR_HAND": group}} | alike | facts


def test_runs_have_a_mean_and_a_deviation_of_a_sample() -> None:
    spreads = TOOL["over_runs"]([run_of(0.6), run_of(0.7), run_of(0.8)])
    assert set(spreads) == {"overall", "XR_HAND"}
    assert spreads["overall"]["kappa"] == pytest.approx({"mean": 0.7, "deviation": 0.1})
    assert spreads["overall"]["auroc"] == pytest.approx({"mean": 0.9, "deviation": 0.0})
    table = TOOL["over_runs_table"](spreads, 3).splitlines()
    assert table[0].split() == ["3", "runs", "kappa", "AUROC", "sensitivity", "specificity"]
    assert table[1].startswith("overall          0.700 +- 0.100   0.900 +- 0.000")


def test_one_run_has_no_deviation_and_what_a_run_lacks_no_mean() -> None:
    assert TOOL["over_runs"]([run_of(0.6)])["overall"]["kappa"] == {"mean": 0.6, "deviation": None}
    lacking = TOOL["over_runs"]([run_of(0.6), run_of(None)])
    assert lacking["overall"]["kappa"] == {"mean": None, "deviation": None}
    assert "- +- -" in TOOL["over_runs_table"](lacking, 2)


def test_differently_evaluated_runs_are_refused() -> None:
    with pytest.raises(UserError, match=r"split=valid and split=tune\. Evaluate all with the same options"):
        TOOL["over_runs"]([run_of(0.6), run_of(0.6, split="tune")])
