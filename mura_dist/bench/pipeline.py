"""bench pipeline: augmented batches uint8 (B, 1, S, S) on the device, start-up time and memory.

    files -> shards, once, not timed -> the backends `cpu`, `dali`, `resident` over the shards, compared with peers.py
    files -> one tar of the same bytes, with an index -> the same augmentation, decoding and resizing each file in every epoch

Peers that read files decode and resize in every epoch. This package does so once, in the conversion. The contender over original
bytes does the same work as the peers, and differs in order, threads and libraries only.
"""

import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from mura_dist.bench import footprint, peers
from mura_dist.bench.clock import Contender
from mura_dist.bench.footprint import Loader
from mura_dist.bench.streams import Epochs, device, stream
from mura_dist.bench.workload import ROTATE_DEG, Load, Options
from mura_dist.core.errors import RunError, install_remedy
from mura_dist.data.loaders import sampler

CPU, DALI = "mura-dist, cpu backend, raw shards", "mura-dist, dali backend, raw shards"
RESIDENT = "mura-dist, resident backend (experimental)"
ORIGINAL = "mura-dist, ORIGINAL bytes decoded every epoch"
WORKER_COUNTS = (1, 2, 4)  # to try with each peer
_NUM_TRAIN = 36_808  # radiographs in MURA's train split
_AHEAD = 2  # micro-batches per thread to load ahead, as in data/loaders/opencv.py
_FEW = 256  # images per epoch of a slow loader, in the memory measurement


def contenders(load: Load) -> list[Contender]:
    """Return the contenders; converts the radiographs first."""
    from mura_dist.data.shards.convert import convert

    folder, files = load.scratch / "shards", load.scratch / "files.tar"
    convert(load.folder, folder, size=load.size, workers=load.workers)
    _pack(load, files)
    if peers.CHUNKS not in peers.missing():
        peers.write_chunks(load, load.scratch / "chunks")
    own = {CPU: partial(batches, folder, "cpu"), ORIGINAL: partial(originals, files)}
    own |= {DALI: partial(batches, folder, "dali"), RESIDENT: partial(batches, folder, "resident")}
    return [
        *(Contender(name, partial(stream, build), is_own=True, is_stream=True) for name, build in own.items()),
        *(
            Contender(name, partial(stream, build), worker_counts=WORKER_COUNTS, is_stream=True)
            for name, build in _peers(load).items()
        ),
    ]


def _peers(load: Load) -> dict[str, Callable[[Load], Epochs]]:
    from mura_dist.data.shards.reader import Shards

    folder = load.scratch / "shards"
    tars = [str(folder / name) for name in Shards.open(folder).tar_names()]
    builds: dict[str, Callable[[Load], Epochs]] = {
        peers.FILES: peers.data_loader,
        peers.TAR: partial(peers.webdataset, [str(load.scratch / "files.tar")]),
        peers.READER: partial(peers.dali_reader, tars),
        peers.SHARDS: partial(peers.webdataset, tars),
        peers.THREADS: peers.spdl,
        peers.CHUNKS: partial(peers.litdata, load.scratch / "chunks"),
    }
    return {name: build for name, build in builds.items() if name not in peers.missing()}


