"""How long a step, an epoch, a bill will be on N ranks, before they are bought: pure functions of a trace and a network.

    Trace (measured by trials.py: seconds of a rank's step with nothing sent, bytes that travel, what a byte costs the host)
    + Network (latency, bandwidth) -> all-reduce, segment by segment -> step -> epoch, efficiency, what limits, cost

    step = the slowest rank's own work + all-reduce of the gradient + all-reduce of the small vector

Nothing of the communication hides behind the backward pass: the engine sends when it is done. Ranks of a CPU share its
processors, so that n of them on c take n / c times as long, for the network's work too; a GPU is a rank's own.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mura_dist.core.errors import UserError
from mura_dist.data.loaders import sampler

# gloo's ring (AllreduceOptions.maxSegmentSize, and two operations in flight).
_SEGMENT_BYTES, _IN_FLIGHT = 1 << 20, 2
_ETHERNET_BYTES, _IP_TCP_BYTES = 14, 52  # headers of a frame; of its packet, TCP's timestamps included
_FLOAT_BYTES = 4
_RATES, _TIMES = {"k": 1e3, "M": 1e6, "G": 1e9}, {"us": 1e-6, "ms": 1e-3, "s": 1.0}

# ---- what is known


def head_length(ranks: int) -> int:
    """Return how many numbers the small vector begins with: a flag of each rank, counts of samples, the gradient's norm.

    See Engine._exchange in mura_dist/training/engine.py.
    """
    return ranks + 3


@dataclass(frozen=True)
class Trace:
    """Of one rank while as many worked as the machine has processors for. Lists are samples: a rank of a round each.

    processors: what the ranks of a machine share; None: each has a GPU of its own. micro_s: forward and backward of a
    micro-batch; rest_s: of a step, all else (optimiser, norm, clearing), nothing sent; evaluation_s: a forward of a micro-batch
    in fp32. gradient_bytes: what is all-reduced; fixed_bytes: the part of the small vector that depends on neither ranks nor
    micro-batches. host_s_per_byte: of a byte passed on in a ring, on two ranks without a network; hop_s: of a message of 4 bytes.
    """

    device: str
    processors: int | None
    architecture: str
    size_px: int
    micro_batch: int
    precision: str
    micro_s: list[float]
    rest_s: list[float]
    evaluation_s: list[float]
    gradient_bytes: int
    fixed_bytes: int
    host_s_per_byte: float
    hop_s: float
    assumed: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)  # command, date, hardware, versions, rounds

    def share(self, ranks: int) -> float:
        """Return the factor on a rank's time when `ranks` share a machine."""
        return 1.0 if self.processors is None else max(1.0, ranks / self.processors)

    def vector_bytes(self, ranks: int, micros: int) -> int:
        """Return the size of the small vector: head, each micro-batch's loss, BatchNorm's sums."""
        return self.fixed_bytes + _FLOAT_BYTES * (head_length(ranks) + micros * ranks)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read a trace. Raise UserError if the file is not one."""
        remedy = "make one with `python tools/scaling/scale.py measure --out FILE`"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            trace = cls(**values)
        except OSError as error:
            raise UserError(f"--trace {path}: {error.strerror}; {remedy}") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"--trace {path} is not a trace ({error}); {remedy}") from error
        if not (trace.micro_s and len(trace.micro_s) == len(trace.rest_s) and trace.evaluation_s):
            raise UserError(f"--trace {path} holds {len(trace.micro_s)} samples of a micro-batch; {remedy}")
        return trace


@dataclass(frozen=True)
class Network:
    """From a rank to the next: seconds of a message of no length, bits a second (infinite: nothing limits it), bytes a packet."""

    latency_s: float
    bandwidth_bit_s: float
    mtu: int = 1500

    @classmethod
    def parse(cls, text: str) -> Network:
        """`300Mb/s`, `1Gb/s:5ms`, `none`. UserError for anything else."""
        if text == "none":
            return cls(0.0, math.inf)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG])b/s(?::(\d+(?:\.\d+)?)(us|ms|s))?", text)
        if match is None or float(match[1]) == 0:
            raise UserError(
                f"network {text!r}: must be a bandwidth above 0, perhaps with a latency, as 25Gb/s:10us or 300Mb/s; or none"
            )
        latency_s = float(match[3]) * _TIMES[match[4]] if match[3] else 0.0
        return cls(latency_s, float(match[1]) * _RATES[match[2]])

    def __str__(self) -> str:
        if math.isinf(self.bandwidth_bit_s):
            return "none"
        unit = "G" if self.bandwidth_bit_s >= 1e9 else "M"
        rate = f"{self.bandwidth_bit_s / _RATES[unit]:g}{unit}b/s"
        if not self.latency_s:
            return rate
        return f"{rate}:{self.latency_s * 1e3:g}ms" if self.latency_s >= 1e-3 else f"{rate}:{self.latency_s * 1e6:g}us"

    def framed(self, size: float) -> float:
        """Return the bytes on the link for `size` bytes of payload by TCP."""
        return size * (self.mtu + _ETHERNET_BYTES) / (self.mtu - _IP_TCP_BYTES)

    def wire_s(self, size: float) -> float:
        """Return the seconds on the link for `size` bytes of payload."""
        return 8 * self.framed(size) / self.bandwidth_bit_s


@dataclass(frozen=True)
class Cluster:
    """Nodes of `per_node` GPUs: `inside` between GPUs of a node, `between` a node and the others (its cards together)."""

    per_node: int
    inside: Network
    between: Network


# ---- an all-reduce


def ring_s(size: int, ranks: int, network: Network, *, host_s_per_byte: float = 0.0, hop_s: float = 0.0) -> float:
    """gloo's all-reduce of `size` bytes: a reduce-scatter, then an all-gather, each rank sending to the next.

    A chunk a rank, each in segments; a rank has two segments in flight, and passes one on when it was received and added. All
    ranks do the same at the same time, so one of them is followed. host_s_per_byte: of a rank's processor, per byte passed on.
    """
    if ranks == 1:
        return 0.0
    num_segments = max(-(-size // _SEGMENT_BYTES), 2 * ranks)
    per_rank = -(-num_segments // ranks)
    segment = size / (per_rank * ranks)
    wire_s, host_s, far_s = network.wire_s(segment), host_s_per_byte * segment, network.latency_s + hop_s
    now = 0.0
    for _ in ("reduce-scatter", "all-gather"):
        sent = now
        done = [now] * _IN_FLIGHT  # when a segment was received and added; before the first: the start
        for index in range((ranks - 1) * per_rank):
            sent = max(sent, done[index]) + wire_s
            done.append(max(sent + far_s, done[-1]) + host_s)
        now = done[-1]
    return now


def nccl_s(size: int, ranks: int, cluster: Cluster) -> float:
    """NCCL's all-reduce over GPUs, the better of a ring and a double binary tree, as its own model of cost has it.

    All rings of a node together use all of its cards, so a node's link carries what one ring's would: 2 (n - 1) / n of the bytes.
    """
    if ranks == 1:
        return 0.0
    nodes, inside, between = -(-ranks // cluster.per_node), cluster.inside, cluster.between
    predicted, far_s = min(ranks, cluster.per_node), between.latency_s if nodes > 1 else 0.0
    byte_s = max(inside.wire_s(1), between.wire_s(1) if nodes > 1 else 0.0)
    ring = 2 * (ranks - 1) / ranks * size * byte_s + 2 * ((ranks - nodes) * inside.latency_s + nodes * far_s)
    tree = 2 * size * byte_s + 2 * (math.log2(nodes) * far_s + (predicted - 1) * inside.latency_s)
    return min(ring, tree)


# ---- a step


@dataclass(frozen=True)
class Step:
    """Seconds. work_s: of a rank in the middle; waiting_s: what the slowest takes more; wire_s, latency_s: of the network."""

    work_s: float
    waiting_s: float
    wire_s: float
    latency_s: float

    @property
    def seconds(self) -> float:
        return self.work_s + self.waiting_s + self.wire_s + self.latency_s


def slowest_s(samples: Sequence[float], ranks: int) -> float:
    """Return the median of the slowest of `ranks` draws: the samples' quantile 0.5^(1/ranks), at most their maximum."""
    ordered = sorted(samples)
    index = 0.5 ** (1 / ranks) * (len(ordered) - 1)
    low = int(index)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (index - low) * (ordered[high] - ordered[low])


