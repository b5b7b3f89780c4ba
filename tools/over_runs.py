"""Print mean and standard deviation of metrics over runs, such as the seeds of launch/ensemble.sbatch.

python tools/over_runs.py RUN [RUN ...] [--together FOLDER]    evaluated runs; FOLDER: the report of their ensemble
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mura_dist.core.errors import UserError
from mura_dist.metrics import summary
from mura_dist.metrics.entries import HEADLINE_METRICS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of an evaluated run")
    parser.add_argument("--together", type=Path, metavar="FOLDER", help="report folder of the ensemble of these runs")
    options = parser.parse_args()
    measured = [read_metrics(folder) for folder in options.runs]
    print(over_runs_table(over_runs(measured), len(measured)))
    if options.together is not None:
        overall = read_metrics(options.together)["overall"]
        numbers = (f"{name} {summary.format_with_interval(overall, name)}" for name in ("kappa", "auroc"))
        print(
            f"Together, as one model: {', '.join(numbers)} ({overall['num_studies']} studies); {options.together}/report.html"
        )
    return 0


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read a run's metrics.json. Raise UserError if the run was not evaluated."""
    path = folder / "metrics.json"
    if not path.is_file():
        raise UserError(f"{folder} has no metrics.json. Run mura-dist evaluate {folder} SHARDS")
    return json.loads(path.read_bytes())


def over_runs(measured: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Compute mean and standard deviation over runs that differ by their seed.

    The deviation describes the training's variation, not the choice of patients.

    Args:
        measured: The metrics.json of each run.

    Returns:
        By group and headline metric: {"mean", "deviation"}. deviation is the sample's (n - 1), None for one run. Both are None
        if a run lacks the metric.

    Raises:
        UserError: The runs were evaluated differently.
    """
    first = measured[0]
    for key in ("split", "manifest_sha256", "operating_point", "selected_on"):
        if differing := next((run[key] for run in measured if run[key] != first[key]), None):
            raise UserError(
                f"runs evaluated differently: {key}={first[key]} and {key}={differing}. Evaluate all with the same options"
            )
    return {
        name: {
            metric: _spread([summary.metrics_by_group(run)[name][metric] for run in measured])
            for metric in HEADLINE_METRICS
        }
        for name in summary.metrics_by_group(first)
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return {"mean": None, "deviation": None}
    return {"mean": float(np.mean(numbers)), "deviation": float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None}


def over_runs_table(spreads: dict[str, dict[str, dict[str, Any]]], num_runs: int) -> str:
    """Return a plain-text table for the terminal: overall, then each study type."""
    form = "{:<16} {:<16} {:<16} {:<16} {:<16}"
    lines = [form.format(f"{num_runs} runs", *(name if name != "auroc" else "AUROC" for name in HEADLINE_METRICS))]
    for name, group in spreads.items():
        cells = [
            f"{summary.format_number(spread['mean'])} +- {summary.format_number(spread['deviation'])}"
            for spread in group.values()
        ]
        lines.append(form.format(name[:16], *cells))
    lines.append(
        "Mean +- standard deviation over runs: how far training varies. Each run's own report has its interval over patients."
    )
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"tools/over_runs.py: {error}", file=sys.stderr)
        sys.exit(2)
