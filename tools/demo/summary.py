"""The last page of launch/demo.sh: a table on the screen, RUN/summary.json on disk.

python tools/demo/summary.py RUN SECONDS VALID      SECONDS: a file with a line "STAGE SECONDS" for each stage that ended
                                                    VALID: a folder of studies, the page's examples
"""

import json
import shlex
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: the page has a line for it

from mura_dist.core import files
from mura_dist.data import mura
from mura_dist.metrics import summary as measure


def main() -> None:
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
    print(f"\n{measure.summary_table(trained)}\n")
    shown = measure.number(summary["auroc_untrained"])
    print(f"AUROC untrained {shown}, trained {measure.number(summary['auroc'])}; {summary['seconds_total']} s in all")
    for what, where in {
        "report": "report.html",
        "metrics": "metrics.json",
        "model": "model.onnx",
        "predictions": "predictions/studies.csv",
        "curves": "curves.png",
        "summary": "summary.json",
    }.items():
        print(f"  {what:12} {run / where}")
    page = ".venv/bin/mura-dist", "page", str(run / "model.onnx"), "--examples", sys.argv[3]
    print(f"The page, with example studies at hand:\n  {shlex.join(page)}")
    print(mura.TERMS)


def stage_seconds(path: Path) -> dict[str, int]:
    """The longest time of each stage: a second start finds its work done and takes next to none."""
    seconds: dict[str, int] = {}
    for line in path.read_text().splitlines():
        stage, _, value = line.partition(" ")
        seconds[stage] = max(seconds.get(stage, 0), int(value))
    return seconds


if __name__ == "__main__":
    main()
