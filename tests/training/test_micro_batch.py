"""Test micro_batch.py: the largest micro-batch that fits on every rank."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mura_dist.core import config
from mura_dist.core.errors import CollectiveRunError, UserError
from mura_dist.distributed.process_group import World
from mura_dist.models.densenet import build
from mura_dist.training import execution, micro_batch
from mura_dist.training.engine import Engine
from mura_dist.training.flat_parameters import FlatParameters

SIZES = (24, 12, 8, 6, 4, 3, 2)


def settings(**values: object) -> config.Settings:
    defaults = {"shards": "", "run": "", "architecture": "tiny", "global_batch": 24, "micro_batch": "auto"}
    return config.check({**defaults, **values}, "test")


@pytest.mark.parametrize(
    ("batch", "ranks", "sizes"),
    [(24, 1, [24, 12, 8, 6, 4, 3, 2]), (24, 2, [12, 6, 4, 3, 2]), (24, 5, []), (2, 2, []), (2, 1, [2])],
)
def test_candidates_divide_the_global_batch(batch: int, ranks: int, sizes: list[int]) -> None:
    assert micro_batch.candidate_sizes(batch, ranks) == sizes


class Limited(nn.Module):
    """A network on a device whose memory holds `limit` radiographs."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.network, self.limit = build("tiny"), limit

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        if len(image) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.network(image)


@pytest.mark.parametrize(("limit", "expected"), [(100, 24), (11, 8), (2, 2)])
def test_largest_fitting_micro_batch_is_chosen(
    monkeypatch: pytest.MonkeyPatch, alone: World, limit: int, expected: int
) -> None:
    monkeypatch.setattr(micro_batch, "build", lambda architecture: Limited(limit))
    assert micro_batch.largest_fitting(settings(), 64, SIZES, alone) == expected


@pytest.mark.parametrize(("batch", "expected"), [(24, 8), (12, 6), (36, 6), (22, 2), (11, 11)])
def test_auto_micro_batch_on_a_cpu(alone: World, batch: int, expected: int) -> None:
    assert micro_batch.find_micro_batch(settings(global_batch=batch), 64, alone) == expected


@pytest.mark.parametrize("overrides", [{"precision": "bf16"}, {"precision": "fp32", "step": "graph"}])
@pytest.mark.parametrize("channels_last", [True, False])
def test_trial_uses_the_execution_of_a_step(
    monkeypatch: pytest.MonkeyPatch, alone: World, overrides: dict[str, str], channels_last: bool
) -> None:
    """Execution and memory format of weights and images are the same."""
    calls: list[tuple[str, str, bool]] = []
    build_network = execution.build

    def spied(model: nn.Module, flat: FlatParameters, settings: config.Settings) -> execution.Network:
        in_order = model.features.conv0.weight.is_contiguous(memory_format=torch.channels_last)
        calls.append((settings.precision, settings.step, in_order))
        return build_network(model, flat, settings)

    monkeypatch.setattr(execution, "build", spied)
    chosen = settings(channels_last=channels_last, **overrides)
    assert micro_batch.largest_fitting(chosen, 64, SIZES, alone) == SIZES[0]
    Engine(build("tiny"), chosen.model_copy(update={"micro_batch": 2}), alone)
    assert len(calls) == 2
    assert calls[0] == calls[1] == (chosen.precision, chosen.step, channels_last)


@pytest.mark.parametrize("num_resident", [0, 7])
def test_resident_radiographs_reserve_memory(monkeypatch: pytest.MonkeyPatch, alone: World, num_resident: int) -> None:
    """The trial allocates as many bytes."""
    reserved: list[int] = []
    zeros = torch.zeros

    def spied(*shape: int, **options: Any) -> Tensor:
        tensor = zeros(*shape, **options)
        if options.get("dtype") is torch.uint8 and tensor.ndim == 1:
            reserved.append(tensor.numel())
        return tensor

    monkeypatch.setattr(torch, "zeros", spied)
    assert micro_batch.largest_fitting(settings(), 64, (2,), alone, num_resident) == 2
    assert reserved == [num_resident * 64 * 64]


def test_no_fitting_micro_batch_is_an_error(monkeypatch: pytest.MonkeyPatch, alone: World) -> None:
    monkeypatch.setattr(micro_batch, "build", lambda architecture: Limited(1))
    with pytest.raises(CollectiveRunError, match="a micro-batch of 2 radiographs of 64 px does not fit"):
        micro_batch.largest_fitting(settings(), 64, SIZES, alone)
    with pytest.raises(UserError, match=r"global_batch=1 cannot be divided .* The nearest is global_batch=2"):
        micro_batch.find_micro_batch(settings(global_batch=1), 64, alone)


def test_other_errors_are_not_memory_errors(monkeypatch: pytest.MonkeyPatch, alone: World) -> None:
    def broken(architecture: str) -> nn.Module:
        raise RuntimeError("a fault of the test")

    monkeypatch.setattr(micro_batch, "build", broken)
    with pytest.raises(RuntimeError, match="a fault of the test"):
        micro_batch.largest_fitting(settings(), 64, SIZES, alone)