def more(load: Load, options: Options, results: dict[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """Return `start`: time to the first batch and memory in new processes, with the peers' best numbers of workers."""
    for name, module in peers.missing().items():
        log(f"skipped {name}: {module} is not installed. Run {install_remedy('peers')}.")
    folder, peer_builds = load.scratch / "shards", _peers(load)
    workers = {result["name"]: result["workers"] for result in results["contenders"]}
    imports = ("torch", "mura_dist.data.shards.reader", "mura_dist.data.loaders.loader")
    num_images = len(load.paths) // load.batch * load.batch
    few = min(num_images, _FEW)
    loaders = [
        Loader(
            CPU,
            partial(batches, folder, "cpu"),
            (*imports, "mura_dist.data.loaders.opencv"),
            num_images,
            grows=True,
            is_own=True,
        ),
        Loader(
            DALI,
            partial(batches, folder, "dali"),
            (*imports, "mura_dist.data.loaders.dali"),
            few,
            grows=True,
            is_own=True,
        ),
        *(Loader(name, peer_builds[name], peers.IMPORTS[name], few) for name in (peers.FILES, peers.TAR, peers.READER)),
    ]
    loads = [replace(load, workers=workers[loader.name]) for loader in loaders]
    return {"start": footprint.measure(loaders, loads, options.rounds, log)}


def batches(folder: Path, backend: str, load: Load) -> Epochs:
    """Return the epochs of a loading backend, called as in training. On a GPU an epoch is as long as MURA's."""
    from mura_dist.data.loaders.loader import BatchLoader, RowTargets
    from mura_dist.data.shards.reader import Shards

    shards, target, numbers = Shards.open(folder), device(), count()
    targets = RowTargets.from_shards(shards)
    loader = BatchLoader(shards, targets, target, backend, load.batch, load.workers)
    rows = np.concatenate([shards.rows(name) for name, split in shards.index["splits"].items() if split["shards"]])
    passes = -(-_NUM_TRAIN // len(rows)) if target.type == "cuda" else 1

    def epoch() -> Iterator[Any]:
        micros = [micro for _ in range(passes) for micro in _micros(rows, next(numbers), load.batch)]
        return (batch.image for batch in loader.load(micros))

    return epoch


def _micros(rows: np.ndarray, number: int, batch: int) -> list[sampler.MicroBatch]:
    epoch = sampler.epoch_permutation(rows, 0, number, rotate_deg=ROTATE_DEG, flip=True)
    share = {"global_batch": batch, "micro_batch": batch, "rank": 0, "world_size": 1}
    steps = range(sampler.steps_per_epoch(len(rows), batch))
    return [micro for step in steps for micro in sampler.step_micro_batches(epoch, step, **share)]


def _pack(load: Load, files: Path) -> None:
    """Write the original bytes of all radiographs into a tar with an index, as shards have it."""
    with tarfile.open(files, "w", dereference=True) as tar:
        for number, path in enumerate(load.paths):
            tar.add(load.folder / path, f"{number:09d}{Path(path).suffix.lower()}")
    with tarfile.open(files) as tar:
        lines = [f"{m.name.rpartition('.')[2]} {m.offset_data} {m.size} {m.name}" for m in tar.getmembers()]
    files.with_suffix(".idx").write_text("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n", encoding="ascii")


def originals(files: Path, load: Load) -> Epochs:
    """Return epochs over original bytes: decode and resize with OpenCV, augment on threads, in this package's order."""
    import cv2
    import torch

    from mura_dist.data.shards.reader import read_index

    cv2.setNumThreads(1)  # the pool's threads provide the parallelism
    extents = [(member.offset, member.size) for member, *_ in read_index(files.with_suffix(".idx"))]
    tar, rows, numbers = os.open(files, os.O_RDONLY), np.arange(len(extents)), count()
    pool, target = ThreadPoolExecutor(load.workers, thread_name_prefix="load"), device()

    def pixels(row: int) -> np.ndarray:
        offset, size = extents[row]
        data = np.frombuffer(os.pread(tar, size, offset), np.uint8)
        gray = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)  # (H, W) uint8
        if gray is None:
            raise RunError(f"{load.paths[row]}: OpenCV cannot decode it. Remove it from --data.")
        return cv2.resize(gray, (load.size, load.size), interpolation=cv2.INTER_AREA)

    def epoch() -> Iterator[Any]:
        ahead: deque[Future[np.ndarray]] = deque()
        for micro in _micros(rows, next(numbers), load.batch):
            ahead.append(pool.submit(_load_micro_batch, pixels, micro, load.size))
            if len(ahead) > _AHEAD * load.workers:
                yield torch.from_numpy(ahead.popleft().result()).to(target)
        while ahead:
            yield torch.from_numpy(ahead.popleft().result()).to(target)

    return epoch


def _load_micro_batch(pixels: Callable[[int], np.ndarray], micro: sampler.MicroBatch, size: int) -> np.ndarray:
    """Return the augmented micro-batch, uint8 (B, 1, S, S)."""
    from mura_dist.data.loaders.opencv import augment

    batch = np.zeros((len(micro.rows), 1, size, size), np.uint8)
    for number, row in enumerate(micro.rows):
        augment(pixels(row), float(micro.angles[number]), bool(micro.flips[number]), batch[number, 0])
    return batch
