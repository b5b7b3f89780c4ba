"""What a step sends; the laws of the model that predicts its time; tools/scaling/scale.py; short real runs."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import communication
import networks
import numpy as np
import planning
import pytest
import scale
import scaling
import torch
import trials
from fleet import Fleet, Job, Turn, _Player
from helpers.commands import ROOT, run
from networks import Spaces
from PIL import Image
from scaling import Cluster, Data, Network, Trace

from mura_dist.core import storage
from mura_dist.core.errors import RunError, UserError
from mura_dist.data.shards import cache
from mura_dist.data.shards.reader import Shards
from mura_dist.distributed import process_group

pytestmark = pytest.mark.nightly(part="scaling")

SCALE, COMMUNICATION = ROOT / "tools/scaling/scale.py", ROOT / "tools/scaling/run_communication.py"
TINY = Job("tiny", 32, 2, 1, "fp32")
MB = 1_000_000
LACKING = networks.lacking()

# ---- what travels


@pytest.mark.parametrize(
    ("architecture", "precision", "kind"), [("densenet169", "fp32", "float"), ("tiny", "bf16", "c10::BFloat16")]
)
def test_a_step_sends_one_gradient_and_one_small_vector(architecture: str, precision: str, kind: str) -> None:
    """By torch's profiler, over two gloo ranks; nothing else. DenseNet-169: 50 MB in fp32, so 25 in bf16, and less than 1."""
    command = ("torchrun", "--standalone", "--nproc-per-node", 2, ROOT / "tests/helpers/collectives.py")
    done = run(*command, architecture, precision, 0)
    assert done.returncode == 0, done.stderr
    weights, norms = trials.sizes(architecture)
    gradient = ["gloo:all_reduce", [weights], kind]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "sent": [gradient, ["gloo:all_reduce", [scaling.head_length(2) + 2 * 2 + norms], "float"]],
        "calls": 2,
    }
    if architecture == "densenet169":
        assert 49 * MB < 4 * weights < 51 * MB
        assert 4 * norms < MB


