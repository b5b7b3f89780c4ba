"""dense_block.py: torchvision's dense blocks over one buffer are torchvision's, forward and backward."""

import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import DenseNet as TorchvisionDenseNet

from mura_dist.models import densenet

CASES = [("tiny", 2, 64), ("tiny", 3, 75), ("tiny", 5, 97), ("tiny", 1, 128)]
NIGHTLY = pytest.mark.nightly(part="training")
LARGE = ("densenet121", 2, 70)


def images(batch: int, size: int, seed: int = 0) -> Tensor:
    """Shades, not noise: neighbouring cells are alike, as in a radiograph. uint8 (batch, 1, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 1, 9, 9, generator=generator) * 200
    shades = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (shades + torch.rand(shades.shape, generator=generator) * 55).to(torch.uint8)


def normalised(image: Tensor, dtype: torch.dtype) -> Tensor:
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (densenet.IMAGENET_MEAN, densenet.IMAGENET_STD))
    return (image.to(dtype) - mean.to(dtype)) * (1 / deviation).to(dtype)


def pair(architecture: str, change: Callable[[nn.BatchNorm2d], None]) -> tuple[densenet.DenseNet, TorchvisionDenseNet]:
    """Our network and torchvision's own, of the same weights and statistics, in training mode."""
    ours = densenet.build(architecture, seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for module in ours.modules():
            if isinstance(module, nn.BatchNorm2d):
                change(module)
    growth, blocks, stem = densenet.ARCHITECTURES[architecture]
    theirs = TorchvisionDenseNet(growth, blocks, stem, num_classes=1)
    theirs.load_state_dict(ours.state_dict())
    return ours.train(), theirs.train()


def as_born(norm: nn.BatchNorm2d) -> None:
    """Weight 1, bias 0."""


def any_sign(norm: nn.BatchNorm2d) -> None:
    norm.weight.normal_(0.3, 0.7)
    norm.bias.normal_(0, 0.5)


def nearly_dead(norm: nn.BatchNorm2d) -> None:
    """As pretrained networks have them: some weights tiny or 0, biases that shut a channel or keep it open."""
    any_sign(norm)
    norm.weight[::3] *= 1e-9
    norm.weight[1::4] = 0


def gradients(network: nn.Module, logit: Tensor) -> dict[str, Tensor]:
    pull = torch.linspace(-1, 1.5, len(logit), dtype=logit.dtype)
    (logit * pull).sum().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def same_step(ours: nn.Module, theirs: nn.Module, image: torch.Tensor) -> None:
    """Logits and every gradient within 1e-9, in fp64."""
    logit, wanted = ours(image)[0], theirs(normalised(image, torch.float64))[:, 0]
    torch.testing.assert_close(logit, wanted, rtol=1e-9, atol=1e-9)
    found, expected = gradients(ours, logit), gradients(theirs, wanted)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        limit = 1e-9 * (1 + gradient.abs().max().item())
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=limit, msg=name)


