"""Test a step, an evaluation and a run on a GPU against the CPU's values."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import gpu
from helpers.commands import TINY, free_port
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from mura_dist.core import config
from mura_dist.data.loaders.loader import Batch, BatchLoader, RowTargets
from mura_dist.data.shards.reader import Shards
from mura_dist.distributed import process_group
from mura_dist.distributed.process_group import World
from mura_dist.models import densenet
from mura_dist.training import metrics_log, validation
from mura_dist.training.engine import Engine
from mura_dist.training.run import Run

pytestmark = gpu.MARKS
NUM_MICROS = 2
STEPS = ["eager", "graph"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def alone() -> Iterator[World]:
    with process_group.join(60) as world:
        yield world


def settings(architecture: str, micro_batch: int, **values: object) -> config.Settings:
    sizes = {"micro_batch": micro_batch, "global_batch": NUM_MICROS * micro_batch}
    defaults = {"shards": "", "run": "", "architecture": architecture}
    return config.check(defaults | sizes | values, "test")


def shades(number: int, size: int, seed: int) -> Tensor:
    """Return smooth images with noise, as radiographs are: uint8 (number, 1, size, size)."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, 1, 9, 9, generator=random) * 200
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (smooth + torch.rand(smooth.shape, generator=random) * 55).to(torch.uint8)


def batches(number: int, size: int, seed: int, device: torch.device) -> list[Batch]:
    label, weight = (torch.arange(number) % 2).float(), torch.ones(number)
    tensors = [
        (shades(number, size, seed + 100 * micro), label, weight, weight.long(), weight.bool()) for micro in range(2)
    ]
    return [Batch(*(tensor.to(device) for tensor in each)) for each in tensors]


def cpu_loss(architecture: str, number: int, size: int, seed: int) -> float:
    """Return the mean cross-entropy of the untrained network in fp32 on the CPU."""
    network = densenet.build(architecture, seed=1).train()
    losses = []
    for batch in batches(number, size, seed, torch.device("cpu")):
        with torch.no_grad():
            logit, _ = network(batch.image)
        losses.append(binary_cross_entropy_with_logits(logit, batch.label).item())
    return float(np.mean(losses))


