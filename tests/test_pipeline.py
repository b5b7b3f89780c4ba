"""pipeline/: two backends behind one contract, the same pixels, our order."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mura_dist import order
from mura_dist.convert import convert
from mura_dist.pipeline import Targets, batches, cpu, dali
from mura_dist.shards import Shards

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["raw", "png", "jpeg"])
def opened(request: pytest.FixtureRequest, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("encoded") / request.param
    convert(phantoms, folder, size=96, encoding=request.param, workers=2)
    return Shards.open(folder)


def micros_of(shards: Shards, *, rotate_deg: float, flip: bool, micro_batch: int = 5) -> list[order.Micro]:
    epoch = order.epoch_order(shards.rows("train"), 0, 0, rotate_deg=rotate_deg, flip=flip)
    steps = range(order.steps_per_epoch(len(epoch.rows), micro_batch))
    sizes = {"global_batch": micro_batch, "micro_batch": micro_batch, "rank": 0, "world_size": 1}
    return [micro for step in steps for micro in order.step_micros(epoch, step, **sizes)]


def both(shards: Shards, micros: list[order.Micro]) -> tuple[np.ndarray, np.ndarray]:
    by_dali = torch.cat(list(dali.images(shards, micros, workers=2, device=CPU))).numpy()
    return np.concatenate(list(cpu.images(shards, micros, workers=2))), by_dali


def test_the_backends_agree_within_two_grey_levels(opened: Shards) -> None:
    ours, theirs = both(opened, micros_of(opened, rotate_deg=30, flip=True))
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == np.uint8
    difference = np.abs(ours.astype(int) - theirs)
    # jpeg: two decoders, each free to round, differ before anything is turned
    assert (difference <= (2 if opened.encoding != "jpeg" else 4)).mean() >= 0.999


def test_a_wrong_sign_or_centre_would_be_seen(opened: Shards) -> None:
    """The law above can fail: turned the other way, or about S/2, far fewer pixels agree."""
    if opened.encoding != "raw":
        pytest.skip("geometry does not depend on the encoding")
    micros = micros_of(opened, rotate_deg=30, flip=True)
    _, theirs = both(opened, micros)
    wrong = [order.Micro(m.rows, -m.angles, m.flips, m.mask) for m in micros]
    ours = np.concatenate(list(cpu.images(opened, wrong, workers=1)))
    assert (np.abs(ours.astype(int) - theirs) <= 2).mean() < 0.9


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_without_augmentation_the_pixels_are_the_stored_ones(opened: Shards, backend: str) -> None:
    rows = opened.rows("valid")
    micros = order.evaluation_micros(rows, micro_batch=4, rank=0, world_size=1)
    targets = Targets.of(opened, weighted=True)
    seen = []
    for batch in batches(opened, targets, micros, backend=backend, device=CPU, workers=2):
        for row, image, real in zip(batch.row.tolist(), batch.image[:, 0].numpy(), batch.mask.tolist(), strict=True):
            if not real:
                assert row == -1
                assert not image.any()
                continue
            seen.append(row)
            difference = np.abs(image.astype(int) - opened.pixels(row))
            assert difference.max() <= (0 if opened.encoding != "jpeg" or backend == "cpu" else 4)
        assert (batch.weight[~batch.mask] == 0).all()
        assert (batch.label == torch.from_numpy(targets.label)[batch.row] * batch.mask).all()
    assert seen == rows.tolist()


def test_the_same_batches_from_any_number_of_threads(opened: Shards) -> None:
    micros = micros_of(opened, rotate_deg=30, flip=True)
    one, four = (np.concatenate(list(cpu.images(opened, micros, workers=workers))) for workers in (1, 4))
    np.testing.assert_array_equal(one, four)


def test_rotation_is_counter_clockwise_then_mirrored() -> None:
    source = np.zeros((65, 65), np.uint8)
    source[32, 60] = 255  # right of the centre
    out = np.zeros_like(source)
    cpu.augment(source, 90, False, out)
    assert np.unravel_index(out.argmax(), out.shape) == (4, 32)  # above it
    cpu.augment(source, 45, True, out)
    row, column = np.unravel_index(out.argmax(), out.shape)
    assert row < 32
    assert column < 32  # up, and mirrored to the left
    cpu.augment(source, 0, True, out)
    np.testing.assert_array_equal(out, source[:, ::-1])


def test_leaving_early_ends_the_threads(opened: Shards) -> None:
    import threading

    stream = cpu.images(opened, micros_of(opened, rotate_deg=30, flip=True), workers=3)
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")]


def test_weights_follow_study_type_and_label(opened: Shards) -> None:
    weighted, plain = (Targets.of(opened, weighted=flag) for flag in (True, False))
    assert (plain.weight == 1).all()
    train = opened.manifest.frame.loc[opened.rows("train")]
    for study_type, part in train.groupby("study_type"):
        sums = {label: weighted.weight[part.index[part["label"] == label]].sum() for label in (0, 1)}
        if part["label"].nunique() == 2:  # both classes pull equally hard
            assert sums[0] == pytest.approx(sums[1], rel=1e-5), study_type
