"""loader.py and its backends: one contract, the same pixels, our order."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import laws
from nvidia.dali import Pipeline

from mura_dist.core.config import Settings
from mura_dist.core.errors import RunError, UserError
from mura_dist.data.loaders import dali, loader, opencv, sampler
from mura_dist.data.loaders.loader import BatchLoader, RowTargets
from mura_dist.data.shards import reader
from mura_dist.data.shards.convert import convert
from mura_dist.data.shards.reader import CorruptSampleError, ShardReadError, Shards

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["raw", "png", "jpeg"])
def opened(request: pytest.FixtureRequest, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("encoded") / request.param
    convert(phantoms, folder, size=96, encoding=request.param, workers=2)
    return Shards.open(folder)


def micros_of(shards: Shards, *, rotate_deg: float, flip: bool, micro_batch: int = 5) -> list[sampler.MicroBatch]:
    epoch = sampler.epoch_permutation(shards.rows("train"), 0, 0, rotate_deg=rotate_deg, flip=flip)
    steps = range(sampler.steps_per_epoch(len(epoch.rows), micro_batch))
    sizes = {"global_batch": micro_batch, "micro_batch": micro_batch, "rank": 0, "world_size": 1}
    return [micro for step in steps for micro in sampler.step_micro_batches(epoch, step, **sizes)]


BACKENDS = ["cpu", "dali", "resident"]


def pixels_by(backend: str, shards: Shards, micro_batches: list[sampler.MicroBatch], workers: int = 2) -> np.ndarray:
    """The images of all micro-batches, uint8 (n, 1, S, S)."""
    loader = BatchLoader(shards, RowTargets.from_shards(shards), CPU, backend, len(micro_batches[0].rows), workers)
    return torch.cat([batch.image for batch in loader.load(micro_batches)]).numpy()


def limit_of(backend: str, shards: Shards) -> int:
    """Gray levels by which 99.9 % of a backend's pixels may differ from the cpu backend's."""
    if backend == "dali":  # jpeg: two decoders, each free to round, differ before anything is turned
        return 2 if shards.encoding != "jpeg" else 4
    return 1


@pytest.mark.parametrize("backend", ["dali", "resident"])
def test_the_backends_agree_within_a_few_gray_levels(opened: Shards, backend: str) -> None:
    micro_batches = micros_of(opened, rotate_deg=30, flip=True)
    actual, reference = (pixels_by(name, opened, micro_batches) for name in ("cpu", backend))
    assert actual.shape == reference.shape
    assert actual.dtype == reference.dtype == np.uint8
    assert (np.abs(actual.astype(int) - reference) <= limit_of(backend, opened)).mean() >= 0.999


@pytest.mark.parametrize("backend", ["dali", "resident"])
def test_a_wrong_sign_or_center_would_be_seen(opened: Shards, backend: str) -> None:
    """The law above can fail: turned the other way, or about S/2, far fewer pixels agree."""
    if opened.encoding != "raw":
        pytest.skip("geometry does not depend on the encoding")
    micro_batches = micros_of(opened, rotate_deg=30, flip=True)
    reference = pixels_by(backend, opened, micro_batches)
    wrong = [sampler.MicroBatch(m.rows, -m.angles, m.flips, m.mask) for m in micro_batches]
    actual = pixels_by("cpu", opened, wrong)
    assert (np.abs(actual.astype(int) - reference) <= 2).mean() < 0.9


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_augmentation_the_pixels_are_the_stored_ones(opened: Shards, backend: str) -> None:
    rows = opened.rows("valid")
    micro_batches = sampler.evaluation_micro_batches(rows, micro_batch=4, rank=0, world_size=1)
    targets = RowTargets.from_shards(opened, "study_type")
    visited = []
    for batch in BatchLoader(opened, targets, CPU, backend, 4, workers=2).load(micro_batches):
        for row, image, real in zip(batch.row.tolist(), batch.image[:, 0].numpy(), batch.mask.tolist(), strict=True):
            if not real:
                assert row == -1
                assert not image.any()
                continue
            visited.append(row)
            difference = np.abs(image.astype(int) - opened.read_pixels(row))
            assert difference.max() <= (0 if opened.encoding != "jpeg" or backend != "dali" else 4)
        assert (batch.weight[~batch.mask] == 0).all()
        assert (batch.label == torch.from_numpy(targets.label)[batch.row] * batch.mask).all()
    assert visited == rows.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_has_only_padding_gets_black_batches(opened: Shards, backend: str) -> None:
    """Evaluating fewer radiographs than there are ranks: each has as many micro-batches."""
    micro_batches = sampler.evaluation_micro_batches(opened.rows("valid")[:2], micro_batch=4, rank=2, world_size=3)
    loader = BatchLoader(opened, RowTargets.from_shards(opened), CPU, backend, 4, workers=1)
    [batch] = loader.load(micro_batches)
    assert batch.row.tolist() == [-1] * 4
    assert not any(tensor.any() for tensor in (batch.image, batch.label, batch.weight, batch.mask))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_batches_from_any_number_of_threads(opened: Shards, backend: str) -> None:
    micro_batches = micros_of(opened, rotate_deg=30, flip=True)
    item, four = (pixels_by(backend, opened, micro_batches, workers) for workers in (1, 4))
    np.testing.assert_array_equal(item, four)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_depends_on_nothing_that_was_loaded_before_it(opened: Shards, backend: str) -> None:
    """A run that resumes in mid-epoch, with other rows in memory, sees what an uninterrupted one would have seen."""
    micro_batches = micros_of(opened, rotate_deg=30, flip=True)
    complete, resumed = pixels_by(backend, opened, micro_batches), pixels_by(backend, opened, micro_batches[5:])
    np.testing.assert_array_equal(complete[5 * 5 :], resumed)


def test_rotation_is_counter_clockwise_then_mirrored() -> None:
    source = np.zeros((65, 65), np.uint8)
    source[32, 60] = 255  # right of the center
    out = np.zeros_like(source)
    opencv.augment(source, 90, False, out)
    assert np.unravel_index(out.argmax(), out.shape) == (4, 32)  # above it
    opencv.augment(source, 45, True, out)
    row, column = np.unravel_index(out.argmax(), out.shape)
    assert row < 32
    assert column < 32  # up, and mirrored to the left
    opencv.augment(source, 0, True, out)
    np.testing.assert_array_equal(out, source[:, ::-1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaving_early_ends_the_threads(opened: Shards, backend: str) -> None:
    loader = BatchLoader(opened, RowTargets.from_shards(opened), CPU, backend, 5, workers=3)
    stream = loader.load(micros_of(opened, rotate_deg=30, flip=True))
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_consumer_reads_no_sample(opened: Shards, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither reads nor decodes: on a GPU, whose next step it launches, that would be time in which the GPU is idle."""
    readers, encoded = set(), Shards.read_encoded

    def note_reader(self: Shards, row: int) -> bytes:
        readers.add(threading.get_ident())
        return encoded(self, row)

    monkeypatch.setattr(Shards, "read_encoded", note_reader)
    loader = BatchLoader(opened, RowTargets.from_shards(opened), CPU, backend, 5, workers=2)
    assert len(list(loader.load(micros_of(opened, rotate_deg=30, flip=True)))) > 10
    assert readers
    assert threading.get_ident() not in readers


