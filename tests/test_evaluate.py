"""evaluate.py over ranks: laws `once` and `metric`."""

import shutil
from pathlib import Path

import laws
import pandas as pd
import pytest
from conftest import TINY, run, torchrun

from mura_dist.shards import Shards

EVALUATE = """
import sys
from pathlib import Path
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


def test_metrics_do_not_depend_on_ranks_or_batch(trained: Path, shard_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "evaluate_ranks.py"
    script.write_text(EVALUATE)
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    recipe = (other / "recipe.toml").read_text()
    (other / "recipe.toml").write_text(recipe.replace("micro_batch = 4", "micro_batch = 7"))
    logits = []
    for ranks, folder in ((1, trained), (2, trained), (3, other)):
        out = tmp_path / str(ranks)
        result = torchrun(
            ranks, "evaluate_ranks", folder, shard_folder, out, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}
        )
        assert result.returncode == 0, result.stderr
        table = pd.read_csv(out / "predictions.csv")  # law once: the split's rows, in order, each one time
        assert (
            table["path"].tolist()
            == Shards.open(shard_folder).manifest.frame.query("split == 'valid'")["path"].tolist()
        )
        logits.append(dict(enumerate(table["logit"])))
        reports = [path.name for path in sorted(out.iterdir())]
        assert {"metrics.json", "report.html", "predictions.csv", "studies.csv"} <= set(reports)
    assert "micro_batch = 7" in (other / "recipe.toml").read_text()
    for others in logits[1:]:
        laws.same_metrics(logits[0], others)
