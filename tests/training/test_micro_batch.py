"""micro_batch.py: which micro-batch fits on every rank."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mura_dist.core import config
from mura_dist.core.errors import CommonFailure, Refusal
from mura_dist.distributed import process_group as world
from mura_dist.distributed.process_group import World
from mura_dist.models.densenet import build
from mura_dist.training import micro_batch


@pytest.fixture(scope="module")
def alone() -> Iterator[World]:
    with world.join(30) as ranks:
        yield ranks


def settings(**values: object) -> config.Settings:
    known = {"shards": "", "run": "", "architecture": "tiny", "global_batch": 24, "micro_batch": "auto"}
    return config.check({**known, **values}, "test")


@pytest.mark.parametrize(
    ("batch", "ranks", "sizes"),
    [(24, 1, [24, 12, 8, 6, 4, 3, 2]), (24, 2, [12, 6, 4, 3, 2]), (24, 5, []), (2, 2, []), (2, 1, [2])],
)
def test_candidates_cut_the_global_batch_evenly(batch: int, ranks: int, sizes: list[int]) -> None:
    assert micro_batch.candidates(batch, ranks) == sizes


class Limited(nn.Module):
    """The network, on a device whose memory holds `limit` radiographs."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.network, self.limit = build("tiny"), limit

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        if len(image) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.network(image)


@pytest.mark.parametrize(("limit", "found"), [(100, 24), (11, 8), (2, 2)])
def test_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch, alone: World, limit: int, found: int) -> None:
    monkeypatch.setattr(micro_batch, "build", lambda architecture: Limited(limit))
    assert micro_batch.fitting_micro_batch(settings(), 64, alone) == found


def test_a_cpu_is_reckoned_before_it_is_tried(monkeypatch: pytest.MonkeyPatch, alone: World) -> None:
    """Free memory for ten radiographs' activations, twice over: eight at once."""
    with torch.autocast("cpu", torch.bfloat16):
        each = micro_batch.kept_bytes(build("tiny").train(), torch.zeros(2, 1, 64, 64, dtype=torch.uint8)) / 2
    assert 64 * 64 < each < 1e6
    monkeypatch.setattr(micro_batch, "_free_bytes", lambda: round(10 * each * 2 / 0.8) + 1)
    assert micro_batch.fitting_micro_batch(settings(), 64, alone) == 8


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch, alone: World) -> None:
    monkeypatch.setattr(micro_batch, "_free_bytes", lambda: 0)
    with pytest.raises(CommonFailure, match="not even 2 radiographs of 64 px fit"):
        micro_batch.fitting_micro_batch(settings(), 64, alone)
    with pytest.raises(Refusal, match=r"global_batch=1 cannot be cut .* the nearest is global_batch=2"):
        micro_batch.fitting_micro_batch(settings(global_batch=1), 64, alone)


def test_other_errors_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch, alone: World) -> None:
    def broken(architecture: str) -> nn.Module:
        raise RuntimeError("a fault of the test")

    monkeypatch.setattr(micro_batch, "_plausible", lambda settings, size, sizes, world: sizes)
    monkeypatch.setattr(micro_batch, "build", broken)
    with pytest.raises(RuntimeError, match="a fault of the test"):
        micro_batch.fitting_micro_batch(settings(), 64, alone)


def test_what_is_kept_leaves_out_the_weights() -> None:
    linear, image = nn.Linear(100, 1, bias=False), torch.ones(3, 100, requires_grad=True)
    assert micro_batch.kept_bytes(linear, image) == 3 * 100 * 4
