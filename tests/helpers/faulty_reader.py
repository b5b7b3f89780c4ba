"""A reader for predict.py's workers that fails as the file name says. The module is light, since every worker imports it."""

import os
from pathlib import Path

from mura_dist.inference import reader
from mura_dist.inference.reader import ReadResult


class RadiographReader(reader.RadiographReader):
    def __call__(self, path: str) -> ReadResult:
        name = Path(path).name
        if "crash" in name:
            os.abort()
        if "spin" in name:
            while True:
                pass
        if "eat" in name:
            try:
                bytearray(1 << 40)
            except MemoryError:
                return reader.failure_result("too_large", "decoding this PNG needs more memory than is available")
        return super().__call__(path)
