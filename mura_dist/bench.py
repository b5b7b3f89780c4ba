"""`mura-dist bench WHAT`: how fast it is, side by side with what a user would use instead.

    radiographs (--data, or phantoms), as links, as many as wanted -> contenders of WHAT, each in a process of its own
    -> once to warm up -> rounds: each works some seconds, in turn -> images/s; ratios of the same round, ours over theirs

A process each: DeepSpeed starts once in a process, and no library's threads, allocator or settings touch another's. One
works at a time, A B A B, so what else the machine does falls on all.
"""

import contextlib
import itertools
import os
import platform
import shlex
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import config, order, phantoms, radiograph, workers
from .card import Card, TrainedOn
from .convert import convert
from .manifest import scan
from .refusal import Failure, Refusal
from .shards import Shards

BATCH, ROTATE_DEG = 8, 30  # the paper's
# WHAT -> size and radiographs by default: one to two minutes on two cores. The paper's 320 px, but for training on a CPU.
DEFAULTS = {"shards": (320, 2000), "pipeline": (320, 400), "train": (160, 32), "predict": (320, 48)}
_MAX_PHANTOMS, _VIEWS_PER_STUDY = 400, 2.4
_ENOUGH = 2048  # images of a turn of the fast pipelines: starting their threads is not what is measured


@dataclass(frozen=True)
class Options:
    """What is worked on. `data`: a folder in MURA's layout, None: phantoms; size and radiographs None: DEFAULTS."""

    data: Path | None = None
    size: int | None = None
    radiographs: int | None = None
    rounds: int = 5
    workers: int = 2
    seconds: float = 2.0  # the least a contender's turn takes
    architecture: str = "densenet169"


@dataclass(frozen=True)
class Load:
    """`folder`, in MURA's layout, holds `paths` (relative to it) and nothing else; `scratch` is for what a bench prepares."""

    folder: Path
    scratch: Path
    paths: list[str]
    size: int
    workers: int
    architecture: str

    def pixels(self) -> list[np.ndarray]:
        """Whole batches, uint8 (8, 1, S, S) each."""
        images = [radiograph.read(self.folder / path, self.size) for path in self.paths]
        return [np.stack(images[i : i + BATCH])[:, None] for i in range(0, len(images) - BATCH + 1, BATCH)]


Work = Callable[[Path], int]
"""Does the work once, writing (if at all) into the empty folder it is given; returns how many images it did."""


@dataclass(frozen=True)
class Contender:
    """`build(load)` is called in the contender's process and returns what is measured there."""

    name: str
    build: Callable[[Load], Work]
    ours: bool = False


def run(what: str, say: Callable[[str], None], options: Options | None = None) -> dict[str, Any]:
    """Measure `what`; `say` hears a line for each contender and round, and of phantoms that are drawn.

    Returns what, command, hardware, versions, workload, rounds, contenders (each: name, ours, num_images, images_per_s
    {median, min, max}) and ratios {"ours / theirs": {median, min, max}}. Raises Refusal for another `what` and for a
    folder that does not serve, Failure where a contender dies.
    """
    if what not in _BENCHES:
        raise Refusal(f"bench {what!r}{config.nearest(what, _BENCHES)}: must be one of {', '.join(_BENCHES)}")
    options = options or Options()
    measured = {"what": what, "command": _command(what, options), "hardware": _hardware(), "versions": _versions()}
    with tempfile.TemporaryDirectory(prefix="mura-dist-bench-") as scratch:
        if options.data is None:
            say("drawing phantoms")
        load = _load(what, options, Path(scratch))
        measured["workload"] = {
            "data": str(options.data or "phantoms"),
            "radiographs": len(load.paths),
            "size_px": load.size,
            "batch": BATCH,
            "workers": load.workers,
            "architecture": load.architecture,
        }
        return measured | _play(_BENCHES[what](load), load, options, say)


def table(measured: dict[str, Any]) -> str:
    """What `run` returned, to read."""
    columns, about = ("median", "min", "max"), ("workload", "hardware", "versions")
    rates = {one["name"]: one["images_per_s"] | {"images": one["num_images"]} for one in measured["contenders"]}
    width = max(map(len, (*rates, *measured["ratios"])))

    def lines(title: str, rows: dict[str, dict[str, float]], names: Sequence[str]) -> list[str]:
        cells = {key: [f"{row[name]:.{0 if name == 'images' else 2}f}" for name in names] for key, row in rows.items()}
        cells = {title: list(names)} | cells
        return ["", *(key.ljust(width) + "".join(f"{cell:>10}" for cell in row) for key, row in cells.items())]

    return "\n".join(
        [
            measured["command"],
            *(", ".join(f"{k} {v}" for k, v in measured[part].items()) for part in about),
            *lines("images/s", rates, (*columns, "images")),
            *lines("times as fast", measured["ratios"], columns),
        ]
    )


