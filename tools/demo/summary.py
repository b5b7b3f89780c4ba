"""Summarize the demo: print five lines, and write RUN/summary.json.

python tools/demo/summary.py RUN SECONDS VALID      SECONDS: a file with a line "STAGE SECONDS" for each time a stage ran
                                                    VALID: a folder of studies, the page's examples
"""

import json
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # launch/demo.sh reports Ctrl-C

from mura_dist.core import files
from mura_dist.data import mura
from mura_dist.metrics import summary as measure


def main() -> None:
    """Write the summary of the run in the arguments, and print it."""
    run, seconds = Path(sys.argv[1]), stage_seconds(Path(sys.argv[2]))
    trained, untrained = (json.loads((run / name).read_bytes()) for name in ("metrics.json", "untrained/metrics.json"))
    overall = trained["overall"]
    summary = {
        "auroc_untrained": untrained["overall"]["auroc"],
        "auroc": overall["auroc"],
        "kappa": overall["kappa"],
        "num_studies": overall["num_studies"],
        "split": trained["split"],
        "checkpoint": trained["checkpoint"],
        "trained_on": trained["trained_on"],
        "seconds": seconds,
        "seconds_total": sum(seconds.values()),
    }
    files.write_json(run / "summary.json", summary)
    print("\n".join(lines(run, summary, overall, sys.argv[3])), flush=True)
    print(mura.TERMS, file=sys.stderr)


def lines(run: Path, summary: dict[str, Any], overall: dict[str, Any], valid: str) -> Iterator[str]:
    """Yield the five lines that end the demo: AUROC, kappa, the report, the page's command, the time."""
    untrained, studies = measure.format_number(summary["auroc_untrained"]), f"{summary['num_studies']} held-out studies"
    test_set = f"{studies} of drawings" if summary["trained_on"] == "phantoms" else studies
    yield f"AUROC: untrained {untrained} -> trained {measure.format_with_interval(overall, 'auroc')}, {test_set}"
    kappa = measure.format_with_interval(overall, "kappa")
    yield f"kappa: {kappa}, agreement of calls and labels beyond chance (0: chance, 1: perfect)"
    yield f"report: open {run / 'report.html'}"
    page = ".venv/bin/mura-dist", "page", str(run / "model.onnx"), "--examples", valid
    yield f"page: {shlex.join(page)}"
    minutes, seconds = divmod(summary["seconds_total"], 60)
    yield f"time: {minutes} min {seconds} s for all steps"


def stage_seconds(path: Path) -> dict[str, int]:
    """Return the total seconds of each stage. A stage that was interrupted has several lines."""
    seconds: dict[str, int] = {}
    for line in path.read_text().splitlines():
        stage, _, value = line.partition(" ")
        seconds[stage] = seconds.get(stage, 0) + int(value)
    return seconds


if __name__ == "__main__":
    main()
