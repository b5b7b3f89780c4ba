"""Measure mura_dist on a GPU in stages, or run the same code without CUDA at a tiny size.

python tools/bench/gpu.py [--out DIR] [--stages env,data,...] [--budget 480] [--data FOLDER] [--scratch FOLDER] [--tests WORDS]

    stages, each a process with a time limit -> DIR/gpu_check.jsonl, a line per measurement, written at once
        -> DIR/gpu_check.json, all measurements; DIR/logs.log, output of the tests and of failed stages -> a table

The tool runs from the root of a checkout and needs no network. A killed stage keeps its measurements, and the next stage runs.
The state of a stage is "ok", "skipped: reason", "failed: error" or "stopped after N s". A stage that needs DeepSpeed is
skipped if it is not installed. Measurements that need DALI or ONNX Runtime's CUDA provider are skipped if these are missing.

On a GPU, an error in a measurement is recorded and the stage continues. On a CPU, it ends the stage, so that a rehearsal detects
it. Exit status: 0 if every stage is ok or skipped, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, conv2d

if TYPE_CHECKING:  # each stage imports what it uses, so that a failing import affects one stage only
    from mura_dist.data.loaders.loader import Batch, RowTargets
    from mura_dist.data.loaders.sampler import MicroBatch
    from mura_dist.data.shards.reader import Shards

ROOT = Path.cwd()
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
ARCHITECTURE, SIZE = ("densenet169", 320) if CUDA else ("tiny", 64)  # SIZE: px
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROTATE_DEG = 30.0
ENCODINGS = ("raw", "jpeg", "png")
BUDGET_S, SLOW_CPU = 480.0, 10  # of all stages; factor on a stage's limit without CUDA
WARM_WAIT_S, REST_S = 60.0, 150.0  # longest wait for `warm`, if the budget then has REST_S for the stages after it


# ---- what every stage needs


class SkippedError(Exception):
    """The stage cannot run on this machine. The text is the reason."""


class Recorder:
    """Writer that appends each measurement to a file at once and prints it."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage
        self.num_failed = 0

    def __call__(self, what: str, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"stage": self.stage, "what": what, **values}, default=str) + "\n")
        print(f"  {self.stage:9} {what:46} " + "  ".join(f"{k}={short(v)}" for k, v in values.items()), flush=True)

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Record an error and continue with CUDA. Without CUDA, raise it."""
        try:
            yield
        except torch.OutOfMemoryError:
            self(what, out_of_memory=True)
        except Exception as error:
            if not CUDA:
                raise
            self.num_failed += 1
            self(what, failed=(str(error).splitlines() or [repr(error)])[0][:200])


def short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:90]


def is_installed(name: str) -> bool:
    with contextlib.suppress(ImportError, ValueError):
        return importlib.util.find_spec(name) is not None
    return False


@functools.cache
def imports_dali() -> bool:
    """Return whether DALI imports, tried in a new process. An installed folder of that name is not enough."""
    code = "import nvidia.dali.fn, nvidia.dali.plugin.pytorch"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def free_memory() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float | None:
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if CUDA else None


class Timing(NamedTuple):
    """Milliseconds of a call.

    `ms`: median on the device. `wall_ms`: mean by the wall clock. `host_ms`: median until the call returns to the host.
    """

    ms: float
    wall_ms: float
    host_ms: float


def measure(call: Callable[[], object], seconds: float = 1.0, *, num_warmup: int = 3) -> Timing:
    """Time a call repeated for `seconds`, at most 400 times. Without CUDA, time it once."""
    for _ in range(num_warmup if CUDA else 1):
        call()
    synchronize()
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    host_ms: list[float] = []
    started = time.perf_counter()
    while not host_ms or (CUDA and time.perf_counter() - started < seconds and len(host_ms) < 400):
        if CUDA:
            events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            events[-1][0].record()
        call_started = time.perf_counter()
        call()
        host_ms.append(1e3 * (time.perf_counter() - call_started))
        if CUDA:
            events[-1][1].record()
    synchronize()
    wall_ms = 1e3 * (time.perf_counter() - started) / len(host_ms)
    device_ms = [start.elapsed_time(end) for start, end in events] if CUDA else host_ms
    return Timing(statistics.median(device_ms), wall_ms, statistics.median(host_ms))


def record_rate(
    record: Recorder, what: str, number: int, call: Callable[[], object], seconds: float = 0.8, **values: Any
) -> None:
    """Measure a call that processes `number` images, and record images/s."""
    timing = measure(call, seconds)
    rate = 1e3 * number / timing.wall_ms
    record(what, images_per_s=rate, ms=timing.ms, host_ms=timing.host_ms, peak_gb=peak_gb(), **values)


def capture_graph(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Return the call as one CUDA graph, and its output, which each replay overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph.replay, output


def random_images(number: int) -> Tensor:
    return torch.randint(0, 256, (number, 1, SIZE, SIZE), dtype=torch.uint8, device=DEVICE)  # (B, 1, S, S) uint8


def alternating_labels(number: int) -> Tensor:
    return (torch.arange(number, device=DEVICE) % 2).float()  # (B,) float32


def package_network() -> nn.Module:
    from mura_dist.models import densenet

    return densenet.build(ARCHITECTURE).to(DEVICE).train()


def torchvision_network() -> nn.Module:
    from torchvision.models.densenet import DenseNet

    from mura_dist.models.densenet import ARCHITECTURES

    return DenseNet(*ARCHITECTURES[ARCHITECTURE], num_classes=1).to(DEVICE).train()


def autocast(precision: str, *, cache: bool = True) -> torch.autocast:
    dtype = DTYPES.get(precision, torch.bfloat16)
    return torch.autocast(DEVICE.type, dtype=dtype, enabled=precision in DTYPES, cache_enabled=cache)


@dataclass(frozen=True)
class StepOptions:
    """Options of a training step (zero, forward, backward, Adam) outside the engine.

    flat: all parameters as one vector, as in the engine. capturable: for a CUDA graph. compiled: a mode of torch.compile, "" for
    none.
    """

    network: str  # ours or torchvision
    precision: str
    channels_last: bool = True
    flat: bool = True
    capturable: bool = False
    compiled: str = ""

    def __str__(self) -> str:
        if self.network == "ours" or self.flat:
            return f"{self.network} {self.precision}"
        return f"{self.network} {self.precision}{' channels-last' if self.channels_last else ''}"


class Trainer:
    """A network and its optimizer. `step` returns a training step on any batch."""

    def __init__(self, options: StepOptions) -> None:
        from mura_dist.training.flat_parameters import FlatParameters

        self.options = options
        self.layout = torch.channels_last if options.channels_last else torch.contiguous_format
        network = (
            package_network() if options.network == "ours" else torchvision_network().to(memory_format=self.layout)
        )
        fused: dict[str, Any] = {"lr": 1e-4, "fused": CUDA or options.flat, "capturable": options.capturable}
        self.zero: Callable[[], object]
        if options.flat:
            flat = FlatParameters(network, channels_last=options.channels_last)
            self.optimizer, self.zero = torch.optim.Adam([flat.weights], **fused), flat.gradient.zero_
        else:
            self.optimizer = torch.optim.Adam(network.parameters(), **fused)
            self.zero = self.optimizer.zero_grad
        self.network: Callable[[Tensor], Any] = network
        if options.compiled:
            compile_options: dict[str, Any] = (
                {"mode": options.compiled} if CUDA else {"backend": "aot_eager"}  # needs no C++ compiler
            )
            self.network = torch.compile(network, dynamic=False, **compile_options)

    def example(self, number: int) -> Tensor:
        """Return a random batch of the network's input."""
        if self.options.network == "ours":
            return random_images(number)
        return torch.randn(number, 3, SIZE, SIZE, device=DEVICE).to(memory_format=self.layout)

    def step(self, image_of: Callable[[], Tensor], label_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return a function that takes one step and returns its loss."""

        def step() -> Tensor:
            self.zero()
            image = image_of()
            if self.options.compiled == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            with autocast(self.options.precision, cache=not self.options.capturable):
                output = self.network(image)
                logit: Tensor = output[0] if self.options.network == "ours" else output[:, 0]  # (B,)
            loss = binary_cross_entropy_with_logits(logit.float(), label_of())
            loss.backward()
            self.optimizer.step()
            return loss

        return step

    def step_on_example(self, number: int) -> Callable[[], Tensor]:
        """Return a step on one random batch."""
        image, label = self.example(number), alternating_labels(number)
        return self.step(lambda: image, lambda: label)


# ---- the machine


def stage_env(record: Recorder, options: argparse.Namespace) -> None:
    """Record versions, the device, and which modules import."""
    record("python", version=sys.version.split()[0], executable=sys.executable)
    names = (
        "torch torchvision triton numpy pandas deepspeed onnx onnxruntime onnxruntime-gpu pydantic cupy-cuda13x "
        "opencv-python-headless scikit-learn pydicom safetensors tensorboard matplotlib rich click nvidia-dali-cuda130 "
        "tensorrt pytest-xdist"
    )
    versions = dict.fromkeys(names.split(), "NO")
    for name in versions:  # without imports, which take seconds
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    record("packages", **versions)
    if shutil.which("git"):
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
        record("commit", hash=commit.stdout.strip())
    record_device(record)
    ram_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    record("host", cores=os.cpu_count(), ram_gib=ram_gib)
    if is_installed("onnxruntime"):
        import onnxruntime

        record("onnxruntime providers", providers=",".join(onnxruntime.get_available_providers()))
    modules = ("mura_dist.train", "mura_dist.inference.export.onnx", "mura_dist.data.loaders.dali")
    commands = {name: [sys.executable, "-c", f"import {name}"] for name in modules}
    imports = {name: subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for name, command in commands.items()}
    for name, process in imports.items():
        error = process.communicate()[1].strip().splitlines()[-1:]
        with record.attempt(f"import {name}"):
            if process.returncode and (name != modules[-1] or imports_dali()):
                raise ImportError(error[0] if error else f"status {process.returncode}")
            record(f"import {name}", ok=process.returncode == 0)


def record_device(record: Recorder) -> None:
    if not CUDA:
        record("gpu", name="none: everything runs at a tiny size")
        return
    properties = torch.cuda.get_device_properties(0)
    record(
        "gpu",
        name=properties.name,
        sms=properties.multi_processor_count,
        gib=properties.total_memory / 2**30,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        nccl=torch.cuda.nccl.version(),
        bf16=torch.cuda.is_bf16_supported(including_emulation=False),
    )
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    with record.attempt("nvidia-smi"):
        line = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
        record("nvidia-smi", line=line.stdout.strip())


def stage_roofline(record: Recorder, options: argparse.Namespace) -> None:
    """Measure the limits of the device: copies, matrix products, the network's two kinds of convolution, launches."""
    num_bytes = 2**32 if CUDA else 2**22
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=DEVICE)
    ms = measure(functools.partial(torch.empty_like(source).copy_, source), 0.5).ms
    record("copy on the device", tb_per_s=2 * num_bytes / ms / 1e9)
    del source
    free_memory()
    side = 8192 if CUDA else 128
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
        ms = measure(functools.partial(torch.matmul, a, b), 0.4).ms
        record(f"matmul {side} {dtype}".replace("torch.", ""), tflops=2 * side**3 / ms / 1e9)
    # Convolutions of block 3 (20x20 cells) in bf16, channels-last, by cuDNN.
    batch = 256 if CUDA else 2
    for name, (channels, out, kernel) in {"1x1 768->128": (768, 128, 1), "3x3 128->32": (128, 32, 3)}.items():
        x, weight = (
            torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
            for shape in ((batch, channels, 20, 20), (out, channels, kernel, kernel))
        )
        flops = 2 * batch * 400 * channels * out * kernel * kernel
        num_bytes = 2 * (x.numel() + batch * 400 * out)
        for benchmark in (False, True):
            torch.backends.cudnn.benchmark = benchmark
            ms = measure(functools.partial(conv2d, x, weight, padding=kernel // 2), 0.2).ms
            record(
                f"conv {name} benchmark={benchmark}",
                tflops=flops / ms / 1e9,
                tb_per_s=num_bytes / ms / 1e9,
                us=1e3 * ms,
            )
    host = torch.empty(2**28 if CUDA else 2**20, dtype=torch.uint8, pin_memory=CUDA)
    device = torch.empty_like(host, device=DEVICE, pin_memory=False)
    ms = measure(lambda: device.copy_(host, non_blocking=True), 0.3).ms
    record("host to device, pinned", gb_per_s=host.numel() / ms / 1e6)
    counter = torch.zeros(1, device=DEVICE)
    wall_ms = measure(lambda: [counter.add_(1) for _ in range(200)], 0.3).wall_ms
    record("a small kernel, launched from Python", us=1e3 * wall_ms / 200)


# ---- shards, tests


def stage_data(record: Recorder, options: argparse.Namespace) -> None:
    """Convert shards for the later stages, from repeated radiographs of --data or from phantoms."""
    from mura_dist.bench.workload import Options, prepare
    from mura_dist.data.shards.convert import convert

    prepared, started = options.scratch / "prepared", time.perf_counter()
    folders = {encoding: options.scratch / f"shards-{encoding}" for encoding in ENCODINGS}
    for path in (prepared, *folders.values()):
        shutil.rmtree(path, ignore_errors=True)
    workers = min(16, os.cpu_count() or 1)
    source = options.data if options.data is not None and options.data.is_dir() else None
    load = prepare(Options(data=source, workers=workers), prepared, size=SIZE, number=4000 if CUDA else 60)
    seconds, real = time.perf_counter() - started, source is not None
    record("folder", files=len(load.paths), distinct=load.num_files, seconds=seconds, real=real)
    for encoding, folder in folders.items():
        started = time.perf_counter()
        convert(load.folder, folder, size=SIZE, encoding=encoding, workers=workers)
        seconds = time.perf_counter() - started
        rate = len(load.paths) / seconds
        record(f"conversion, {encoding}", images_per_s=rate, seconds=seconds, workers=workers)


def stage_tests(record: Recorder, options: argparse.Namespace) -> None:
    """Run tests/gpu in parallel processes that share the GPU. --tests: pytest's -k."""
    expression = options.tests
    if not is_installed("deepspeed"):
        record("skipped", why="training tests need DeepSpeed")
        expression = f"({expression}) and not training" if expression else "not training"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "--durations=12", "-rA"]
    if is_installed("xdist") and CUDA:
        command += ["-n", "9"]
    command += ["-k", expression] if expression else []
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    (options.out / "test_gpu.log").write_text(result.stdout[-200_000:] + result.stderr[-50_000:])
    for line in result.stdout.splitlines():
        summary = " in " in line and any(word in line for word in ("passed", "skipped", "failed"))
        if summary or line.startswith(("PASSED", "FAILED", "ERROR", "SKIPPED")):
            record("pytest", line=line[:200])
    if result.returncode:
        raise RuntimeError(f"pytest exited with status {result.returncode}. Its output is in logs.log.")


# ---- the training step


def stage_engine(record: Recorder, options: argparse.Namespace) -> None:
    """Measure the engine with one rank, eager and as a graph: precision, images/s, waits for the GPU, host time."""
    if not is_installed("deepspeed"):
        raise SkippedError("DeepSpeed is not installed")
    from mura_dist.distributed import process_group

    with process_group.join(120.0) as world:
        for step in ("eager", "graph"):
            for number in (64, 8, 256) if CUDA else (2,):
                with record.attempt(f"engine {step} batch {number}"):
                    measure_engine(record, step, number, world)


def measure_engine(record: Recorder, mode: str, number: int, world: Any) -> None:
    from mura_dist.core import config
    from mura_dist.data.loaders.loader import Batch
    from mura_dist.models import densenet
    from mura_dist.training.checked_network import CheckedNetwork
    from mura_dist.training.engine import Engine

    free_memory()
    values = {"shards": "", "run": "", "architecture": ARCHITECTURE, "precision": "bf16", "step": mode}
    settings = config.check(values | {"global_batch": number, "micro_batch": number}, "gpu.py")
    engine, all_ones = Engine(densenet.build(ARCHITECTURE), settings, world), torch.ones(number, device=DEVICE)
    batch = Batch(random_images(number), alternating_labels(number), all_ones, all_ones.long(), all_ones.bool())

    def step() -> Any:
        return engine.step([batch], 1e-4)

    what = f"engine {mode} batch {number}"
    dtypes: set[str] = set()
    conv0 = engine.model.get_submodule("features.conv0")
    hook = conv0.register_forward_hook(lambda module, inputs, output: dtypes.add(str(output.dtype)))
    step()
    hook.remove()
    record(f"{what}: conv0 computes in", dtype=",".join(sorted(dtypes)), as_asked=dtypes == {"torch.bfloat16"})
    if CUDA:
        for _ in range(4):
            step()
        record_waits(record, what, step)
    record_rate(record, what, number, step, 1.0)
    if isinstance(engine.network, CheckedNetwork):
        record(f"{what}: recorded", fell_back=engine.network.fell_back)
    host_work: dict[str, Callable[[], object]] = {
        "flat.attach": engine.flat.attach,
        "statistics.reset": engine.statistics.reset,
    }
    for name, call in host_work.items():
        record(f"{what}: host ms of {name}", ms=min(host_ms(call) for _ in range(10)))
    result = step()
    record(f"{what}: result", loss=result.loss, norm=result.gradient_norm, applied=result.applied)


def host_ms(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def record_waits(record: Recorder, what: str, step: Callable[[], object]) -> None:
    """Record how often the host waits for the GPU in a step, and in which lines."""
    with (
        mock.patch.object(torch.cuda, "synchronize", mock.Mock(wraps=torch.cuda.synchronize)) as synchronize,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    sync_warnings = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
    locations = sorted({f"{Path(warning.filename).name}:{warning.lineno}" for warning in sync_warnings})
    record(
        f"{what}: waits", synchronize_calls=synchronize.call_count, others=len(sync_warnings), where=",".join(locations)
    )


def stage_blocks(record: Recorder, options: argparse.Namespace) -> None:
    """Compare the package's dense blocks with torchvision's layers for the same weights, in fp64, fp32 and bf16."""
    from mura_dist.models import densenet

    number = 16 if CUDA else 4
    image, label = random_images(number), alternating_labels(number)

    def gradient_of(
        network: nn.Module, inputs: Tensor, logit_of: Callable[[Any], Tensor], precision: str
    ) -> tuple[Tensor, Tensor]:
        with autocast(precision):
            logit = logit_of(network(inputs))
        dtype = torch.float64 if precision == "fp64" else torch.float32
        binary_cross_entropy_with_logits(logit.to(dtype), label.to(dtype)).backward()
        gradients = [
            parameter.grad.flatten().double() for parameter in network.parameters() if parameter.grad is not None
        ]
        return logit.detach().double(), torch.cat(gradients)

    exact_gradient = torch.empty(0)
    for precision in ("fp64", "fp32", "bf16"):
        block_network = densenet.build(ARCHITECTURE).to(DEVICE, memory_format=torch.channels_last).train()
        layer_network = torchvision_network().to(memory_format=torch.channels_last)
        layer_network.load_state_dict(block_network.state_dict())
        if precision == "fp64":
            block_network, layer_network = block_network.double(), layer_network.double()
        pixels = ((image.to(block_network.mean.dtype) - block_network.mean) * block_network.scale).to(
            memory_format=torch.channels_last
        )
        logit, gradient = gradient_of(block_network, image, lambda outputs: outputs[0], precision)
        layer_logit, layer_gradient = gradient_of(layer_network, pixels, lambda outputs: outputs[:, 0], precision)
        exact_gradient = layer_gradient if precision == "fp64" else exact_gradient
        record(
            f"blocks against layers, {precision}",
            logit=float((logit - layer_logit).abs().max()),
            gradient=float((gradient - layer_gradient).norm() / layer_gradient.norm()),
            ours_to_fp64=float((gradient - exact_gradient).norm() / exact_gradient.norm()),
            theirs_to_fp64=float((layer_gradient - exact_gradient).norm() / exact_gradient.norm()),
            finite=bool(gradient.isfinite().all()),
        )


EAGER = (8, 64, 256)
STEPS: tuple[
    tuple[StepOptions, tuple[int, ...], tuple[int, ...]], ...
] = (  # batch sizes; batch sizes with cuDNN's benchmark too
    (StepOptions("ours", "bf16"), EAGER, (256,)),
    (StepOptions("torchvision", "bf16", flat=False), EAGER, (256,)),
    (StepOptions("torchvision", "fp32", channels_last=False, flat=False), (64,), ()),
    (StepOptions("ours", "fp32"), (64,), ()),
)


def stage_step(record: Recorder, options: argparse.Namespace) -> None:
    """Measure an eager training step. If `host_ms` is near `ms`, the CPU is the limit, not the GPU."""
    for step_options, batches, benchmarked in STEPS:
        free_memory()
        trainer = Trainer(step_options)
        for benchmark, sizes in ((False, batches), (True, benchmarked)):
            torch.backends.cudnn.benchmark = benchmark
            for number in sizes if CUDA or not sizes else (2,):
                what = f"{step_options} batch {number}{' benchmark' if benchmark else ''}"
                free_memory()
                with record.attempt(what):
                    record_rate(record, what, number, trainer.step_on_example(number))
        del trainer


def stage_graph(record: Recorder, options: argparse.Namespace) -> None:
    """Measure the training step as one CUDA graph, which removes the CPU's share."""
    if not CUDA:
        raise SkippedError("CUDA graphs need CUDA")
    torch.backends.cudnn.benchmark = True
    for network in ("ours", "torchvision"):
        for number in (8, 64, 256):
            what = f"{network} bf16 graph batch {number}"
            free_memory()
            with record.attempt(what):
                replay, loss = capture_graph(
                    Trainer(StepOptions(network, "bf16", capturable=True)).step_on_example(number)
                )
                record_rate(record, what, number, replay, loss=float(loss))
                del replay, loss


def stage_warm(record: Recorder, options: argparse.Namespace) -> None:
    """Fill Inductor's cache for `compiled`. The stage runs in parallel with `tests`."""
    compile_steps(record, only_first=True)


def stage_compiled(record: Recorder, options: argparse.Namespace) -> None:
    """Measure the training step with torch.compile."""
    compile_steps(record, only_first=False)


def compile_steps(record: Recorder, *, only_first: bool) -> None:
    torch.backends.cudnn.benchmark = True
    for number, mode in ((256, "default"), (16, "reduce-overhead")) if CUDA else ((2, "default"),):
        free_memory()
        torch._dynamo.reset()
        what = f"ours compiled {mode} bf16 batch {number}"
        with record.attempt(what):
            started = time.perf_counter()
            step = Trainer(StepOptions("ours", "bf16", compiled=mode)).step_on_example(number)
            step()
            synchronize()
            seconds = time.perf_counter() - started
            if only_first:
                record(what, first_step_s=seconds)
            else:
                record_rate(record, what, number, step, 1.0, first_step_s=seconds)


# ---- batches


def open_shards(options: argparse.Namespace, encoding: str = "raw") -> tuple[Shards, RowTargets]:
    from mura_dist.data.loaders.loader import RowTargets
    from mura_dist.data.shards.reader import Shards

    folder = options.scratch / f"shards-{encoding}"
    if not (folder / "index.json").is_file():
        raise SkippedError(f"no {encoding} shards in {options.scratch}. Run stage data first.")
    shards = Shards.open(folder)
    return shards, RowTargets.from_shards(shards)


def backends() -> tuple[str, ...]:
    return ("dali", "cpu", "resident") if imports_dali() else ("cpu", "resident")


def draw_micro_batches(rows: np.ndarray, number: int, count: int) -> list[MicroBatch]:
    """Return `count` micro-batches of `number` radiographs from one epoch, repeated if needed."""
    from mura_dist.data.loaders import sampler

    epoch = sampler.epoch_permutation(rows, 0, 0, rotate_deg=ROTATE_DEG, flip=True)
    return [epoch.micro_batch(index % (len(rows) // number) * number, number) for index in range(count)]


def stage_loader(record: Recorder, options: argparse.Namespace) -> None:
    """Measure augmented batches on the device: pixels, images/s, and ms of the training thread per micro-batch.

    Raw shards need no decoding. nvJPEG decodes jpeg shards (dali). The host decodes png shards, so that only their
    pixels are compared.
    """
    from mura_dist.data.loaders.loader import BatchLoader

    for encoding in ENCODINGS:
        shards, targets = open_shards(options, encoding)
        compare_pixels(record, shards, targets)
        if encoding == "png":  # decoded by the host, which `bench pipeline` measures
            continue
        for number in ((16, 64, 256) if encoding == "raw" else (64, 256)) if CUDA else (4,):
            micro_batches = draw_micro_batches(shards.rows("train"), number, max(2, (20_000 if CUDA else 32) // number))
            for backend in backends():
                for workers in ((8, 15) if encoding == "raw" and backend == "cpu" else (8,)) if CUDA else (2,):
                    what = f"{backend} {encoding} batch {number} workers {workers}"
                    with record.attempt(what):
                        loader = BatchLoader(shards, targets, DEVICE, backend, number, workers, prefetch=4 * workers)
                        if backend == "resident":
                            record_first_epoch(record, what, loader)
                        record_stream(record, what, number, loader.load(micro_batches))
    record_warp(record)


def record_first_epoch(record: Recorder, what: str, loader: Any) -> None:
    """Record the time in which the first epoch loads the radiographs into the device's memory."""
    rows, started = loader.shards.rows("train"), time.perf_counter()
    for _ in loader.load(draw_micro_batches(rows, min(64, len(rows)), -(-len(rows) // min(64, len(rows))))):
        pass
    synchronize()
    seconds = time.perf_counter() - started
    gb_per_s = len(rows) * loader.shards.size**2 / seconds / 1e9
    record(f"{what}: first epoch", images=len(rows), seconds=seconds, gb_per_s=gb_per_s)


def record_warp(record: Recorder) -> None:
    """Measure the resident backend's kernel alone, and the equivalent torch operations."""
    from mura_dist.data.loaders.warp import inverse_maps, select_warp, warp_by_torch

    number, rng = 256 if CUDA else 4, np.random.default_rng(0)
    pixels = torch.randint(0, 256, (number, SIZE, SIZE), dtype=torch.uint8, device=DEVICE)
    slots = torch.arange(number, dtype=torch.int32, device=DEVICE)
    angles, flips = rng.uniform(-ROTATE_DEG, ROTATE_DEG, number), rng.random(number) < 0.5
    maps = torch.from_numpy(inverse_maps(angles, flips, SIZE)).to(DEVICE)
    for name, warp in {"its kernel": select_warp(DEVICE), "torch operations": warp_by_torch}.items():
        what = f"warp, {name}, batch {number}"
        with record.attempt(what):
            record_rate(record, what, number, functools.partial(warp, pixels, slots, maps), 0.4)


def compare_pixels(record: Recorder, shards: Shards, targets: RowTargets) -> None:
    """Record how far each backend's pixels are from the cpu backend's. Allowed are 2 levels in 99.9 % of them."""
    from mura_dist.data.loaders.loader import BatchLoader

    number = min(32, len(shards.rows("train")))
    micro = draw_micro_batches(shards.rows("train"), number, 1)[0]
    [reference] = BatchLoader(shards, targets, torch.device("cpu"), "cpu", number, workers=2).load([micro])
    for backend in backends():
        what = f"pixels, {backend} {shards.encoding} against the CPU"
        with record.attempt(what):
            [batch] = BatchLoader(shards, targets, DEVICE, backend, number, workers=2).load([micro])
            difference = (batch.image.cpu().int() - reference.image.int()).abs()
            record(what, within_2=float((difference <= 2).float().mean()), worst=int(difference.max()))


def record_stream(record: Recorder, what: str, number: int, batches: Iterator[Batch]) -> None:
    """Record the rate of batches over 1.5 s, without the first batch."""
    next(batches)
    synchronize()
    started, data_wait_s, num_batches = time.perf_counter(), 0.0, 0
    while True:
        wait_started = time.perf_counter()
        if next(batches, None) is None or time.perf_counter() - started > 1.5:
            break
        data_wait_s += time.perf_counter() - wait_started
        num_batches += 1
    synchronize()
    seconds = time.perf_counter() - started
    record(what, images_per_s=num_batches * number / seconds, ms_a_micro=1e3 * data_wait_s / max(num_batches, 1))


def stage_proto(record: Recorder, options: argparse.Namespace) -> None:
    """Measure training without its commands: resident batches, graph steps, DeepSpeed's engine, a new order each epoch."""
    if not is_installed("deepspeed"):
        raise SkippedError("DeepSpeed is not installed")
    from mura_dist.distributed import process_group

    shards, targets = open_shards(options)
    with process_group.join(120.0) as world:
        for number in (256, 8) if CUDA else (4,):
            what = f"resident and graph, batch {number}"
            with record.attempt(what):
                train_resident(record, what, number, shards, targets, world)


def train_resident(record: Recorder, what: str, number: int, shards: Shards, targets: RowTargets, world: Any) -> None:
    from mura_dist.core import config
    from mura_dist.data.loaders import sampler
    from mura_dist.data.loaders.loader import BatchLoader
    from mura_dist.models import densenet
    from mura_dist.training.engine import Engine

    free_memory()
    rows = shards.rows("train")
    values = {"shards": "", "run": "", "architecture": ARCHITECTURE, "precision": "bf16", "step": "graph"}
    settings = config.check(values | {"global_batch": number, "micro_batch": number}, "gpu.py")
    engine = Engine(densenet.build(ARCHITECTURE), settings, world)
    loader = BatchLoader(shards, targets, DEVICE, "resident", number, 8 if CUDA else 2)
    losses: list[float] = []
    started, num_timed, data_wait_s = time.perf_counter(), 0, 0.0
    for epoch_index in range(20):
        epoch = sampler.epoch_permutation(rows, 0, epoch_index, rotate_deg=ROTATE_DEG, flip=True)
        batches = loader.load(epoch.micro_batch(index * number, number) for index in range(len(rows) // number))
        while True:
            wait_started = time.perf_counter()
            if (batch := next(batches, None)) is None:
                break
            data_wait_s += time.perf_counter() - wait_started
            losses.append(engine.step([batch], 1e-4).loss)
            num_timed += 1
        if epoch_index == 0:  # the first epoch reads the radiographs and captures the graph
            started, num_timed, data_wait_s = time.perf_counter(), 0, 0.0
        elif time.perf_counter() - started > (5 if CUDA else 0.3):
            break
    seconds = time.perf_counter() - started
    ends = {"first": losses[0], "last": losses[-1]}
    rate = num_timed * number / seconds
    record(what, images_per_s=rate, steps=len(losses), data_wait=data_wait_s / seconds, **ends, peak_gb=peak_gb())
    record(f"{what}: recorded", fell_back=getattr(engine.network, "fell_back", None))


# ---- the commands, the exported model


def stage_train(record: Recorder, options: argparse.Namespace) -> None:
    """Run `mura_dist.train` and record images/s of the second half of its steps, the wait for data and the overhead."""
    if not is_installed("deepspeed"):
        raise SkippedError("DeepSpeed is not installed")
    open_shards(options)
    default = "dali" if imports_dali() else "cpu"
    runs = [(default, "eager", 256), ("resident", "graph", 256), ("resident", "graph", 8), (default, "eager", 8)]
    for pipeline, step, micro in runs if CUDA else [(default, "eager", 8), ("resident", "graph", 8)]:
        epochs = 2 if CUDA and micro > 8 else 1
        what, run = f"train {pipeline} {step} micro {micro}", options.scratch / f"run-{pipeline}-{step}-{micro}"
        shutil.rmtree(run, ignore_errors=True)
        settings = {"shards": options.scratch / "shards-raw", "run": run, "architecture": ARCHITECTURE}
        settings |= {"global_batch": micro, "micro_batch": micro, "pipeline": pipeline, "step": step, "epochs": epochs}
        settings |= {"log_every": 4 if CUDA else 1, "tensorboard": "false"}
        command = [sys.executable, "-m", "mura_dist.train", *(f"{key}={value}" for key, value in settings.items())]
        started = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        with record.attempt(what):
            if result.returncode:
                raise RuntimeError(result.stderr[-400:].replace("\n", " "))
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            rates = [line["images_per_s"] for line in lines if line["kind"] == "step"]
            epoch = [line for line in lines if line["kind"] == "epoch"][-1]
            record(
                what,
                seconds=time.perf_counter() - started,
                images_per_s=statistics.median(rates[len(rates) // 2 :]),
                data_wait=epoch["data_wait_share"],
                overhead=epoch["overhead_share"],
                evaluation_s=epoch["evaluation_s"],
                tune_loss=epoch["tune_loss"],
            )


def stage_infer(record: Recorder, options: argparse.Namespace) -> None:
    """Measure the network in eval mode by torch, eager and as a graph. The package evaluates in fp32."""
    torch.backends.cudnn.benchmark = True
    probe, reference = random_images(32 if CUDA else 2), torch.empty(0)
    kinds = [("fp32", False), ("tf32", False), ("bf16", False), ("fp16", False), ("bf16", True), ("fp16", True)]
    for precision, is_graph in kinds if CUDA else [("fp32", False), ("bf16", False)]:
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        network = package_network().to(memory_format=torch.channels_last).eval()
        if precision == "fp16":
            for name in ("features", "classifier"):
                network.get_submodule(name).half()

        def forward(image: Tensor, network: nn.Module = network, precision: str = precision) -> Tensor:
            with autocast("bf16" if precision == "bf16" else "fp32", cache=False):
                logit: Tensor = network(image)[0]
            return logit

        with torch.inference_mode():
            logit = forward(probe).float()
            reference = reference if len(reference) else logit
            record(f"{precision} against fp32", logit=float((logit - reference).abs().max()))
            for number in ((1, 64, 256) if is_graph else (1, 8, 64, 256)) if CUDA else (1,):
                what = f"torch {precision}{' graph' if is_graph else ''} batch {number}"
                with record.attempt(what):
                    call: Callable[[], object] = functools.partial(forward, random_images(number))
                    if is_graph:
                        call, _ = capture_graph(call)  # type: ignore[arg-type]
                    record_rate(record, what, number, call, 0.4)


def stage_ort(record: Recorder, options: argparse.Namespace) -> None:
    """Measure ONNX Runtime as `mura-dist predict` runs it, and its difference from torch."""
    import onnxruntime

    from mura_dist.inference.engine import PROVIDERS, SessionConfig
    from mura_dist.inference.export import onnx, precision
    from mura_dist.inference.onnx_model import OnnxModel
    from mura_dist.models import densenet
    from mura_dist.models.card import Card, TrainedOn

    available = onnxruntime.get_available_providers() if CUDA else []
    providers = [name for name in ("cuda", "tensorrt") if PROVIDERS[name] in available] or ["cpu"]
    trained_on = TrainedOn(kind="phantoms", manifest_sha256="", num_radiographs=0)
    facts: dict[str, Any] = {"size": SIZE, "study_types": [], "trained_on": trained_on, "selected_on": "tune"}
    card = Card(**facts, recipe={}, checkpoint="none")
    network = densenet.build(ARCHITECTURE).eval()
    started = time.perf_counter()
    files = {"fp32": onnx.build_onnx(network, card)}
    record("export", seconds=time.perf_counter() - started)
    files["fp16"] = onnx.build_onnx(precision.to_half_precision(network), card.model_copy(update={"precision": "fp16"}))
    probe = np.random.default_rng(0).integers(0, 256, (7, 1, SIZE, SIZE), dtype=np.uint8)
    with torch.inference_mode():
        reference = network(torch.from_numpy(probe))[0].numpy()
    batches_and_streams = {
        "cuda": ((1, 1), (64, 1), (64, 2), (256, 2)),
        "tensorrt": ((64, 1),),
        "cpu": ((2, 1),),
    }  # batch, streams
    for provider in providers:
        for name, data in files.items():
            logits_of_two = np.empty(0)
            with record.attempt(f"ort {provider} {name} batch 2"):
                logits_of_two = OnnxModel.from_bytes(
                    data, "the exported model", provider, SessionConfig(batch_size=2)
                ).logits(probe)
            for number, streams in batches_and_streams[provider] if CUDA else batches_and_streams["cpu"]:
                what = f"ort {provider} {name} batch {number} streams {streams}"
                with record.attempt(what):
                    model = OnnxModel.from_bytes(data, "the exported model", provider, SessionConfig(number, streams))
                    logits = model.logits(probe)
                    change_by_batch_size = float(np.abs(logits - logits_of_two).max()) if len(logits_of_two) else None
                    rate = measure_prediction_rate(model, number)
                    difference = float(np.abs(logits - reference).max())
                    record(what, images_per_s=rate, logit=difference, logit_by_batch_size=change_by_batch_size)


def measure_prediction_rate(model: Any, number: int) -> float:
    """Return images/s of batches of `number`, after three warm-up batches."""
    batch = np.random.default_rng(1).integers(0, 256, (number, 1, SIZE, SIZE), dtype=np.uint8)
    list(model.stream([batch] * 3))
    num_batches_timed, started = (30 if CUDA else 2), time.perf_counter()
    list(model.stream([batch] * num_batches_timed))
    return num_batches_timed * number / (time.perf_counter() - started)


# ---- the process that starts the stages


class Stage(NamedTuple):
    """A stage and its time limit with CUDA."""

    run: Callable[[Recorder, argparse.Namespace], None]
    limit_s: float


STAGES = {  # the most important first, in case the budget ends early
    "env": Stage(stage_env, 40),
    "data": Stage(stage_data, 60),
    "engine": Stage(stage_engine, 80),
    "train": Stage(stage_train, 140),
    "proto": Stage(stage_proto, 45),
    "ort": Stage(stage_ort, 75),
    "loader": Stage(stage_loader, 80),
    "blocks": Stage(stage_blocks, 40),
    "warm": Stage(stage_warm, 150),
    "tests": Stage(stage_tests, 150),
    "compiled": Stage(stage_compiled, 90),
    "step": Stage(stage_step, 60),
    "graph": Stage(stage_graph, 45),
    "infer": Stage(stage_infer, 45),
    "roofline": Stage(stage_roofline, 30),
}


def run_stage(options: argparse.Namespace) -> int:
    """Run a stage in this process. Return the exit status."""
    record, started = Recorder(options.out / "gpu_check.jsonl", options.stage), time.perf_counter()
    torch.backends.cudnn.allow_tf32 = False
    try:
        STAGES[options.stage].run(record, options)
        state = f"failed: {record.num_failed} measurements" if record.num_failed else "ok"
    except SkippedError as error:
        state = f"skipped: {error}"
    except BaseException as error:
        traceback.print_exc()
        state = f"failed: {repr(error)[:300]}"
    record("end", state=state, seconds=time.perf_counter() - started)
    return int(state.startswith("failed"))


def start_stage(name: str, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    arguments = [
        "--stage",
        name,
        "--out",
        str(options.out),
        "--scratch",
        str(options.scratch),
        "--tests",
        options.tests,
    ]
    arguments += ["--data", str(options.data)] if options.data is not None else []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "ORT_DISABLE_TELEMETRY": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(options.scratch / "inductor")
    environment["TRITON_CACHE_DIR"] = str(options.scratch / "triton")
    if not CUDA:
        environment.setdefault("OMP_NUM_THREADS", "1")
        environment |= (
            {"TRITON_INTERPRET": "1"} if name == "loader" else {}
        )  # Triton's interpreter runs the kernel on a CPU
    with (options.out / f"{name}.log").open("wb") as log:
        stdout = log if name == "warm" else None  # it runs in parallel with another stage
        command = [sys.executable, str(Path(__file__).resolve()), *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stdout=stdout, stderr=log)


def end_stage(process: subprocess.Popen[bytes]) -> None:
    """Kill a stage's process and the processes it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(process: subprocess.Popen[bytes], name: str, limit_s: float, options: argparse.Namespace) -> str:
    """Wait for a stage, at most `limit_s`, and return its state. Kill it then, also if this process exits."""
    timed_out = False
    try:
        process.wait(max(0.0, limit_s))
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        end_stage(process)
    ends = [line for line in read_lines(options) if line["stage"] == name and line["what"] == "end"]
    if ends:
        return str(ends[-1]["state"])
    return f"stopped after {limit_s:.0f} s" if timed_out else f"failed: exited with status {process.returncode}"


def read_lines(options: argparse.Namespace) -> list[dict[str, Any]]:
    path = options.out / "gpu_check.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run_stages(names: Sequence[str], options: argparse.Namespace) -> dict[str, str]:
    """Run stages and return the state of each. Write gpu_check.json after each stage."""
    states: dict[str, str] = {}
    deadline_s = time.perf_counter() + options.budget
    warm_process: subprocess.Popen[bytes] | None = None
    try:
        for name in names:
            if deadline_s - time.perf_counter() < 5:
                states[name] = "stopped: no time left"
                continue
            if name == "warm":
                warm_process = start_stage(name, options)
                continue
            if warm_process is not None and name != "tests":  # a timed stage needs all CPU cores
                remaining_s = deadline_s - time.perf_counter()
                states["warm"] = wait_for(
                    warm_process, "warm", min(WARM_WAIT_S, remaining_s - REST_S) if CUDA else remaining_s, options
                )
                warm_process = None
            limit_s = min(STAGES[name].limit_s * (1 if CUDA else SLOW_CPU), max(0.0, deadline_s - time.perf_counter()))
            print(f"== {name}: at most {limit_s:.0f} s", flush=True)
            states[name] = wait_for(start_stage(name, options), name, limit_s, options)
            write_results(states, options)
            if states[name].startswith("failed"):
                for line in (options.out / f"{name}.log").read_text(errors="replace").splitlines()[-3:]:
                    print("   ", line[:200])
        if warm_process is not None:
            states["warm"] = wait_for(warm_process, "warm", STAGES["warm"].limit_s, options)
            warm_process = None
    finally:
        if warm_process is not None:
            end_stage(warm_process)
    write_results(states, options)
    return states


def write_results(states: dict[str, str], options: argparse.Namespace) -> None:
    results = {"stages": states, "measurements": read_lines(options)}
    (options.out / "gpu_check.json").write_text(json.dumps(results, indent=1))


def join_logs(states: dict[str, str], options: argparse.Namespace) -> None:
    """Join the tests' output and the logs of failed stages into one file, and delete the logs."""
    texts = []
    for log in sorted(path for path in options.out.glob("*.log") if path.name != "logs.log"):
        if log.stem == "test_gpu" or has_failed(states.get(log.stem, "")):
            texts.append(f"==== {log.name}\n{log.read_text(errors='replace')[-100_000:]}\n")
        log.unlink()
    (options.out / "logs.log").write_text("".join(texts))


def has_failed(state: str) -> bool:
    return state != "ok" and not state.startswith("skipped")


def print_table(options: argparse.Namespace) -> None:
    for line in read_lines(options):
        if line.keys() & {"images_per_s", "within_2", "tflops", "tb_per_s"}:
            cells = (f"{key[:9]}={short(value)}" for key, value in line.items() if key not in ("stage", "what"))
            print(f"{line['stage'][:7]:8}{line['what'][:52]:53}" + " ".join(cells))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_out = Path(os.environ.get("OUT") or "gpu_out")
    parser.add_argument(
        "--out", type=Path, default=default_out, help="a folder for the results (default $OUT, or gpu_out)"
    )
    parser.add_argument(
        "--stages", default=",".join(STAGES), help=f"stages to run, of {','.join(STAGES)} (default all)"
    )
    budget_s = BUDGET_S if CUDA else BUDGET_S * SLOW_CPU
    parser.add_argument("--budget", type=float, default=budget_s, help=f"seconds for all stages (default {budget_s:g})")
    parser.add_argument("--data", type=Path, help="a folder in MURA's layout (default: phantoms)")
    scratch = Path(tempfile.gettempdir()) / "gpu_check"
    parser.add_argument(
        "--scratch", type=Path, default=scratch, help="a folder for shards, runs, caches; not deleted at the end"
    )
    parser.add_argument("--tests", default="", help="pytest's -k for stage tests")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    names = options.stages.split(",")
    if unknown := set(names) - set(STAGES):
        print(f"gpu.py: --stages {','.join(sorted(unknown))}: must be some of {','.join(STAGES)}", file=sys.stderr)
        return 2
    options.out, options.scratch = options.out.resolve(), options.scratch.resolve()
    if options.stage:
        return run_stage(options)
    for folder in (options.out, options.scratch):
        folder.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu_check.jsonl").unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # the finally of run_stages kills the stages
    started = time.perf_counter()
    states = run_stages(names, options)
    join_logs(states, options)
    print(f"\n==== {time.perf_counter() - started:.0f} s in all; " + "; ".join(f"{k}: {v}" for k, v in states.items()))
    print_table(options)
    return int(any(map(has_failed, states.values())))


if __name__ == "__main__":
    sys.exit(main())
