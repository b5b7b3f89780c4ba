"""bench predict: files to tables against the model alone and a script that goes one by one; our files against torch's export.

files    `mura-dist predict` on the fp32 file, and on a CPU the int8 file, also in OpenVINO where that is installed
         against the fp32 file alone on pixels in memory, and torch in eager mode, one radiograph at a time, read by Pillow
pixels   our files alone on pixels in memory, against torch's own export of torchvision's network of the same weights

Random weights: their values cost the same. Nothing is said here of what int8 changes: `mura-dist export --precision int8` does.
"""

import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mura_dist.bench.clock import Contender, Work
from mura_dist.bench.streams import device
from mura_dist.bench.training import their_network
from mura_dist.bench.workload import Load

_CALIBRATED = 16  # radiographs


def contenders(load: Load) -> list[Contender]:
    from mura_dist.inference.engine_onnxruntime import import_onnxruntime

    import_onnxruntime()  # or a UserError, before the minute of the exports
    fp32, stock = load.scratch / "model.onnx", load.scratch / "stock.onnx"
    files = {("fp32", provider()): fp32}
    if provider() == "cpu":
        files[("int8", "cpu")] = load.scratch / "int8.onnx"
        if importlib.util.find_spec("openvino") is not None:
            files[("int8", "openvino")] = load.scratch / "int8.onnx"
    _export(load, fp32, stock, load.scratch / "int8.onnx" if len(files) > 1 else None)
    names = {key: f"{key[0]}, OpenVINO" if key[1] == "openvino" else key[0] for key in files}
    return [
        *(
            Contender(
                f"mura-dist predict, files to tables, {names[key]}", partial(_files_to_tables, path, key[1]), ours=True
            )
            for key, path in files.items()
        ),
        Contender("the fp32 file alone, pixels in memory", partial(_alone, fp32, provider())),
        Contender("torch eager, one by one, Pillow", partial(_one_by_one, 0)),
        # On a busy machine torch's threads spend their time waiting for one another: its better side counts too.
        Contender("torch eager, one by one, Pillow, one thread", partial(_one_by_one, 1)),
        *(
            Contender(f"pixels, our file, {names[key]}", partial(_alone, path, key[1]), ours=True, family="pixels")
            for key, path in files.items()
        ),
        Contender("pixels, torch's export, ONNX Runtime", partial(_stock, stock), family="pixels"),
    ]


def _export(load: Load, fp32: Path, stock: Path, int8: Path | None) -> None:
    """The same weights as our file, as torch's own export of torchvision's network, and in integers."""
    import torch

    from mura_dist.inference.export import int8 as quantise
    from mura_dist.inference.export import onnx
    from mura_dist.models import densenet as model
    from mura_dist.models.card import Card, TrainedOn

    trained_on = TrainedOn(kind="phantoms", manifest_sha256="", num_radiographs=0)
    facts: dict[str, Any] = {"size": load.size, "study_types": [], "trained_on": trained_on, "selected_on": "tune"}
    card = Card(**facts, recipe={}, checkpoint="none")
    network = model.build(load.architecture).eval()
    fp32.write_bytes(onnx.build_onnx(network, card))
    theirs = their_network(load.architecture).eval()
    theirs.load_state_dict(network.state_dict())
    with onnx.quiet():
        program = torch.onnx.export(
            theirs,
            (torch.zeros(2, 3, load.size, load.size),),
            dynamo=True,
            input_names=["x"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    stock.write_bytes(program.model_proto.SerializeToString())
    if int8 is not None:
        images = np.concatenate(load.pixels())[:_CALIBRATED]
        narrow = card.model_copy(update={"precision": "int8"})
        int8.write_bytes(onnx.finalize(quantise.build_int8_graph(network, images), narrow))


def provider() -> str:
    return "cuda" if device().type == "cuda" else "cpu"


def _files_to_tables(model: Path, provider: str, load: Load) -> Work:
    from mura_dist.inference.predict import PredictOptions, predict

    options = PredictOptions(provider=provider, workers=load.workers)

    def work(out: Path) -> int:
        summary = predict(model, load.folder, out / "predicted", options)
        assert summary is not None
        return int(summary["num_radiographs"])

    return work


def _alone(path: Path, provider: str, load: Load) -> Work:
    from mura_dist.inference.engine import pipelined_config
    from mura_dist.inference.onnx_model import OnnxModel

    model, images = OnnxModel.load(path, provider, pipelined_config()), np.concatenate(load.pixels())
    return lambda out: sum(len(logit) for (logit,) in model.stream(_cut(images, model.session_config.batch_size or 1)))


def _cut(images: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(images), batch_size):
        yield images[start : start + batch_size]


def _stock(path: Path, load: Load) -> Work:
    """As ONNX Runtime runs it unless told otherwise, float pixels normalised beforehand."""
    import onnxruntime

    from mura_dist.models.densenet import IMAGENET_MEAN, IMAGENET_STD

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = ["CUDAExecutionProvider" if provider() == "cuda" else "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    mean, deviation = (np.array(part, np.float32)[:, None, None] for part in (IMAGENET_MEAN, IMAGENET_STD))
    batches = [(np.repeat(batch, 3, axis=1) / np.float32(255) - mean) / deviation for batch in load.pixels()]
    return lambda out: sum(len(session.run(None, {"x": batch})[0]) for batch in batches)


def _one_by_one(threads: int, load: Load) -> Work:
    """threads: 0 as many as torch takes by itself."""
    import torch
    from PIL import Image
    from torchvision import transforms as t

    from mura_dist.models.densenet import IMAGENET_MEAN, IMAGENET_STD

    torch.set_num_threads(threads or torch.get_num_threads())
    network, place, size = their_network(load.architecture).eval(), device(), (load.size, load.size)
    transform = t.Compose([t.Resize(size), t.ToTensor(), t.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    @torch.inference_mode()
    def probability(path: Path) -> float:
        with Image.open(path) as image:
            pixels = transform(image.convert("RGB"))[None].to(place)  # (1, 3, S, S) float32
        return torch.sigmoid(network(pixels)).item()

    return lambda out: len([probability(load.folder / path) for path in load.paths])
