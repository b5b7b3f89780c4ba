"""Test the engine on one rank against autograd and definitions, and that a skipped step changes nothing."""

import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.commands import run
from helpers.steps import NUM_MICROS, SIZE, batches, settings
from torch import Tensor

from mura_dist.data.loaders.loader import Batch
from mura_dist.distributed.process_group import World
from mura_dist.models.densenet import DenseNet, build
from mura_dist.training import engine as engine_module
from mura_dist.training.batchnorm import RunningStatistics
from mura_dist.training.checked_network import CheckedNetwork
from mura_dist.training.ema import WeightAverage
from mura_dist.training.engine import Engine
from mura_dist.training.flat_parameters import FlatParameters


def by_hand(model: DenseNet, step: list[Batch], smoothing: float = 0.0) -> tuple[float, Tensor]:
    """Return loss and concatenated gradient of sum(weight x BCE) / global batch, by plain autograd."""
    model.train()
    total = torch.zeros(())
    for batch in step:
        logit, _ = model(batch.image)
        target = batch.label * (1 - smoothing) + smoothing / 2
        each = F.binary_cross_entropy_with_logits(logit, target, reduction="none")
        total = total + (batch.weight * each).sum() / (NUM_MICROS * SIZE)
    gradients = torch.autograd.grad(total, list(model.parameters()))
    return total.item(), torch.cat([gradient.flatten() for gradient in gradients])