@pytest.mark.parametrize(
    ("architecture", "batch", "size", "change"),
    [*((*case, change) for case in CASES for change in (as_born, any_sign, nearly_dead)), (*LARGE, nearly_dead)],
)
def test_a_step_is_torchvisions(architecture: str, batch: int, size: int, change: Callable) -> None:
    ours, theirs = (network.double() for network in pair(architecture, change))
    same_step(ours, theirs, images(batch, size))
    for name, value in theirs.state_dict().items():  # running statistics and counters among them
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("architecture", "batch", "size", "training"),
    [*((*case, training) for case in CASES for training in (True, False)), (*LARGE, True)],
)
def test_the_plain_layers_are_torchvisions(
    monkeypatch: pytest.MonkeyPatch, architecture: str, batch: int, size: int, training: bool
) -> None:
    """The pool before the transition's convolution, the head before the mean: as evaluation, export, torch.compile, fp16 run."""
    monkeypatch.setattr(densenet, "_uses_dense_block", lambda device: False)
    ours, theirs = (network.double().train(training) for network in pair(architecture, any_sign))
    same_step(ours, theirs, images(batch, size))


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
def test_running_statistics_are_written_in_place(momentum: float) -> None:
    ours, theirs = pair("tiny", any_sign)
    flat = torch.cat([buffer.flatten() for name, buffer in ours.named_buffers() if "running" in name])
    norms = [module for module in ours.modules() if isinstance(module, nn.BatchNorm2d)]
    parts = iter(flat.split([len(norm.bias) for norm in norms for _ in range(2)]))
    for norm in norms:
        norm.running_mean, norm.running_var, norm.momentum = next(parts), next(parts), momentum
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    for seed in range(2):
        image = images(2, 64, seed)
        ours(image), theirs(normalised(image, torch.float32))
    wanted = torch.cat([buffer.flatten() for name, buffer in theirs.named_buffers() if "running" in name])
    torch.testing.assert_close(flat, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_add_to_those_that_are_there() -> None:
    """Parameters and gradients as views of one vector, as the engine keeps them."""
    ours, _ = pair("tiny", any_sign)
    vector = torch.zeros(sum(parameter.numel() for parameter in ours.parameters()))
    pieces = vector.split([parameter.numel() for parameter in ours.parameters()])
    for parameter, piece in zip(ours.parameters(), pieces, strict=True):
        parameter.grad = piece.view_as(parameter)
    gradients(ours, ours(images(2, 64))[0])
    once = vector.clone()
    gradients(ours, ours(images(2, 64))[0])
    assert once.abs().max() > 0
    torch.testing.assert_close(vector, 2 * once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_input_gives_the_same_bits(dtype: torch.dtype) -> None:
    def once() -> list[Tensor]:
        ours, _ = pair("tiny", any_sign)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            logit, cells = ours(images(3, 96))
        return [logit.detach(), cells.detach(), *gradients(ours, logit).values()]

    first, second = once(), once()
    assert all(torch.isfinite(tensor).all() for tensor in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        (torch.bfloat16, as_born),
        (torch.bfloat16, nearly_dead),
        (torch.float16, any_sign),
        pytest.param(torch.bfloat16, any_sign, marks=NIGHTLY),
        pytest.param(torch.float16, as_born, marks=NIGHTLY),
        pytest.param(torch.float16, nearly_dead, marks=NIGHTLY),
    ],
)
def test_half_precision_is_as_near_to_the_truth_as_torchvisions(dtype: torch.dtype, change: Callable) -> None:
    """Ratio of the two gradients' distances from float64's, the median of 9 batches; torchvision's own distance is the yardstick.

    The median, for single batches stray: of 36 batches in float16 on a processor with AMX the ratio was 0.37 to 4.95, its
    quartiles 0.81 and 1.21, its median 0.97 to 0.99.
    """

    def away(seed: int) -> tuple[float, ...]:
        image = images(4, 128, seed)
        double, (ours, theirs) = pair("tiny", change)[1].double(), pair("tiny", change)
        truth = gradients(double, double(normalised(image, torch.float64))[:, 0])
        with torch.autocast("cpu", dtype=dtype):
            logits = ours(image)[0], theirs(normalised(image, torch.float32))[:, 0].float()
        whole, *found = (
            torch.cat([gradient.flatten().double() for gradient in each.values()])
            for each in (truth, *(gradients(*both) for both in zip((ours, theirs), logits, strict=True)))
        )
        return tuple(distance(each, whole) for each in found)

    ratios = [ours / theirs for ours, theirs in (away(seed) for seed in range(9))]
    assert statistics.median(ratios) <= 1.25


@pytest.mark.slow
def test_autocast_keeps_little_for_the_backward_pass() -> None:
    """The buffer once and each layer's bottleneck, not a copy for each layer: under a quarter of what torchvision keeps."""
    image = images(8, 128)

    def kept_bytes(forward: Callable[[], object]) -> int:
        storages: dict[int, int] = {}

        def seen(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            forward()
        return sum(storages.values())

    ours, theirs = pair("densenet121", as_born)
    weights = 2 * 4 * sum(parameter.numel() for parameter in ours.parameters())
    x = normalised(image, torch.float32)
    assert kept_bytes(lambda: ours(image)) < kept_bytes(lambda: theirs(x)) / 4 + weights


def test_one_value_a_channel_is_no_batch() -> None:
    with pytest.raises(ValueError, match="more than 1 value"):
        densenet.build("tiny").train()(images(1, 32))
