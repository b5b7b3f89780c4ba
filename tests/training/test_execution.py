"""Test execution.py, graph.py and the engine on a CPU."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed.runtime.engine as deepspeed_engine
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from helpers.steps import batches, settings
from torch import Tensor, nn

from mura_dist.core.errors import CollectiveRunError
from mura_dist.distributed.process_group import World
from mura_dist.models.densenet import build
from mura_dist.training.checked_network import CheckedNetwork
from mura_dist.training.engine import Engine
from mura_dist.training.flat_parameters import FlatParameters
from mura_dist.training.graph import Recording


@pytest.fixture
def cuda_autocast() -> Iterator[None]:
    """Set the flag of `torch.autocast("cuda")`, which DeepSpeed reads on every device."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", before)


@pytest.mark.parametrize("step", ["eager", "graph"])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
@pytest.mark.usefixtures("cuda_autocast")
def test_deepspeed_does_not_disable_autocast(alone: World, step: str, precision: str, dtype: torch.dtype) -> None:
    engine, dtypes = Engine(build("tiny"), settings(precision=precision, step=step), alone), set()
    engine.model.features.conv0.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    engine.step(batches(1), 1e-3)
    assert dtypes == {dtype}


def test_deepspeed_uses_the_gpu_of_this_rank(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under srun --gpus-per-task=1 each rank sees one GPU with number 0, for any local rank."""
    devices: list[int] = []
    set_device = get_accelerator().set_device
    monkeypatch.setattr(get_accelerator(), "set_device", lambda index: (devices.append(index), set_device(index)))
    monkeypatch.setenv("LOCAL_RANK", "3")
    Engine(build("tiny"), settings(), alone)
    assert devices == [0]


@pytest.mark.parametrize("stage", [0, 1])
def test_deepspeed_never_waits_for_the_device(alone: World, monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    """Its throughput timer would wait twice a step."""
    engine, num_waits = Engine(build("tiny"), settings(zero_stage=stage), alone), 0

    def synchronize(*arguments: object) -> None:
        nonlocal num_waits
        num_waits += 1

    monkeypatch.setattr(get_accelerator(), "synchronize", synchronize)
    for seed in range(4):  # the timer begins to wait in the third step
        engine.step(batches(seed), 1e-3)
    assert num_waits == 0
    assert isinstance(engine._engine, deepspeed_engine.DeepSpeedEngine)
    assert not engine._engine.tput_timer.config.enabled


@pytest.mark.parametrize("step", ["eager", "graph"])
def test_host_reads_from_the_device_once_a_step(alone: World, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Each read makes the host wait for the GPU. dense_block.py reads weights on a CPU only."""
    engine = Engine(build("tiny"), settings(step=step, ema=0.9, clip_norm=1.0), alone)
    engine.step(batches(0), 1e-3)
    reads: list[str] = []

    def spied(name: str) -> Callable[..., object]:
        method = getattr(Tensor, name)

        def read(tensor: Tensor, *arguments: object) -> object:
            caller = Path(sys._getframe(1).f_code.co_filename).name
            if caller != "dense_block.py":
                reads.append(f"{caller}: {name}")
            return method(tensor, *arguments)

        return read

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(Tensor, name, spied(name))
    assert engine.step(batches(1), 1e-3).applied
    assert reads == ["engine.py: tolist"]


def test_views_are_recreated_after_weights_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    flat, num_calls = FlatParameters(build("tiny"), channels_last=True), 0
    views = flat.views

    def counted(vector: Tensor) -> list[Tensor]:
        nonlocal num_calls
        num_calls += 1
        return views(vector)

    monkeypatch.setattr(flat, "views", counted)
    flat.weights.grad = None
    flat.attach()
    assert num_calls == 0
    assert flat.weights.grad is flat.gradient
    flat.weights.data = flat.weights.data.clone()
    flat.attach()
    assert num_calls == 2
    first, starts = flat._parameters[0], flat.weights.data_ptr()
    assert first.data_ptr() == starts


@pytest.mark.parametrize("overrides", [{}, {"precision": "bf16"}, {"zero_stage": 1}, {"ema": 0.9, "optimizer": "sgd"}])
def test_recorded_network_is_bit_identical_to_eager(
    alone: World, capsys: pytest.CaptureFixture[str], overrides: dict[str, object]
) -> None:
    """On a CPU this holds over steps, micro-batches and an evaluation between steps."""
    engines = [Engine(build("tiny", seed=3), settings(step=step, **overrides), alone) for step in ("eager", "graph")]
    for seed in range(3):
        results = [engine.step(batches(seed), 1e-2) for engine in engines]
        assert results[0] == results[1]
        assert results[0].applied
        for engine in engines:
            with engine.eval_weights() as model, torch.no_grad():
                model(batches(9)[0].image)
    assert engines[0].fingerprint() == engines[1].fingerprint()
    assert torch.equal(engines[0].statistics.values, engines[1].statistics.values)
    assert "eager" not in capsys.readouterr().err, "no fall back"


class Flawed:
    """A forward hook that makes a recording fail or differ."""

    def __init__(self, fault: str) -> None:
        self.fault, self.num_calls = fault, 0

    def __call__(self, module: object, inputs: object, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.num_calls += 1
        logit, cells = output
        if self.fault == "raises" and self.num_calls == 1:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        if self.fault == "logit" and self.num_calls == 3:  # 1: eager; 2 and 3: the replays that are compared
            return logit + 0.01, cells
        if self.fault == "gradient" and self.num_calls == 2:
            return logit.detach() + 1.1 * (logit - logit.detach()), cells
        return output


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("raises", "it fails (operation not permitted when stream is capturing)"),
        ("logit", "logits by 0.01 (limit 0.001)"),
        ("gradient", "the gradient by 0.1 of its norm (limit 0.01)"),
    ],
)
def test_differing_recording_falls_back_to_eager(
    alone: World, capsys: pytest.CaptureFixture[str], fault: str, says: str
) -> None:
    engines = [Engine(build("tiny", seed=3), settings(step=step), alone) for step in ("eager", "graph")]
    handle = engines[1].model.register_forward_hook(Flawed(fault))
    for seed in range(2):
        results = [engine.step(batches(seed), 1e-2) for engine in engines]
        assert results[0] == results[1]
    handle.remove()
    assert engines[0].fingerprint() == engines[1].fingerprint()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert says in lines[0]
    assert lines[0].endswith("The run continues with step=eager.")


