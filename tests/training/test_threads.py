"""Test a network of real size on two threads. Run it alone: threads that share processors wait for each other."""

from pathlib import Path

import pytest
from helpers.commands import TINY, run
from helpers.runs import equal, logged_metrics, tensors


@pytest.mark.nightly(part="training")
def test_densenet_on_two_threads_resumes_bit_identical(shard_folder: Path, tmp_path: Path) -> None:
    """The other tests use one thread and tensors too small for several."""
    arguments = (*TINY, "architecture=densenet121", "global_batch=24", "micro_batch=8", "precision=bf16")
    for folder, epochs in (("never", 2), ("torn", 1), ("torn", 2)):
        settings = (f"shards={shard_folder}", f"run={tmp_path / folder}", f"epochs={epochs}", "--quiet")
        result = run(
            "mura-dist", "train", *arguments, *settings, timeout_s=900, env={"OMP_NUM_THREADS": "2"}, cold=True
        )
        assert result.returncode == 0, result.stderr
    assert logged_metrics(tmp_path / "never") == logged_metrics(tmp_path / "torn")
    assert equal(tensors(tmp_path / "never", 8), tensors(tmp_path / "torn", 8))
