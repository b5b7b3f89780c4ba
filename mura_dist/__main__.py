"""Run the command line: `python -m mura_dist ...` is `mura-dist ...`."""

from mura_dist.cli import entry

if __name__ == "__main__":
    entry()
