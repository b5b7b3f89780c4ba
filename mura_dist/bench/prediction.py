"""bench predict: `mura-dist predict` and its ONNX files, compared with simple scripts and with torch's export.

    files    `mura-dist predict` with the fp32 file, and on a CPU with the int8 file, also in OpenVINO if installed; each compared
             with the same file on pixels in memory, and with eager torch on one radiograph at a time, read by Pillow
    pixels   the ONNX files on pixels in memory, compared with torch's export of torchvision's network with the same weights
    ceiling  on a CPU: the speed of `mura-dist predict` if it only decoded, ran the gate and computed the model

The time begins when the model is compiled and loaded, on both sides. The weights are random, which does not affect speed.
`mura-dist export --precision int8` measures the effect of int8.
"""

import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mura_dist.bench.clock import Contender, Timed, Work
from mura_dist.bench.streams import device
from mura_dist.bench.training import torchvision_densenet
from mura_dist.bench.workload import Load, Options

_FILES, _PIXELS = "mura-dist predict, files to tables", "pixels, our file"
_NUM_CALIBRATION = 16  # radiographs
_NUM_PIXELS, _NUM_SLOW = 256, 32  # distinct radiographs in memory; radiographs of a peer that reads one by one


def contenders(load: Load) -> list[Contender]:
    """Return the contenders; exports the models first."""
    from mura_dist.inference.engine_onnxruntime import import_onnxruntime

    import_onnxruntime()  # raises UserError before the exports, which take a minute
    stock, files = load.scratch / "stock.onnx", _model_files(load)
    int8 = next((path for name, (path, _) in files.items() if name == "int8"), None)
    _export(load, files["fp32"][0], stock, int8)
    return [
        *(
            Contender(
                f"{_FILES}, {name}",
                partial(_files_to_tables, *file),
                is_own=True,
                baseline=f"{_PIXELS}, {name}",
            )
            for name, file in files.items()
        ),
        Contender("torch eager, one by one, Pillow", partial(_one_by_one, 0)),
        # On a busy machine torch's threads wait for one another, so the single-threaded rate is measured too.
        Contender("torch eager, one by one, Pillow, one thread", partial(_one_by_one, 1)),
        *(
            Contender(f"{_PIXELS}, {name}", partial(_model_only, *file), is_own=True, family="pixels")
            for name, file in files.items()
        ),
        Contender("pixels, torch's export, ONNX Runtime", partial(_stock, stock), family="pixels"),
    ]


def _model_files(load: Load) -> dict[str, tuple[Path, str]]:
    """Return the path and the provider of each model, by its name in the results."""
    files = {"fp32": (load.scratch / "model.onnx", provider())}
    if provider() == "cpu":
        files["int8"] = load.scratch / "int8.onnx", "cpu"
        if importlib.util.find_spec("openvino") is not None:
            files["int8, OpenVINO"] = load.scratch / "int8.onnx", "openvino"
    return files


