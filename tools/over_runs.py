"""Mean and standard deviation over runs, such as those of launch/ensemble.sbatch: one recipe, several seeds.

python tools/over_runs.py RUN [RUN ...] [--together FOLDER]    runs that were evaluated; FOLDER: the report of their ensemble
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mura_dist.core.errors import Refusal
from mura_dist.metrics import summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--together", type=Path, metavar="FOLDER")
    words = parser.parse_args()
    measured = [measured_of(folder) for folder in words.runs]
    print(summary.over_runs_table(summary.over_runs(measured), len(measured)))
    if words.together is not None:
        overall = measured_of(words.together)["overall"]
        numbers = (f"{name} {summary.with_interval(overall, name)}" for name in ("kappa", "auroc"))
        print(
            f"Together, as one model: {', '.join(numbers)} ({overall['num_studies']} studies); {words.together}/report.html"
        )
    return 0


def measured_of(folder: Path) -> dict[str, Any]:
    """Refusal where it was not evaluated yet."""
    path = folder / "metrics.json"
    if not path.is_file():
        raise Refusal(f"{folder} holds no metrics.json; mura-dist evaluate {folder} SHARDS makes it")
    return json.loads(path.read_bytes())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Refusal as refusal:
        print(f"tools/over_runs.py: {refusal}", file=sys.stderr)
        sys.exit(2)
