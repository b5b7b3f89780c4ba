"""Measure what a GPU makes of mura_dist, stage by stage; without CUDA the same code at a tiny size, to see that it runs.

python tools/bench/gpu.py [--out DIR] [--stages env,data,...] [--budget 480] [--data FOLDER] [--scratch FOLDER] [--tests WORDS]

    stages, each a process with a limit of seconds -> DIR/gpu_check.jsonl, a line a measurement, at once
        -> DIR/gpu_check.json, all of it; DIR/logs.log, the tests' output and that of stages that failed -> a table

Runs from the root of a checkout and needs no network. A stage that is killed keeps what it measured, and the next one runs. It
ends "ok", "left out: reason", "failed: error" or "stopped after N s"; what DALI, DeepSpeed or ONNX Runtime's CUDA provider is
needed for is left out where that is missing. On a GPU a part that fails is recorded and the stage goes on; on a CPU it ends the
stage, so that no part is broken unseen. Exit status: 0 every stage ok or left out; 1 otherwise.
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

if TYPE_CHECKING:  # imported where they are used: a stage whose imports fail does not keep the others from running
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
BUDGET_S, SLOW_CPU = 480.0, 10  # of all stages; how many times as long a stage may take without CUDA
WARM_WAIT_S, REST_S = 60.0, 150.0  # `warm` is waited for as long, as far as the budget leaves REST_S for others


# ---- what every stage needs


class LeftOutError(Exception):
    """Ends a stage that cannot run here; its text is the reason."""


class Recorder:
    """Append a line a measurement to a file, at once, and print it."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage
        self.num_failed = 0

    def __call__(self, what: str, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"stage": self.stage, "what": what, **values}, default=str) + "\n")
        print(f"  {self.stage:9} {what:46} " + "  ".join(f"{k}={short(v)}" for k, v in values.items()), flush=True)

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Record an error and go on, with CUDA; without, let it end the stage."""
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
    """Import it in a process of its own: that a folder has its name is not enough."""
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
    """Milliseconds of a call: on the device (median), by the wall clock, until it returns to the host (median)."""

    ms: float
    wall_ms: float
    host_ms: float


def measure(call: Callable[[], object], seconds: float = 1.0, *, num_warmup: int = 3) -> Timing:
    """Call it as often as `seconds` allow, at most 400 times; without CUDA once."""
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
    device_ms = [first.elapsed_time(last) for first, last in events] if CUDA else host_ms
    return Timing(statistics.median(device_ms), wall_ms, statistics.median(host_ms))


def record_rate(
    record: Recorder, what: str, number: int, call: Callable[[], object], seconds: float = 0.8, **values: Any
) -> None:
    """Measure a call that works on `number` images."""
    timing = measure(call, seconds)
    rate = 1e3 * number / timing.wall_ms
    record(what, images_per_s=rate, ms=timing.ms, host_ms=timing.host_ms, peak_gb=peak_gb(), **values)


def captured(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """(the call as one CUDA graph, its output, which each replay fills anew)."""
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


def both_labels(number: int) -> Tensor:
    return (torch.arange(number, device=DEVICE) % 2).float()  # (B,) float32


def our_network() -> nn.Module:
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
    """How a training step (zero, forward, backward, Adam) is done, outside the engine.

    flat: all parameters as one vector, as the engine has them. capturable: as a CUDA graph wants it. compiled: a mode of
    torch.compile, "" for none.
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
    """A network and its optimizer; `step` gives a training step on any batch."""

    def __init__(self, options: StepOptions) -> None:
        from mura_dist.training.flat_parameters import FlatParameters

        self.options = options
        self.layout = torch.channels_last if options.channels_last else torch.contiguous_format
        network = our_network() if options.network == "ours" else torchvision_network().to(memory_format=self.layout)
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
            how: dict[str, Any] = {"mode": options.compiled} if CUDA else {"backend": "aot_eager"}  # no C++ compiler
            self.network = torch.compile(network, dynamic=False, **how)

    def example(self, number: int) -> Tensor:
        """A batch of what the network takes."""
        if self.options.network == "ours":
            return random_images(number)
        return torch.randn(number, 3, SIZE, SIZE, device=DEVICE).to(memory_format=self.layout)

    def step(self, image_of: Callable[[], Tensor], label_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A function that does one step and returns its loss."""

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
        image, label = self.example(number), both_labels(number)
        return self.step(lambda: image, lambda: label)


# ---- the machine


def stage_env(record: Recorder, options: argparse.Namespace) -> None:
    """Versions, the device, what can be imported."""
    record("python", version=sys.version.split()[0], executable=sys.executable)
    names = (
        "torch torchvision triton numpy pandas deepspeed onnx onnxruntime onnxruntime-gpu pydantic cupy-cuda13x "
        "opencv-python-headless scikit-learn pydicom safetensors tensorboard matplotlib rich click nvidia-dali-cuda130 "
        "tensorrt pytest-xdist"
    )
    versions = dict.fromkeys(names.split(), "NO")
    for name in versions:  # not imported: that takes seconds
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
    imports = {name: subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for name, words in commands.items()}
    for name, process in imports.items():
        error = process.communicate()[1].strip().splitlines()[-1:]
        with record.attempt(f"import {name}"):
            if process.returncode and (name != modules[-1] or imports_dali()):
                raise ImportError(error[0] if error else f"status {process.returncode}")
            record(f"import {name}", ok=process.returncode == 0)


def record_device(record: Recorder) -> None:
    if not CUDA:
        record("gpu", name="none: everything below is tiny")
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
    """What the device does at best: copies, products of matrices, the network's two kinds of convolution, launches."""
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
    # Of block 3, 20x20 cells, bf16, channels-last: what cuDNN gives of that peak.
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
    one = torch.zeros(1, device=DEVICE)
    wall_ms = measure(lambda: [one.add_(1) for _ in range(200)], 0.3).wall_ms
    record("a small kernel, launched from Python", us=1e3 * wall_ms / 200)


# ---- shards, tests


def stage_data(record: Recorder, options: argparse.Namespace) -> None:
    """Shards for the stages after it, of --data's radiographs again and again, or of phantoms."""
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
    """tests/gpu, several at once: they share the GPU, it is not about speed. --tests: pytest's -k."""
    words = options.tests
    if not is_installed("deepspeed"):
        record("left out", why="no DeepSpeed: no training")
        words = f"({words}) and not training" if words else "not training"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "--durations=12", "-rA"]
    if is_installed("xdist") and CUDA:
        command += ["-n", "9"]
    command += ["-k", words] if words else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (options.out / "test_gpu.log").write_text(done.stdout[-200_000:] + done.stderr[-50_000:])
    for line in done.stdout.splitlines():
        summary = " in " in line and any(word in line for word in ("passed", "skipped", "failed"))
        if summary or line.startswith(("PASSED", "FAILED", "ERROR", "SKIPPED")):
            record("pytest", line=line[:200])
    if done.returncode:
        raise RuntimeError(f"pytest ended with status {done.returncode}; its output is in logs.log")


