"""The same as `mura-dist verify`, for those who look for a script: python tools/check_shards.py OUT [options]."""

import sys

from mura_dist.cli.main import entry

if __name__ == "__main__":
    entry(["verify", *sys.argv[1:]])
