"""The same as `mura-dist predict`, for those who look for a script.

python tools/predict.py MODEL.onnx DIRECTORY --out OUT [options]
"""

import sys

from mura_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
