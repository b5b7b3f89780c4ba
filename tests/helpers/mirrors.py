"""Open mirrored shards in a process of its own. The module is light, since every such process imports it."""

from multiprocessing.queues import Queue
from pathlib import Path

from mura_dist.data.shards.reader import Shards


def open_mirrored(folder: Path, mirror: Path, opened: Queue) -> None:
    """Put the mirror's folder and the sum of a sample's pixels into the queue."""
    shards = Shards.open(folder, mirror=mirror)
    opened.put((str(shards.folder), int(shards.read_pixels(int(shards.rows("train")[0])).sum())))
