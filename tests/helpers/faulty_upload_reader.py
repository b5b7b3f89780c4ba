"""A reader for the page's workers that raises on one content. The module is light, since every worker imports it."""

from mura_dist.inference.page import study


class UploadReader(study.UploadReader):
    def __call__(self, data: bytes) -> study.Upload:
        if data == b"raise":
            raise ValueError("no")
        return super().__call__(data)
