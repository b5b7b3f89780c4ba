"""bench predict: files to tables, against the model alone on pixels in memory, and a script that goes one by one.

Random weights: their values cost the same.
"""

from functools import partial
from pathlib import Path
from typing import Any

from .clock import Contender, Work
from .streams import device
from .training import their_network
from .workload import Load


def contenders(load: Load) -> list[Contender]:
    from .. import export, model
    from ..card import Card, TrainedOn

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


def provider() -> str:
    return "cuda" if device().type == "cuda" else "cpu"


def _files_to_tables(model: Path, load: Load) -> Work:
    from ..predict import predict

    options: dict[str, Any] = {"provider": provider(), "workers": load.workers}

    def work(out: Path) -> int:
        summary = predict(model, load.folder, out / "predicted", **options)
        assert summary is not None
        return summary["num_radiographs"]

    return work


def _runtime_alone(path: Path, load: Load) -> Work:
    from ..runtime import Model

    model, batches = Model.load(path, provider()), load.pixels()
    return lambda out: sum(len(model.logits(batch)) for batch in batches)


def _one_by_one(threads: int, load: Load) -> Work:
    """threads: 0 as many as torch takes by itself."""
    import torch
    from PIL import Image
    from torchvision import transforms as t

    from ..model import IMAGENET_DEVIATION, IMAGENET_MEAN

    torch.set_num_threads(threads or torch.get_num_threads())
    network, place, size = their_network(load.architecture).eval(), device(), (load.size, load.size)
    transform = t.Compose([t.Resize(size), t.ToTensor(), t.Normalize(IMAGENET_MEAN, IMAGENET_DEVIATION)])

    @torch.inference_mode()
    def probability(path: Path) -> float:
        with Image.open(path) as image:
            pixels = transform(image.convert("RGB"))[None].to(place)  # (1, 3, S, S) float32
        return torch.sigmoid(network(pixels)).item()

    return lambda out: len([probability(load.folder / path) for path in load.paths])
