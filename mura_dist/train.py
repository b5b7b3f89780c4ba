"""Run `mura-dist train` under a launcher: `torchrun -m mura_dist.train`, `deepspeed --module mura_dist.train`."""

import sys

from mura_dist.cli import entry

if __name__ == "__main__":
    entry(["train", *sys.argv[1:]])
