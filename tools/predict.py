"""The same as `mura-dist predict`, for those who look for a script.

python tools/predict.py MODEL.onnx FILE_OR_FOLDER... --out OUT [options]
"""

import sys

from mura_dist.cli.main import entry

if __name__ == "__main__":
    entry(["predict", *sys.argv[1:]])
