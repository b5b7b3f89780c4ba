"""The last page of launch/demo.sh: a table on the screen, RUN/summary.json on disk.

python tools/demo_summary.py RUN STAGE=SECONDS ...
"""

import json
import sys
from pathlib import Path

from mura_dist import atomic, metrics, mura


def main() -> None:
    run, stages = Path(sys.argv[1]), dict(word.split("=") for word in sys.argv[2:])
    trained, untrained = (json.loads((run / name).read_bytes()) for name in ("metrics.json", "untrained/metrics.json"))
    seconds = _earlier(run) | {name: int(value) for name, value in stages.items()}
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
    atomic.write_json(run / "summary.json", summary)
    print(f"\n{metrics.summary_table(trained)}\n")
    shown = metrics.number(summary["auroc_untrained"])
    print(f"AUROC untrained {shown}, trained {metrics.number(summary['auroc'])}; {summary['seconds_total']} s in all")
    for what, where in {
        "report": "report.html",
        "metrics": "metrics.json",
        "model": "model.onnx",
        "predictions": "predictions/studies.csv",
        "curves": "curves.png",
        "summary": "summary.json",
    }.items():
        print(f"  {what:12} {run / where}")
    print(mura.TERMS)


def _earlier(run: Path) -> dict[str, int]:
    """Seconds of stages an earlier start of the demo finished."""
    path = run / "summary.json"
    return json.loads(path.read_bytes())["seconds"] if path.is_file() else {}


if __name__ == "__main__":
    main()
