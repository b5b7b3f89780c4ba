"""Test that processes return what reading in one process returns, whatever their number and their shared memory."""

import os
from pathlib import Path

import numpy as np
import pytest
from helpers.predictions import draw

from mura_dist.distributed.worker_pool import DEFAULT_LIMITS
from mura_dist.inference import reader_pool
from mura_dist.inference.reader import RadiographReader
from mura_dist.inference.reader_pool import start_readers

SIZE = 48


@pytest.mark.parametrize("memory", ["anonymous", "a file", "too small"])
@pytest.mark.parametrize("workers", [1, 3])
def test_results_are_those_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str, workers: int
) -> None:
    if memory == "a file":
        monkeypatch.delattr(os, "memfd_create", raising=False)  # as on Windows and macOS
    batch_size = 400 if memory == "too small" else 4  # read further ahead than the memory reaches
    paths = [str(draw(tmp_path / f"{number:03d}.png", number)) for number in range(100)]
    for path in paths[::7]:
        Path(path).write_bytes(b"junk")
    reader = RadiographReader(SIZE)
    expected = [reader(path) for path in paths]
    with start_readers(SIZE, batch_size=batch_size, workers=workers, limits=DEFAULT_LIMITS) as readers:
        readers.prepare(len(paths))
        assert readers.pool.workers == workers
        for path_lists in ([paths[:50], [], paths[50:]], [paths]):
            num_results = 0
            for number, result in enumerate(readers.results(path_lists)):
                assert result._replace(image=None, seconds=0) == expected[number]._replace(image=None, seconds=0)
                np.testing.assert_equal(result.image, expected[number].image)
                num_results += 1
            assert num_results == len(paths)


def test_processes_start_when_results_are_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_pool, "_max_workers", lambda: 3)
    monkeypatch.setattr(reader_pool, "_PATIENCE_S", 60.0)
    paths = [str(draw(tmp_path / f"{number:03d}.png", number)) for number in range(200)]
    with start_readers(SIZE, batch_size=4, workers=None, limits=DEFAULT_LIMITS) as readers:
        readers.prepare(len(paths))
        assert len(list(readers.results([paths]))) == len(paths)
        assert readers.pool.workers == 1
        monkeypatch.setattr(reader_pool, "_PATIENCE_S", -1.0)
        assert len(list(readers.results([paths]))) == len(paths)
        assert readers.pool.workers == 3
