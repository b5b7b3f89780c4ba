"""Run `mura-dist predict` under a launcher: `torchrun -m mura_dist.predict`, `srun python -m mura_dist.predict`."""

import sys

from mura_dist.cli import entry

if __name__ == "__main__":
    entry(["predict", *sys.argv[1:]])
