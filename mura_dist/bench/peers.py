"""The usual alternatives for loading, each a function of the Load that returns Epochs. Flip, rotation within 30 degrees.

    data_loader   torch's DataLoader, Pillow and torchvision transforms, over the raw folder
    webdataset    webdataset and torchvision v2, over a tar of original files or over this package's shards
    dali_reader   DALI's fn.readers.webdataset with its index, over this package's shards
    spdl          SPDL's thread pipeline and OpenCV, over the raw folder
    litdata       LitData's streaming data set, Pillow and torchvision v2, over its own chunks of original files

They use nothing of this package except its shards. Imports are inside the functions, since the time to the first batch is
measured too. `load.workers` is the number of worker processes, and of threads of DALI and SPDL.

SPDL's own decoders need FFmpeg's libraries on the system, which differ in their gray. Its pipeline runs any function that
releases the interpreter's lock.
"""

import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mura_dist.bench.streams import Epochs, device
from mura_dist.bench.workload import ROTATE_DEG, Load

FILES = "(a) DataLoader + Pillow + torchvision, files"
TAR = "(b) webdataset + torchvision v2, original files in a tar"
READER = "(c) DALI readers.webdataset, our shards"
SHARDS = "webdataset + torchvision v2, our shards"
THREADS = "(d) SPDL + OpenCV, files"
CHUNKS = "(e) LitData + Pillow + torchvision v2, its chunks of original files"

IMPORTS = {
    FILES: ("torch", "torch.utils.data", "torchvision.transforms", "PIL.Image"),
    TAR: ("torch", "torch.utils.data", "webdataset", "torchvision.transforms.v2", "PIL.Image"),
    READER: ("torch", "nvidia.dali.fn", "nvidia.dali.plugin.pytorch"),
}
"""Modules that each peer imports before it touches a radiograph."""

OPTIONAL = {THREADS: "spdl", CHUNKS: "litdata"}
"""Modules of the peers that the extra `peers` installs."""


def missing() -> dict[str, str]:
    """Return the peers that cannot run here, with the module that each lacks."""
    return {name: module for name, module in OPTIONAL.items() if find_spec(module) is None}


class _Files:
    """A map-style data set for torch's DataLoader."""

    def __init__(self, load: Load) -> None:
        from torchvision import transforms as t

        self.files, size = [load.folder / path for path in load.paths], (load.size, load.size)
        turn = t.RandomRotation(ROTATE_DEG, t.InterpolationMode.BILINEAR)
        self.transform = t.Compose([t.Resize(size), t.RandomHorizontalFlip(), turn, t.PILToTensor()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("L"))  # uint8 (1, S, S)


def data_loader(load: Load) -> Epochs:
    """Return the epochs of a DataLoader over image files."""
    return _data_loader_epochs(load, _Files(load), batch_size=load.batch, shuffle=True, drop_last=True)


def webdataset(tars: list[str], load: Load) -> Epochs:
    """Return the epochs of webdataset over tars."""
    import torch
    import webdataset
    from torchvision.transforms import InterpolationMode, v2

    augment = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomRotation(ROTATE_DEG, InterpolationMode.BILINEAR)])
    resize = v2.Compose([v2.PILToTensor(), v2.Resize((load.size, load.size))])

    def image(sample: dict[str, Any]) -> torch.Tensor:
        if "npy" in sample:
            return augment(torch.from_numpy(sample["npy"])[None])  # uint8 (1, S, S)
        return augment(resize(next(value for key, value in sample.items() if not key.startswith("_"))))

    # Every worker reads all tars, so that none is idle if there are fewer tars than workers.
    samples = webdataset.WebDataset(tars, shardshuffle=False, workersplitter=None).shuffle(100).decode("pill")
    return _data_loader_epochs(
        load, samples.map(image).batched(load.batch, collation_fn=torch.stack, partial=False), batch_size=None
    )


def _data_loader_epochs(load: Load, samples: Any, **options: Any) -> Epochs:
    from torch.utils.data import DataLoader

    target = device()
    options |= {"multiprocessing_context": "fork", "persistent_workers": True, "pin_memory": target.type == "cuda"}
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores are intended
    loader = DataLoader(samples, num_workers=load.workers, **options)
    return lambda: (batch.to(target, non_blocking=True) for batch in loader)


def dali_reader(tars: list[str], load: Load) -> Epochs:
    """Return the epochs of DALI's reader, as in its guide.

    Batches are copied as in this package's `dali` backend, which is faster than DALI's iterator.
    """
    import torch
    from nvidia.dali.plugin.pytorch import feed_ndarray

    target, side = device(), load.size
    on_gpu = target.type == "cuda"
    options = {"batch_size": load.batch, "num_threads": load.workers, "device_id": 0 if on_gpu else None}
    pipe = _reader(tars, side, on_gpu, prefetch_queue_depth=2, **options)
    pipe.build()
    steps = pipe.epoch_size("samples") // load.batch

    def batch() -> Any:
        (pixels,) = pipe.run()
        image = torch.empty((load.batch, side, side, 1), dtype=torch.uint8, device=target)
        feed_ndarray(pixels.as_tensor(), image, cuda_stream=torch.cuda.current_stream(target) if on_gpu else None)
        return image.view(load.batch, 1, side, side)

    return lambda: (batch() for _ in range(steps))