# ---- the training step


def stage_engine(record: Recorder, options: argparse.Namespace) -> None:
    """The engine with one rank, eager and recorded: precision, images/s, waits for the GPU, what the host does in a step."""
    if not is_installed("deepspeed"):
        raise LeftOutError("DeepSpeed is not installed")
    from mura_dist.distributed import process_group

    with process_group.join(120.0) as world:
        for step in ("eager", "graph"):
            for number in (64, 8, 256) if CUDA else (2,):
                with record.attempt(f"engine {step} batch {number}"):
                    measure_engine(record, step, number, world)


def measure_engine(record: Recorder, how: str, number: int, world: Any) -> None:
    from mura_dist.core import config
    from mura_dist.data.loaders.loader import Batch
    from mura_dist.models import densenet
    from mura_dist.training.checked_network import CheckedNetwork
    from mura_dist.training.engine import Engine

    free_memory()
    values = {"shards": "", "run": "", "architecture": ARCHITECTURE, "precision": "bf16", "step": how}
    settings = config.check(values | {"global_batch": number, "micro_batch": number}, "gpu.py")
    engine, ones = Engine(densenet.build(ARCHITECTURE), settings, world), torch.ones(number, device=DEVICE)
    batch = Batch(random_images(number), both_labels(number), ones, ones.long(), ones.bool())

    def step() -> Any:
        return engine.step([batch], 1e-4)

    what = f"engine {how} batch {number}"
    dtypes: set[str] = set()
    first = engine.model.get_submodule("features.conv0")
    hook = first.register_forward_hook(lambda module, inputs, output: dtypes.add(str(output.dtype)))
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
    """How often the host waits for the GPU in a step, and where."""
    with (
        mock.patch.object(torch.cuda, "synchronize", mock.Mock(wraps=torch.cuda.synchronize)) as counted,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
    places = sorted({f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits})
    record(f"{what}: waits", synchronize_calls=counted.call_count, others=len(waits), where=",".join(places))


def stage_blocks(record: Recorder, options: argparse.Namespace) -> None:
    """Our dense blocks against torchvision's layers with the same weights: fp64 as a proof, fp32 and bf16 as they are."""
    from mura_dist.models import densenet

    number = 16 if CUDA else 4
    image, label = random_images(number), both_labels(number)

    def gradient_of(network: nn.Module, logit_of: Callable[[], Tensor], precision: str) -> tuple[Tensor, Tensor]:
        with autocast(precision):
            logit = logit_of()
        dtype = torch.float64 if precision == "fp64" else torch.float32
        binary_cross_entropy_with_logits(logit.to(dtype), label.to(dtype)).backward()
        gradients = [
            parameter.grad.flatten().double() for parameter in network.parameters() if parameter.grad is not None
        ]
        return logit.detach().double(), torch.cat(gradients)

    exact = torch.empty(0)
    for precision in ("fp64", "fp32", "bf16"):
        ours = densenet.build(ARCHITECTURE).to(DEVICE, memory_format=torch.channels_last).train()
        theirs = torchvision_network().to(memory_format=torch.channels_last)
        theirs.load_state_dict(ours.state_dict())
        if precision == "fp64":
            ours, theirs = ours.double(), theirs.double()
        pixels = ((image.to(ours.mean.dtype) - ours.mean) * ours.scale).to(memory_format=torch.channels_last)
        logit, gradient = gradient_of(ours, lambda ours=ours: ours(image)[0], precision)  # type: ignore[misc]
        wanted, plain = gradient_of(theirs, lambda theirs=theirs, x=pixels: theirs(x)[:, 0], precision)  # type: ignore[misc]
        exact = plain if precision == "fp64" else exact
        record(
            f"blocks against layers, {precision}",
            logit=float((logit - wanted).abs().max()),
            gradient=float((gradient - plain).norm() / plain.norm()),
            ours_to_fp64=float((gradient - exact).norm() / exact.norm()),
            theirs_to_fp64=float((plain - exact).norm() / exact.norm()),
            finite=bool(gradient.isfinite().all()),
        )


EAGER = (8, 64, 256)
STEPS: tuple[tuple[StepOptions, tuple[int, ...], tuple[int, ...]], ...] = (  # batches; those with cuDNN's benchmark too
    (StepOptions("ours", "bf16"), EAGER, (256,)),
    (StepOptions("torchvision", "bf16", flat=False), EAGER, (256,)),
    (StepOptions("torchvision", "fp32", channels_last=False, flat=False), (64,), ()),
    (StepOptions("ours", "fp32"), (64,), ()),
)


def stage_step(record: Recorder, options: argparse.Namespace) -> None:
    """A training step, eager. `host_ms` near `ms`: the processor is the limit, not the GPU."""
    for how, batches, benchmarked in STEPS:
        free_memory()
        trainer = Trainer(how)
        for benchmark, sizes in ((False, batches), (True, benchmarked)):
            torch.backends.cudnn.benchmark = benchmark
            for number in sizes if CUDA or not sizes else (2,):
                what = f"{how} batch {number}{' benchmark' if benchmark else ''}"
                free_memory()
                with record.attempt(what):
                    record_rate(record, what, number, trainer.step_on_example(number))
        del trainer


def stage_graph(record: Recorder, options: argparse.Namespace) -> None:
    """The whole step as one CUDA graph: what is left when the processor is out of the way."""
    if not CUDA:
        raise LeftOutError("CUDA graphs need CUDA")
    torch.backends.cudnn.benchmark = True
    for network in ("ours", "torchvision"):
        for number in (8, 64, 256):
            what = f"{network} bf16 graph batch {number}"
            free_memory()
            with record.attempt(what):
                replay, loss = captured(Trainer(StepOptions(network, "bf16", capturable=True)).step_on_example(number))
                record_rate(record, what, number, replay, loss=float(loss))
                del replay, loss


def stage_warm(record: Recorder, options: argparse.Namespace) -> None:
    """Fill Inductor's cache for `compiled`, beside `tests`; nobody waits for it."""
    compile_steps(record, only_first=True)


def stage_compiled(record: Recorder, options: argparse.Namespace) -> None:
    """The step with torch.compile."""
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
        raise LeftOutError(f"no {encoding} shards in {options.scratch}; stage data makes them")
    shards = Shards.open(folder)
    return shards, RowTargets.from_shards(shards)


def backends() -> tuple[str, ...]:
    return ("dali", "cpu", "resident") if imports_dali() else ("cpu", "resident")


def micros_of(rows: np.ndarray, number: int, count: int) -> list[MicroBatch]:
    """`count` micro-batches of `number` radiographs, of one epoch's again and again."""
    from mura_dist.data.loaders import sampler

    epoch = sampler.epoch_permutation(rows, 0, 0, rotate_deg=ROTATE_DEG, flip=True)
    return [epoch.micro_batch(place % (len(rows) // number) * number, number) for place in range(count)]


def stage_loader(record: Recorder, options: argparse.Namespace) -> None:
    """Augmented batches on the device: their pixels, images/s, and ms of the training thread a micro-batch.

    raw shards need no decoding, jpeg shards are decoded by nvJPEG (dali), png shards by the host: of those the pixels alone.
    """
    from mura_dist.data.loaders.loader import BatchLoader

    for encoding in ENCODINGS:
        shards, targets = open_shards(options, encoding)
        compare_pixels(record, shards, targets)
        if encoding == "png":  # decoded by the host, as bench pipeline measures
            continue
        for number in ((16, 64, 256) if encoding == "raw" else (64, 256)) if CUDA else (4,):
            micros = micros_of(shards.rows("train"), number, max(2, (20_000 if CUDA else 32) // number))
            for backend in backends():
                for workers in ((8, 15) if encoding == "raw" and backend == "cpu" else (8,)) if CUDA else (2,):
                    what = f"{backend} {encoding} batch {number} workers {workers}"
                    with record.attempt(what):
                        loader = BatchLoader(shards, targets, DEVICE, backend, number, workers, prefetch=4 * workers)
                        if backend == "resident":
                            record_filling(record, what, loader)
                        record_stream(record, what, number, loader.load(micros))
    record_warp(record)


def record_filling(record: Recorder, what: str, loader: Any) -> None:
    """How long the first epoch's radiographs take into the device's memory."""
    rows, started = loader.shards.rows("train"), time.perf_counter()
    for _ in loader.load(micros_of(rows, min(64, len(rows)), -(-len(rows) // min(64, len(rows))))):
        pass
    synchronize()
    seconds = time.perf_counter() - started
    gb_per_s = len(rows) * loader.shards.size**2 / seconds / 1e9
    record(f"{what}: first epoch", images=len(rows), seconds=seconds, gb_per_s=gb_per_s)


def record_warp(record: Recorder) -> None:
    """The kernel of the resident backend alone, and the same by torch operations."""
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
    """The law: the pixels of every backend are those of the cpu backend, within 2 levels in 99.9 %."""
    from mura_dist.data.loaders.loader import BatchLoader

    number = min(32, len(shards.rows("train")))
    micro = micros_of(shards.rows("train"), number, 1)[0]
    [wanted] = BatchLoader(shards, targets, torch.device("cpu"), "cpu", number, workers=2).load([micro])
    for backend in backends():
        what = f"pixels, {backend} {shards.encoding} against the CPU"
        with record.attempt(what):
            [batch] = BatchLoader(shards, targets, DEVICE, backend, number, workers=2).load([micro])
            off = (batch.image.cpu().int() - wanted.image.int()).abs()
            record(what, within_2=float((off <= 2).float().mean()), worst=int(off.max()))


def record_stream(record: Recorder, what: str, number: int, batches: Iterator[Batch]) -> None:
    """Take batches for 1.5 s, the first not counted."""
    next(batches)
    synchronize()
    started, held_s, num_batches = time.perf_counter(), 0.0, 0
    while True:
        wait_started = time.perf_counter()
        if next(batches, None) is None or time.perf_counter() - started > 1.5:
            break
        held_s += time.perf_counter() - wait_started
        num_batches += 1
    synchronize()
    seconds = time.perf_counter() - started
    record(what, images_per_s=num_batches * number / seconds, ms_a_micro=1e3 * held_s / max(num_batches, 1))


def stage_proto(record: Recorder, options: argparse.Namespace) -> None:
    """The design end to end: resident batches, recorded steps, DeepSpeed's engine, a fresh order each epoch."""
    if not is_installed("deepspeed"):
        raise LeftOutError("DeepSpeed is not installed")
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
    started, num_timed, held_s = time.perf_counter(), 0, 0.0
    for number_of_epoch in range(20):
        epoch = sampler.epoch_permutation(rows, 0, number_of_epoch, rotate_deg=ROTATE_DEG, flip=True)
        batches = loader.load(epoch.micro_batch(place * number, number) for place in range(len(rows) // number))
        while True:
            wait_started = time.perf_counter()
            if (batch := next(batches, None)) is None:
                break
            held_s += time.perf_counter() - wait_started
            losses.append(engine.step([batch], 1e-4).loss)
            num_timed += 1
        if number_of_epoch == 0:  # radiographs are read and the step is recorded in it
            started, num_timed, held_s = time.perf_counter(), 0, 0.0
        elif time.perf_counter() - started > (5 if CUDA else 0.3):
            break
    seconds = time.perf_counter() - started
    ends = {"first": losses[0], "last": losses[-1]}
    rate = num_timed * number / seconds
    record(what, images_per_s=rate, steps=len(losses), data_wait=held_s / seconds, **ends, peak_gb=peak_gb())
    record(f"{what}: recorded", fell_back=getattr(engine.network, "fell_back", None))


# ---- the commands, the exported model


def stage_train(record: Recorder, options: argparse.Namespace) -> None:
    """`mura_dist.train` as a user runs it: images/s of the second half of its steps, waiting for data, overhead."""
    if not is_installed("deepspeed"):
        raise LeftOutError("DeepSpeed is not installed")
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
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        with record.attempt(what):
            if done.returncode:
                raise RuntimeError(done.stderr[-400:].replace("\n", " "))
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
    """The network in eval mode by torch, eager and as a graph; evaluation is fp32 today."""
    torch.backends.cudnn.benchmark = True
    probe, wanted = random_images(32 if CUDA else 2), torch.empty(0)
    kinds = [("fp32", False), ("tf32", False), ("bf16", False), ("fp16", False), ("bf16", True), ("fp16", True)]
    for precision, graphed in kinds if CUDA else [("fp32", False), ("bf16", False)]:
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        network = our_network().to(memory_format=torch.channels_last).eval()
        if precision == "fp16":
            for name in ("features", "classifier"):
                network.get_submodule(name).half()

        def forward(image: Tensor, network: nn.Module = network, precision: str = precision) -> Tensor:
            with autocast("bf16" if precision == "bf16" else "fp32", cache=False):
                logit: Tensor = network(image)[0]
            return logit

        with torch.inference_mode():
            logit = forward(probe).float()
            wanted = wanted if len(wanted) else logit
            record(f"{precision} against fp32", logit=float((logit - wanted).abs().max()))
            for number in ((1, 64, 256) if graphed else (1, 8, 64, 256)) if CUDA else (1,):
                what = f"torch {precision}{' graph' if graphed else ''} batch {number}"
                with record.attempt(what):
                    call: Callable[[], object] = functools.partial(forward, random_images(number))
                    if graphed:
                        call, _ = captured(call)  # type: ignore[arg-type]
                    record_rate(record, what, number, call, 0.4)


def stage_ort(record: Recorder, options: argparse.Namespace) -> None:
    """ONNX Runtime as `mura-dist predict` runs it; parity with torch."""
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
        wanted = network(torch.from_numpy(probe))[0].numpy()
    ways = {"cuda": ((1, 1), (64, 1), (64, 2), (256, 2)), "tensorrt": ((64, 1),), "cpu": ((2, 1),)}  # batch, streams
    for provider in providers:
        for name, data in files.items():
            by_two = np.empty(0)
            with record.attempt(f"ort {provider} {name} batch 2"):
                by_two = OnnxModel.from_bytes(data, "the exported model", provider, SessionConfig(batch_size=2)).logits(
                    probe
                )
            for number, streams in ways[provider] if CUDA else ways["cpu"]:
                what = f"ort {provider} {name} batch {number} streams {streams}"
                with record.attempt(what):
                    model = OnnxModel.from_bytes(data, "the exported model", provider, SessionConfig(number, streams))
                    logits = model.logits(probe)
                    moved = float(np.abs(logits - by_two).max()) if len(by_two) else None
                    rate = predicted_per_s(model, number)
                    off = float(np.abs(logits - wanted).max())
                    record(what, images_per_s=rate, logit=off, logit_by_batch_size=moved)


def predicted_per_s(model: Any, number: int) -> float:
    """Images/s of batches of `number`, after three that are not counted."""
    batch = np.random.default_rng(1).integers(0, 256, (number, 1, SIZE, SIZE), dtype=np.uint8)
    list(model.stream([batch] * 3))
    turns, started = (30 if CUDA else 2), time.perf_counter()
    list(model.stream([batch] * turns))
    return turns * number / (time.perf_counter() - started)


# ---- the one that starts them


class Stage(NamedTuple):
    run: Callable[[Recorder, argparse.Namespace], None]
    limit_s: float


STAGES = {  # in an order in which a budget that does not reach the end has measured most
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
    """In the stage's process."""
    record, started = Recorder(options.out / "gpu_check.jsonl", options.stage), time.perf_counter()
    torch.backends.cudnn.allow_tf32 = False
    try:
        STAGES[options.stage].run(record, options)
        state = f"failed: {record.num_failed} of its parts" if record.num_failed else "ok"
    except LeftOutError as error:
        state = f"left out: {error}"
    except BaseException as error:
        traceback.print_exc()
        state = f"failed: {repr(error)[:300]}"
    record("end", state=state, seconds=time.perf_counter() - started)
    return int(state.startswith("failed"))


def start_stage(name: str, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    words = ["--stage", name, "--out", str(options.out), "--scratch", str(options.scratch), "--tests", options.tests]
    words += ["--data", str(options.data)] if options.data is not None else []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "ORT_DISABLE_TELEMETRY": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(options.scratch / "inductor")
    environment["TRITON_CACHE_DIR"] = str(options.scratch / "triton")
    if not CUDA:
        environment.setdefault("OMP_NUM_THREADS", "1")
        environment |= {"TRITON_INTERPRET": "1"} if name == "loader" else {}  # its kernel too runs on a CPU
    with (options.out / f"{name}.log").open("wb") as log:
        stdout = log if name == "warm" else None  # it speaks while others do
        command = [sys.executable, str(Path(__file__).resolve()), *words]
        return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stdout=stdout, stderr=log)


def end_stage(process: subprocess.Popen[bytes]) -> None:
    """End it, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(process: subprocess.Popen[bytes], name: str, limit_s: float, options: argparse.Namespace) -> str:
    """How the stage ended; it is ended after `limit_s`, or where this process is."""
    timed_out = False
    try:
        process.wait(max(0.0, limit_s))
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        end_stage(process)
    ends = [line for line in lines_of(options) if line["stage"] == name and line["what"] == "end"]
    if ends:
        return str(ends[-1]["state"])
    return f"stopped after {limit_s:.0f} s" if timed_out else f"failed: ended with status {process.returncode}"


def lines_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    path = options.out / "gpu_check.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run_stages(names: Sequence[str], options: argparse.Namespace) -> dict[str, str]:
    """Stage -> how it ended; gpu_check.json is written anew after each."""
    states: dict[str, str] = {}
    ends = time.perf_counter() + options.budget
    warming: subprocess.Popen[bytes] | None = None
    try:
        for name in names:
            if ends - time.perf_counter() < 5:
                states[name] = "stopped: no time left"
                continue
            if name == "warm":
                warming = start_stage(name, options)
                continue
            if warming is not None and name != "tests":  # what is timed wants the processors for itself
                left_s = ends - time.perf_counter()
                states["warm"] = wait_for(
                    warming, "warm", min(WARM_WAIT_S, left_s - REST_S) if CUDA else left_s, options
                )
                warming = None
            limit_s = min(STAGES[name].limit_s * (1 if CUDA else SLOW_CPU), max(0.0, ends - time.perf_counter()))
            print(f"== {name}: at most {limit_s:.0f} s", flush=True)
            states[name] = wait_for(start_stage(name, options), name, limit_s, options)
            write_results(states, options)
            if states[name].startswith("failed"):
                for line in (options.out / f"{name}.log").read_text(errors="replace").splitlines()[-3:]:
                    print("   ", line[:200])
        if warming is not None:
            states["warm"] = wait_for(warming, "warm", STAGES["warm"].limit_s, options)
            warming = None
    finally:
        if warming is not None:
            end_stage(warming)
    write_results(states, options)
    return states


def write_results(states: dict[str, str], options: argparse.Namespace) -> None:
    results = {"stages": states, "measurements": lines_of(options)}
    (options.out / "gpu_check.json").write_text(json.dumps(results, indent=1))


def join_logs(states: dict[str, str], options: argparse.Namespace) -> None:
    """One file of the tests' output and of the logs of stages that did not end well."""
    texts = []
    for log in sorted(path for path in options.out.glob("*.log") if path.name != "logs.log"):
        if log.stem == "test_gpu" or is_bad(states.get(log.stem, "")):
            texts.append(f"==== {log.name}\n{log.read_text(errors='replace')[-100_000:]}\n")
        log.unlink()
    (options.out / "logs.log").write_text("".join(texts))


def is_bad(state: str) -> bool:
    return state != "ok" and not state.startswith("left out")


def print_table(options: argparse.Namespace) -> None:
    for line in lines_of(options):
        if line.keys() & {"images_per_s", "within_2", "tflops", "tb_per_s"}:
            cells = (f"{key[:9]}={short(value)}" for key, value in line.items() if key not in ("stage", "what"))
            print(f"{line['stage'][:7]:8}{line['what'][:52]:53}" + " ".join(cells))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_out = Path(os.environ.get("OUT") or "gpu_out")
    parser.add_argument(
        "--out", type=Path, default=default_out, help="a folder for the results (default $OUT, or gpu_out)"
    )
    parser.add_argument("--stages", default=",".join(STAGES), help=f"some of {','.join(STAGES)} (default all)")
    budget_s = BUDGET_S if CUDA else BUDGET_S * SLOW_CPU
    parser.add_argument("--budget", type=float, default=budget_s, help=f"seconds of all stages (default {budget_s:g})")
    parser.add_argument("--data", type=Path, help="a folder in MURA's layout (default: phantoms)")
    scratch = Path(tempfile.gettempdir()) / "gpu_check"
    parser.add_argument(
        "--scratch", type=Path, default=scratch, help="a folder for shards, runs, caches; kept for the next call"
    )
    parser.add_argument("--tests", default="", help="pytest's -k of stage tests")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    options = parser().parse_args(words)
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
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # stages end with this process
    started = time.perf_counter()
    states = run_stages(names, options)
    join_logs(states, options)
    print(f"\n==== {time.perf_counter() - started:.0f} s in all; " + "; ".join(f"{k}: {v}" for k, v in states.items()))
    print_table(options)
    return int(any(map(is_bad, states.values())))


if __name__ == "__main__":
    sys.exit(main())
