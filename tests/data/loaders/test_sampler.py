"""sampler.py: pure functions of (rows, seed, epoch, step); laws `once` and `order` over many worlds."""

import tracemalloc

import numpy as np
import pytest
from helpers import laws

from mura_dist.data.loaders import sampler

ROWS = np.arange(100, 347)  # 247 rows that do not begin at 0
WORLDS = [1, 2, 3, 5]

# sampler.epoch_permutation(np.arange(8), 7, 1, ...), written down on 2026-11-23 with NumPy 2.4.6.
GOLDEN_ROWS = [1, 7, 6, 5, 0, 4, 3, 2]
GOLDEN_ANGLES = [-27.07561, 18.65533, -9.39391, -10.69085, -22.2658, -3.98275, 11.30007, 25.5478]
GOLDEN_FLIPS = [False, True, False, False, False, True, True, True]


def epoch_of(seed: int = 3, epoch: int = 2, **options) -> sampler.Epoch:
    return sampler.epoch_permutation(ROWS, seed, epoch, **{"rotate_deg": 30.0, "flip": True} | options)


def turns(epoch: sampler.Epoch) -> sampler.MicroBatch:
    """The whole epoch as one micro-batch."""
    return epoch.micro_batch(0, len(epoch.rows))


def whole_step(
    epoch: sampler.Epoch, step: int, world_size: int, *, global_batch: int, micro_batch: int
) -> list[sampler.MicroBatch]:
    options = {"global_batch": global_batch, "micro_batch": micro_batch, "world_size": world_size}
    return [
        micro for rank in range(world_size) for micro in sampler.step_micro_batches(epoch, step, rank=rank, **options)
    ]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(("global_batch", "micro_batch"), [(60, 2), (120, 4), (30, 1)])
def test_a_step_does_not_depend_on_the_ranks(world_size: int, global_batch: int, micro_batch: int) -> None:
    sizes = {"global_batch": global_batch, "micro_batch": micro_batch}
    for step in range(sampler.steps_per_epoch(len(ROWS), global_batch)):
        laws.same_order(whole_step(epoch_of(), step, world_size, **sizes), whole_step(epoch_of(), step, 1, **sizes))


@pytest.mark.parametrize("before", WORLDS)
@pytest.mark.parametrize("after", WORLDS)
@pytest.mark.parametrize(("global_batch", "micro_batch"), [(30, 1), (60, 2)])
def test_a_restart_in_mid_epoch_on_other_ranks(before: int, after: int, global_batch: int, micro_batch: int) -> None:
    """Law of order: the second half, from another world, is what the first world would have gone on with; each row once."""
    sizes = {"global_batch": global_batch, "micro_batch": micro_batch}
    num_steps = sampler.steps_per_epoch(len(ROWS), global_batch)
    worlds = [before if step < num_steps // 2 else after for step in range(num_steps)]
    visited = [micro for step, ranks in enumerate(worlds) for micro in whole_step(epoch_of(), step, ranks, **sizes)]
    never_stopped = [micro for step in range(num_steps) for micro in whole_step(epoch_of(), step, before, **sizes)]
    laws.same_order(visited, never_stopped)
    laws.once(ROWS, [visited], dropped=len(ROWS) % global_batch)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_an_epoch_has_each_row_once(world_size: int, micro_batch: int) -> None:
    global_batch = micro_batch * world_size * 3
    steps = range(sampler.steps_per_epoch(len(ROWS), global_batch))
    options = {"global_batch": global_batch, "micro_batch": micro_batch, "world_size": world_size}
    ranks = [
        [micro for step in steps for micro in sampler.step_micro_batches(epoch_of(), step, rank=rank, **options)]
        for rank in range(world_size)
    ]
    laws.once(ROWS, ranks, dropped=len(ROWS) % global_batch)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("micro_batch", [1, 2, 7, 64, 300])
def test_an_evaluation_has_each_row_once(world_size: int, micro_batch: int) -> None:
    options = {"micro_batch": micro_batch, "world_size": world_size}
    ranks = [sampler.evaluation_micro_batches(ROWS, rank=rank, **options) for rank in range(world_size)]
    laws.once(ROWS, ranks)
    assert all(len(micro.rows) == micro_batch for micro_batches in ranks for micro in micro_batches)
    assert not any(micro.angles.any() or micro.flips.any() for micro_batches in ranks for micro in micro_batches)


def test_order_changes_with_epoch_and_seed_and_nothing_else() -> None:
    same = epoch_of()
    np.testing.assert_array_equal(epoch_of().rows, same.rows)
    for another in (epoch_of(epoch=3), epoch_of(seed=4)):
        assert sorted(another.rows) == sorted(same.rows)
        assert (another.rows != same.rows).mean() > 0.9
        assert (turns(another).angles != turns(same).angles).mean() > 0.9


def test_the_order_is_this_one_for_ever() -> None:
    """Philox's raw output is promised not to change; a run resumed years later must find its order again."""
    epoch = sampler.epoch_permutation(np.arange(8), 7, 1, rotate_deg=30.0, flip=True)
    assert epoch.rows.tolist() == GOLDEN_ROWS
    np.testing.assert_allclose(turns(epoch).angles, GOLDEN_ANGLES, atol=1e-5)
    assert turns(epoch).flips.tolist() == GOLDEN_FLIPS


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 255, 256, 257, 4096])
def test_an_order_of_any_length_is_a_permutation(num_rows: int) -> None:
    rows = np.arange(num_rows) * 3 + 5
    assert sorted(sampler.epoch_permutation(rows, 1, 2, rotate_deg=30.0, flip=True).rows) == rows.tolist()


