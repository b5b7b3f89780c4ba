"""The same as `mura-dist verify`, for those who look for a script: python tools/check_shards.py OUT [options]."""

import sys

from mura_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
