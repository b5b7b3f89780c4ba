"""Run the ranks of one world as processes with an Engine each, and time their turns.

    Fleet(job, ranks) -> play("step") -> Turn: from the first rank's start to the last one's end, what each did inside
    step    a step of the engine         alone  the same step, nothing sent   together  4 bytes instead of each all-reduce
    bare    one all-reduce of the buffer that travels as the gradient; small: of one like the step's small vector
    tiny    one of 4 bytes               evaluation   a forward of one micro-batch as evaluation does it

Ranks may live in network namespaces (networks.py). All clocks are this machine's monotonic one, so that they compare.
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, NamedTuple, Self

from scaling import head_length

from mura_dist.core.errors import RunError
from mura_dist.distributed import environment, processes

_TIMEOUT_S = 120.0
# The same step every time: ranks that did not hear each other would drift apart, and 60 steps on noise end in gradients of inf.
_LEARNING_RATE = 0.0


@dataclass(frozen=True)
class Job:
    """What each rank trains: `micros` micro-batches of `micro_batch` radiographs of `size` px a step. precision: fp32, bf16."""

    architecture: str
    size: int
    micro_batch: int
    micros: int
    precision: str


class Turn(NamedTuple):
    """seconds: from the first rank's start to the last one's end. micros_s: of forward and backward, by rank, then micro-batch;
    own_s: each rank's own seconds. sent_s: of each all-reduce, from the last rank's call to the last one's return."""

    seconds: float
    micros_s: list[list[float]]
    own_s: list[float]
    sent_s: list[float]


class Facts(NamedTuple):
    """Of one step: bytes of the buffer that is all-reduced (its type in words), of the small vector."""

    gradient_bytes: int
    gradient_type: str
    vector_bytes: int
    device: str


