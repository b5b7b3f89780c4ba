"""bench predict: `mura-dist predict` and its ONNX files, compared with simple scripts and with torch's export.

    files    `mura-dist predict` with the fp32 file, and on a CPU with the int8 file, also in OpenVINO if installed; compared with
             the fp32 model on pixels in memory, and with eager torch on one radiograph at a time, read by Pillow
    pixels   the ONNX files on pixels in memory, compared with torch's export of torchvision's network with the same weights

The weights are random, which does not affect speed. `mura-dist export --precision int8` measures the effect of int8.
"""

import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mura_dist.bench.clock import Contender, Work
from mura_dist.bench.streams import device
from mura_dist.bench.training import torchvision_densenet
from mura_dist.bench.workload import Load

_NUM_CALIBRATION = 16  # radiographs


def contenders(load: Load) -> list[Contender]:
    """Return the contenders; exports the models first."""
    from mura_dist.inference.engine_onnxruntime import import_onnxruntime

    import_onnxruntime()  # raises UserError before the exports, which take a minute
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
                f"mura-dist predict, files to tables, {names[key]}",
                partial(_files_to_tables, path, key[1]),
                is_own=True,
            )
            for key, path in files.items()
        ),
        Contender("fp32 file only, pixels in memory", partial(_model_only, fp32, provider())),
        Contender("torch eager, one by one, Pillow", partial(_one_by_one, 0)),
        # On a busy machine torch's threads wait for one another, so the single-threaded rate is measured too.
        Contender("torch eager, one by one, Pillow, one thread", partial(_one_by_one, 1)),
        *(
            Contender(
                f"pixels, our file, {names[key]}", partial(_model_only, path, key[1]), is_own=True, family="pixels"
            )
            for key, path in files.items()
        ),
        Contender("pixels, torch's export, ONNX Runtime", partial(_stock, stock), family="pixels"),
    ]


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
        images = np.concatenate(load.pixels())[:_NUM_CALIBRATION]
        int8_card = card.model_copy(update={"precision": "int8"})
        int8.write_bytes(onnx.finalize(int8_export.build_int8_graph(network, images), int8_card))


def provider() -> str:
    """Return the ONNX execution provider of this machine: cuda or cpu."""
    return "cuda" if device().type == "cuda" else "cpu"


def _files_to_tables(model: Path, provider: str, load: Load) -> Work:
    from mura_dist.inference.predict import PredictOptions, predict

    options = PredictOptions(provider=provider, workers=load.workers)

    def work(out: Path) -> int:
        summary = predict(model, load.folder, out / "predicted", options)
        assert summary is not None
        return int(summary["num_radiographs"])

    return work


def _model_only(path: Path, provider: str, load: Load) -> Work:
    from mura_dist.inference.engine import pipelined_config
    from mura_dist.inference.onnx_model import OnnxModel

    model, images = OnnxModel.load(path, provider, pipelined_config()), np.concatenate(load.pixels())
    return lambda out: sum(
        len(logit) for (logit,) in model.stream(_batches(images, model.session_config.batch_size or 1))
    )


def _batches(images: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(images), batch_size):
        yield images[start : start + batch_size]


def _stock(path: Path, load: Load) -> Work:
    """Run torch's export with ONNX Runtime's default options, on normalized float pixels."""
    import onnxruntime

    from mura_dist.models.densenet import IMAGENET_MEAN, IMAGENET_STD

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = ["CUDAExecutionProvider" if provider() == "cuda" else "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    batches = [(np.repeat(batch, 3, axis=1) / np.float32(255) - mean) / std for batch in load.pixels()]
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

    return lambda out: len([probability(load.folder / path) for path in load.paths])