def _command(what: str, options: Options) -> str:
    given = [(name, value) for name, value in asdict(options).items() if value != getattr(Options(), name)]
    return " ".join(["mura-dist bench", what, *(f"--{name} {shlex.quote(str(value))}" for name, value in given)])


def _versions() -> dict[str, str]:
    from .runs import environment

    here, theirs = environment(), ("pillow", "webdataset")
    known = {name: here[name] for name in ("mura_dist", "python")} | here["versions"]
    return known | {name: metadata.version(name) for name in theirs}


def _hardware() -> dict[str, Any]:
    """The machine, and how busy it was before: on a shared one, the work of others is in the numbers."""
    import torch

    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": next(iter(names), platform.machine()),
        "processors": workers.processors(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _load(what: str, options: Options, scratch: Path) -> Load:
    """Link as many radiographs as wanted: evenly over the folder, or all, again and again, under other patients' names."""
    size, number = options.size or DEFAULTS[what][0], options.radiographs or DEFAULTS[what][1]
    source, folder = options.data or scratch / "phantoms", scratch / "radiographs"
    if options.data is None:
        studies = round(min(number, _MAX_PHANTOMS) / _VIEWS_PER_STUDY)
        phantoms.draw(source, studies=max(phantoms.MIN_STUDIES, studies))
    scanned = scan(source)
    known = list(zip(scanned.manifest.frame["path"], scanned.manifest.frame["patient"], strict=True))
    taken = [known[place * len(known) // number] for place in range(number)] if number < len(known) else known
    usable = [(path, patient) for path, patient in taken if _everyone_reads(scanned.root / path)]
    if not usable:
        raise Refusal(f"--data {source}: none of its files is a sound PNG or JPEG; give a folder that has some")
    paths = []
    for place in range(number):
        copy, (path, patient) = place // len(usable), usable[place % len(usable)]
        paths.append(path.replace(f"/{patient}/", f"/{patient}x{copy}/", 1) if copy else path)
        (folder / paths[-1]).parent.mkdir(parents=True, exist_ok=True)
        (folder / paths[-1]).symlink_to((scanned.root / path).resolve())
    return Load(folder, scratch, paths, size, options.workers, options.architecture)


def _everyone_reads(path: Path) -> bool:
    """Also the contenders that have only Pillow."""
    try:
        radiograph.read(path, 32)
    except radiograph.Unreadable:
        return False
    return path.suffix.lower() in (".png", ".jpg", ".jpeg")


def _play(contenders: list[Contender], load: Load, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    images: dict[str, list[int]] = {contender.name: [] for contender in contenders}
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    try:
        with contextlib.ExitStack() as stack:
            pools = {contender.name: stack.enter_context(workers.start(1)) for contender in contenders}
            for ready in [pools[contender.name].submit(_prepare, contender, load) for contender in contenders]:
                ready.result()
            for number, (name, pool) in itertools.product(range(1, options.rounds + 1), pools.items()):
                num_images, seconds = pool.submit(_measure, options.seconds, load.scratch).result()
                images[name].append(num_images)
                rates[name].append(num_images / seconds)
                say(f"round {number} of {options.rounds}: {name}: {rates[name][-1]:.2f} images/s")
    except BrokenProcessPool as error:
        raise Failure("a contender's process died, perhaps out of memory; give fewer --radiographs") from error
    results = [
        {"name": c.name, "ours": c.ours, "num_images": sum(images[c.name]), "images_per_s": _spread(rates[c.name])}
        for c in contenders
    ]
    pairs = [(a.name, b.name) for a in contenders if a.ours for b in contenders if not b.ours]
    ratios = {f"{a} / {b}": _spread([x / y for x, y in zip(rates[a], rates[b], strict=True)]) for a, b in pairs}
    return {"rounds": options.rounds, "contenders": results, "ratios": ratios}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


_work: Work  # in a contender's process: its own
_process = contextlib.ExitStack()  # and what stays open as long as that


def _prepare(contender: Contender, load: Load) -> None:
    global _work
    os.dup2(2, 1)  # stdout is for the result; DeepSpeed, for one, greets there
    _work = contender.build(load)
    _measure(0, load.scratch)  # files get into the cache, kernels are chosen


def _measure(seconds: float, scratch: Path) -> tuple[int, float]:
    """(images, seconds) of as many whole works as fill `seconds`; making and removing their folders is not timed."""
    num_images, taken = 0, 0.0
    while not num_images or taken < seconds:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            started = time.perf_counter()
            num_images += _work(Path(folder))
            taken += time.perf_counter() - started
    return num_images, taken


# shards: a whole conversion, against processes that only decode and resize the same files.


def _shards(load: Load) -> list[Contender]:
    return [
        Contender("mura-dist shards (raw)", _conversion, ours=True),
        Contender("decode and resize only", _reading),
    ]


def _conversion(load: Load) -> Work:
    def work(out: Path) -> int:
        convert(load.folder, out / "shards", size=load.size, workers=load.workers)
        return len(load.paths)

    return work


def _reading(load: Load) -> Work:
    def work(out: Path) -> int:
        with workers.start(load.workers) as pool:  # processes that start count on both sides
            return sum(pool.map(partial(_read, load.folder, load.size), load.paths, chunksize=8))

    return work


def _read(folder: Path, size: int, path: str) -> int:
    radiograph.read(folder / path, size)
    return 1


# pipeline: augmented batches uint8 (8, 1, S, S) on the device. From shards, resized once; or from files, resized each time.


def _pipeline(load: Load) -> list[Contender]:
    folder = load.scratch / "shards"
    convert(load.folder, folder, size=load.size, workers=load.workers)
    files = load.scratch / "files.tar"
    with tarfile.open(files, "w", dereference=True) as tar:
        for number, path in enumerate(load.paths):
            tar.add(load.folder / path, f"{number:09d}{Path(path).suffix.lower()}")
    ours = [str(folder / name) for name in Shards.open(folder).names()]
    return [
        Contender("mura-dist, cpu backend", partial(_batches, folder, "cpu"), ours=True),
        Contender("mura-dist, dali backend", partial(_batches, folder, "dali"), ours=True),
        Contender("DataLoader + Pillow + torchvision, files", _data_loader),
        Contender("webdataset + torchvision v2, files in a tar", partial(_webdataset, [str(files)])),
        Contender("webdataset + torchvision v2, our shards", partial(_webdataset, ours)),
    ]


def _batches(folder: Path, backend: str, load: Load) -> Work:
    from .pipeline import Targets, batches

    shards, device = Shards.open(folder), _device()
    targets, epochs = Targets.of(shards, weighted=False), itertools.count()
    rows = np.concatenate([shards.rows(name) for name, part in shards.index["splits"].items() if part["shards"]])
    steps = range(order.steps_per_epoch(len(rows), BATCH))

    def work(out: Path) -> int:
        micros: list[order.Micro] = []
        while len(micros) * BATCH < min(_ENOUGH, 16 * len(rows)):
            epoch = order.epoch_order(rows, 0, next(epochs), rotate_deg=ROTATE_DEG, flip=True)
            alone = {"global_batch": BATCH, "micro_batch": BATCH, "rank": 0, "world_size": 1}
            micros += [micro for step in steps for micro in order.step_micros(epoch, step, **alone)]
        made = batches(shards, targets, micros, backend=backend, device=device, workers=load.workers)
        return _count(load.size, (batch.image for batch in made))

    return work


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
        with Image.open(self.files[place]) as image:
            return self.transform(image.convert("L"))  # uint8 (1, S, S)


def _data_loader(load: Load) -> Work:
    return _loaded(load, _Files(load), batch_size=BATCH, shuffle=True, drop_last=True)


def _webdataset(tars: list[str], load: Load) -> Work:
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
    return _loaded(load, samples.map(image).batched(BATCH, collation_fn=torch.stack, partial=False), batch_size=None)


def _loaded(load: Load, samples: Any, **how: Any) -> Work:
    from torch.utils.data import DataLoader

    device = _device()
    how |= {"multiprocessing_context": "fork", "persistent_workers": True, "pin_memory": device.type == "cuda"}
    loader = DataLoader(samples, num_workers=load.workers, **how)
    return lambda out: _count(load.size, (batch.to(device, non_blocking=True) for batch in loader))


def _device() -> Any:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _count(size: int, images: Iterable[Any]) -> int:
    """How many, once all of them are on the device; the same kind of them from every contender."""
    import torch

    number = 0
    for batch in images:
        assert (batch.dtype, batch.shape[1:]) == (torch.uint8, (1, size, size)), (batch.dtype, batch.shape)
        number += len(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return number


# train: steps on pixels in memory, against the loop one would write first, with and without autocast.


def _train(load: Load) -> list[Contender]:
    return [
        Contender("mura-dist Engine, fp32", partial(_engine, "fp32"), ours=True),
        Contender("bare torch loop, fp32", partial(_bare, "fp32")),
        Contender("mura-dist Engine, bf16", partial(_engine, "bf16"), ours=True),
        Contender("bare torch loop, bf16 autocast", partial(_bare, "bf16")),
    ]


def _labels() -> Any:
    """Both classes, float32 (8,)."""
    import torch

    return torch.arange(BATCH, device=_device()) % 2.0


def _engine(precision: str, load: Load) -> Work:
    import torch

    from . import model, world
    from .engine import Engine
    from .pipeline import Batch

    values = {"shards": "", "run": "", "architecture": load.architecture, "precision": precision}
    settings = config.check(values | {"global_batch": BATCH, "micro_batch": BATCH}, "bench")
    ranks = _process.enter_context(world.join(settings.timeout_s))
    engine, ones = Engine(model.build(load.architecture), settings, ranks), torch.ones(BATCH, device=_device())
    images = [torch.from_numpy(batch).to(ranks.device) for batch in load.pixels()]
    batches = itertools.cycle([Batch(image, _labels(), ones, ones.long(), ones.bool()) for image in images])

    def work(out: Path) -> int:
        assert np.isfinite(engine.step([next(batches)], settings.learning_rate).loss)
        return BATCH

    return work


def _densenet(architecture: str) -> Any:
    """torchvision's own, with one logit, as a user would build it."""
    from torchvision.models.densenet import DenseNet

    from .model import ARCHITECTURES

    return DenseNet(*ARCHITECTURES[architecture], num_classes=1).to(_device())


def _bare(precision: str, load: Load) -> Work:
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits
    from torchvision.transforms.functional import normalize

    from .model import IMAGENET_DEVIATION, IMAGENET_MEAN

    network, device, label = _densenet(load.architecture).train(), _device(), _labels()
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4)
    grey = [torch.from_numpy(batch).expand(-1, 3, -1, -1) / 255 for batch in load.pixels()]  # (8, 3, S, S) float32
    images = itertools.cycle([normalize(image, IMAGENET_MEAN, IMAGENET_DEVIATION).to(device) for image in grey])

    def work(out: Path) -> int:
        optimiser.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logit = network(next(images))[:, 0]
        loss = binary_cross_entropy_with_logits(logit.float(), label)
        loss.backward()
        optimiser.step()
        assert np.isfinite(loss.item())  # as one logs it; on a GPU it waits for the step
        return BATCH

    return work


# predict: files to tables, against the model alone on pixels in memory, and a script that goes one by one. Random weights.


def _predict(load: Load) -> list[Contender]:
    from . import export, model

    trained_on = TrainedOn(kind="phantoms", manifest_sha256="", num_radiographs=0)
    facts: dict[str, Any] = {
        "study_types": [],
        "trained_on": trained_on,
        "selected_on": "tune",
        "recipe": {},
        "checkpoint": "none",
    }
    path = load.scratch / "model.onnx"
    path.write_bytes(export.graph(model.build(load.architecture).eval(), Card(size=load.size, **facts)))
    return [
        Contender("mura-dist predict, files to tables", partial(_files_to_tables, path), ours=True),
        Contender("ONNX Runtime alone, pixels in memory", partial(_runtime_alone, path)),
        Contender("torch eager, one by one, Pillow", partial(_one_by_one, 0)),
        # On a busy machine torch's threads spend their time waiting for one another: its better side counts too.
        Contender("torch eager, one by one, Pillow, one thread", partial(_one_by_one, 1)),
    ]


def _provider() -> str:
    return "cuda" if _device().type == "cuda" else "cpu"


def _files_to_tables(model: Path, load: Load) -> Work:
    from .predict import predict

    options: dict[str, Any] = {"provider": _provider(), "workers": load.workers}
    return lambda out: predict(model, load.folder, out / "predicted", **options)["num_radiographs"]


def _runtime_alone(path: Path, load: Load) -> Work:
    from .predict import Model

    model, batches = Model.load(path, _provider()), load.pixels()
    return lambda out: sum(len(model.logits(batch)) for batch in batches)


def _one_by_one(threads: int, load: Load) -> Work:
    """threads: 0 as many as torch takes by itself."""
    import torch
    from torchvision import transforms as t

    from .model import IMAGENET_DEVIATION, IMAGENET_MEAN

    torch.set_num_threads(threads or torch.get_num_threads())
    network, device, size = _densenet(load.architecture).eval(), _device(), (load.size, load.size)
    transform = t.Compose([t.Resize(size), t.ToTensor(), t.Normalize(IMAGENET_MEAN, IMAGENET_DEVIATION)])

    @torch.inference_mode()
    def probability(path: Path) -> float:
        with Image.open(path) as image:
            pixels = transform(image.convert("RGB"))[None].to(device)  # (1, 3, S, S) float32
        return torch.sigmoid(network(pixels)).item()

    return lambda out: len([probability(load.folder / path) for path in load.paths])


_BENCHES = {"shards": _shards, "pipeline": _pipeline, "train": _train, "predict": _predict}
