"""Print the demo's plan for a folder and this machine as shell assignments: ranks, settings, valid.

python tools/demo/plan.py SHARDS FOLDER

The recipe is made for the phantoms. A smaller folder gets smaller batches, and the number of epochs keeps the number of training
radiographs about constant.
"""

import shlex
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # launch/demo.sh reports Ctrl-C

import torch

from mura_dist.core import config
from mura_dist.core.errors import UserError
from mura_dist.data.shards.reader import Shards
from mura_dist.data.source.scan import scan

RECIPE = Path("launch/recipes/demo.toml")
NUM_TRAINED = 4_800  # training radiographs times epochs


def main() -> int:
    """Print the plan of the folder in the arguments."""
    shards, folder = Shards.open(sys.argv[1]), Path(sys.argv[2])
    num_train = len(shards.rows("train"))
    for split in ("tune", "valid"):
        shards.rows(split)  # an empty split fails here, before the training
    recipe = config.load(RECIPE)
    ranks = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    micro = max(2, min(recipe.micro_batch, num_train // 4))
    epochs = recipe.epochs if shards.trained_on == "phantoms" else max(1, round(NUM_TRAINED / num_train))
    patience = max(1, round(recipe.plateau_patience * epochs / recipe.epochs))  # the same number of radiographs
    settings = [f"micro_batch={micro}", f"global_batch={2 * micro}", f"epochs={epochs}", f"plateau_patience={patience}"]
    valid = Path(scan(folder).root) / "valid"
    print(f"ranks={ranks} settings=({' '.join(settings)}) valid={shlex.quote(str(valid))}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"launch/demo.sh: {error}", file=sys.stderr)
        sys.exit(2)