def _reader(tars: list[str], side: int, on_gpu: bool, **options: Any) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    from mura_dist.data.shards.reader import read_index

    indexes = [str(Path(tar).with_suffix(".idx")) for tar in tars]
    image, *_ = read_index(Path(indexes[0]))[0]
    header_bytes = image.size - side**2 if image.suffix == "npy" else 0

    @pipeline_def  # type: ignore[untyped-decorator]
    def graph() -> Any:
        options: dict[str, Any] = {"random_shuffle": True, "initial_fill": 100, "name": "samples"}
        data: Any = fn.readers.webdataset(paths=tars, index_paths=indexes, ext=[image.suffix], **options)
        if header_bytes:
            pixels = fn.reshape(data[header_bytes:], shape=[side, side, 1], layout="HWC")
            pixels = pixels.gpu() if on_gpu else pixels
        else:
            pixels = fn.decoders.image(data, device="mixed" if on_gpu else "cpu", output_type=types.GRAY)
        angle, flip = fn.random.uniform(range=(-ROTATE_DEG, ROTATE_DEG)), fn.random.coin_flip()
        rotated = fn.rotate(pixels, angle=angle, keep_size=True, fill_value=0, interp_type=types.INTERP_LINEAR)
        return fn.flip(rotated, horizontal=flip)

    return graph(**options)


def spdl(load: Load) -> Epochs:
    """Return the epochs of SPDL's pipeline, as in its guide to images: a thread decodes, resizes and augments a batch."""
    import cv2
    import numpy as np
    import torch
    from spdl.pipeline import PipelineBuilder

    cv2.setNumThreads(1)  # the pipeline's threads provide the parallelism
    target, size = device(), (load.size, load.size)
    center = ((load.size - 1) / 2, (load.size - 1) / 2)
    files = [str(load.folder / path) for path in load.paths]

    def image(path: str) -> np.ndarray:
        gray = cv2.resize(cv2.imread(path, cv2.IMREAD_GRAYSCALE), size, interpolation=cv2.INTER_AREA)
        matrix = cv2.getRotationMatrix2D(center, random.uniform(-ROTATE_DEG, ROTATE_DEG), 1)
        turned = cv2.warpAffine(gray, matrix, size, flags=cv2.INTER_LINEAR)
        return cv2.flip(turned, 1) if random.random() < 0.5 else turned  # (S, S) uint8

    def images(paths: list[str]) -> torch.Tensor:
        return torch.from_numpy(np.stack([image(path) for path in paths])[:, None])  # uint8 (B, 1, S, S)

    def epoch() -> Iterator[torch.Tensor]:
        builder = PipelineBuilder().add_source(random.sample(files, len(files))).aggregate(load.batch, drop_last=True)
        pipeline = builder.pipe(images, concurrency=load.workers).add_sink().build(num_threads=load.workers)
        with pipeline.auto_stop():
            yield from (batch.to(target, non_blocking=True) for batch in pipeline)

    return epoch


_WRITE_CHUNKS = """
import sys
from pathlib import Path
import litdata

def sample(path):
    return {"image": Path(path).read_bytes()}

if __name__ == "__main__":
    litdata.optimize(sample, sys.stdin.read().split("\\0"), sys.argv[1], chunk_bytes="64MB", num_workers=1, verbose=False)
"""


def write_chunks(load: Load, folder: Path) -> None:
    """Write LitData's chunks of the original files."""
    script, files = load.scratch / "write_chunks.py", [str(load.folder / path) for path in load.paths]
    script.write_text(_WRITE_CHUNKS, encoding="utf-8")
    environment = os.environ | {
        name: str(load.scratch / name) for name in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER")
    }
    command = [sys.executable, str(script), str(folder)]
    subprocess.run(command, input="\0".join(files), text=True, check=True, stdout=sys.stderr, env=environment)


def litdata(folder: Path, load: Load) -> Epochs:
    """Return the epochs of LitData's loader over the chunks of `folder`."""
    import io

    import torch
    from litdata import StreamingDataLoader, StreamingDataset
    from PIL import Image
    from torchvision.transforms import InterpolationMode, v2

    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize((load.size, load.size)),
            v2.RandomHorizontalFlip(),
            v2.RandomRotation(ROTATE_DEG, InterpolationMode.BILINEAR),
        ]
    )

    def image(sample: dict[str, bytes]) -> torch.Tensor:
        with Image.open(io.BytesIO(sample["image"])) as picture:
            return transform(picture.convert("L"))  # uint8 (1, S, S)

    target = device()
    samples = StreamingDataset(str(folder), shuffle=True, drop_last=True, transform=image)
    options: dict[str, Any] = {"num_workers": load.workers, "pin_memory": target.type == "cuda"}
    options |= {"multiprocessing_context": "fork", "persistent_workers": True, "drop_last": True}
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    loader = StreamingDataLoader(samples, batch_size=load.batch, **options)
    return lambda: (batch.to(target, non_blocking=True) for batch in loader)
