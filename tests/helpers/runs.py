"""The results of a training run, for comparison."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from mura_dist.training import metrics_log


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics_log.read(folder / "metrics.jsonl") if line["kind"] == "step"]


WALL_CLOCK = {"time_s", "evaluation_s", "images_per_s", "data_wait_share", "limited_by", "overhead_share"}


def logged_metrics(folder: Path) -> list[dict[str, object]]:
    """Return metrics.jsonl without its wall-clock fields."""
    lines = metrics_log.read(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in lines]


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, of the model and the optimizer."""
    paths = sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    tensors_by_name = {f"{path.name}:{key}": value for path in paths for key, value in load_file(path).items()}
    assert len(tensors_by_name) > 100, tensors_by_name.keys()
    return tensors_by_name


def steps_an_epoch(folder: Path) -> int:
    return next(
        line["step"]
        for line in metrics_log.read(folder / "metrics.jsonl")
        if line.get("epoch") == 1 and line["kind"] == "epoch"
    )


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