def weights_of(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def everything(engine: Engine) -> dict[str, Tensor]:
    with engine.eval_weights() as model:
        tensors = {key: value.clone() for key, value in model.state_dict().items()}
    return (
        tensors
        | {f"optimiser.{k}": v.clone() for k, v in engine.optimizer_state.tensors().items()}
        | {key: value.clone() for key, value in engine.state().items()}
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_step_equals_autograd_over_the_global_batch(alone: World, channels_last: bool, smoothing: float) -> None:
    """Loss, gradient norm and SGD's first step equal those of autograd."""
    chosen = settings(optimizer="sgd", channels_last=channels_last, label_smoothing=smoothing)
    engine = Engine(build("tiny", seed=1), chosen, alone)
    before = weights_of(engine.model)
    result = engine.step(batches(1), 0.5)
    loss, gradient = by_hand(build("tiny", seed=1), batches(1), smoothing)
    assert result.applied
    assert not result.nonfinite_micro_batches
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-4)
    torch.testing.assert_close(weights_of(engine.model), before - 0.5 * gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_large_gradient_is_clipped(alone: World, limit: float) -> None:
    engine = Engine(build("tiny", seed=1), settings(optimizer="sgd", clip_norm=limit), alone)
    before = weights_of(engine.model)
    norm = engine.step(batches(1), 1.0).gradient_norm
    moved = (weights_of(engine.model) - before).norm().item()
    assert moved == pytest.approx(min(limit, norm), rel=1e-3)
    assert 0.01 < norm < 1e6


@pytest.mark.parametrize("stage", [0, 1])
def test_deepspeed_does_not_clip(alone: World, stage: int) -> None:
    """DeepSpeed's default is to clip to 1."""
    engine = Engine(build("tiny", seed=1), settings(optimizer="sgd", zero_stage=stage), alone)
    before = weights_of(engine.model)
    heavy = [dataclasses.replace(batch, weight=1000 * batch.weight) for batch in batches(1)]
    norm = engine.step(heavy, 1e-3).gradient_norm
    assert norm > 10
    assert (weights_of(engine.model) - before).norm().item() == pytest.approx(1e-3 * norm, rel=1e-3)


def spoil_stem(calls: list[int], module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
    """Make the first convolution's output of the second micro-batch NaN, so that every BatchNorm sees it."""
    calls.append(1)
    return output * (math.nan if len(calls) == 2 else 1.0)


def test_nonfinite_activations_leave_no_trace(alone: World) -> None:
    """BatchNorm's buffers are reset too: (1 - momentum) x NaN would remain NaN."""
    engines = [Engine(build("tiny", seed=2), settings(), alone) for _ in range(2)]
    for engine in engines:
        engine.step(batches(1), 1e-2)
    calls: list[int] = []
    handle = engines[0].model.features.conv0.register_forward_hook(functools.partial(spoil_stem, calls))
    result = engines[0].step(batches(2), 1e-2)
    handle.remove()
    assert (result.applied, result.nonfinite_micro_batches, len(calls)) == (False, (1,), NUM_MICROS)
    after = [engine.step(batches(3), 1e-2) for engine in engines]
    assert after[0] == after[1]
    assert after[0].applied
    assert same(everything(engines[0]), everything(engines[1]))


def without_samples(batch: Batch) -> Batch:
    """Return the batch as the loader returns it if each of its samples is corrupt."""
    zeros = torch.zeros_like
    return Batch(zeros(batch.image), zeros(batch.label), zeros(batch.weight), batch.row, zeros(batch.mask), SIZE)


@pytest.mark.parametrize("overrides", [{}, {"zero_stage": 1}, {"ema": 0.5, "weight_decay": 0.1}])
@pytest.mark.parametrize("failed", [True, False])
def test_step_without_samples_changes_nothing(alone: World, overrides: dict[str, float], failed: bool) -> None:
    """The same holds if a rank could not read its micro-batches. Weights, moments and BatchNorm's statistics stay."""
    engine, untouched = (Engine(build("tiny", seed=2), settings(**overrides), alone) for _ in range(2))
    for trained_engine in (engine, untouched):
        trained_engine.step(batches(1), 1e-2)
    result = engine.step([] if failed else [without_samples(batch) for batch in batches(2)], 1e-2, read_failed=failed)
    assert (result.applied, result.read_failed, result.nonfinite_micro_batches) == (False, failed, ())
    assert result.has_samples == failed
    assert result.num_corrupt == (0 if failed else NUM_MICROS * SIZE)
    assert engine.step(batches(3), 1e-2) == untouched.step(batches(3), 1e-2)
    assert same(everything(engine), everything(untouched))


def test_micro_batch_without_samples_is_excluded_from_batchnorm(alone: World) -> None:
    """The gradient is that of the other micro-batches, divided by the global batch. The statistics' mean is over the others."""
    first, second, third = batches(1)
    engine = Engine(build("tiny", seed=1), settings(optimizer="sgd"), alone)
    pair = Engine(build("tiny", seed=1), settings(optimizer="sgd", global_batch=2 * SIZE), alone)
    before = weights_of(engine.model)
    result, of_pair = engine.step([first, without_samples(second), third], 0.5), pair.step([first, third], 0.5)
    assert (result.applied, result.has_samples, result.num_corrupt) == (True, True, SIZE)
    assert result.loss == pytest.approx(of_pair.loss * 2 / 3, rel=1e-6)
    torch.testing.assert_close(weights_of(engine.model) - before, (weights_of(pair.model) - before) * 2 / 3)
    assert torch.equal(engine.statistics.values, pair.statistics.values)


@pytest.mark.parametrize("long_s", [0.0, 100.0])
def test_stop_request_abandons_a_long_step(alone: World, monkeypatch: pytest.MonkeyPatch, long_s: float) -> None:
    """It is abandoned between micro-batches without effect. A short step is finished."""
    monkeypatch.setattr(engine_module, "_LONG_S", long_s)
    engine, untouched = (Engine(build("tiny", seed=2), settings(ema=0.5), alone) for _ in range(2))
    before = everything(engine)
    result = engine.step(batches(1), 1e-2, should_stop=lambda: True)
    assert result.stop
    assert result.abandoned == (not result.applied) == (long_s == 0)
    assert same(everything(engine), before) == (long_s == 0)
    if result.abandoned:
        assert engine.step(batches(1), 1e-2) == untouched.step(batches(1), 1e-2)
        assert same(everything(engine), everything(untouched)), "done again, it is what it would have been"


def test_fingerprint_detects_any_changed_value(alone: World) -> None:
    engine = Engine(build("tiny", seed=2), settings(ema=0.5), alone)
    engine.step(batches(1), 1e-2)
    assert engine.average is not None
    fingerprint = engine.fingerprint()
    assert fingerprint[1]
    for vector in (
        engine.flat.weights.data,
        engine.statistics.values,
        engine.average.weights,
        engine.average.statistics,
    ):
        value = vector[5].item()
        vector[5] = math.nextafter(value, math.inf) + 1e-3
        assert engine.fingerprint()[0] != fingerprint[0]
        vector[5] = math.nan
        assert not engine.fingerprint()[1]
        vector[5] = value
        assert engine.fingerprint() == fingerprint


@pytest.mark.parametrize("overrides", [{}, {"ema": 0.9}, {"optimizer": "sgd"}])
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_skipped_step_changes_nothing(alone: World, fault: str, overrides: dict[str, object]) -> None:
    """Weights, optimizer, BatchNorm and moving average are bit-identical, and so is the next step."""
    engines = [Engine(build("tiny", seed=2), settings(**overrides), alone) for _ in range(2)]
    first = [engine.step(batches(1), 1e-2) for engine in engines]
    assert first[0] == first[1]
    before, calls = everything(engines[0]), 0

    def spoil(module: object, inputs: object, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        logit, cells = output
        if calls == 2 and fault == "gradient":
            logit.register_hook(lambda gradient: gradient * math.inf)
        return (logit * math.nan if calls == 2 and fault == "loss" else logit), cells

    handle = engines[0].model.register_forward_hook(spoil)
    result = engines[0].step(batches(2), 1e-2)
    handle.remove()
    assert calls == NUM_MICROS
    assert not result.applied
    assert result.nonfinite_micro_batches == ((1,) if fault == "loss" else ())
    assert same(everything(engines[0]), before)
    after = [engine.step(batches(3), 1e-2) for engine in engines]
    assert after[0] == after[1]
    assert same(everything(engines[0]), everything(engines[1]))
    assert not same(everything(engines[0]), before)


def test_eval_weights_are_the_moving_average(alone: World) -> None:
    """Weights and statistics equal the definition. The trained weights are restored after an evaluation."""
    engine = Engine(build("tiny", seed=3), settings(ema=0.5), alone)
    plain = Engine(build("tiny", seed=3), settings(), alone)
    averaged = weights_of(engine.model)
    for step in range(4):
        for trained_engine in (engine, plain):
            trained_engine.step(batches(step), 1e-2)
        share = 1 - min(0.5, (1 + step) / (10 + step))
        averaged = averaged + share * (weights_of(engine.model) - averaged)
    trained = weights_of(engine.model)
    assert torch.equal(trained, weights_of(plain.model)), "averaging does not change training"
    with engine.eval_weights() as model:
        assert not model.training
        torch.testing.assert_close(weights_of(model), averaged, rtol=1e-5, atol=1e-6)
        eval_weights = {key: value.clone() for key, value in model.state_dict().items() if "running" in key}
    assert torch.equal(weights_of(engine.model), trained)
    assert not torch.allclose(averaged, trained)
    with plain.eval_weights() as model:
        moved = [key for key in eval_weights if not torch.allclose(eval_weights[key], model.state_dict()[key])]
    assert len(moved) > len(eval_weights) / 2, "its statistics are its own"


def test_average_decay_grows_from_the_start() -> None:
    average = WeightAverage(0.999, torch.zeros(1), torch.zeros(1))
    shares = []
    for _ in range(3):
        before = average.weights.item()
        average.update(torch.ones(1), torch.ones(1))
        shares.append((average.weights.item() - before) / (1 - before))
    assert shares == pytest.approx([0.9, 1 - 2 / 11, 1 - 3 / 12], rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_to_fp32(alone: World, precision: str) -> None:
    full = Engine(build("tiny", seed=4), settings(), alone).step(batches(1), 1e-3)
    half = Engine(build("tiny", seed=4), settings(precision=precision), alone).step(
        batches(1), 1e-3, loss_scale=1024.0 if precision == "fp16" else 1.0
    )
    assert half.applied
    assert half.loss == pytest.approx(full.loss, rel=0.02)
    assert half.loss != full.loss
    assert half.gradient_norm == pytest.approx(full.gradient_norm, rel=0.1)


def test_overflowing_fp16_scale_skips_the_step(alone: World) -> None:
    engine = Engine(build("tiny", seed=4), settings(precision="fp16"), alone)
    before = everything(engine)
    result = engine.step(batches(1), 1e-3, loss_scale=2.0**40)
    assert not result.applied
    assert result.nonfinite_micro_batches == (), "the loss is sound"
    assert same(everything(engine), before)


@pytest.mark.nightly(part="training")
def test_compiled_step_is_close_to_eager(alone: World) -> None:
    """Needs a C++ compiler."""
    eager = Engine(build("tiny", seed=5), settings(), alone)
    compiled = Engine(build("tiny", seed=5), settings(compile="default"), alone)
    for seed in range(2):
        a, b = eager.step(batches(seed), 1e-3), compiled.step(batches(seed), 1e-3)
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-3)
    assert a.loss != 0
    assert isinstance(compiled.network, CheckedNetwork)
    assert not compiled.network.fell_back
    torch.testing.assert_close(eager.statistics.values, compiled.statistics.values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("channels_last", [True, False])
def test_flat_parameters_are_views_of_the_model(channels_last: bool) -> None:
    model = build("tiny", seed=6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flat = FlatParameters(model, channels_last=channels_last)
    assert same({key: value.clone() for key, value in model.state_dict().items()}, before)
    number = sum(parameter.numel() for parameter in model.parameters())
    assert int((flat.weights != 0).sum()) <= number <= flat.weights.numel()
    model(torch.zeros(2, 1, 32, 32, dtype=torch.uint8))[0].sum().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    assert flat.gradient.norm() == pytest.approx(gradients.norm().item(), rel=1e-6)
    assert flat.gradient.norm() > 0
    with torch.no_grad():
        flat.weights += 1
    for key, value in model.named_parameters():
        torch.testing.assert_close(value, before[key] + 1)
    convolution = model.features.conv0.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_running_statistics_are_updated_once_a_step_by_the_mean() -> None:
    """They equal the mean over the micro-batches of mean and unbiased variance, with momentum 0.1."""
    model = build("tiny").train()
    norm = model.features.norm0
    statistics = RunningStatistics(model)
    before = statistics.values.clone()
    images = torch.randint(0, 256, (3, 4, 1, 32, 32), dtype=torch.uint8)
    means, variances = [], []
    model.features.conv0.register_forward_hook(
        lambda _, __, read: (means.append(read.mean((0, 2, 3))), variances.append(read.var((0, 2, 3))), None)[-1]
    )
    for image in images:
        model(image)
        statistics.collect()
    statistics.update(statistics.sum / 3)
    statistics.load_into_model(statistics.values)
    torch.testing.assert_close(norm.running_mean, 0.1 * torch.stack(means).mean(0).detach())
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * torch.stack(variances).mean(0).detach())
    assert not torch.equal(before, statistics.values)
    assert norm.num_batches_tracked == 1
    statistics.reset()
    assert not statistics.sum.any()


THREADS = """
import torch
from mura_dist.distributed import process_group
with process_group.join(30):
    big = torch.zeros(400_000)
    big.copy_(torch.ones(400_000))  # as load_state_dict does: threads begin
    tiny = torch.full((400_000,), 1e-20) * torch.full((400_000,), 1e-20)  # 1e-40 is denormal
    print(torch.get_num_threads(), int((tiny != 0).sum()))
"""


def test_all_threads_flush_denormals() -> None:
    """A resumed run starts its threads earlier than a new run, and both must compute the same bits."""
    result = run("python", "-c", THREADS, env={"OMP_NUM_THREADS": "2"})
    assert result.stdout.split() == ["2", "0"], result.stderr


TWICE = """
import torch
from mura_dist.core import config
from mura_dist.data.loaders.loader import Batch
from mura_dist.distributed import process_group
from mura_dist.models.densenet import build
from mura_dist.training.engine import Engine

ones = torch.ones(2)
batch = Batch(torch.zeros(2, 1, 64, 64, dtype=torch.uint8), ones, ones, ones.long(), ones.bool())
sizes = {"shards": "", "run": "", "architecture": "tiny", "precision": "fp32", "global_batch": 2, "micro_batch": 2}
for _ in range(2):
    with process_group.join(30) as ranks:
        print(Engine(build("tiny"), config.check(sizes, "test"), ranks).step([batch], 1e-3).applied)
"""


def test_process_can_train_twice() -> None:
    """A notebook does so. DeepSpeed would use the groups of the first process group in the second."""
    done = run("python", "-c", TWICE)
    assert done.stdout.split() == ["True", "True"], done.stderr
