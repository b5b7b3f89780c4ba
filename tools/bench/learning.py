"""Compare the AUROC of `mura-dist train` with that of a plain loop of torchvision and torch, over seeds.

python tools/bench/learning.py SHARDS [--seeds 3] [--epochs 5] [--loss-weights class] [--out DIR] ...

Both train on the train split of SHARDS with one rank. The plain loop uses torchvision's network and transforms, torch's Adam and
binary cross-entropy, and a constant learning rate. Both share the pixels, the settings and, for each seed, the initial weights.
Each draws its own order, flips and rotations.

After each epoch the tool prints the AUROC over the radiographs of a split, and the mean of the AUROCs within study types. At the
end it prints the difference after the last epoch with its standard error over seeds.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models.densenet import DenseNet
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import normalize

from mura_dist.core.errors import UserError
from mura_dist.data.shards.reader import Shards
from mura_dist.metrics.classification import compute_auroc
from mura_dist.models.densenet import ARCHITECTURES
from mura_dist.training import checkpoint
from mura_dist.training.run import Run

IMAGENET = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}  # as torchvision documents its DenseNet weights
EVAL_BATCH = 64  # radiographs
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIN_POSITIVES = 10  # of a study type whose AUROC enters the mean


@dataclass(frozen=True)
class Recipe:
    """The settings that both trainings share."""

    architecture: str = "densenet169"
    epochs: int = 5
    batch: int = 16  # radiographs
    learning_rate: float = 3e-4
    rotate_deg: float = 30.0
    loss_weights: str = "class"


@dataclass(frozen=True)
class Split:
    """The radiographs of a split: image uint8 (n, 1, S, S), label and weight float32 (n,), study_type str (n,)."""

    image: Tensor
    label: Tensor
    weight: Tensor
    study_type: np.ndarray

    @classmethod
    def read(cls, shards: Shards, name: str, loss_weights: str = "none") -> "Split":
        """Read a split.

        A positive weighs the share of negatives, and a negative the share of positives, over the split or per study type.
        """
        rows = shards.rows(name)
        frame = shards.manifest.frame.loc[rows]
        if loss_weights == "none":
            weight = np.ones(len(frame))
        else:
            groups = [frame["study_type"]] if loss_weights == "study_type" else [np.zeros(len(frame))]
            share = frame.groupby(groups)["label"].transform("mean")  # of positives
            weight = np.where(frame["label"] == 1, 1 - share, share)
        return cls(
            torch.from_numpy(np.stack([shards.read_pixels(int(row)) for row in rows])[:, None]),
            torch.from_numpy(frame["label"].to_numpy(np.float32)),
            torch.from_numpy(weight.astype(np.float32)),
            frame["study_type"].to_numpy(),
        )


class PlainLoop:
    """A DenseNet with one logit and its Adam."""

    def __init__(self, recipe: Recipe, *, bf16: bool, weights: dict[str, Tensor] | None = None) -> None:
        """Build the network.

        Args:
            recipe: its architecture and learning rate are used.
            bf16: whether a step's forward pass runs under autocast.
            weights: initial weights as torchvision's state dict; None: torchvision's initialization.
        """
        growth, blocks, width = ARCHITECTURES[recipe.architecture]
        self.network = DenseNet(growth, blocks, width, num_classes=1)
        if weights is not None:
            self.network.load_state_dict(weights)
        self.network.to(DEVICE, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.network.parameters(), recipe.learning_rate)
        self.bf16 = bf16

    def step(self, image: Tensor, label: Tensor, weight: Tensor) -> float:
        """Take one step on image uint8 (B, 1, S, S), label and weight (B,); return the mean of weight x BCE."""
        self.network.train()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bf16):
            logit = self.network(_input(image))[:, 0]
        loss = F.binary_cross_entropy_with_logits(logit.float(), label.to(DEVICE), weight=weight.to(DEVICE))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def epoch(self, train: Split, recipe: Recipe) -> None:
        """Train one epoch on a shuffled split, with random flips and rotations."""
        rotate = v2.RandomRotation(recipe.rotate_deg, interpolation=v2.InterpolationMode.BILINEAR)
        augment = v2.Compose([v2.RandomHorizontalFlip(), rotate])
        for rows in torch.randperm(len(train.label)).split(recipe.batch):
            if len(rows) == recipe.batch:
                image = torch.stack([augment(image_of_row) for image_of_row in train.image[rows]])
                self.step(image, train.label[rows], train.weight[rows])

    @torch.no_grad()
    def logits(self, image: Tensor) -> Tensor:
        """Return the logits (n,) of image uint8 (n, 1, S, S) in fp32 with the running statistics."""
        self.network.eval()
        return torch.cat([self.network(_input(chunk))[:, 0].cpu() for chunk in image.split(EVAL_BATCH)])


def _input(image: Tensor) -> Tensor:
    """Convert gray uint8 (n, 1, S, S) to (n, 3, S, S) float32, normalized as torchvision's weights expect it."""
    gray = image.to(DEVICE).expand(-1, 3, -1, -1).float() / 255
    return normalize(gray, **IMAGENET).contiguous(memory_format=torch.channels_last)