@pytest.mark.parametrize("size", [1, 3, 4, 8, 50])
def test_a_place_is_turned_alike_whatever_is_cut_out_around_it(size: int) -> None:
    """Angles and flips are drawn for a micro-batch at a time: from any start, the same words of the stream."""
    complete = turns(epoch_of())
    for start in range(0, len(ROWS) - size, 5):
        piece = epoch_of().micro_batch(start, size)
        for name in ("rows", "angles", "flips"):
            np.testing.assert_array_equal(getattr(piece, name), getattr(complete, name)[start : start + size])


def test_an_order_takes_one_array_of_its_length() -> None:
    """76 MiB for ten million rows, besides theirs; the parts that are worked on are short."""
    rows = np.arange(4_000_000)
    tracemalloc.start()
    sampler.epoch_permutation(rows, 0, 0, rotate_deg=30.0, flip=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 1.3 * rows.nbytes


def test_an_augmentation_belongs_to_the_radiograph() -> None:
    """Not to its place: other batches, on other ranks, give a radiograph the same angle and flip in that epoch."""

    def by_row(global_batch: int, micro_batch: int, world_size: int) -> dict[int, tuple[float, bool]]:
        sizes = {"global_batch": global_batch, "micro_batch": micro_batch}
        steps = range(sampler.steps_per_epoch(len(ROWS), global_batch))
        micro_batches = [micro for step in steps for micro in whole_step(epoch_of(), step, world_size, **sizes)]
        return {
            row: (angle, flip)
            for m in micro_batches
            for row, angle, flip in zip(m.rows.tolist(), m.angles.tolist(), m.flips.tolist(), strict=True)
        }

    a, b = by_row(60, 2, 3), by_row(8, 4, 1)
    common = a.keys() & b.keys()
    assert len(common) > 200
    assert all(a[row] == b[row] for row in common)


def test_angles_and_flips_are_as_asked() -> None:
    rows = np.arange(20_000)
    epoch = turns(sampler.epoch_permutation(rows, 0, 0, rotate_deg=30.0, flip=True))
    assert np.abs(epoch.angles).max() <= 30
    assert abs(epoch.angles.mean()) < 0.5
    assert abs(epoch.angles.std() - 30 / np.sqrt(3)) < 0.3
    assert abs(epoch.flips.mean() - 0.5) < 0.015
    assert abs(np.corrcoef(epoch.angles, epoch.flips)[0, 1]) < 0.03
    still = turns(sampler.epoch_permutation(rows, 0, 0, rotate_deg=0.0, flip=False))
    assert not still.angles.any()
    assert not still.flips.any()


def test_the_shuffle_is_whole() -> None:
    """Not a buffer's: where a row lands says nothing about where it was."""
    rows = np.arange(20_000)
    landed = np.argsort(sampler.epoch_permutation(rows, 0, 0, rotate_deg=0, flip=False).rows)
    assert abs(np.corrcoef(rows, landed)[0, 1]) < 0.03
    assert abs(np.abs(landed - rows).mean() / len(rows) - 1 / 3) < 0.01


@pytest.mark.parametrize(
    ("inputs", "unit", "nearest"), [(10, 4, 8), (11, 4, 12), (1, 8, 8), (100, 24, 96), (24, 24, 24)]
)
def test_the_nearest_global_batch(inputs: int, unit: int, nearest: int) -> None:
    assert sampler.nearest_global_batch(inputs, unit) == nearest
