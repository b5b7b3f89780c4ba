"""The same as `mura-dist phantoms`, for those who look for a script: python tools/make_phantoms.py OUT [options]."""

import sys

from mura_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["phantoms", *sys.argv[1:]]))
