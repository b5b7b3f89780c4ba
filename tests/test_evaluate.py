"""evaluate.py over ranks: laws `once` and `metric`."""

from pathlib import Path

import laws
import pandas as pd
import pytest
from conftest import TINY, run, torchrun

from mura_dist.shards import Shards

EVALUATE = """
import sys
from pathlib import Path
from mura_dist import launcher
from mura_dist.evaluate import evaluate_run
run, shards, out = map(Path, sys.argv[1:4])
evaluate_run(run, shards, split="valid", which="last", out=out)
"""


@pytest.fixture(scope="module")
def trained(shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    result = run("mura-dist", "train", *TINY, f"shards={shard_folder}", f"run={folder}", "epochs=1", "micro_batch=4")
    assert result.returncode == 0, result.stderr
    return folder


def test_metrics_do_not_depend_on_the_ranks(trained: Path, shard_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "evaluate_ranks.py"
    script.write_text(EVALUATE)
    logits = {}
    for ranks in (1, 2, 3):
        out = tmp_path / str(ranks)
        result = torchrun(
            ranks, "evaluate_ranks", trained, shard_folder, out, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}
        )
        assert result.returncode == 0, result.stderr
        table = pd.read_csv(out / "predictions.csv")
        assert (
            table["path"].tolist()
            == Shards.open(shard_folder).manifest.frame.query("split == 'valid'")["path"].tolist()
        )
        logits[ranks] = dict(enumerate(table["logit"]))
        reports = [path.name for path in sorted(out.iterdir())]
        assert {"metrics.json", "report.html", "predictions.csv", "studies.csv"} <= set(reports)
    laws.same_metrics(logits[1], logits[2])
    laws.same_metrics(logits[1], logits[3])
