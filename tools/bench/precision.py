"""Compare models of lower precision with the fp32 model: probabilities, calls and kappa on new phantoms.

python tools/bench/precision.py FP32.onnx OTHER.onnx [OTHER.onnx ...] [--provider openvino] [--studies 900] [--px 128]

The tool draws phantoms (900 studies, over 2,000 radiographs) with a seed that the demo does not use, and reads them as predict
does. Each model gets the same pixels. The first model is the reference, computed by ONNX Runtime on the CPU. --provider computes
the other models.

It prints AUROC and kappa of each model at a threshold of 1/2. Against the reference it prints the mean and the largest change of
a radiograph's probability, the number of studies whose call changed, and the difference of kappa with its paired interval
(bootstrap over patients).
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from mura_dist.data import phantoms, radiograph
from mura_dist.data.source.scan import scan
from mura_dist.inference.engine import pipelined_config
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.metrics import classification
from mura_dist.metrics.comparison import compare_predictions

THRESHOLD, BATCH = 0.5, 64


def probabilities(model: OnnxModel, images: np.ndarray) -> np.ndarray:
    """Return the probability of each radiograph, float64 (N,)."""
    batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    return classification.sigmoid(np.concatenate([logit for (logit,) in model.stream(batches)]))


def compute_auroc_and_kappa(studies: pd.DataFrame) -> tuple[float, float]:
    """Return AUROC and kappa at THRESHOLD."""
    label, probability = studies["label"].to_numpy(), studies["probability"].to_numpy()
    confusion = classification.compute_confusion(label, probability > THRESHOLD)
    return float(classification.compute_auroc(label, probability)), float(classification.compute_kappa(confusion))


def main() -> None:
    """Draw the phantoms, run each model and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--studies", type=int, default=900)
    parser.add_argument("--px", type=int, default=128)
    parser.add_argument("--seed", type=int, default=777)
    options = parser.parse_args()
    models = [
        OnnxModel.load(path, options.provider if index else "cpu", pipelined_config(BATCH))
        for index, path in enumerate(options.models)
    ]
    with tempfile.TemporaryDirectory() as folder:
        phantoms.draw(Path(folder) / "drawn", studies=options.studies, size=options.px, seed=options.seed)
        scanned = scan(Path(folder) / "drawn")
        frame = scanned.manifest.frame
        images = np.stack([radiograph.read(scanned.root / path, models[0].size) for path in frame["path"]])[:, None]
    rows = frame.index.to_numpy(np.int64)
    views = [probabilities(model, images) for model in models]
    studies = [classification.build_study_table(rows, view, frame) for view in views]
    print(f"{len(rows)} radiographs of {len(studies[0])} studies, drawn at {options.px} px with seed {options.seed}")
    for path, model, view, table in zip(options.models, models, views, studies, strict=True):
        auroc, kappa = compute_auroc_and_kappa(table)
        print(f"{path.name} ({model.card.precision}, {model.provider}): AUROC {auroc:.4f}, kappa {kappa:.4f}")
        if model is not models[0]:
            difference = np.abs(view - views[0])
            calls = ((table["probability"] > THRESHOLD) != (studies[0]["probability"] > THRESHOLD)).sum()
            kappas = compare_predictions(table, studies[0], threshold=THRESHOLD)["overall"]["kappa"]
            print(
                f"  probability: {difference.mean():.5f} on average, {difference.max():.4f} at most; calls changed: {calls} "
                f"({calls / len(table):.2%}); kappa {kappas}"
            )


if __name__ == "__main__":
    main()