def train_package(shards: Shards, recipe: Recipe, seed: int, folder: Path, overrides: list[str]) -> Run:
    """Run `mura-dist train` to its end, and keep a checkpoint of every epoch.

    Raises:
        subprocess.CalledProcessError: It failed. Its own message is on stderr.
    """
    settings = {"shards": shards.folder, "run": folder, "seed": seed, "architecture": recipe.architecture}
    settings |= {"epochs": recipe.epochs, "global_batch": recipe.batch, "micro_batch": recipe.batch}
    settings |= {"learning_rate": recipe.learning_rate, "rotate_deg": recipe.rotate_deg}
    settings |= {"loss_weights": recipe.loss_weights, "plateau_patience": recipe.epochs + 1}
    settings |= {"keep_checkpoints": recipe.epochs + 1}
    command = [sys.executable, "-m", "mura_dist", "train", *(f"{key}={value}" for key, value in settings.items())]
    subprocess.run([*command, *overrides, "--quiet"], check=True, stdout=subprocess.DEVNULL)
    return Run.load(folder)


def logits_by_epoch(run: Run, recipe: Recipe, image: Tensor) -> Iterator[Tensor]:
    """Yield the logits of image with each epoch's checkpoint of a run, computed by torchvision's network."""
    for saved in checkpoint.list_folders(run.checkpoints)[1:]:  # the first is of step 0
        yield PlainLoop(recipe, bf16=False, weights=load_file(saved / "model.safetensors")).logits(image)


def plain_logits_by_epoch(train: Split, recipe: Recipe, seed: int, *, bf16: bool, image: Tensor) -> Iterator[Tensor]:
    """Train the plain loop, and yield the logits of image after each epoch."""
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)  # a CPU computes with denormals many times as slowly
    loop = PlainLoop(recipe, bf16=bf16)
    for _ in range(recipe.epochs):
        loop.epoch(train, recipe)
        yield loop.logits(image)


def aurocs(split: Split, logit: Tensor) -> tuple[float, float]:
    """Compute the AUROC over a split, and the mean of the AUROCs within its study types.

    The mean is NaN if no study type has MIN_POSITIVES.
    """
    label, score = split.label.numpy(), logit.numpy()
    masks = [split.study_type == name for name in np.unique(split.study_type)]
    within = [
        compute_auroc(label[mask], score[mask]) for mask in masks if MIN_POSITIVES <= label[mask].sum() < mask.sum()
    ]
    return float(compute_auroc(label, score)), float(np.mean(within)) if within else float("nan")


def compare(
    shards: Shards, recipe: Recipe, seed: int, folder: Path, *, split: str, overrides: list[str]
) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """Train both, and yield after each epoch the `aurocs` of mura-dist and of the plain loop."""
    run = train_package(shards, recipe, seed, folder, overrides)
    train, scored = Split.read(shards, "train", recipe.loss_weights), Split.read(shards, split)
    bf16 = run.settings.precision == "bf16"
    trained = logits_by_epoch(run, recipe, scored.image)
    plain = plain_logits_by_epoch(train, recipe, seed, bf16=bf16, image=scored.image)
    for logits in zip(trained, plain, strict=True):
        yield aurocs(scored, logits[0]), aurocs(scored, logits[1])


def standard_error(trained: list[float], plain: list[float]) -> float:
    """Compute the standard error of the difference of two means over seeds."""
    return float(np.sqrt(np.var(trained, ddof=1) / len(trained) + np.var(plain, ddof=1) / len(plain)))


def main() -> None:
    """Train both for each seed and print the AUROCs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds: 0, 1, ...; default: 3")
    parser.add_argument("--split", default="valid", help="split for the AUROC; default: valid")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: a temporary one")
    for name, default in vars(Recipe()).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, help=f"default: {default}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further settings of `mura-dist train`")
    options = parser.parse_intermixed_args()
    recipe = Recipe(**{name: getattr(options, name) for name in vars(Recipe())})
    shards = Shards.open(options.shards)
    trained, plain = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(options.seeds):
            folder = (options.out or Path(temporary)) / f"{recipe.loss_weights}-{seed}"
            pairs = compare(shards, recipe, seed, folder, split=options.split, overrides=options.overrides)
            for epoch, (trained_pair, plain_pair) in enumerate(pairs, 1):
                cells = [
                    f"{overall:.3f} ({within:.3f} within study types)" for overall, within in (trained_pair, plain_pair)
                ]
                print(f"seed {seed}, epoch {epoch}: mura-dist {cells[0]}, plain loop {cells[1]}", flush=True)
            trained.append(trained_pair[0])
            plain.append(plain_pair[0])
    print(
        f"{options.split}, last epoch, {len(trained)} seeds: mura-dist {np.mean(trained):.3f}, plain loop {np.mean(plain):.3f}"
    )
    if len(trained) > 1:
        difference = np.mean(trained) - np.mean(plain)
        print(f"difference {difference:+.3f}, standard error {standard_error(trained, plain):.3f}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"learning.py: {error}", file=sys.stderr)
        sys.exit(2)
    except subprocess.CalledProcessError as error:  # its message is on stderr
        sys.exit(error.returncode)