def test_the_consumer_does_not_run_dali(opened: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipeline.run calls external_source's Python, and waits: both in the thread that calls it."""
    runners, run = set(), Pipeline.run

    def note_runner(self: Pipeline, *phrases: object) -> object:
        runners.add(threading.get_ident())
        return run(self, *phrases)

    monkeypatch.setattr(Pipeline, "run", note_runner)
    assert len(pixels_by("dali", opened, micros_of(opened, rotate_deg=30, flip=True))) > 50
    assert runners
    assert threading.get_ident() not in runners


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_while_reading_reaches_the_consumer(opened: Shards, backend: str) -> None:
    """Raised by a thread; the next epoch comes as if nothing had been."""
    micro_batches = micros_of(opened, rotate_deg=30, flip=True)
    loader = BatchLoader(opened, RowTargets.from_shards(opened), CPU, backend, 5, workers=2)
    impossible = replace(micro_batches[3], rows=np.full(5, len(opened.manifest.frame)))
    with pytest.raises(IndexError):
        list(loader.load([*micro_batches[:3], impossible, *micro_batches[3:]]))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")]
    assert [batch.row.tolist() for batch in loader.load(micro_batches)] == [
        micro.rows.tolist() for micro in micro_batches
    ]


def test_weights_balance_the_labels_of_what_they_are_counted_over(opened: Shards) -> None:
    """Over all train radiographs, or over those of each study type, both labels pull equally hard."""
    assert (RowTargets.from_shards(opened).weight == 1).all()
    train = opened.manifest.frame.loc[opened.rows("train")]
    complete, parts = [train], [piece for _, piece in train.groupby("study_type") if piece["label"].nunique() == 2]
    assert len(parts) > 1
    for loss_weights, groups in (("class", complete), ("study_type", parts)):
        weight = RowTargets.from_shards(opened, loss_weights).weight
        for group in groups:
            sums = [weight[group.index[group["label"] == label]].sum() for label in (0, 1)]
            assert sums[0] == pytest.approx(sums[1], rel=1e-5), loss_weights
    by_label = [
        set(RowTargets.from_shards(opened, "class").weight[train.index[train["label"] == label]]) for label in (0, 1)
    ]
    assert [len(weights) for weights in by_label] == [1, 1], "one pair for all study types"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_sample_is_named_once_and_left_out(
    opened: Shards, backend: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All others come as they would have; with strict, it ends there."""
    folder = tmp_path / "shards"
    shutil.copytree(opened.folder, folder)
    bad = sorted(opened.rows("train").tolist())[3]
    tar = laws.damage(Shards.open(folder), bad)
    broken, micro_batches = Shards.open(folder), micros_of(opened, rotate_deg=30, flip=True) * 2
    assert sum(bad in micro.rows for micro in micro_batches) == 2, "seen in both epochs"
    complete = BatchLoader(opened, RowTargets.from_shards(opened, "study_type"), CPU, backend, 5, workers=2)
    capfd.readouterr()
    pairs = zip(complete.load(micro_batches), replace(complete, shards=broken).load(micro_batches), strict=True)
    for sound, batch in pairs:
        is_current = batch.row == bad
        assert (batch.mask == (sound.mask & ~is_current)).all()
        assert not batch.image[is_current].any()
        assert (batch.weight == torch.where(is_current, 0, sound.weight)).all()
        for name in ("image", "label"):
            assert torch.equal(getattr(batch, name)[~is_current], getattr(sound, name)[~is_current])
    [line] = [line for line in capfd.readouterr().err.splitlines() if "corrupt sample" in line]
    path = opened.manifest.frame.at[bad, "path"]
    assert line.startswith(f"corrupt sample: row {bad} ({path}) in {tar}: its CRC-32 differs")
    assert list(broken.corrupt) == [bad]
    with pytest.raises(RunError, match=rf"row {bad} .*strict=true\)\. Make its shard again"):
        list(replace(complete, shards=Shards.open(folder), strict=True).load(micro_batches))


def test_a_tar_that_shrinks_damages_samples_and_one_that_vanishes_none(opened: Shards, tmp_path: Path) -> None:
    """Under a running training: an error by row, or the disk's; not a dead process."""
    folder = tmp_path / "shards"
    shutil.copytree(opened.folder, folder)
    broken = Shards.open(folder)
    first, last = broken.rows("train")[[0, -1]].tolist()
    broken.read_pixels(first)
    [tar] = broken.tar_names("train")
    os.truncate(folder / tar, 40_000)
    with pytest.raises(CorruptSampleError, match=rf"row {last} .* in {tar}: its CRC-32 differs: .*truncated"):
        broken.read_pixels(last)
    (folder / tar).unlink()
    with pytest.raises(CorruptSampleError, match=rf"row {last} .*truncated"):
        broken.read_pixels(last)
    with pytest.raises(ShardReadError, match=rf"{tar} cannot be read: no such file or directory \(at row {first}\)"):
        Shards.open(folder).read_pixels(first)


def test_a_sample_read_before_is_damaged_once_its_tar_was_cut_short(opened: Shards, tmp_path: Path) -> None:
    """Its CRC-32 was right the first time."""
    folder = tmp_path / "shards"
    shutil.copytree(opened.folder, folder)
    broken = Shards.open(folder)
    last = int(broken.rows("train")[-1])
    broken.read_pixels(last)
    os.truncate(folder / broken.tar_names("train")[0], 40_000)
    with pytest.raises(CorruptSampleError, match=rf"row {last} .*truncated"):
        broken.read_pixels(last)


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(), reason="Linux gives EIO where /proc/self/mem is read at no mapping"
)
@pytest.mark.parametrize("passing", [True, False])
def test_an_error_of_the_disk_is_retried_and_no_samples_fault(
    opened: Shards, tmp_path: Path, passing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(opened.folder, folder)
    broken = Shards.open(folder)
    broken.check_tars("train")
    tar, row = folder / broken.tar_names("train")[0], int(broken.rows("train")[0])
    tar.rename(tmp_path / "aside")
    tar.symlink_to("/proc/self/mem")
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if passing and len(pauses) == 2:
            tar.unlink()
            (tmp_path / "aside").rename(tar)

    monkeypatch.setattr(reader, "time", SimpleNamespace(sleep=pause))
    if passing:
        np.testing.assert_array_equal(broken.read_pixels(row), opened.read_pixels(row))
        assert len(pauses) == 2
    else:
        with pytest.raises(ShardReadError, match=rf"{tar.name} cannot be read in 4 attempts: input/output error"):
            broken.read_pixels(row)
        assert pauses == [0.2, 1.0, 3.0]
    assert broken.corrupt == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_backend_hides_an_error_of_the_disk(opened: Shards, backend: str, tmp_path: Path) -> None:
    """It comes out of the loader, and the loader's threads end."""
    folder = tmp_path / "shards"
    shutil.copytree(opened.folder, folder)
    broken = Shards.open(folder)
    broken.check_tars("train")
    (folder / broken.tar_names("train")[0]).unlink()
    loading = BatchLoader(broken, RowTargets.from_shards(opened), CPU, backend, 5, workers=2)
    with pytest.raises(ShardReadError, match="no such file or directory"):
        list(loading.load(micros_of(opened, rotate_deg=30, flip=True)))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")]


def test_an_index_that_contradicts_its_samples_is_refused_before_any_is_read(opened: Shards, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(opened.folder, folder)
    index = json.loads((folder / "index.json").read_bytes())
    alternatives = sorted({"raw", "png", "jpeg"} - {opened.encoding})
    claims: list[tuple[dict[str, Any], str]] = [({"encoding": name}, f"encoding '{name}'") for name in alternatives]
    claims += [({"size": 32}, "raw pixels of size 32")] if opened.encoding == "raw" else []
    for change, phrases in claims:
        (folder / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(UserError, match=rf"index.json has {phrases}, its .idx files have .*Make the shards again"):
            Shards.open(folder).check_tars("train")


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_ranks_than_shards_and_none_waits(opened: Shards, world_size: int, micro_batch: int, backend: str) -> None:
    """One shard, up to five ranks: every rank has as many batches, over all of them every row once (law: once)."""
    rows = opened.rows("train")
    loader = BatchLoader(opened, RowTargets.from_shards(opened), CPU, backend, micro_batch, workers=1)
    assert len(opened.tar_names("train")) == 1
    epoch = sampler.epoch_permutation(rows, 0, 0, rotate_deg=30, flip=True)
    sizes = {"global_batch": micro_batch * world_size, "micro_batch": micro_batch, "world_size": world_size}
    num_steps = sampler.steps_per_epoch(len(rows), sizes["global_batch"])
    visited = []
    for rank in range(world_size):
        micro_batches = (
            m for step in range(num_steps) for m in sampler.step_micro_batches(epoch, step, rank=rank, **sizes)
        )
        created = list(loader.load(micro_batches))
        assert len(created) == num_steps
        visited += [row for batch in created for row in batch.row.tolist()]
    assert len(visited) == len(set(visited)) == len(rows) - len(rows) % sizes["global_batch"]
    assert set(visited) <= set(rows.tolist())


def test_prefetch_threads_and_decoder_follow_the_machine(opened: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = RowTargets.from_shards(opened)

    def chosen(device: str = "cpu", **settings: object) -> BatchLoader:
        return BatchLoader.from_settings(
            Settings(shards="s", run="r", **settings), opened, targets, torch.device(device)
        )

    monkeypatch.setattr(loader, "num_processors", lambda: 8)
    assert (chosen().backend, chosen().workers) == ("cpu", 4)
    assert (chosen("cuda").backend, chosen("cuda").workers) == ("dali", 8)
    for name, value in {"RANK": "0", "WORLD_SIZE": "64", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert (chosen().workers, chosen("cuda").workers) == (2, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert chosen().workers == 1
    assert chosen(micro_batch=8).prefetch == 16, (
        "64 MiB of these small pixels would be far more: sixteen a thread at most"
    )
    assert chosen(micro_batch=4096).prefetch == 2, "two a thread at least"
    output = chosen(workers=3, prefetch=5, pipeline="dali", strict=True)
    assert (output.workers, output.prefetch, output.backend, output.strict) == (3, 5, "dali", True)
    assert "dali" in str(output)
    assert "batches by resident" in str(chosen(pipeline="resident"))
    assert "3 threads per rank, 5 micro-batches ahead" in str(output)


def test_larger_micro_batches_are_not_held_ahead_in_as_great_a_number(opened: Shards) -> None:
    """Evaluation may load 256 where training loads 8: as many micro-batches ahead would take 32 times the memory."""
    loader = BatchLoader(opened, RowTargets.from_shards(opened), CPU, "cpu", micro_batch=2, workers=1, prefetch=16)
    for batch, num_ahead in ((2, 16), (8, 4), (32, 2)):
        pulled = 0

        def micro_batches(batch: int = batch) -> Iterator[sampler.MicroBatch]:
            nonlocal pulled
            for micro in micros_of(opened, rotate_deg=0, flip=False, micro_batch=2) * 2:
                pulled += 1
                rows = np.resize(micro.rows, batch)
                yield sampler.MicroBatch(rows, np.zeros(batch, np.float32), np.zeros(batch, bool), np.ones(batch, bool))

        stream = loader.load(micro_batches())
        assert next(stream).image.shape == (batch, 1, 96, 96)
        assert pulled == num_ahead + 1
        stream.close()


def test_dali_goes_on_from_epoch_to_epoch(opened: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for all epochs; one that was left in mid-epoch leaves nothing behind in the next."""
    monkeypatch.setattr(dali, "_graphs", {})
    epochs = [micros_of(opened, rotate_deg=30, flip=True, micro_batch=size)[:count] for size, count in ((5, 9), (4, 3))]
    for _ in range(3):
        for micro_batches in epochs:
            remaining = dali.load_images(opened, micro_batches, workers=2, device=CPU, prefetch=4)
            next(remaining)
            remaining.close()
            actual, reference = pixels_by("cpu", opened, micro_batches), pixels_by("dali", opened, micro_batches)
            assert (np.abs(actual.astype(int) - reference) <= limit_of("dali", opened)).mean() >= 0.999
            item = [
                created.rows.tolist()
                for created in dali.load_images(opened, micro_batches[:1], workers=2, device=CPU, prefetch=4)
            ]
            assert item == [micro_batches[0].rows.tolist()]
    assert all(graph.pipe is not None for graph in dali._graphs.values())
    assert len(dali._graphs) == 2, "one for each batch size"