class Fleet:
    """Raises RunError where a rank ends, or does not answer."""

    def __init__(self, job: Job, ranks: int, *, spaces: Sequence[str] = (), address: str = "127.0.0.1") -> None:
        self.job, self.ranks, self.spaces, self.address = job, ranks, spaces, address

    def __enter__(self) -> Self:
        context, port = multiprocessing.get_context("spawn"), _free_port()
        self._pipes, self._processes = [], []
        for rank in range(self.ranks):
            parent_end, child_end = context.Pipe()
            space = self.spaces[rank] if self.spaces else ""
            arguments = (rank, self.ranks, (self.address, port), space, self.job, child_end)
            process = context.Process(target=_serve, args=arguments, daemon=True, name=f"rank-{rank}")
            process.start()
            child_end.close()
            self._pipes.append(parent_end)
            self._processes.append(process)
        try:
            self.facts: Facts = self._answers()[0]
        except BaseException as error:
            self.__exit__(error)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(0 if any(error) else 10)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()

    def play(self, what: str) -> Turn:
        for pipe in self._pipes:
            pipe.send(what)
        answers = self._answers()
        starts, ends, micros, calls = zip(*answers, strict=True)
        own = [end - start for start, end in zip(starts, ends, strict=True)]
        sent = [max(end for _, end in ranks) - max(start for start, _ in ranks) for ranks in zip(*calls, strict=True)]
        return Turn(max(ends) - min(starts), list(micros), own, sent)

    def _answers(self) -> list[Any]:
        """Return the answers by rank. Raise RunError with the first rank that exits."""
        answers: dict[int, Any] = {}
        while len(answers) < self.ranks:
            waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = connection.wait(list(waiting), _TIMEOUT_S)
            rank = waiting[ready[0]] if ready else min(waiting.values())
            try:
                if not ready:
                    raise TimeoutError
                answers[rank] = self._pipes[rank].recv()
            except (EOFError, OSError) as error:
                raise RunError(
                    f"rank {rank} of {self.ranks} ended, or did not answer for {_TIMEOUT_S:.0f} s; it says why above, or memory "
                    "ran out: fewer ranks or a smaller --size take less"
                ) from error
        return [answers[rank] for rank in range(self.ranks)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- in a rank's process


def _serve(rank: int, ranks: int, meeting: tuple[str, int], space: str, job: Job, pipe: Any) -> None:
    processes.end_with_parent()
    os.dup2(2, 1)  # stdout is for the result; DeepSpeed greets there
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # a namespace knows no host names, and torch says so for each rank
    if space:
        import networks

        networks.enter(space)
        os.environ["GLOO_SOCKET_IFNAME"] = networks.DEVICE
    for name in environment.LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "MASTER_ADDR": meeting[0],
        "MASTER_PORT": meeting[1],
    }
    os.environ.update({name: str(value) for name, value in variables.items()})
    import torch

    from mura_dist.distributed import process_group

    torch.set_num_threads(max(1, processes.num_processors() // ranks))
    with process_group.join(_TIMEOUT_S) as world:
        player = _Player(job, world)
        pipe.send(player.facts())
        while (what := pipe.recv()) is not None:
            pipe.send(player.play(what))


class _Player:
    """A rank, ready for any of the turns."""

    def __init__(self, job: Job, world: Any) -> None:
        import torch

        from mura_dist.core import config
        from mura_dist.models import densenet
        from mura_dist.training.engine import Engine

        self.job, self.world = job, world
        sizes = {"micro_batch": job.micro_batch, "global_batch": job.micro_batch * job.micros * world.size}
        kwargs = {"shards": "", "run": "", "architecture": job.architecture, "precision": job.precision}
        self.engine = Engine(densenet.build(job.architecture), config.check(kwargs | sizes, "fleet"), world)
        self.batches = [_batch(job, world, index) for index in range(job.micros)]
        self.micro_seconds: list[float] = []
        self.calls: list[tuple[float, float]] = []
        # The gradient itself, or where it travels in another type (DeepSpeed's own word) another buffer.
        self.buffer = self.engine.flat.gradient.to(self.engine._engine.communication_data_type)
        length = head_length(world.size) + self.engine.num_micro_batches + self.engine.statistics.sum.numel()
        self.vector = torch.ones(length, device=world.device)
        self.scalar = torch.ones(1, device=world.device)

    def facts(self) -> Facts:
        kind = str(self.buffer.dtype).removeprefix("torch.")
        return Facts(self.buffer.nbytes, kind, self.vector.nbytes, str(self.world.device.type))

    def play(self, what: str) -> tuple[float, float, list[float], list[tuple[float, float]]]:
        """(start, end, seconds of each micro-batch, start and end of each all-reduce), after a barrier."""
        work: Callable[[], None] = getattr(self, what)
        self.buffer.fill_(1)
        self.micro_seconds, self.calls = [], []
        self.world.barrier()
        self._settle()
        started = time.monotonic()
        work()
        self._settle()
        return started, time.monotonic(), self.micro_seconds, self.calls

    def _settle(self) -> None:
        import torch

        if self.world.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self) -> None:
        with _instead(self._noted):
            self._step()

    def alone(self) -> None:
        """DeepSpeed's whole way of the gradient is left out, and the small vector stays this rank's own."""
        self.engine._engine.allreduce_gradients = lambda *args, **kwargs: None  # hides the method
        try:
            with _instead(lambda real, *args, **kwargs: None):
                self._step()
        finally:
            del self.engine._engine.allreduce_gradients

    def together(self) -> None:
        """Take a step in which each all-reduce sends 4 bytes, so that ranks wait for each other and hardly send."""
        with _instead(lambda real, *args, **kwargs: self._noted(real, self.scalar)):
            self._step()

    def _step(self) -> None:
        result = self.engine.step(self._timed(), _LEARNING_RATE)
        assert result.applied, result
        assert math.isfinite(result.loss)

    def _noted(self, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._settle()
        started = time.monotonic()
        work = real(*args, **kwargs)
        self._settle()
        self.calls.append((started, time.monotonic()))
        return work

    def _timed(self) -> Iterator[Any]:
        """Yield the micro-batches and record the seconds between one and the next."""
        for batch in self.batches:
            started = time.monotonic()
            yield batch
            self._settle()
            self.micro_seconds.append(time.monotonic() - started)

    def bare(self) -> None:
        _all_reduce(self.buffer)

    def small(self) -> None:
        _all_reduce(self.vector)

    def tiny(self) -> None:
        _all_reduce(self.scalar)

    def evaluation(self) -> None:
        import torch

        with self.engine.eval_weights() as network, torch.inference_mode():
            network(self.batches[0].image)


def _all_reduce(vector: Any) -> None:
    import torch.distributed as dist

    dist.all_reduce(vector)


def _batch(job: Job, world: Any, index: int) -> Any:
    """Return a batch of noise. The pixels do not affect the time of a convolution."""
    import torch

    from mura_dist.data.loaders.loader import Batch

    random = torch.Generator().manual_seed(1000 * world.rank + index)
    image = torch.randint(0, 256, (job.micro_batch, 1, job.size, job.size), dtype=torch.uint8, generator=random)
    unit_weights = torch.ones(job.micro_batch, device=world.device)
    label = torch.arange(job.micro_batch, device=world.device) % 2.0
    return Batch(image.to(world.device), label, unit_weights, unit_weights.long(), unit_weights.bool())


@contextlib.contextmanager
def _instead(call: Callable[..., Any]) -> Iterator[None]:
    """Within, an all-reduce is `call` of the real one and its arguments: torch's own, which DeepSpeed calls too."""
    import torch.distributed as dist

    name, real = "all_reduce", dist.all_reduce
    setattr(dist, name, functools.partial(call, real))
    try:
        yield
    finally:
        setattr(dist, name, real)