def step(trace: Trace, ranks: int, micros: int, where: Network | Cluster) -> Step:
    """Of `micros` micro-batches on each rank. On a Network all ranks share this machine's processors, and gloo sends."""
    own = [micros * micro + rest for micro, rest in zip(trace.micro_s, trace.rest_s, strict=True)]
    share = trace.share(ranks)
    work = share * statistics.median(own)
    # Who shares a processor waits for all that is done there, whoever does it: there is no slowest one.
    waiting = slowest_s(own, ranks) - statistics.median(own) if share == 1 else 0.0
    total_s, far = _sent_s(trace, ranks, micros, where), _sent_s(trace, ranks, micros, _near(where))
    return Step(work, waiting, far, total_s - far)


def _sent_s(trace: Trace, ranks: int, micros: int, where: Network | Cluster) -> float:
    sizes = (trace.gradient_bytes, trace.vector_bytes(ranks, micros))
    if isinstance(where, Cluster):
        return sum(nccl_s(size, ranks, where) for size in sizes)
    share = trace.share(ranks)
    host = {"host_s_per_byte": share * trace.host_s_per_byte, "hop_s": trace.hop_s}
    return sum(ring_s(size, ranks, where, **host) for size in sizes)


def sent_bytes(trace: Trace, ranks: int, micros: int) -> float:
    """Return the bytes that a rank of a ring sends in a step, without headers."""
    return 2 * (ranks - 1) / ranks * (trace.gradient_bytes + trace.vector_bytes(ranks, micros))