TINY_BATCH, LARGE_BATCH = ("tiny", 16, 64), ("densenet169", 4, 96)  # architecture, radiographs, px


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("precision", "tolerance", "network"),
    [
        ("fp32", 1e-4, TINY_BATCH),
        ("fp32", 1e-4, LARGE_BATCH),
        ("bf16", 1e-2, TINY_BATCH),
        ("bf16", 1e-2, LARGE_BATCH),
        ("fp16", 1e-2, TINY_BATCH),
    ],
)
def test_first_step_equals_the_cpus(
    alone: World,
    capsys: pytest.CaptureFixture[str],
    step: str,
    precision: str,
    tolerance: float,
    network: tuple[str, int, int],
) -> None:
    """Its loss is within the tolerance of the CPU's in fp32. The convolutions use the recipe's precision."""
    architecture, number, size = network
    chosen = settings(architecture, number, precision=precision, step=step)
    engine = Engine(densenet.build(architecture, seed=1), chosen, alone)
    dtypes = set()
    hook = engine.model.features.conv0.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    result = engine.step(batches(number, size, 7, gpu.DEVICE), 1e-4)
    hook.remove()
    assert dtypes == {DTYPES[precision]}
    assert result.applied
    assert result.loss == pytest.approx(cpu_loss(architecture, number, size, 7), abs=tolerance)
    assert "step=eager" not in capsys.readouterr().err, "no fall back"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graph_trains_like_eager(alone: World, precision: str) -> None:
    """The losses of ten steps are equal up to the order of additions on a GPU."""
    losses = {}
    for step in STEPS:
        engine = Engine(densenet.build("tiny", seed=1), settings("tiny", 8, precision=precision, step=step), alone)
        losses[step] = [engine.step(batches(8, 64, seed, gpu.DEVICE), 1e-3).loss for seed in range(10)]
    tolerance = 1e-3 if precision == "fp32" else 2e-2
    np.testing.assert_allclose(losses["graph"], losses["eager"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("architecture", ["tiny", "densenet121"])
def test_dense_block_gradients_in_fp64_equal_the_cpus(architecture: str) -> None:
    gradients = []
    for device in (torch.device("cpu"), gpu.DEVICE):
        network = densenet.build(architecture, seed=1).double().train().to(device, memory_format=torch.channels_last)
        logit, _ = network(shades(4, 64, 3).to(device))
        (logit * torch.linspace(-1, 1.5, 4, dtype=torch.float64, device=device)).sum().backward()
        gradients.append([parameter.grad.cpu() for parameter in network.parameters()])
    norm = torch.cat([gradient.flatten() for gradient in gradients[0]]).norm()
    for on_cpu, on_gpu in zip(*gradients, strict=True):
        assert float((on_cpu - on_gpu).norm() / norm) < 1e-10


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("arguments", [{}, {"ema": 0.9, "clip_norm": 1.0}])
def test_host_synchronizes_once_a_step(alone: World, step: str, arguments: dict[str, float]) -> None:
    engine = Engine(densenet.build("tiny"), settings("tiny", 8, precision="bf16", step=step, **arguments), alone)
    several = [batches(8, 64, seed, gpu.DEVICE) for seed in range(4)]
    for each in several[:3]:
        engine.step(each, 1e-4)
    waits = gpu.host_waits(lambda: engine.step(several[3], 1e-4)) if gpu.CUDA else ["engine.py:1"]
    assert len(waits) == 1, waits
    assert waits[0].startswith("engine.py:")


def test_scores_equal_the_cpus(alone: World, shard_folder: Path) -> None:
    """In fp32, for batches of at most 256 on a GPU and the micro-batch on a CPU."""
    shards = Shards.open(shard_folder)
    rows, chosen = shards.rows("train"), settings("tiny", 4, pipeline="cpu")
    model = densenet.build("tiny", seed=1).eval()
    loading = BatchLoader.from_settings(chosen, shards, RowTargets.from_shards(shards), gpu.DEVICE)
    scores = validation.score_rows(model.to(gpu.DEVICE), rows, loading, alone)
    images = torch.from_numpy(np.stack([shards.read_pixels(row) for row in rows])[:, None])
    with torch.inference_mode():
        logits = model.cpu()(images)[0].numpy()
    assert np.array_equal(scores.rows, rows)
    np.testing.assert_allclose(scores.logit, logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "starts"),
    [
        (("precision=bf16",), (1, 2)),
        (("zero_stage=1", "ema=0.9"), (1,)),
        (("step=graph", "pipeline=resident", "micro_batch=auto"), (1,)),
    ],
)
def test_run_resumes_on_gpu(
    shard_folder: Path, tmp_path: Path, arguments: tuple[str, ...], starts: tuple[int, ...]
) -> None:
    """The run stops after an epoch and resumes. Its first loss is close to the CPU's."""
    settings = [*TINY, f"shards={shard_folder}", *arguments]
    for epochs in starts:
        arguments = (*settings, f"run={tmp_path / 'run'}", f"epochs={epochs}")
        result = gpu.python("-m", "mura_dist.train", *arguments)
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
    lines = metrics_log.read(tmp_path / "run" / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    assert len(losses) >= 8 * len(starts)
    assert np.isfinite(losses).all()
    if "micro_batch=auto" in arguments:  # another BatchNorm group than TINY's
        return
    arguments = [*settings, f"run={tmp_path / 'cpu'}", "precision=fp32", "epochs=1", "--quiet"]
    assert gpu.python("-m", "mura_dist.train", *arguments, hide_gpu=True).returncode == 0
    on_cpu = [line["loss"] for line in metrics_log.read(tmp_path / "cpu" / "metrics.jsonl") if line["kind"] == "step"]
    assert losses[0] == pytest.approx(on_cpu[0], abs=1e-2)


LATE = """
import time
import torch
import torch.distributed as dist
from mura_dist.distributed import nccl, process_group
with process_group.join(60):
    vector = torch.ones(3, device="cuda")
    dist.all_reduce(vector)
    torch.cuda._sleep(20_000_000_000)  # cycles: about ten seconds
    begin = time.monotonic()
    try:
        dist.all_reduce(vector)
        nccl.wait(nccl.record_event(), 1.0)
    except RuntimeError:
        print(f"waited {time.monotonic() - begin:.1f} s", flush=True)
"""


@pytest.mark.skipif(not gpu.CUDA, reason="NCCL needs a CUDA device; tests/distributed/test_nccl.py shows it over gloo")
def test_hanging_collective_raises() -> None:
    begin = time.monotonic()
    done = gpu.python("-c", LATE)
    assert "waited 1." in done.stdout, done.stderr
    assert time.monotonic() - begin < 90


@pytest.mark.skipif(gpu.CUDA and torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each of two ranks")
def test_silent_rank_is_reported(shard_folder: Path, tmp_path: Path) -> None:
    """The other rank waits collective_timeout_s, logs a line and exits with 1. status.json has state failed."""
    settings = [*TINY, "epochs=500", "collective_timeout_s=10", f"shards={shard_folder}", f"run={tmp_path / 'run'}"]
    rendezvous = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    command = [sys.executable, "-m", "mura_dist.train", *settings]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **rendezvous, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        log, begin = tmp_path / "run" / "metrics.jsonl", time.monotonic()
        while not (log.is_file() and '"kind": "step"' in log.read_text()):
            assert all(rank.poll() is None for rank in ranks), ranks[0].communicate()[1]
            assert time.monotonic() - begin < 120
            time.sleep(0.2)
        ranks[1].send_signal(signal.SIGSTOP)
        _, stderr = ranks[0].communicate(timeout=100)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[0].returncode == 1
    assert "rank 0 lost another rank (" in stderr
    assert "The same command resumes from the last checkpoint" in stderr
    assert Run.load(tmp_path / "run").status()["state"] == "failed"


def test_command_logs_the_device(shard_folder: Path, tmp_path: Path) -> None:
    arguments = [*TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "epochs=0"]
    done = gpu.python("-m", "mura_dist.train", *arguments)
    assert done.returncode == 0, done.stderr
    loader = "(dali|cpu)" if gpu.CUDA else "cpu"  # cpu where DALI is missing
    assert re.search(f"fp32 on {gpu.DEVICE.type}, batches by {loader} ", done.stderr), done.stderr
