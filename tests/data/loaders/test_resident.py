"""resident.py: each radiograph is read once, stays, and gives the batches of the cpu backend; a run on it from end to end."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import train
from helpers.runs import losses

from mura_dist.core.errors import RankLocalUserError
from mura_dist.data.loaders import resident, sampler
from mura_dist.data.loaders.loader import Batch, BatchLoader, RowTargets
from mura_dist.data.shards.reader import Shards

CPU = torch.device("cpu")


@pytest.fixture
def shards(shard_folder: Path) -> Shards:
    return Shards.open(shard_folder)


@pytest.fixture
def num_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each row was read."""
    counts, encoded = Counter[int](), Shards.read_encoded

    def count_read(self: Shards, row: int) -> bytes:
        counts[row] += 1
        return encoded(self, row)

    monkeypatch.setattr(Shards, "read_encoded", count_read)
    return counts


def loader_of(shards: Shards, backend: str = "resident") -> BatchLoader:
    return BatchLoader(shards, RowTargets.from_shards(shards), CPU, backend, 4, workers=2)


def training(shards: Shards, epoch: int) -> list[sampler.MicroBatch]:
    ordered = sampler.epoch_permutation(shards.rows("train"), 0, epoch, rotate_deg=30, flip=True)
    return [ordered.micro_batch(start, 4) for start in range(0, len(ordered.rows) - 3, 4)]


def evaluation(rows: np.ndarray) -> list[sampler.MicroBatch]:
    return sampler.evaluation_micro_batches(rows, micro_batch=7, rank=0, world_size=1)


def assert_same(actual: Iterator[Batch], reference: Iterator[Batch]) -> None:
    for a, b in zip(actual, reference, strict=True):
        difference = (a.image.int() - b.image.int()).abs()
        assert (difference <= 1).float().mean() >= 0.999
        for name in ("label", "weight", "row", "mask"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_each_radiograph_is_read_once_in_a_run(shards: Shards, num_reads: Counter[int]) -> None:
    """Over epochs and evaluations of other sizes, of splits apart and together; asked for again before it lies there."""
    loader, another = loader_of(shards), loader_of(shards, "cpu")
    both = np.union1d(shards.rows("valid"), shards.rows("tune"))
    tune = evaluation(shards.rows("tune"))
    streams = [tune * 2, training(shards, 0), training(shards, 1), evaluation(both)]
    batches = [list(loader.load(micro_batches)) for micro_batches in streams]
    assert set(both) | set(batches[1][0].row.tolist()) <= set(num_reads)
    assert set(num_reads.values()) == {1}
    for micro_batches, several in zip(streams, batches, strict=True):
        assert_same(iter(several), another.load(micro_batches))


def test_streams_beside_each_other_and_left_early_lose_nothing(shards: Shards) -> None:
    loader, another, micro_batches = loader_of(shards), loader_of(shards, "cpu"), training(shards, 0)
    remaining, first, second = (loader.load(micro_batches) for _ in range(3))
    next(remaining)
    batches = [batch for pair in zip(first, second, strict=True) for batch in pair]
    remaining.close()
    assert_same(iter(batches), another.load([micro for micro in micro_batches for _ in range(2)]))
    assert_same(loader.load(training(shards, 1)), another.load(training(shards, 1)))


def test_more_than_its_share_of_the_memory_is_refused(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line: bytes needed, bytes there are, and what to give instead; up to the limit it works."""
    needed = {split: len(shards.rows(split)) * 64**2 for split in ("train", "tune")}
    monkeypatch.setattr(resident, "free_bytes", lambda device: 2 * needed["train"])
    loader = loader_of(shards)
    assert len(list(loader.load(training(shards, 0)))) == len(training(shards, 0))
    monkeypatch.setattr(resident, "free_bytes", lambda device: 2 * needed["tune"] - 1)
    loader = loader_of(shards)
    with pytest.raises(RankLocalUserError) as caught:
        list(loader.load(evaluation(shards.rows("tune"))))
    limit = (2 * needed["tune"] - 1) // 2
    line = str(caught.value)
    for piece in (
        "pipeline=resident",
        f"{needed['tune']:,} bytes",
        f"is {limit:,} (50%",
        "pipeline=dali",
        "pipeline=cpu",
    ):
        assert piece in line
    assert "\n" not in line


def test_free_memory_is_what_the_system_says_shared_by_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    complete = resident.free_bytes(CPU)
    assert 1 << 20 < complete < 1 << 50
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert resident.free_bytes(CPU) < complete / 2


def test_a_run_on_resident_radiographs_learns_as_the_cpu_backends_does(
    single_rank_run: Path, shard_folder: Path, tmp_path: Path
) -> None:
    """From its first step to its last, stopped after an epoch and resumed; the run says how it was loaded."""
    for epochs in (1, 2):
        result = train(1, shard_folder, tmp_path / "run", "pipeline=resident", f"epochs={epochs}")
        assert result.returncode == 0, result.stderr
    actual, expected = losses(tmp_path / "run"), losses(single_rank_run)
    assert len(actual) == len(expected) >= 10
    assert actual[0] == pytest.approx(expected[0], rel=1e-4)
    assert actual[:9] == pytest.approx(expected[:9], rel=1e-3)
    assert actual == pytest.approx(expected, rel=2e-2)  # pixels that differ by 1 grow, as any rounding does
    assert json.loads((tmp_path / "run" / "environment.json").read_bytes())["pipeline"] == "resident"
