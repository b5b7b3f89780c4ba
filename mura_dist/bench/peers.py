"""What one would load with instead: each a function of the load that gives Epochs. 320 px, flip, rotation within 30 degrees.

    data_loader   the seed project's way: torch's DataLoader, Pillow, torchvision transforms, over the raw folder
    webdataset    webdataset and torchvision v2, over a tar of original files, or over our shards
    dali_reader   DALI's own fn.readers.webdataset with its index, over our shards

Nothing of ours is used but shards and their format, and nothing is imported before it is called: the seconds to their first
batch are measured too. `load.workers` are worker processes of the first two, threads of the third.
"""

import warnings
from pathlib import Path
from typing import Any

from mura_dist.bench.streams import Epochs, device
from mura_dist.bench.workload import ROTATE_DEG, Load

FILES = "(a) DataLoader + Pillow + torchvision, files"
TAR = "(b) webdataset + torchvision v2, original files in a tar"
READER = "(c) DALI readers.webdataset, our shards"
SHARDS = "webdataset + torchvision v2, our shards"

IMPORTS = {
    FILES: ("torch", "torch.utils.data", "torchvision.transforms", "PIL.Image"),
    TAR: ("torch", "torch.utils.data", "webdataset", "torchvision.transforms.v2", "PIL.Image"),
    READER: ("torch", "nvidia.dali.fn", "nvidia.dali.plugin.pytorch"),
}
"""What a process of each needs before it has anything to do with radiographs."""


class _Files:
    """A data set as torch's DataLoader takes it."""

    def __init__(self, load: Load) -> None:
        from torchvision import transforms as t

        self.files, size = [load.folder / path for path in load.paths], (load.size, load.size)
        turn = t.RandomRotation(ROTATE_DEG, t.InterpolationMode.BILINEAR)
        self.transform = t.Compose([t.Resize(size), t.RandomHorizontalFlip(), turn, t.PILToTensor()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> Any:
        from PIL import Image

        with Image.open(self.files[place]) as image:
            return self.transform(image.convert("L"))  # uint8 (1, S, S)


def data_loader(load: Load) -> Epochs:
    return _loaded(load, _Files(load), batch_size=load.batch, shuffle=True, drop_last=True)


def webdataset(tars: list[str], load: Load) -> Epochs:
    import torch
    import webdataset
    from torchvision.transforms import InterpolationMode, v2

    augment = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomRotation(ROTATE_DEG, InterpolationMode.BILINEAR)])
    resize = v2.Compose([v2.PILToTensor(), v2.Resize((load.size, load.size))])

    def image(sample: dict[str, Any]) -> torch.Tensor:
        if "npy" in sample:
            return augment(torch.from_numpy(sample["npy"])[None])  # uint8 (1, S, S)
        return augment(resize(next(value for key, value in sample.items() if not key.startswith("_"))))

    # Every worker reads all tars: with fewer tars than workers, none is to stand idle.
    samples = webdataset.WebDataset(tars, shardshuffle=False, workersplitter=None).shuffle(100).decode("pill")
    return _loaded(
        load, samples.map(image).batched(load.batch, collation_fn=torch.stack, partial=False), batch_size=None
    )


def _loaded(load: Load, samples: Any, **how: Any) -> Epochs:
    from torch.utils.data import DataLoader

    place = device()
    how |= {"multiprocessing_context": "fork", "persistent_workers": True, "pin_memory": place.type == "cuda"}
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores: that is tried
    loader = DataLoader(samples, num_workers=load.workers, **how)
    return lambda: (batch.to(place, non_blocking=True) for batch in loader)


def dali_reader(tars: list[str], load: Load) -> Epochs:
    """As DALI's guide has it; batches are handed over as our own `dali` backend does, which is quicker than its iterator."""
    import torch
    from nvidia.dali.plugin.pytorch import feed_ndarray

    place, side = device(), load.size
    on_gpu = place.type == "cuda"
    how = {"batch_size": load.batch, "num_threads": load.workers, "device_id": 0 if on_gpu else None}
    pipe = _reader(tars, side, on_gpu, prefetch_queue_depth=2, **how)
    pipe.build()
    steps = pipe.epoch_size("samples") // load.batch

    def batch() -> Any:
        (pixels,) = pipe.run()
        image = torch.empty((load.batch, side, side, 1), dtype=torch.uint8, device=place)
        feed_ndarray(pixels.as_tensor(), image, cuda_stream=torch.cuda.current_stream(place) if on_gpu else None)
        return image.view(load.batch, 1, side, side)

    return lambda: (batch() for _ in range(steps))


def _reader(tars: list[str], side: int, on_gpu: bool, **how: Any) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    from mura_dist.data.shards.reader import read_index

    indexes = [str(Path(tar).with_suffix(".idx")) for tar in tars]
    image, *_ = read_index(Path(indexes[0]))[0]
    header_bytes = image.size - side**2 if image.suffix == "npy" else 0

    @pipeline_def  # type: ignore[untyped-decorator]
    def graph() -> Any:
        how: dict[str, Any] = {"random_shuffle": True, "initial_fill": 100, "name": "samples"}
        data: Any = fn.readers.webdataset(paths=tars, index_paths=indexes, ext=[image.suffix], **how)
        if header_bytes:
            pixels = fn.reshape(data[header_bytes:], shape=[side, side, 1], layout="HWC")
            pixels = pixels.gpu() if on_gpu else pixels
        else:
            pixels = fn.decoders.image(data, device="mixed" if on_gpu else "cpu", output_type=types.GRAY)
        angle, flip = fn.random.uniform(range=(-ROTATE_DEG, ROTATE_DEG)), fn.random.coin_flip()
        turned = fn.rotate(pixels, angle=angle, keep_size=True, fill_value=0, interp_type=types.INTERP_LINEAR)
        return fn.flip(turned, horizontal=flip)

    return graph(**how)
