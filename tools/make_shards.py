"""The same as `mura-dist shards`, for those who look for a script: python tools/make_shards.py SOURCE OUT [options]."""

import sys

from mura_dist.cli.main import entry

if __name__ == "__main__":
    entry(["shards", *sys.argv[1:]])
