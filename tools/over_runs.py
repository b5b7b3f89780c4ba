"""Mean and standard deviation over runs, such as those of launch/ensemble.sbatch: one recipe, several seeds.

python tools/over_runs.py RUN [RUN ...] [--together FOLDER]    runs that were evaluated; FOLDER: the report of their ensemble
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
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--together", type=Path, metavar="FOLDER")
    words = parser.parse_args()
    measured = [measured_of(folder) for folder in words.runs]
    print(over_runs_table(over_runs(measured), len(measured)))
    if words.together is not None:
        overall = measured_of(words.together)["overall"]
        numbers = (f"{name} {summary.format_with_interval(overall, name)}" for name in ("kappa", "auroc"))
        print(
            f"Together, as one model: {', '.join(numbers)} ({overall['num_studies']} studies); {words.together}/report.html"
        )
    return 0


def measured_of(folder: Path) -> dict[str, Any]:
    """UserError where it was not evaluated yet."""
    path = folder / "metrics.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no metrics.json; mura-dist evaluate {folder} SHARDS makes it")
    return json.loads(path.read_bytes())


def over_runs(measured: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """How runs that differ by their seed differ in what they reach: by group and headline metric, {"mean", "deviation"}.

    measured: the runs' metrics.json. deviation: of a sample (n - 1), None of one run; both None where a run has no such
    number. It says how far training varies, nothing of other patients: that is each run's interval. Raises UserError where the
    runs were not measured alike.
    """
    first = measured[0]
    for key in ("split", "manifest_sha256", "operating_point", "selected_on"):
        if other := next((one[key] for one in measured if one[key] != first[key]), None):
            raise UserError(f"runs measured with {key}={first[key]} and {key}={other}; evaluate all of them alike")
    return {
        name: {
            metric: _spread([summary.metrics_by_group(one)[name][metric] for one in measured])
            for metric in HEADLINE_METRICS
        }
        for name in summary.metrics_by_group(first)
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        return {"mean": None, "deviation": None}
    return {"mean": float(np.mean(found)), "deviation": float(np.std(found, ddof=1)) if len(found) > 1 else None}


def over_runs_table(spreads: dict[str, dict[str, dict[str, Any]]], num_runs: int) -> str:
    """A plain-text table for the terminal: overall, each study type."""
    form = "{:<16} {:<16} {:<16} {:<16} {:<16}"
    lines = [form.format(f"{num_runs} runs", *(name if name != "auroc" else "AUROC" for name in HEADLINE_METRICS))]
    for name, group in spreads.items():
        cells = [
            f"{summary.format_number(one['mean'])} +- {summary.format_number(one['deviation'])}"
            for one in group.values()
        ]
        lines.append(form.format(name[:16], *cells))
    lines.append(
        "Mean +- standard deviation over runs: how far training varies. Each run's own report has its interval over patients."
    )
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as refusal:
        print(f"tools/over_runs.py: {refusal}", file=sys.stderr)
        sys.exit(2)
