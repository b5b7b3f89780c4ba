"""Record a network's forward and backward as two CUDA graphs, and replay them with two launches instead of thousands.

    image (B, 1, S, S) -> warm up -> record forward, record backward -> Recording
    image of that shape -> copied into the recording's input -> replay forward -> logit (B,)
        backward of logit -> copied into the recording's input -> replay backward, which adds to the flat gradient

A replay is one autograd node. DeepSpeed's forward and backward wrap it; collectives and optimizer are not recorded.
A CPU has no graphs: a replay calls the network, with the same copies, autograd node and results.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NUM_WARMUPS = 3  # cuDNN and cuBLAS choose algorithms and allocate memory in the first calls, which a recording forbids


class Recording:
    """A recorded network for one shape of micro-batch. `image`, `logit` and `upstream` never move in memory."""

    def __init__(self, network: Callable[[Tensor], Tensor], image: Tensor) -> None:
        """Record `network`: image (B, 1, S, S) uint8 -> logit (B,). Its backward adds to the parameters' gradients in place."""
        self._network, self.logit = network, torch.empty(0)
        self._anchor = torch.zeros((), device=image.device, requires_grad=True)  # makes autograd call the replay
        self.image, self.upstream = image.clone(), torch.zeros(len(image), device=image.device)
        self.replay_forward: Callable[[], None] = self._forward
        self.replay_backward: Callable[[], None] = self._backward
        if image.is_cuda:
            self._warm_up()
            pool = torch.cuda.graph_pool_handle()
            self.replay_forward = _captured(self._forward, pool)
            self.replay_backward = _captured(self._backward, pool)
            # Detached from autograd nodes of the recording's stream, which an eager forward would reuse.
            self.logit = self.logit.detach()

    def __call__(self, image: Tensor) -> Tensor:
        """Replay the network on `image`, of the recorded shape."""
        logit: Tensor = _Replay.apply(self._anchor, image, self)
        return logit

    def _warm_up(self) -> None:
        """Run on a side stream. The autograd nodes are dropped, because they would tie the recording to that stream."""
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
    # thread_local: the loader's threads may pin memory, and NCCL's thread may query events, during the recording.
    # The outer stream: after a failed recording, torch before 2.15 leaves the recording's stream current.
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
