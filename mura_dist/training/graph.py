"""Record a network's forward and backward as two CUDA graphs, and replay them: two launches in place of thousands.

    image (B, 1, S, S) of a new shape -> eager, once -> warm up -> record forward, record backward -> compare with eager
    image of a known shape            -> copied into the recording's input -> replay forward -> logit (B,)
        backward of logit             -> copied into the recording's input -> replay backward, which adds to the flat gradient

A replay is one node of autograd, so DeepSpeed's forward and backward stay around it, and collectives and optimizer outside.
On a CPU, which has no graphs, a replay calls the network: the same copies, checks and autograd node with the same results.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mura_dist.training.flat_parameters import Flat

NUM_WARMUPS = 3  # cuDNN and cuBLAS choose and allocate what they need in the first calls; recording forbids that
# What a replay may differ from eager by: the largest logit difference, and the gradient's relative to its norm. The kernels are
# the same; the order of their atomic additions is not. In half precision such roundings grow through 169 layers.
LOGIT_TOLERANCE = {False: 1e-3, True: 5e-2}  # by is_half
GRADIENT_TOLERANCE = {False: 1e-2, True: 0.3}


class RecordingError(Exception):
    """The network cannot be recorded, or a replay differs from it; the text says why."""


class RecordedNetwork:
    """A network that replays recordings, one for each shape of micro-batch: image (B, 1, S, S) uint8 -> logit (B,)."""

    def __init__(self, network: Callable[[Tensor], Tensor], flat: Flat, *, is_half: bool) -> None:
        self._network, self._flat, self._is_half = network, flat, is_half
        self._recordings: dict[tuple[torch.Size, int], Recording] = {}  # by shape, and where the weights lie
        self._anchor = torch.zeros((), device=flat.weights.device, requires_grad=True)  # makes autograd call the replay

    @property
    def recordings(self) -> list["Recording"]:
        return list(self._recordings.values())

    def __call__(self, image: Tensor) -> Tensor:
        """Raises RecordingError at the first micro-batch of a shape; the gradient is then as it was."""
        key = (image.shape, self._flat.weights.data_ptr())
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._record(image)
        logit: Tensor = _Replay.apply(self._anchor, image, recording)
        return logit

    def _record(self, image: Tensor) -> "Recording":
        before = self._flat.gradient.clone()
        upstream = torch.linspace(-1, 1, len(image), device=image.device)  # any gradient of the logits
        try:
            wanted = self._gradient_of(self._network, image, upstream)
            if not math.isfinite(float(wanted[1].norm())):
                raise RecordingError("the gradient of the first micro-batch is not finite")
            recording = Recording(self._network, image)
            for _ in range(2):  # the second replay sees what the first left behind
                replayed = self._gradient_of(
                    lambda image: _Replay.apply(self._anchor, image, recording), image, upstream
                )
                self._compare(replayed, wanted)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):  # the end of the recording failed over it
                raise error.__context__ from error
            raise RecordingError(f"recording failed ({str(error).splitlines()[0][:160]})") from error
        finally:
            self._flat.gradient.copy_(before)
        return recording

    def _compare(self, replayed: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
        """Raise RecordingError where logits or gradient of a replay are too far from those wanted."""
        worst = float((replayed[0] - wanted[0]).abs().max())
        relative = float((replayed[1] - wanted[1]).norm() / wanted[1].norm())
        limits = LOGIT_TOLERANCE[self._is_half], GRADIENT_TOLERANCE[self._is_half]
        if not (worst <= limits[0] and relative <= limits[1]):  # so written, NaN is too far
            raise RecordingError(
                f"its first step differs from eager's: logits by {worst:.2g} (limit {limits[0]:g}), "
                f"the gradient by {relative:.2g} of its norm (limit {limits[1]:g})"
            )

    def _gradient_of(
        self, network: Callable[[Tensor], Tensor], image: Tensor, upstream: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(logits, the flat gradient) of a micro-batch."""
        self._flat.gradient.zero_()
        with torch.enable_grad():
            logit = network(image)
            torch.autograd.backward(logit, upstream.to(logit.dtype))
        return logit.detach().clone(), self._flat.gradient.clone()


class Recording:
    """Forward and backward for one shape, each on memory of its own: `image`, `logit`, `upstream` stay where they are."""

    def __init__(self, network: Callable[[Tensor], Tensor], image: Tensor) -> None:
        self._network, self.logit = network, torch.empty(0)
        self.image, self.upstream = image.clone(), torch.zeros(len(image), device=image.device)
        self.replay_forward: Callable[[], None] = self._forward
        self.replay_backward: Callable[[], None] = self._backward
        if image.is_cuda:
            self._warm_up()
            pool = torch.cuda.graph_pool_handle()
            self.replay_forward = _captured(self._forward, pool)
            self.replay_backward = _captured(self._backward, pool)
            # Without autograd's nodes, which are of the recording's stream: an eager forward would take up those of the weights.
            self.logit = self.logit.detach()

    def _warm_up(self) -> None:
        """Run on a stream of its own, and keep none of autograd's nodes, which would tie the recording to that stream."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARMUPS):
                self._forward()
                self._backward()
        torch.cuda.current_stream().wait_stream(stream)
        self.logit = torch.empty(0)

    def _forward(self) -> None:
        with torch.enable_grad():
            self.logit = self._network(self.image)

    def _backward(self) -> None:
        torch.autograd.backward(self.logit, self.upstream)


def _captured(call: Callable[[], None], pool: Any) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    # thread_local: meanwhile the loader's threads pin memory and NCCL's looks at events, which is no concern of this graph.
    # The outer stream: a recording that fails leaves its own current in torch before 2.15.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
    ):
        call()
    return graph.replay


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, image: Tensor, recording: Recording) -> Tensor:
        ctx.recording = recording
        recording.image.copy_(image)
        recording.replay_forward()
        return recording.logit.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None, None]:
        ctx.recording.upstream.copy_(upstream)
        ctx.recording.replay_backward()
        return None, None, None
