"""Train a DenseNet-169 as a user would write it, with torchvision, DataLoader, Adam and ReduceLROnPlateau, without mura_dist.

python tools/bench/plain_loop.py FOLDER MANIFEST OUT [--size 128] [--epochs 7] [--precision bf16] ...

    MANIFEST (columns split, label, path below FOLDER) -> files decoded by Pillow in each epoch -> train -> loss on tune
        -> OUT/checkpoint.pt after each epoch -> weights of the lowest tune loss -> OUT/predictions.csv (path,probability)

The same command resumes after the last finished epoch. predictions.csv has the radiographs of the split valid.
"""

import argparse
import copy
import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
EVAL_BATCH = 64  # radiographs


class Radiographs(Dataset):
    """The radiographs of a table: (image (3, S, S) float32, label float32)."""

    def __init__(self, folder: Path, table: pd.DataFrame, transform: transforms.Compose) -> None:
        self.paths = [folder / path for path in table["path"]]
        self.labels = table["label"].to_numpy("float32")
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        return self.transform(Image.open(self.paths[index]).convert("RGB")), float(self.labels[index])


def evaluation_transform(size: int) -> list[Any]:
    return [
        transforms.Resize((size, size), antialias=True),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]


def build_network(architecture: str) -> nn.Module:
    if architecture == "tiny":  # for tests
        return torchvision.models.DenseNet(4, (1, 2, 2, 1), 8, num_classes=1)
    return torchvision.models.get_model(architecture, num_classes=1)


@torch.no_grad()
def predict(network: nn.Module, loader: DataLoader) -> tuple[Tensor, Tensor]:
    """Return the logits and the labels (n,), in the order of the table, in fp32."""
    network.eval()
    pairs = [(network(image)[:, 0], label.float()) for image, label in loader]
    return torch.cat([logit for logit, _ in pairs]), torch.cat([label for _, label in pairs])


def train(options: argparse.Namespace, table: pd.DataFrame) -> nn.Module:
    """Train, and return the network with the weights of the lowest tune loss."""
    splits = {name: table[table["split"] == name] for name in ("train", "tune")}
    share = splits["train"]["label"].mean()  # of positives
    augment = [transforms.RandomHorizontalFlip(), transforms.RandomRotation(options.rotate_deg)]
    evaluation = evaluation_transform(options.size)
    loader = DataLoader(
        Radiographs(options.folder, splits["train"], transforms.Compose([evaluation[0], *augment, *evaluation[1:]])),
        batch_size=options.batch,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
    )
    tune = DataLoader(
        Radiographs(options.folder, splits["tune"], transforms.Compose(evaluation)),
        EVAL_BATCH,
        num_workers=options.workers,
    )
    torch.manual_seed(options.seed)
    network = build_network(options.architecture)
    bf16 = options.precision == "bf16"
    if bf16:
        network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), options.learning_rate)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=1)
    best: dict[str, Any] = {"loss": math.inf, "weights": copy.deepcopy(network.state_dict())}
    first = 0
    path = options.out / "checkpoint.pt"
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        plateau.load_state_dict(saved["plateau"])
        best, first = saved["best"], saved["epoch"]

    def weighted_loss(logit: Tensor, label: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logit, label, weight=torch.where(label > 0, 1 - share, share))

    for epoch in range(first, options.epochs):
        torch.manual_seed(
            options.seed * 1_000_003 + epoch
        )  # so that a resumed epoch has the same order and augmentation
        network.train()
        for image, label in loader:
            if bf16:
                image = image.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logit = network(image)[:, 0]
            loss = weighted_loss(logit.float(), label.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        tune_loss = weighted_loss(*predict(network, tune)).item()
        plateau.step(tune_loss)
        if tune_loss < best["loss"]:
            best = {"loss": tune_loss, "weights": copy.deepcopy(network.state_dict())}
        print(f"epoch {epoch + 1}: tune loss {tune_loss:.4f}", flush=True)
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "plateau": plateau.state_dict()}
        torch.save({**state, "best": best, "epoch": epoch + 1}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    network.load_state_dict(best["weights"])
    return network


def main() -> None:
    """Train and write the predictions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="manifest.csv of shards of FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument(
        "--architecture", default="densenet169", help="torchvision's name, or tiny; default: densenet169"
    )
    parser.add_argument("--size", type=int, default=128, help="pixels of a side; default: 128")
    parser.add_argument("--epochs", type=int, default=7, help="default: 7")
    parser.add_argument("--batch", type=int, default=16, help="radiographs; default: 16")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="default: 3e-4")
    parser.add_argument("--rotate-deg", type=float, default=30.0, help="default: 30")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of torch; default: 2")
    parser.add_argument("--workers", type=int, default=2, help="processes of the DataLoader; default: 2")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast and channels-last"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # a CPU computes with denormals many times as slowly
    table = pd.read_csv(options.manifest)
    network = train(options, table)
    valid = table[table["split"] == "valid"]
    transform = transforms.Compose(evaluation_transform(options.size))
    loader = DataLoader(Radiographs(options.folder, valid, transform), EVAL_BATCH, num_workers=options.workers)
    logit, _ = predict(network, loader)
    predictions = pd.DataFrame({"path": valid["path"].to_numpy(), "probability": logit.double().sigmoid().numpy()})
    predictions.to_csv(options.out / "predictions.tmp", index=False)
    os.replace(options.out / "predictions.tmp", options.out / "predictions.csv")


if __name__ == "__main__":
    main()