@pytest.mark.slow
def test_what_stage_1_sends(tmp_path: Path) -> None:
    """The whole gradient, the small vector; DeepSpeed's own norm, and the weights' shares."""
    done = run(
        "torchrun", "--standalone", "--nproc-per-node", 2, ROOT / "tests/helpers/collectives.py", "tiny", "fp32", 1
    )
    weights, _ = trials.sizes("tiny")
    sent = json.loads(done.stdout.splitlines()[-1])["sent"]
    assert [name for name, *_ in sent] == ["gloo:all_reduce"] * 3 + ["gloo:all_gather"]
    assert [shape for _, shape, _ in sent][::3] == [[weights], [weights // 2]]


def test_a_ratio_is_of_one_round() -> None:
    def turn(seconds: float, *sent_s: float) -> Turn:
        return Turn(seconds, [], [], list(sent_s))

    rounds = [
        {"step": turn(5, 1.5, 0.5), "together": turn(4), "alone": turn(3), "bare": turn(2)},
        {"step": turn(9, 1, 1), "together": turn(6.5), "alone": turn(6), "bare": turn(1)},
    ]
    measured = communication._summary(rounds)
    assert measured["ratio"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert measured["waiting_ratio"] == {"median": 0.5, "min": 0.5, "max": 0.5}
    assert measured["sent_ratio"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert measured["extra_s"] == {"median": 2.5, "min": 2.0, "max": 3.0}


# ---- the laws of the model

GRID = list(itertools.product((4, 630_000, 50 * MB), (2, 3, 4, 8, 64), (0.0, 1e-4, 5e-3), (3e8, 1e10)))


def trace_of(**values: Any) -> Trace:
    defaults: dict[str, Any] = {
        "device": "cpu",
        "processors": 2,
        "architecture": "tiny",
        "size_px": 64,
        "micro_batch": 4,
    }
    defaults |= {
        "precision": "fp32",
        "micro_s": [0.1, 0.11, 0.12],
        "rest_s": [0.02, 0.02, 0.03],
        "evaluation_s": [0.05],
    }
    defaults |= {"gradient_bytes": 50 * MB, "fixed_bytes": 630_000, "host_s_per_byte": 1e-9, "hop_s": 1e-4}
    return Trace(**defaults | values)


GPU = {"processors": None, "device": "a GPU", "host_s_per_byte": 0.0, "hop_s": 0.0}


def data_of(**values: Any) -> Data:
    defaults: dict[str, Any] = {
        "radiographs": 36_808,
        "tune": 0.1,
        "num_valid": 3_197,
        "bytes_each": 1e5,
        "per_shard": 512,
    }
    defaults |= {
        "disk_bytes_per_s": 2e9,
        "store_bytes_per_s": 4e8,
        "dollars_per_1000_gets": 0.0004,
        "dollars_per_gb": 0.0,
    }
    return Data(**defaults | {"dollars_per_gpu_hour": 3.0, "epochs": 10} | values)


def cluster_of(rate: float = 1e11, latency_s: float = 1e-5) -> Cluster:
    return Cluster(8, Network(5e-6, 1.2e12), Network(latency_s, rate))


@pytest.mark.parametrize(("size", "ranks", "latency_s", "rate"), GRID)
def test_a_ring_takes_its_bytes_and_at_most_its_hops(size: int, ranks: int, latency_s: float, rate: float) -> None:
    """No faster than the wire carries 2 (n - 1) / n of the bytes; no slower than every segment after the other."""
    network = Network(latency_s, rate)
    seconds = scaling.ring_s(size, ranks, network)
    wire = network.wire_s(2 * (ranks - 1) / ranks * size)
    assert network.framed(1448) == 1514, "a whole packet of Ethernet"
    segments = 2 * (ranks - 1) * -(-max(-(-size // (1 << 20)), 2 * ranks) // ranks)
    assert wire * 0.999999 <= seconds <= (wire + segments * latency_s) * 1.000001
    assert seconds >= 2 * (ranks - 1) * latency_s, "a chunk goes round twice"
    assert scaling.ring_s(size, 1, network) == 0
    assert seconds >= scaling.ring_s(size, ranks, Network(latency_s, 2 * rate))
    assert seconds <= scaling.ring_s(size, ranks, Network(latency_s + 1e-3, rate))
    assert seconds <= scaling.ring_s(size, ranks, network, host_s_per_byte=1e-9)


def test_a_ring_without_a_network_is_the_hosts_work() -> None:
    """2 (n - 1) / n of the bytes through a processor; two ranks: each byte once, as it is measured."""
    for ranks in (2, 4, 8):
        seconds = scaling.ring_s(48 << 20, ranks, Network.parse("none"), host_s_per_byte=1e-9)
        assert seconds == pytest.approx(2 * (ranks - 1) / ranks * (48 << 20) * 1e-9, rel=1e-6)


def test_a_ring_followed_by_hand() -> None:
    """Two ranks, 4 MiB: two segments of 1 MiB each way, in each phase; 1 s on the wire, 0.25 s to arrive."""
    second = Network(0.25, 8 * Network(0, 1).framed(1 << 20))
    assert scaling.ring_s(4 << 20, 2, second) == pytest.approx(2 * (2 * 1.0 + 0.25))
    far = Network(10.0, 8 * Network(0, 1).framed(1 << 20))  # three a rank: the third waits until the first has arrived
    assert scaling.ring_s(6 << 20, 2, far) == pytest.approx(2 * (1 + 10 + 1 + 10))


@pytest.mark.parametrize(("size", "ranks", "latency_s", "rate"), GRID)
def test_nccl_takes_its_bytes_over_the_slowest_link(size: int, ranks: int, latency_s: float, rate: float) -> None:
    seconds = scaling.nccl_s(size, ranks, cluster_of(rate, latency_s))
    slow = Network(latency_s, rate) if ranks > 8 else Network(5e-6, 1.2e12)
    assert seconds >= slow.wire_s(2 * (ranks - 1) / ranks * size) * 0.999999
    assert scaling.nccl_s(size, 1, cluster_of(rate, latency_s)) == 0
    assert seconds >= scaling.nccl_s(size, ranks, cluster_of(2 * rate, latency_s))
    if ranks <= 8:
        assert seconds == scaling.nccl_s(size, ranks, cluster_of(1.0, 9.0)), "nothing leaves the node"


@pytest.mark.parametrize("ranks", [1, 2, 8, 64, 256])
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_one_rank_sends_nothing_and_no_rank_gains_by_company(ranks: int, kind: str) -> None:
    trace, where = (trace_of(), Network(1e-4, 1e9)) if kind == "cpu" else (trace_of(**GPU), cluster_of())
    for micros in (1, 4):
        step, alone = (scaling.step(trace, number, micros, where) for number in (ranks, 1))
        assert (alone.wire_s, alone.latency_s, alone.waiting_s) == (0, 0, 0)
        assert step.seconds >= alone.seconds
        assert min(dataclasses.astuple(step)) >= 0
        assert step.seconds >= scaling.step(trace, ranks, micros, _better(where)).seconds


def _better(where: Network | Cluster) -> Network | Cluster:
    if isinstance(where, Cluster):
        return dataclasses.replace(where, between=_better(where.between))
    return Network(where.latency_s / 2, where.bandwidth_bit_s * 2)


def test_ranks_share_processors_gpus_do_not() -> None:
    nowhere = Network.parse("none")
    assert scaling.step(trace_of(), 8, 1, nowhere).work_s == pytest.approx(
        4 * scaling.step(trace_of(), 2, 1, nowhere).work_s
    )
    gpus = [scaling.step(trace_of(**GPU), number, 1, cluster_of()).work_s for number in (1, 256)]
    assert gpus[0] == gpus[1]


def test_the_slowest_of_many() -> None:
    samples = list(range(101))
    measured = [scaling.slowest_s(samples, ranks) for ranks in (1, 2, 8, 256, 10**6)]
    assert measured[0] == 50
    assert measured == sorted(measured)
    assert measured[-1] <= 100
    drawn = np.random.default_rng(0).integers(0, 101, (20_000, 8)).max(axis=1)
    assert scaling.slowest_s(samples, 8) == pytest.approx(np.median(drawn), abs=1.5)
    assert scaling.slowest_s([3.0], 8) == 3


@pytest.mark.parametrize("gpus", [1, 2, 3, 8, 24, 256])
@pytest.mark.parametrize("batch", [None, 4 * 96, 4 * 8 * 96])
def test_an_epoch_adds_up(gpus: int, batch: int | None) -> None:
    trace, data = trace_of(**GPU), data_of()
    row = scaling.epoch(trace, gpus, cluster_of(), data, global_batch=batch)
    if row.refused:
        assert row.step is None
        assert row.global_batch % (4 * gpus) or row.global_batch > data.num_train
        return
    assert row.step is not None
    assert 0 < row.efficiency <= 1
    assert row.global_batch % (4 * gpus) == 0
    assert row.steps * row.global_batch <= data.num_train < (row.steps + 1) * row.global_batch
    assert row.epoch_s > row.steps * row.step_s
    assert row.read_bytes <= data.radiographs * data.bytes_each
    assert row.nodes == math.ceil(gpus / 8)
    assert row.copied_bytes == row.nodes * 40_005 * 100_000
    assert row.dollars == pytest.approx(3 * gpus * row.epoch_s / 3600)


def test_what_does_not_divide_is_said_and_the_nearest_named() -> None:
    row = scaling.epoch(trace_of(**GPU), 24, cluster_of(), data_of(), global_batch=128)
    assert (row.step, row.refused) == (None, "a global batch of 128 is no multiple of 4 x 24; the nearest is 96")
    more = scaling.epoch(trace_of(**GPU), 256, cluster_of(), data_of(radiographs=900))
    assert more.refused == "a global batch of 1024 is more than an epoch's 810; fewer GPUs, or a smaller micro-batch"


def test_what_limits() -> None:
    def limit(data: Data | None = None, rate: float = 1e11, latency_s: float = 1e-5, **values: Any) -> str:
        steady = {"micro_s": [0.1] * 3, "rest_s": [0.02] * 3}
        return scaling.epoch(
            trace_of(**GPU | steady | values), 64, cluster_of(rate, latency_s), data or data_of()
        ).limit

    assert limit(rate=4e11) == "computing"
    assert limit(rate=1e9) == "bandwidth"
    assert limit(rate=4e11, latency_s=5e-3) == "latency"
    assert limit(micro_s=[0.1, 0.1, 0.2]) == "slowest rank"
    assert limit(data_of(disk_bytes_per_s=1e5)) == "reading"


# ---- the data, against the code that moves it


def test_the_copys_requests_are_those_of_the_mirror(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[str] = []
    for name in ("read", "copy_to"):
        original = getattr(storage.LocalStorage, name)
        monkeypatch.setattr(
            storage.LocalStorage,
            name,
            lambda self, what, *more, original=original: (requests.append(what), original(self, what, *more))[1],
        )
    for _ in range(2):  # ranks of a node
        cache.local_folder(shard_folder, tmp_path)
    index = json.loads((shard_folder / "index.json").read_text())
    counts = {split: entry["num_radiographs"] for split, entry in index["splits"].items()}
    data = data_of(radiographs=counts["train"] + counts["tune"], num_valid=counts["valid"], tune=0.1)
    assert len(index["splits"]) == data.num_shards == 3
    assert len(requests) == scaling.epoch(trace_of(processors=None), 2, cluster_of(), data).gets


def test_a_samples_bytes_are_those_of_the_tars(shard_folder: Path) -> None:
    for path in shard_folder.glob("*.tar"):
        number = len((path.with_suffix(".crc")).read_text().splitlines())
        remainder = path.stat().st_size - number * scaling.sample_bytes("raw", Shards.open(shard_folder).size)
        assert 0 <= remainder <= 20 * 512, "the end of a tar"
    assert scaling.sample_bytes("jpeg", 320) < scaling.sample_bytes("png", 320) < scaling.sample_bytes("raw", 320)


def test_planning_ten_million() -> None:
    """Memory, which a busy machine does not change: 200 MiB with the rows. Its time: tools/scaling/scale.py planning."""
    rows = np.arange(10_000_000)
    peak = planning.peak_bytes(rows, 256, 8)
    assert rows.nbytes <= peak <= 1.1 * rows.nbytes
    assert peak + rows.nbytes < 200 * 2**20


def test_planning_counts_every_micro_batch() -> None:
    measured = planning.measure(10_000, 4, 8)
    assert measured["epoch_s"] / measured["micro_us"] * 1e6 == pytest.approx(10_000 // 32)
    assert "10,000 radiographs, 4 ranks" in planning.format_row(measured)


# ---- files and words


@pytest.mark.parametrize("text", ["none", "300Mb/s", "25Gb/s:10us", "1.5Gb/s:5ms"])
def test_a_network_is_written_as_it_is_read(text: str) -> None:
    assert str(Network.parse(text)) == text


@pytest.mark.parametrize("text", ["", "0Gb/s", "25", "25GB/s", "1Gb/s:5", "1Gb/s:", "-1Gb/s"])
def test_what_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="must be a bandwidth above 0, perhaps with a latency, as 25Gb/s:10us"):
        Network.parse(text)


def test_a_trace_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace_of(assumed=["a"]).save(path)
    assert Trace.load(path) == trace_of(assumed=["a"])
    for text, says in (("{", "is not a trace"), ('{"device": "cpu"}', "is not a trace"), ("[]", "is not a trace")):
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            Trace.load(path)
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        Trace.load(path)
    trace_of(micro_s=[]).save(path)
    with pytest.raises(UserError, match="holds 0 samples"):
        Trace.load(path)


def test_the_table_and_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "trace.json", tmp_path / "scaling.png"
    trace_of(**GPU).save(path)
    assert scale.main(["predict", "--trace", str(path), "--plot", str(picture), "--network", "25Gb/s:10us"]) == 0
    lines = (output := capsys.readouterr().out).splitlines()
    table = lines[lines.index("25Gb/s:10us between nodes") + 2 :][:9]
    assert [int(line.split()[0]) for line in table] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    data = data_of(bytes_each=scaling.sample_bytes("raw", 320))
    for line in table:
        row = scaling.epoch(trace_of(**GPU), int(line.split()[0]), cluster_of(25e9), data)
        assert f" {1e3 * row.step_s:.1f} " in line
        assert f" {row.efficiency:.1%} " in line
    assert "GETs" in output
    assert "  given: $3 a GPU and hour" in output
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert len(image.convert("L").getcolors()) > 20


def test_a_gpu_nobody_measured_is_named_so() -> None:
    done = run("python", SCALE, "predict", "--images-per-s", 600, "--gpus", "1,3,512", "--global-batch", 4096)
    assert done.returncode == 0, done.stderr
    assert "  given: a GPU trains 600 images/s in micro-batches of 16 (bf16)" in done.stdout
    assert "25.0 MB of gradient" in done.stdout
    assert done.stdout.count("a global batch of 4096 is no multiple of 16 x 3; the nearest is 4080") == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["predict"], "give either --trace FILE"),
        (["predict", "--images-per-s", "0"], "--images-per-s 0.0: must be at least 0.001"),
        (["predict", "--images-per-s", "5", "--gpus", "0"], "--gpus 0: must be numbers of at least 1"),
        (["predict", "--images-per-s", "5", "--network", "fast"], "network 'fast': must be a bandwidth"),
        (["predict", "--images-per-s", "5", "--tune", "1"], "--tune 1.0: must be less than 1"),
        (["predict", "--images-per-s", "5", "--plot", "a.pdf"], "the plot is a PNG"),
        (["predict", "--trace", "none.json"], "none.json: No such file or directory; make one with"),
        (["measure", "--out", "t.json", "--micro-batch", "1"], "--micro-batch 1: must be at least 2"),
        (["check", "--ranks", "two"], "--ranks two: must be numbers of at least 1"),
        (["check", "--rounds", "0"], "--rounds 0: must be at least 1"),
        (["planning", "--radiographs", "10"], "must be at most --radiographs 10"),
    ],
)
def test_a_wrong_request_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scale.main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1), err
    assert err.startswith("scale.py: ")
    assert says in err


def test_every_option_is_explained() -> None:
    commands = scale.parser()._subparsers._group_actions[0].choices
    assert set(commands) == {"measure", "check", "predict", "planning"}
    assert all(action.help for command in commands.values() for action in command._actions)
    done = run("python", SCALE, "check", "--help")
    assert done.returncode == 0
    assert "--network" in done.stdout
    refused = run("python", COMMUNICATION, "--ranks", "1")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)


# ---- real runs, of two ranks


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(TINY, 2) as ranks:
        yield ranks


@pytest.fixture
def started(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts two ranks gets these: each start takes seconds."""
    for module in (communication, trials):
        monkeypatch.setattr(module, "Fleet", lambda job, ranks: contextlib.nullcontext(fleet))
    monkeypatch.setattr(networks, "lacking", lambda: "not here")
    monkeypatch.setattr(trials, "_at_once", lambda: (2, 2))


@pytest.mark.usefixtures("started")
def test_two_real_ranks_with_and_without_communication() -> None:
    lines: list[str] = []
    (measured,) = communication.measure(TINY, [2], rounds=2, log=lines.append)
    weights, norms = trials.sizes("tiny")
    assert (measured["ranks"], measured["gradient_type"], measured["gradient_bytes"]) == (2, "float32", 4 * weights)
    assert measured["vector_bytes"] == 4 * (scaling.head_length(2) + 2 + norms)
    for key in ("step_s", "together_s", "alone_s", "bare_s", "sent_s"):
        assert 0 < measured[key]["min"] <= measured[key]["median"] <= measured[key]["max"]
    assert lines[0].startswith("2 ranks: step ")


def test_ranks_alone_do_not_hear_each_other_and_then_they_do_again(fleet: Fleet) -> None:
    """What is left out is left out of that turn only; forward and backward are timed in those that have them."""
    kinds = ("alone", "step", "together", "bare", "small", "tiny", "evaluation")
    turns = {what: fleet.play(what) for what in kinds}
    assert all(turn.seconds >= max(turn.own_s) > 0 for turn in turns.values())
    assert {what: len(turn.sent_s) for what, turn in turns.items() if turn.sent_s} == {
        "step": 2,
        "together": 2,
    }
    assert {what: [len(micros) for micros in turn.micros_s] for what, turn in turns.items() if turn.micros_s[0]} == {
        "alone": [1, 1],
        "step": [1, 1],
        "together": [1, 1],
    }


def test_every_measured_step_is_the_same() -> None:
    """However many: weights that moved by noise ended in gradients that are not finite."""
    with process_group.join(30) as world:
        player = _Player(TINY, world)
        before = player.engine.flat.weights.detach().clone()
        for what in ("alone", "step", "together", "bare", "step"):
            player.play(what)
        assert torch.equal(player.engine.flat.weights, before)


def test_a_rank_that_ends_is_named() -> None:
    with (
        pytest.raises(RunError, match=r"rank [01] of 2 ended"),
        Fleet(dataclasses.replace(TINY, architecture="none"), 2),
    ):
        pass


@pytest.mark.usefixtures("started")
def test_a_trace_and_a_run_of_two(tmp_path: Path) -> None:
    trace = trials.measure(TINY, rounds=2, provenance={"command": "test"}, log=lambda line: None)
    weights, norms = trials.sizes("tiny")
    assert (trace.gradient_bytes, trace.fixed_bytes) == (4 * weights, 4 * norms)
    assert len(trace.micro_s) == len(trace.rest_s) == len(trace.evaluation_s) > 0
    assert min(trace.micro_s) > 0
    trace.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json") == trace
    for source in (trace, None):
        (measured,) = trials.check(source, TINY, [2], [Network.parse("none")], rounds=2, log=lambda line: None)
    assert measured["error"] == pytest.approx(measured["predicted_s"] / measured["step_s"]["median"] - 1)
    assert measured["sent_bytes"] is None


SEND = """
import socket, time
with socket.create_connection(("{}", 9000)) as line:
    started = time.monotonic()
    line.sendall(bytes(1 << 20))
    line.shutdown(socket.SHUT_WR)
    line.recv(1)
    print(time.monotonic() - started)
"""
HEAR = """
import socket
with socket.create_server(("", 9000)) as door:
    print("ready", flush=True)
    with door.accept()[0] as line:
        while line.recv(1 << 16):
            pass
        line.sendall(b"!")
"""


def seconds_of_a_mebibyte(spaces: Spaces) -> float:
    """From the second rank's namespace to the first one's."""
    inside = [["ip", "netns", "exec", name, sys.executable, "-c"] for name in spaces.names]
    with subprocess.Popen([*inside[0], HEAR], stdout=subprocess.PIPE, text=True) as hearer:
        assert hearer.stdout is not None
        assert hearer.stdout.readline() == "ready\n"
        answer = subprocess.run([*inside[1], SEND.format(spaces.address)], capture_output=True, text=True, check=True)
    return float(answer.stdout)


@pytest.mark.skipif(bool(LACKING), reason=LACKING)
def test_namespaces_come_with_their_links_and_go() -> None:
    with Spaces(2) as spaces:
        assert set(networks.leftovers()) > set(spaces.names)
        with Spaces(1) as second:
            assert len(networks.leftovers()) == 3 + len(second.names) + 1, "a bridge each"
        spaces.limit(Network.parse("10Mb/s"))
        before = spaces.sent_bytes()
        assert seconds_of_a_mebibyte(spaces) > 0.6, "0.88 s, but for a burst of 256 KiB at the start"
        sent = [now - then for now, then in zip(spaces.sent_bytes(), before, strict=True)]
        assert 0 < sent[0] < 0.2 * sent[1]
        assert sent[1] == pytest.approx(Network.parse("10Mb/s").framed(1 << 20), rel=0.05)
        spaces.limit(Network.parse("none"))
    assert networks.leftovers() == []
    with pytest.raises(ZeroDivisionError), Spaces(1):
        raise ZeroDivisionError
    assert networks.leftovers() == []


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="take root; run this as root, or leave the networks out with --network none"):
        Spaces(2)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="ip and tc not found; install iproute2"):
        Spaces(2)


@pytest.mark.slow
@pytest.mark.skipif(bool(LACKING), reason=LACKING)
def test_a_check_over_a_far_link(tmp_path: Path) -> None:
    """Two ranks of a small network: the bytes are those predicted, and over 100 ms the way is what takes the time."""
    numbers = tmp_path / "check.json"
    arguments = ("--architecture", "tiny", "--size", 32, "--ranks", 2, "--rounds", 3)
    arguments += ("--network", "none", "--network", "1Gb/s:100ms")
    done = run("python", SCALE, "check", *arguments, "--json", numbers, "--plot", tmp_path / "check.png")
    assert done.returncode == 0, done.stderr
    near, far = json.loads(numbers.read_text())["runs"]
    assert (
        0 <= near["sent_bytes"] - near["predicted_bytes"] < 6_000
    )  # of 14 kB in bf16, 27 in fp32: acknowledgements count
    assert far["step_s"]["median"] >= 0.4, "two all-reduces, each there and back"
    assert far["parts"]["latency_s"] >= 0.4
    with Image.open(tmp_path / "check.png") as image:
        assert image.format == "PNG"
    with contextlib.suppress(FileNotFoundError):
        assert not [name for name in os.listdir("/run/netns") if name.startswith("mura")]