def more(load: Load, options: Options, results: dict[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """Return `ceilings`, one for each model on a CPU.

    Each has name, decode_ms, gate_ms and model_ms (processor time per radiograph), ceiling = model / (decode + gate + model), the
    measured ratio of files to pixels, and share = ratio / ceiling.
    """
    if provider() != "cpu":
        return {"ceilings": []}
    ceilings = []
    for name, file in _model_files(load).items():
        parts = [(*_measure_reading(load), _measure_model(load, *file)) for _ in range(options.rounds)]
        decode_ms, gate_ms, model_ms = (statistics.median(values) for values in zip(*parts, strict=True))
        ceiling = model_ms / (decode_ms + gate_ms + model_ms)
        ratio = results["ratios"][f"{_FILES}, {name} / {_PIXELS}, {name}"]["median"]
        milliseconds = {"decode_ms": decode_ms, "gate_ms": gate_ms, "model_ms": model_ms}
        ceilings.append({"name": name} | milliseconds | {"ceiling": ceiling, "ratio": ratio, "share": ratio / ceiling})
    return {"ceilings": ceilings}


def _measure_reading(load: Load) -> tuple[float, float]:
    """Return the processor time in ms of decoding a radiograph, and of its gate. They alternate, as in a prediction."""
    from mura_dist.data import gate, radiograph

    clocks = [[time.process_time()]]
    for path in load.paths[:_NUM_PIXELS]:
        details = radiograph.read_details(load.folder / path, load.size)
        decoded = time.process_time()
        gate.classify(details.image, details.colors)
        clocks.append([decoded, time.process_time()])
    decode_s = sum(decoded - previous[-1] for previous, (decoded, _) in itertools.pairwise(clocks))
    gate_s = sum(end - decoded for decoded, end in clocks[1:])
    return decode_s * 1000 / (len(clocks) - 1), gate_s * 1000 / (len(clocks) - 1)


def _measure_model(load: Load, path: Path, provider: str) -> float:
    """Return the processor time in ms of computing a radiograph, of all threads together."""
    work = _model_only(path, provider, replace(load, paths=load.paths[:_NUM_PIXELS]))
    work(load.scratch)  # warm-up
    start = time.process_time()
    num_images = work(load.scratch)
    assert isinstance(num_images, int)
    return (time.process_time() - start) * 1000 / num_images


def _export(load: Load, fp32: Path, stock: Path, int8: Path | None) -> None:
    """Export the same weights as this package's fp32 and int8 files, and by torch from torchvision's network."""
    import torch

    from mura_dist.inference.export import int8 as int8_export
    from mura_dist.inference.export import onnx
    from mura_dist.models import densenet as model
    from mura_dist.models.card import Card, TrainedOn

    trained_on = TrainedOn(kind="phantoms", manifest_sha256="", num_radiographs=0)
    metadata: dict[str, Any] = {"size": load.size, "study_types": [], "trained_on": trained_on, "selected_on": "tune"}
    card = Card(**metadata, recipe={}, checkpoint="none")
    network = model.build(load.architecture).eval()
    fp32.write_bytes(onnx.build_onnx(network, card))
    torchvision_network = torchvision_densenet(load.architecture).eval()
    torchvision_network.load_state_dict(network.state_dict())
    with onnx.quiet():
        program = torch.onnx.export(
            torchvision_network,
            (torch.zeros(2, 3, load.size, load.size),),
            dynamo=True,
            input_names=["x"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    stock.write_bytes(program.model_proto.SerializeToString())
    if int8 is not None:
        images = np.concatenate(load.pixels(_NUM_CALIBRATION))
        int8_card = card.model_copy(update={"precision": "int8"})
        int8.write_bytes(onnx.finalize(int8_export.build_int8_graph(network, images), int8_card))


def provider() -> str:
    """Return the ONNX execution provider of this machine: cuda or cpu."""
    return "cuda" if device().type == "cuda" else "cpu"


def _files_to_tables(model: Path, provider: str, load: Load) -> Work:
    from mura_dist.inference.predict import PredictOptions, predict

    options = PredictOptions(provider=provider, workers=load.workers)

    def work(out: Path) -> Timed:
        summary = predict(model, load.folder, out / "predicted", options)
        assert summary is not None
        return Timed(summary["num_radiographs"], summary["loading_s"])

    return work


def _model_only(path: Path, provider: str, load: Load) -> Work:
    from mura_dist.inference.engine import pipelined_config
    from mura_dist.inference.onnx_model import OnnxModel

    model, images = OnnxModel.load(path, provider, pipelined_config()), np.concatenate(load.pixels(_NUM_PIXELS))
    batch_size = model.session_config.batch_size or 1
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]

    def work(out: Path) -> int:
        num_batches = -(-len(load.paths) // batch_size)
        repeated = itertools.islice(itertools.cycle(batches), num_batches)
        return sum(len(logit) for (logit,) in model.stream(repeated))

    return work


def _stock(path: Path, load: Load) -> Work:
    """Run torch's export with ONNX Runtime's default options, on normalized float pixels."""
    import onnxruntime

    from mura_dist.models.densenet import IMAGENET_MEAN, IMAGENET_STD

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = ["CUDAExecutionProvider" if provider() == "cuda" else "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    batches = [(np.repeat(batch, 3, axis=1) / np.float32(255) - mean) / std for batch in load.pixels(_NUM_PIXELS)]
    return lambda out: sum(len(session.run(None, {"x": batch})[0]) for batch in batches)


def _one_by_one(threads: int, load: Load) -> Work:
    """Run eager torch on one file at a time. threads: 0 for torch's default."""
    import torch
    from PIL import Image
    from torchvision import transforms as t

    from mura_dist.models.densenet import IMAGENET_MEAN, IMAGENET_STD

    torch.set_num_threads(threads or torch.get_num_threads())
    network, target, size = torchvision_densenet(load.architecture).eval(), device(), (load.size, load.size)
    transform = t.Compose([t.Resize(size), t.ToTensor(), t.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    @torch.inference_mode()
    def probability(path: Path) -> float:
        with Image.open(path) as image:
            pixels = transform(image.convert("RGB"))[None].to(target)  # (1, 3, S, S) float32
        return torch.sigmoid(network(pixels)).item()

    return lambda out: len([probability(load.folder / path) for path in load.paths[:_NUM_SLOW]])
