"""Compare models of lower precision with the fp32 model on the same radiographs: AUROC, kappa, calls and probabilities.

python tools/bench/precision.py FP32.onnx OTHER.onnx [OTHER.onnx ...] [--folder FOLDER] [--provider openvino] [--studies 900]

FOLDER is in MURA's layout, and its split `valid` is compared. Without --folder the tool draws phantoms (900 studies, over 2,000
radiographs) with a seed that the demo does not use. The tool reads files as predict does. Each model gets the same pixels. The
first model is the reference, computed by ONNX Runtime on the CPU. --provider computes the other models.

It prints AUROC and kappa of each model, by study, at a threshold of 1/2. Against the reference it prints the difference of both
with its paired 95 % interval (bootstrap over patients), the number of studies whose call changed, and the mean and the largest
change of a radiograph's probability.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mura_dist.data import phantoms, radiograph
from mura_dist.data.source.scan import scan
from mura_dist.inference.engine import pipelined_config
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.metrics import classification
from mura_dist.metrics.comparison import compare_predictions

THRESHOLD, BATCH = 0.5, 64


def read(folder: Path, size: int, split: str | None = None) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the manifest's lines of a folder's split, or of all, and their pixels uint8 (N, 1, size, size)."""
    scanned = scan(folder)
    frame = scanned.manifest.frame
    if split is not None:
        frame = frame[frame["split"] == split]
    return frame, np.stack([radiograph.read(scanned.root / path, size) for path in frame["path"]])[:, None]


def probabilities(model: OnnxModel, images: np.ndarray) -> np.ndarray:
    """Return the probability of each radiograph, float64 (N,)."""
    batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    return classification.sigmoid(np.concatenate([logit for (logit,) in model.stream(batches)]))


def describe_difference(metric: dict[str, Any]) -> str:
    """Describe a metric of compare_predictions: value, difference from the reference, paired interval."""
    interval = "no interval" if metric["low"] is None else f"{metric['low']:+.4f} to {metric['high']:+.4f}"
    return f"{metric['a']:.4f}, {metric['difference']:+.4f} ({interval})"


def main() -> None:
    """Read or draw the radiographs, run each model and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--studies", type=int, default=900)
    parser.add_argument("--px", type=int, default=128)
    parser.add_argument("--seed", type=int, default=777)
    options = parser.parse_args()
    models = [
        OnnxModel.load(path, options.provider if index else "cpu", pipelined_config(BATCH))
        for index, path in enumerate(options.models)
    ]
    if options.folder:
        source = f"valid of {options.folder}"
        frame, images = read(options.folder, models[0].size, "valid")
    else:
        source = f"drawn at {options.px} px with seed {options.seed}"
        with tempfile.TemporaryDirectory() as folder:
            phantoms.draw(Path(folder) / "drawn", studies=options.studies, size=options.px, seed=options.seed)
            frame, images = read(Path(folder) / "drawn", models[0].size)
    rows = frame.index.to_numpy(np.int64)
    views = [probabilities(model, images) for model in models]
    studies = [classification.build_study_table(rows, view, frame) for view in views]
    labels = studies[0]["label"]
    print(f"{len(rows)} radiographs, {len(labels)} studies ({int(labels.sum())} abnormal), {source}")
    for path, model, view, table in zip(options.models, models, views, studies, strict=True):
        comparison = compare_predictions(table, studies[0], threshold=THRESHOLD)["overall"]
        bits = f", {model.card.weight_bits}-bit weights" if model.card.weight_bits else ""
        print(f"{path} ({model.card.precision}{bits}, {model.provider})")
        if model is models[0]:
            print(f"  AUROC {comparison['auroc']['a']:.4f}; kappa {comparison['kappa']['a']:.4f}")
            continue
        difference = np.abs(view - views[0])
        num_calls = ((table["probability"] > THRESHOLD) != (studies[0]["probability"] > THRESHOLD)).sum()
        print(f"  AUROC {describe_difference(comparison['auroc'])}; kappa {describe_difference(comparison['kappa'])}")
        print(
            f"  calls changed: {num_calls} ({num_calls / len(table):.2%}); change of a probability: {difference.mean():.5f} on "
            f"average, {difference.max():.4f} at most"
        )


if __name__ == "__main__":
    main()