def _near(where: Network | Cluster) -> Network | Cluster:
    """Return the network or cluster without latency."""
    if isinstance(where, Network):
        return replace(where, latency_s=0.0)
    return replace(where, inside=replace(where.inside, latency_s=0.0), between=replace(where.between, latency_s=0.0))


# ---- an epoch and its bill

_ENCODED_320 = {"png": 27_045, "jpeg": 15_904}  # bytes, measured on real radiographs (docs/benchmarks.md)
_NPY_HEADER, _TAR_BLOCK = 128, 512


def sample_bytes(encoding: str, size_px: int) -> int:
    """Of a radiograph in its tar: the image, label and row, a header before each, all in blocks. png and jpeg by area."""
    image = _NPY_HEADER + size_px**2 if encoding == "raw" else round(_ENCODED_320[encoding] * (size_px / 320) ** 2)
    return _TAR_BLOCK * (1 + -(-image // _TAR_BLOCK)) + 2 * 2 * _TAR_BLOCK


@dataclass(frozen=True)
class Data:
    """What an epoch reads. bytes_each: of a radiograph's sample in a shard, tar and all; rates a node; prices in dollars.

    radiographs: of MURA's train folder, of which `tune` is cut off for evaluation; num_valid: of the valid split, copied too.
    """

    radiographs: int
    tune: float
    num_valid: int
    bytes_each: float
    per_shard: int
    disk_bytes_per_s: float
    store_bytes_per_s: float
    dollars_per_1000_gets: float
    dollars_per_gb: float
    dollars_per_gpu_hour: float
    epochs: int

    @property
    def num_tune(self) -> int:
        return round(self.tune * self.radiographs)

    @property
    def num_train(self) -> int:
        return self.radiographs - self.num_tune

    @property
    def streamed_gets(self) -> int:
        """An epoch's, where nothing is copied: a range of a tar for each radiograph, whoever asks."""
        return self.radiographs

    @property
    def streamed_bytes(self) -> float:
        return self.radiographs * self.bytes_each

    @property
    def streamed_dollars(self) -> float:
        return self.streamed_gets / 1000 * self.dollars_per_1000_gets + self.streamed_bytes / 1e9 * self.dollars_per_gb

    @property
    def num_shards(self) -> int:
        return sum(-(-number // self.per_shard) for number in (self.num_train, self.num_tune, self.num_valid))


@dataclass(frozen=True)
class Epoch:
    """One row of the table. `refused` is the reason for missing numbers and the remedy."""

    ranks: int
    global_batch: int
    refused: str = ""
    step: Step | None = None
    nodes: int = 0
    steps: int = 0
    read_s: float = 0.0  # of a step's radiographs, beside it
    step_s: float = 0.0  # the data's pace included
    epoch_s: float = 0.0
    images_per_s: float = 0.0
    efficiency: float = 0.0
    limit: str = ""
    read_bytes: int = 0  # an epoch, all nodes, from their disks
    dollars: float = 0.0  # an epoch: GPUs
    copied_bytes: int = 0  # once, all nodes, from a store
    copy_s: float = 0.0
    gets: int = 0  # of that copy
    dollars_store: float = 0.0  # an epoch's share of that copy


def epoch(trace: Trace, ranks: int, where: Network | Cluster, data: Data, *, global_batch: int | None = None) -> Epoch:
    """Of `ranks` ranks. global_batch None: as many radiographs as the ranks take at once, a micro-batch each."""
    unit = trace.micro_batch * ranks  # a micro-batch is BatchNorm's group, part of the recipe: ranks take whole ones
    batch = global_batch or unit
    if reason := _refused(batch, unit, ranks, data.num_train):
        return Epoch(ranks, batch, refused=reason)
    nodes = -(-ranks // where.per_node) if isinstance(where, Cluster) else 1
    micros, steps = batch // unit, sampler.steps_per_epoch(data.num_train, batch)
    predicted, read_s = step(trace, ranks, micros, where), data.bytes_each * batch / (nodes * data.disk_bytes_per_s)
    step_s = max(predicted.seconds, read_s)  # the loader works ahead, beside the steps
    evaluation_s = -(-data.num_tune // unit) * trace.share(ranks) * slowest_s(trace.evaluation_s, ranks)
    epoch_s = steps * step_s + evaluation_s
    bill = _bill(data, nodes, ranks)
    return Epoch(
        ranks,
        batch,
        step=predicted,
        nodes=nodes,
        steps=steps,
        read_s=read_s,
        step_s=step_s,
        epoch_s=epoch_s,
        images_per_s=batch / step_s,
        efficiency=step(trace, 1, micros, where).seconds
        / step_s,  # of one rank that has as much to do, and nobody to wait for
        limit=_limit(predicted, read_s),
        read_bytes=round((steps * batch + data.num_tune) * data.bytes_each),
        dollars=ranks * epoch_s / 3600 * data.dollars_per_gpu_hour,
        **bill,
    )


def _bill(data: Data, nodes: int, ranks: int) -> dict[str, Any]:
    """Of the copy from a store to each node's disk (cache.py), once, of all splits; the GPUs wait for it, and cost."""
    each = round((data.radiographs + data.num_valid) * data.bytes_each)
    files, copy_s = 3 * data.num_shards + 1, each / data.store_bytes_per_s  # a tar, its .idx and .crc; the manifest
    gets = nodes * files + ranks  # every rank asks for index.json
    dollars = gets / 1000 * data.dollars_per_1000_gets + nodes * each / 1e9 * data.dollars_per_gb
    dollars += ranks * copy_s / 3600 * data.dollars_per_gpu_hour
    return {
        "copied_bytes": nodes * each,
        "copy_s": copy_s,
        "gets": gets,
        "dollars_store": dollars / data.epochs,
    }


def _refused(batch: int, unit: int, ranks: int, num_train: int) -> str:
    if batch > num_train:
        return f"a global batch of {batch} is more than an epoch's {num_train}; fewer GPUs, or a smaller micro-batch"
    if batch % unit:
        near = sampler.nearest_global_batch(batch, unit)
        return f"a global batch of {batch} is no multiple of {unit // ranks} x {ranks}; the nearest is {near}"
    return ""


def _limit(predicted: Step, read_s: float) -> str:
    """Return the limiting resource: computing if it is nine tenths of a step, else the largest of the others."""
    if read_s > predicted.seconds:
        return "reading"
    rest = {"bandwidth": predicted.wire_s, "latency": predicted.latency_s, "slowest rank": predicted.waiting_s}
    return "computing" if predicted.work_s >= 0.9 * predicted.seconds else max(rest, key=rest.__getitem__)


# ---- a GPU that nobody has measured


def assumed(images_per_s: float, spread: float, *, micro_batch: int, precision: str, weights: int, norms: int) -> Trace:
    """A trace of a GPU said to train `images_per_s`; `spread`: the slowest of a hundred steps over the middle one, less 1.

    weights, norms: numbers of the flat gradient and of BatchNorm's statistics.
    """
    middle = micro_batch / images_per_s
    samples = [middle * (1 + spread * max(0, index - 50) / 50) for index in range(101)]
    return Trace(
        device="a GPU",
        processors=None,
        architecture="densenet169",
        size_px=0,
        micro_batch=micro_batch,
        precision=precision,
        micro_s=samples,
        rest_s=[0.0] * len(samples),
        evaluation_s=[middle],
        gradient_bytes=weights * (2 if precision == "bf16" else _FLOAT_BYTES),
        fixed_bytes=_FLOAT_BYTES * norms,
        host_s_per_byte=0.0,
        hop_s=0.0,
        assumed=[
            f"a GPU trains {images_per_s:g} images/s in micro-batches of {micro_batch} ({precision}), the optimiser included",
            f"the slowest of a hundred steps takes {spread:.0%} more than the middle one",
            "evaluation, in fp32, is as fast as training",
        ],
    )
