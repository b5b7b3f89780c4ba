"""bench pipeline: augmented batches uint8 (B, 1, S, S) on the device; and what it costs to start, and to hold.

    files -> shards, once, untimed -> ours: `cpu`, `dali`, `resident` over the shards   against peers.py
    files -> one tar of the same bytes, its index -> ours, with each file decoded and resized at every epoch: like for like

The peers over files decode and resize at every epoch; ours did so once, in the conversion. The contender over original
bytes differs from the peers in order, threads and libraries alone, and is always shown beside the first.
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
from mura_dist.core.errors import RunError
from mura_dist.data.loaders import sampler

CPU, DALI = "mura-dist, cpu backend, raw shards", "mura-dist, dali backend, raw shards"
RESIDENT = "mura-dist, resident backend (experimental)"
ORIGINAL = "mura-dist, ORIGINAL bytes decoded every epoch"
TRIES = (1, 2, 4)  # workers of a peer
_MURA = 36_808  # radiographs of its train split
_AHEAD = 2  # micro-batches a thread may be ahead, as in data/loaders/opencv.py
_FEW = 256  # images between two looks at the memory of a loader that is slow


def contenders(load: Load) -> list[Contender]:
    from mura_dist.data.shards.convert import convert

    folder, files = load.scratch / "shards", load.scratch / "files.tar"
    convert(load.folder, folder, size=load.size, workers=load.workers)
    _pack(load, files)
    ours = {CPU: partial(batches, folder, "cpu"), ORIGINAL: partial(originals, files)}
    ours |= {DALI: partial(batches, folder, "dali"), RESIDENT: partial(batches, folder, "resident")}
    return [
        *(Contender(name, partial(stream, build), ours=True, streams=True) for name, build in ours.items()),
        *(Contender(name, partial(stream, build), tries=TRIES, streams=True) for name, build in _peers(load).items()),
    ]


def _peers(load: Load) -> dict[str, Callable[[Load], Epochs]]:
    from mura_dist.data.shards.reader import Shards

    folder = load.scratch / "shards"
    tars = [str(folder / name) for name in Shards.open(folder).tar_names()]
    return {
        peers.FILES: peers.data_loader,
        peers.TAR: partial(peers.webdataset, [str(load.scratch / "files.tar")]),
        peers.READER: partial(peers.dali_reader, tars),
        peers.SHARDS: partial(peers.webdataset, tars),
    }


def more(load: Load, options: Options, results: dict[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """start: seconds to the first batch and memory, of processes that do nothing else; peers with the workers they chose."""
    folder, theirs = load.scratch / "shards", _peers(load)
    chosen = {one["name"]: one["workers"] for one in results["contenders"]}
    ours = ("torch", "mura_dist.data.shards.reader", "mura_dist.data.loaders.loader")
    whole = len(load.paths) // load.batch * load.batch
    few = min(whole, _FEW)
    loaders = [
        Loader(
            CPU, partial(batches, folder, "cpu"), (*ours, "mura_dist.data.loaders.opencv"), whole, grows=True, ours=True
        ),
        Loader(
            DALI, partial(batches, folder, "dali"), (*ours, "mura_dist.data.loaders.dali"), few, grows=True, ours=True
        ),
        *(Loader(name, theirs[name], peers.IMPORTS[name], few) for name in (peers.FILES, peers.TAR, peers.READER)),
    ]
    loads = [replace(load, workers=chosen[loader.name]) for loader in loaders]
    return {"start": footprint.measure(loaders, loads, options.rounds, log)}


def batches(folder: Path, backend: str, load: Load) -> Epochs:
    """Ours: the pipeline as training calls it, once an epoch; on a GPU an epoch is as long as MURA's, here too."""
    from mura_dist.data.loaders.loader import BatchLoader, RowTargets
    from mura_dist.data.shards.reader import Shards

    shards, place, numbers = Shards.open(folder), device(), count()
    targets = RowTargets.from_shards(shards)
    loader = BatchLoader(shards, targets, place, backend, load.batch, load.workers)
    rows = np.concatenate([shards.rows(name) for name, part in shards.index["splits"].items() if part["shards"]])
    passes = -(-_MURA // len(rows)) if place.type == "cuda" else 1

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
    """The original bytes of every radiograph in a tar, and where they are: an index as the shards have."""
    with tarfile.open(files, "w", dereference=True) as tar:
        for number, path in enumerate(load.paths):
            tar.add(load.folder / path, f"{number:09d}{Path(path).suffix.lower()}")
    with tarfile.open(files) as tar:
        lines = [f"{m.name.rpartition('.')[2]} {m.offset_data} {m.size} {m.name}" for m in tar.getmembers()]
    files.with_suffix(".idx").write_text("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n", encoding="ascii")


def originals(files: Path, load: Load) -> Epochs:
    """Ours, like for like: original bytes by place -> decoded, resized (OpenCV) -> our warp, in our order, on threads."""
    import cv2
    import torch

    from mura_dist.data.shards.reader import read_index

    cv2.setNumThreads(1)  # our threads are the parallelism
    bytes_of = [(member.offset, member.size) for member, *_ in read_index(files.with_suffix(".idx"))]
    tar, rows, numbers = os.open(files, os.O_RDONLY), np.arange(len(bytes_of)), count()
    pool, place = ThreadPoolExecutor(load.workers, thread_name_prefix="load"), device()

    def pixels(row: int) -> np.ndarray:
        offset, size = bytes_of[row]
        data = np.frombuffer(os.pread(tar, size, offset), np.uint8)
        grey = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)  # (H, W) uint8
        if grey is None:
            raise RunError(f"{load.paths[row]}: OpenCV does not decode it; give --data without it")
        return cv2.resize(grey, (load.size, load.size), interpolation=cv2.INTER_AREA)

    def epoch() -> Iterator[Any]:
        ahead: deque[Future[np.ndarray]] = deque()
        for micro in _micros(rows, next(numbers), load.batch):
            ahead.append(pool.submit(_filled, pixels, micro, load.size))
            if len(ahead) > _AHEAD * load.workers:
                yield torch.from_numpy(ahead.popleft().result()).to(place)
        while ahead:
            yield torch.from_numpy(ahead.popleft().result()).to(place)

    return epoch


def _filled(pixels: Callable[[int], np.ndarray], micro: sampler.MicroBatch, size: int) -> np.ndarray:
    """uint8 (B, 1, S, S)."""
    from mura_dist.data.loaders.opencv import augment

    batch = np.zeros((len(micro.rows), 1, size, size), np.uint8)
    for number, row in enumerate(micro.rows):
        augment(pixels(row), float(micro.angles[number]), bool(micro.flips[number]), batch[number, 0])
    return batch
