"""The same as `mura-dist phantoms`, for those who look for a script: python tools/make_phantoms.py OUT [options]."""

import sys

from mura_dist.cli.main import entry

if __name__ == "__main__":
    entry(["phantoms", *sys.argv[1:]])