def test_nonfinite_gradient_prevents_recording(alone: World, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(build("tiny", seed=3), settings(step="graph"), alone)
    with torch.no_grad():
        engine.model.features.conv0.weight[0] = torch.nan
    assert not engine.step(batches(0), 1e-2).applied
    assert "the gradient of the first micro-batch is not finite" in capsys.readouterr().err


def test_out_of_memory_while_recording_is_reported(alone: World) -> None:
    engine = Engine(build("tiny", seed=3), settings(step="graph"), alone)

    def exhausted(module: object, inputs: object, output: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    engine.model.register_forward_hook(exhausted)
    with pytest.raises(CollectiveRunError, match=r"out of memory on rank 0 with micro_batch=4"):
        engine.step(batches(0), 1e-2)


def test_recording_depends_on_shape_and_weight_address() -> None:
    """ZeRO may move the weights, and a graph would read the old address."""
    model = build("tiny", seed=3).train()
    flat = FlatParameters(model, channels_last=True)
    shapes: list[torch.Size] = []

    def network(image: Tensor) -> Tensor:
        shapes.append(image.shape)
        return model(image)[0]

    image = batches(0)[0].image
    recorded = CheckedNetwork(network, lambda image: Recording(network, image), flat, "graph", is_half=False)
    calls = []
    for size in (4, 4, 2, 4, 2):
        recorded(image[:size]).sum().backward()
        calls.append(len(shapes))
        shapes.clear()
    assert calls[0] == calls[2] > 1, "recorded and compared at the first batch of a shape"
    assert calls[1] == calls[3] == calls[4] == 1
    flat.weights.data = flat.weights.data.clone()
    flat.attach()
    recorded(image)
    assert len(shapes) == calls[0]


@pytest.mark.parametrize(("fault", "says"), [("raises", "it fails (no C++ compiler)"), ("logit", "logits by 0.01")])
def test_failing_or_differing_compiled_network_falls_back_to_eager(
    alone: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str, says: str
) -> None:
    """It fails without a compiler, for example."""

    def compiled(model: nn.Module, **options: object) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def forward(image: Tensor) -> tuple[Tensor, Tensor]:
            if fault == "raises":
                raise RuntimeError("no C++ compiler\nmore of it")
            logit, cells = model(image)
            return logit + 0.01, cells

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    engines = [Engine(build("tiny", seed=3), settings(step=step), alone) for step in ("eager", "compile")]
    for seed in range(2):
        results = [engine.step(batches(seed), 1e-2) for engine in engines]
        assert results[0] == results[1]
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("step=compile: ")
    assert says in line
    assert line.endswith("The run continues with step=eager.")
