"""Format the results of scaling.py: a table per network, a table of the data, the assumptions.

    epochs of one network (scaling.epoch for 1, 2, 4 ... ranks) -> lines

A row without numbers has the reason.
"""

from __future__ import annotations

from collections.abc import Sequence

from scaling import Data, Epoch, Network, Trace

_HEAD = ("ranks", "global batch", "step ms", "network ms", "images/s", "efficiency", "limit", "epoch s", "$ an epoch")
_DISK = ("ranks", "GB an epoch", "GB a node", "of a step's time")
_STORE = ("ranks", "GB once", "GETs once", "before the first step, s", "$ an epoch more")


def table(network: Network, epochs: Sequence[Epoch]) -> list[str]:
    """Return the lines of a network's table."""
    return [f"{network} between nodes", *_columns(_HEAD, [_cells(epoch) for epoch in epochs])]


def _cells(epoch: Epoch) -> list[str]:
    if epoch.step is None:
        return [str(epoch.ranks), str(epoch.global_batch), epoch.refused]
    sent = epoch.step.wire_s + epoch.step.latency_s
    return [
        str(epoch.ranks),
        str(epoch.global_batch),
        f"{1e3 * epoch.step_s:.1f}",
        f"{1e3 * sent:.2f}",
        f"{epoch.images_per_s:,.0f}",
        f"{epoch.efficiency:.1%}",
        epoch.limit,
        f"{epoch.epoch_s:.1f}",
        f"{epoch.dollars:.3f}",
    ]


def data_tables(data: Data, epochs: Sequence[Epoch]) -> list[str]:
    """What is read: from the nodes' own disks; from a store, copied to them once (cache.py), or each time, as we do not."""
    rows = [epoch for epoch in epochs if epoch.step is not None]
    disk = [
        [
            str(epoch.ranks),
            f"{epoch.read_bytes / 1e9:.2f}",
            f"{epoch.read_bytes / epoch.nodes / 1e9:.2f}",
            f"{epoch.read_s / epoch.step_s:.1%}",
        ]
        for epoch in rows
    ]
    store = [
        [
            str(epoch.ranks),
            f"{epoch.copied_bytes / 1e9:.1f}",
            f"{epoch.gets:,}",
            f"{epoch.copy_s:.1f}",
            f"{epoch.dollars_store:.4f}",
        ]
        for epoch in rows
    ]
    each_time = f"{data.streamed_bytes / 1e9:.2f} GB, {data.streamed_gets:,} GETs, ${data.streamed_dollars:.4f}"
    return [
        "data on the nodes' own disks: no requests, nothing to pay for",
        *_columns(_DISK, disk),
        "",
        f"data in an object store, copied to each node once, shared by {data.epochs} epochs",
        *_columns(_STORE, store),
        f"read from the store at every epoch instead, a range of a tar for each radiograph: {each_time} an epoch",
    ]


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns to the right. A row shorter than the head ends in a text."""
    complete_rows = [row for row in rows if len(row) == len(head)]
    widths = [max(len(title), *(len(row[column]) for row in complete_rows), 0) for column, title in enumerate(head)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)) for row in (head, *rows)]


def assumptions(trace: Trace, data: Data, where: str) -> list[str]:
    """Return the assumptions, one per line."""
    return [
        *trace.assumed,
        where,
        f"{data.radiographs:,} radiographs to train and tune on ({data.tune:.0%} tune), {data.num_valid:,} others",
        f"{data.bytes_each:,.0f} bytes a radiograph in its tar, {data.per_shard} radiographs a tar",
        f"a node's disk {data.disk_bytes_per_s / 1e6:,.0f} MB/s, the store {data.store_bytes_per_s / 1e6:,.0f} MB/s a node",
        f"${data.dollars_per_gpu_hour:g} a GPU and hour, ${data.dollars_per_1000_gets:g} for 1,000 GETs, "
        f"${data.dollars_per_gb:g} a GB out of the store",
    ]
