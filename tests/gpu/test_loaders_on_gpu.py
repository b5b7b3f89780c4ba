"""Test the loading backends on a GPU: batches equal the CPU's, without waiting for the device. Skipped without a GPU."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import gpu

from mura_dist.data.loaders import sampler
from mura_dist.data.loaders.loader import BatchLoader, RowTargets
from mura_dist.data.loaders.warp import inverse_maps, triton_error, warp_by_torch
from mura_dist.data.shards.convert import convert
from mura_dist.data.shards.reader import Shards

pytestmark = gpu.MARKS
needs_cuda = pytest.mark.skipif(not gpu.CUDA, reason="compares two programs of a CUDA device")

BATCH = 8


@pytest.fixture(scope="module", params=["raw", "png", "jpeg"])
def encoded(request: pytest.FixtureRequest, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("encoded") / request.param
    convert(phantoms, folder, size=96, encoding=request.param, workers=2)
    return Shards.open(folder)


def training_micros(shards: Shards, num_micro_batches: int) -> list[sampler.MicroBatch]:
    epoch = sampler.epoch_permutation(shards.rows("train"), 0, 0, rotate_deg=30.0, flip=True)
    return [epoch.micro_batch(number * BATCH, BATCH) for number in range(num_micro_batches)]


def loader_of(shards: Shards, device: torch.device, backend: str) -> BatchLoader:
    return BatchLoader(shards, RowTargets.from_shards(shards, "study_type"), device, backend, BATCH, workers=2)


@pytest.mark.parametrize("backend", ["dali", "cpu", "resident"])
def test_gpu_batches_equal_cpu_batches(encoded: Shards, backend: str) -> None:
    """With and without augmentation, with a padded last micro-batch, in every encoding."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali.fn")
    evaluated = sampler.evaluation_micro_batches(
        encoded.rows("valid")[: BATCH + 3], micro_batch=BATCH, rank=0, world_size=1
    )
    for micros in (training_micros(encoded, 4), evaluated):
        host = loader_of(encoded, torch.device("cpu"), "cpu").load(micros)
        device = loader_of(encoded, gpu.DEVICE, backend).load(micros)
        for on_gpu, on_cpu in zip(device, host, strict=True):
            assert on_gpu.image.device == gpu.DEVICE
            difference = np.abs(on_gpu.image.cpu().numpy().astype(int) - on_cpu.image.numpy())
            # dali's jpeg: two decoders, each free to round
            limit = {"dali": 2 if encoded.encoding != "jpeg" else 4, "cpu": 0, "resident": 1}[backend]
            assert (difference <= limit).mean() >= 0.999
            assert not on_gpu.image[~on_gpu.mask].any()
            for name in ("label", "weight", "row", "mask"):
                assert torch.equal(getattr(on_gpu, name).cpu(), getattr(on_cpu, name))


@pytest.fixture
def no_wait() -> Iterator[None]:
    """torch raises if the host would wait for the device."""
    if not gpu.CUDA:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["cpu", "resident"])
@pytest.mark.usefixtures("no_wait")
def test_loader_never_synchronizes_with_the_device(shard_folder: Path, backend: str) -> None:
    """Neither in the first pass over the radiographs nor later."""
    shards = Shards.open(shard_folder)
    loader, micros = loader_of(shards, gpu.DEVICE, backend), training_micros(shards, 4)
    for _ in range(2):
        assert len(list(loader.load(micros))) == 4


@needs_cuda
def test_triton_kernel_is_bit_identical_to_torch() -> None:
    """On random pixels at several sizes and angles. A slot of -1 is black."""
    if triton_error():
        pytest.skip(triton_error())
    from mura_dist.data.loaders.warp_triton import warp_by_triton

    device, rng = gpu.DEVICE, np.random.default_rng(0)
    angles = np.array([0, 90, -90, 180, 45, 30, -30, 12.3456, -7.77, 0.001], np.float32)
    flips, slots = rng.random(10) < 0.5, np.arange(10, dtype=np.int32) - 1
    for size in (17, 64, 320, 331):
        arrays = rng.integers(0, 256, (9, size, size), dtype=np.uint8), slots, inverse_maps(angles, flips, size)
        on_device = [torch.from_numpy(array).to(device) for array in arrays]
        triton, plain = warp_by_triton(*on_device), warp_by_torch(*on_device)
        assert torch.equal(triton, plain)
        assert not triton[0].any()
        on_cpu = warp_by_torch(*map(torch.from_numpy, arrays))
        assert torch.equal(plain.cpu(), on_cpu)
